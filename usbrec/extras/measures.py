"""Measures of the search: the summary's facts, the candidates, and the choice among them.

Each is a mean over dialogues of what their evaluation rows record at the first searched turn.
Rows that were not searched are left out, and so are rows without a gold profile where one is
needed. What a choice can gain depends on how well its judge tells a dialogue's target from other
films, which `judge_ranked` tries on the recommender's best films; it alone asks a model.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist, fmean

from usbrec.chat import Ranks, Row
from usbrec.crs.agents import Messages, Roles, Votes, announce, card_prompt, internal_judge_prompt
from usbrec.crs.dialogue import Examples, add_turn
from usbrec.crs.evaluation import EvaluationOptions, is_target
from usbrec.crs.wishes import card, fit, read_profile
from usbrec.extras.agreement import SUMMARY_TOKENS
from usbrec.extras.intervals import UNIT, auc, mean_interval

JUDGES = ("internal judge", "judge with cards")
RULE = "rule"  # the fit with the true wishes
STEPS = 1000  # of the sum in `hit_rate`


def summaries(methods: Mapping[str, Sequence[Row]], seed: int) -> Row:
    """Return `summary_facts` per searched method, or once, as "all", where all are equal."""
    found = {name: summary_facts(rows, seed) for name, rows in methods.items()}
    known = {name: x for name, x in found.items() if x["exact"]["n"]}
    figures = list(known.values())
    return {"all": figures[0]} if known and figures.count(figures[0]) == len(known) else known


def summary_facts(rows: Sequence[Row], seed: int) -> Row:
    """Return the precision and recall of the summaries' facts, and the share of exact summaries.

    A fact is right if the gold profile has it too: attitude, kind and value. Precision is over all
    facts that are told, recall over all that are true. An exact summary tells the true facts and no
    other.
    """
    rows = [row for row in rows if row["searches"] and row["searches"][0]["facts"]]
    groups, counts = [x["dialog_id"] for x in rows], [x["searches"][0]["facts"] for x in rows]
    found = {}
    for name, base in (("precision", "told"), ("recall", "true")):
        shares = [x["right"] / x[base] if x[base] else None for x in counts]
        found[name] = mean_interval(shares, seed, [x[base] for x in counts], groups)
    exact = [float(x["right"] == x["told"] == x["true"]) for x in counts]
    return {**found, "exact": mean_interval(exact, seed, groups=groups)}


def search_figures(rows: Sequence[Row], area: float | None, seed: int) -> Row:
    """Return the means of a searched method's `choice_figures`, each with its interval."""
    rows = [row for row in rows if row["searches"]]
    groups, searches = [row["dialog_id"] for row in rows], [row["searches"][0] for row in rows]
    figures = [choice_figures(search, area) for search in searches]
    most = float(max(len(search["candidates"]) for search in searches))
    limits = {"different_titles": (0.0, most), "gain": (-1.0, 1.0), "gain_predicted": (-1.0, 1.0)}
    return {
        name: mean_interval([x[name] for x in figures], seed, None, groups, limits.get(name, UNIT))
        for name in figures[0]
    }


def choice_figures(search: Row, area: float | None) -> dict[str, float | None]:
    """Return what a search's candidates held and what its choice made of them.

    different_titles    titles among the candidates, the first of each reply
    pass@N              whether a target is among them: Recall@1 of the best by target
    best_by_rule        Recall@1 of the candidate that fits the true wishes best, ties to the first
    chosen              Recall@1 of the search's choice, which the internal judge decides
    random              Recall@1 of a random candidate, in expectation
    gain                chosen less random
    gain_predicted      `hit_rate` of a judge with this `area` (AUC within a dialogue) less random

    How much a search gains follows from pass@N and the judge's ROC curve: ROC-n-Reroll, ICLR 2026.
    """
    candidates = search["candidates"]
    found, fits = [float(x["found"]) for x in candidates], [x["fit"] for x in candidates]
    hits, misses = ({x["title"] for x in candidates if x["found"] is y} for y in (True, False))
    chosen, random = found[search["best"]], sum(found) / len(found)
    return {
        "different_titles": float(len((hits | misses) - {None})),
        "pass@N": max(found),
        "best_by_rule": None if None in fits else found[fits.index(max(fits))],
        "chosen": chosen,
        "random": random,
        "gain": chosen - random,
        "gain_predicted": None if area is None else hit_rate(area, len(hits), len(misses)) - random,
    }


@cache
def hit_rate(area: float, hits: int, misses: int) -> float:
    """Return how often a judge's favourite among so many different films is a hit.

    The judge is binormal: it scores hits by N(d, 1) and misses by N(0, 1), where
    d = sqrt(2) * Phi^-1(area) makes its AUC `area`. So of one hit and one miss the hit wins in
    `area`; of one and two in 1/3 if the area is 1/2. The mean is over the quantiles of the best
    miss.
    """
    if not hits or not misses:
        return float(hits > 0)
    normal = NormalDist()
    d = 2**0.5 * normal.inv_cdf(min(max(area, 1e-9), 1 - 1e-9))
    best = [normal.inv_cdf(((i + 0.5) / STEPS) ** (1 / misses)) for i in range(STEPS)]
    return fmean(1 - normal.cdf(x - d) ** hits for x in best)


# --- the judge within a dialogue --------------------------------------------------------------


def judge_ranked(roles: Roles, examples: Examples, options: EvaluationOptions) -> list[Row]:
    """Return per example its summary and the films that the recommender ranks highest.

    {"dialog_id", "turn_id", "profile", "films": [{"title", "found", "scores": {scorer: 0 to 2}}]}

    After the dialogue each film is recommended in the same words (`announce`). Of the scorers, each
    judge knows the summary alone and is read in closed form; "rule" is the film's `fit` with the
    true wishes (None without a gold profile), "rule on the summary" with those of the summary. A
    language model that cannot rank gives no films.
    """
    catalogue = roles.catalogue
    if not examples or not isinstance(roles.recommender.llm, Ranks):
        return [{"dialog_id": x.dialog_id, "turn_id": x.turn_id, "films": []} for x in examples]
    histories = [x.history for x in examples]
    ranked = roles.likeliest(histories, options.ranked_titles)
    profiles = roles.complete(roles.summaries(histories, SUMMARY_TOKENS, [0] * len(histories)))
    rows: list[Row] = []
    cases: list[tuple[Row, Messages, Messages]] = []  # the scores of a film, and both prompts
    for x, profile, best in zip(examples, profiles, ranked, strict=True):
        told, films = {RULE: x.profile, "rule on the summary": profile}, []
        wishes = {k: read_profile(text, catalogue) for k, text in told.items() if text is not None}
        for item in best:
            hit = is_target(catalogue, (item,), x.items)
            scores: Row = {k: fit(item, wishes[k]) if k in wishes else None for k in told}
            films.append({"title": item.title, "found": hit, "scores": scores})
            tried = add_turn(x.history, "recommender", announce(item.title))
            by_card = card_prompt(tried[-1].text, card(item), profile)
            cases.append((scores, internal_judge_prompt(tried, profile), by_card))
        ids = {"dialog_id": x.dialog_id, "turn_id": x.turn_id}
        rows.append({**ids, "profile": profile, "films": films})
    for number, name in enumerate(JUDGES):
        prompts = [asked[number] for _, *asked in cases]
        marks = roles.judge(prompts, Votes(0, options.vote_temperature), [0] * len(cases))
        for (scores, *_), mark in zip(cases, marks, strict=True):
            scores[name] = mark.score
    return rows


def within_dialogues(rows: Sequence[Row], seed: int) -> Row:
    """Return {scorer: {"all", "broken"}}: the mean AUC within a dialogue, with its interval.

    "all" is the AUC of the target against all other films, "broken" against those that break a
    wish of the gold profile. A dialogue without both kinds of film does not count.
    """
    groups, kinds = [row["dialog_id"] for row in rows], {"all": (None, 0, 1, 2), "broken": (0, 1)}

    def area(films: Sequence[Row], name: str, grades: tuple[int | None, ...]) -> float | None:
        read = [(x["scores"][name], x) for x in films if x["scores"][name] is not None]
        misses = [y for y, x in read if not x["found"] and x["scores"][RULE] in grades]
        return auc([y for y, x in read if x["found"]], misses)

    found: Row = {}
    for name in next((row["films"][0]["scores"] for row in rows if row["films"]), ()):
        areas = {kind: [area(row["films"], name, x) for row in rows] for kind, x in kinds.items()}
        found[name] = {kind: mean_interval(x, seed, groups=groups) for kind, x in areas.items()}
    return found
