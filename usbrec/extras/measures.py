"""Measures of the judges and of the search, each with its interval over dialogues.

`judge_agreement` compares each gold reply with a rewriting of it, title and attributes, for another
film. The film is drawn by its count among the training labels and is never a target. The external
judge sees either reply with an explanation: the row's own (rewritten likewise) where the dataset
has one, else the recommender's explanation of that reply. The internal judge sees a summary
generated from the history alone, the judge with cards also the card of the reply's first title. A
reply whose gold title cannot be found or replaced is skipped with the reason. `count_wins` compares
PODCS' pairs with the gold titles, by rule.

What a search's choice can gain depends on how well its judge tells a dialogue's target from other
films. `judge_ranked` measures this on the films that the recommender ranks highest. Only these two
ask a model. The measures of the search are means of what the evaluation's rows record at the first
searched turn: the summary's facts, the candidates, and the choice among them. Rows that were not
searched are left out, and so are rows without a gold profile where one is needed.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist, fmean

import numpy as np

from usbrec.chat import Messages, Ranks, Row, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import EXPLAIN, Roles, Votes
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Example, Examples, Popularity, add_turn
from usbrec.crs.evaluation import EvaluationOptions, is_target
from usbrec.crs.lessons import gold_items
from usbrec.crs.wishes import UNKNOWN, card, fit, read_profile, rewrite_all
from usbrec.extras.intervals import UNIT, auc, auc_interval, mean_interval
from usbrec.options import seed_for

SUMMARY_TOKENS = 48
REPLIES = ("gold", "other")  # the two replies of a row
CHECKED = {"external": "external judge", "internal": "internal judge", "cards": "judge with cards"}
RULE = "rule"  # the fit with the true wishes
STEPS = 1000  # of the sum in `hit_rate`


# --- the judges against the truth -------------------------------------------------------------


def count_wins(catalogue: Catalogue, examples: Examples, records: Sequence[Row]) -> dict[str, int]:
    """Return the number of pairs whose chosen side is better, equal or worse by rule alone.

    A side's grade is that of its first title against the gold titles (`Catalogue.grade`). The judge
    has no part in it, so it shows what the judge's preferences are worth.
    """
    wins = {"better": 0, "equal": 0, "worse": 0}
    for example, record in zip(examples, records, strict=True):
        for pair in record["pairs"]:
            texts = (pair[side][0]["content"] for side in ("chosen", "rejected"))
            first, second = (catalogue.grade_of(text, example.items) for text in texts)
            wins["better" if first > second else "worse" if first < second else "equal"] += 1
    return wins


def sample_means(
    catalogue: Catalogue, examples: Examples, records: Sequence[Row], seed: int
) -> list[Row]:
    """Return two means over PODCS' samples: the judge's score, and the share that names a target.

    Where the first grows from round to round and the second does not, only the judge sees a gain.
    """
    pairs = zip(examples, records, strict=True)
    drawn = [(example, x) for example, record in pairs for x in record["samples"]]
    groups = [example.dialog_id for example, _ in drawn]
    hits = [float(catalogue.mentions(x["reply"], example.items)) for example, x in drawn]
    scores = mean_interval([x["score"] for _, x in drawn], seed, None, groups, (0.0, 2.0))
    return [scores, mean_interval(hits, seed, None, groups)]


def judge_agreement(
    roles: Roles, examples: Examples, popularity: Popularity, seed: int, options: EvaluationOptions
) -> list[Row]:
    """Return one row per example: {"external": [gold, other], "internal": [gold, other], ...}.

    A score that could not be read is None. A skipped row has only its ids and the reason,
    "skipped".
    """
    keys = [seed_for(seed, "agreement", x.dialog_id, x.turn_id) for x in examples]
    pairs = zip(examples, keys, strict=True)
    rows = [contrast(roles.catalogue, x, popularity, key) for x, key in pairs]
    used = [x for x in zip(examples, keys, rows, strict=True) if x[2]["skipped"] is None]
    seeds = [seed_for(key, "summary") for _, key, _ in used]
    asked = roles.summaries([x.history for x, _, _ in used], SUMMARY_TOKENS, seeds)
    plain = Sampling(options.max_new_tokens, options.temperature)
    for x, key, row in used:
        if not row["explanations"]:
            heard = [add_turn(said, "seeker", EXPLAIN) for said in dialogues_of(x, row)]
            seeds = [seed_for(key, "explain", row[side]) for side in REPLIES]
            asked += roles.recommender.requests(map(agents.recommender_prompt, heard), plain, seeds)
    texts = iter(roles.complete(asked))
    for _, _, row in used:
        row["profile"] = next(texts)
    prompts: dict[str, list[Messages]] = {name: [] for name in CHECKED}
    for x, _, row in used:
        told, both = row.pop("explanations") or [next(texts), next(texts)], dialogues_of(x, row)
        prompts["external"] += map(agents.external_judge_prompt, both, told, [x.items] * 2)
        prompts["internal"] += [agents.internal_judge_prompt(said, row["profile"]) for said in both]
        for reply in (row[side] for side in REPLIES):
            shown = next(map(card, roles.catalogue.first(reply)), UNKNOWN)
            prompts["cards"].append(agents.card_prompt(reply, shown, row["profile"]))
    for place, name in enumerate(CHECKED):
        seeds = [seed_for(key, "judge", 2 * place + i) for _, key, _ in used for i in range(2)]
        judge = roles.external if name == "external" else None
        scores = iter(roles.judge(prompts[name], options, seeds, judge))
        for _, _, row in used:
            row[name] = [next(scores).score for _ in REPLIES]
    return rows


def dialogues_of(example: Example, row: Row) -> list[Dialogue]:
    """Return the dialogue with the gold reply, and with the other one."""
    return [add_turn(example.history, "recommender", row[side]) for side in REPLIES]


def contrast(catalogue: Catalogue, example: Example, popularity: Popularity, key: int) -> Row:
    """Return {"gold", "other", "titles", "explanations"}: a row with the gold reply and another.

    The other is the gold reply rewritten for the films `titles`. They are as many as gold titles
    and none of them, drawn by training count. `explanations` are of both replies, or none where the
    dataset has none. "skipped" is the reason why a row has no replies, or None.
    """
    row = {"dialog_id": example.dialog_id, "turn_id": example.turn_id, "skipped": None}
    if len(golds := gold_items(example, catalogue)) < len(example.items):
        return {**row, "skipped": "a gold title is not in the catalogue, or ambiguous"}
    known = [(catalogue.get(title), count) for title, count in sorted(popularity.items())]
    pool = [(item, count) for item, count in known if item and item not in golds]
    if len(pool) < len(golds):
        return {**row, "skipped": "too few other titles to draw from"}
    share = np.array([count for _, count in pool], float)
    generator = np.random.default_rng(seed_for(key, "others"))
    places = generator.choice(len(pool), len(golds), replace=False, p=share / share.sum())
    films = [pool[place][0] for place in places]
    gold, told = example.response, example.explanation
    pairs = list(zip(golds, films, strict=True))
    other, why = (rewrite_all(text, pairs) for text in (gold, told or ""))
    if other == gold or catalogue.mentions(other, example.items):
        return {**row, "skipped": "a gold title in the reply could not be replaced"}
    titles, explanations = [film.title for film in films], [] if told is None else [told, why]
    return {**row, "gold": gold, "other": other, "titles": titles, "explanations": explanations}


def agreement(rows: Sequence[Row], seed: int) -> Row:
    """Return {"auc", "low", "high", "n", "means", "unparsed"} per judge, and the skipped rows.

    `means` are the mean scores of the gold replies and of the others: an order can be right where a
    judge gives all replies much the same. `unparsed` counts the rows with a score that could not be
    read, which are left out.
    """
    used = [row for row in rows if row["skipped"] is None]
    result: Row = {"skipped": len(rows) - len(used)}
    for judge_name in CHECKED:
        read = [row[judge_name] for row in used if None not in row[judge_name]]
        area = auc_interval([gold for gold, _ in read], [other for _, other in read], seed)
        area["means"] = [fmean(x[i] for x in read) if read else None for i in range(len(REPLIES))]
        result[judge_name] = {**area, "unparsed": len(used) - len(read)}
    return result


# --- the judge within a dialogue --------------------------------------------------------------


def judge_ranked(roles: Roles, examples: Examples, o: EvaluationOptions, memory: bool) -> list[Row]:
    """Return per example its summary and the films that the recommender ranks highest.

    {"dialog_id", "turn_id", "profile", "films": [{"title", "found", "scores": {scorer: 0 to 2}}]}

    After the dialogue each film is recommended in the same words (`announce`). Of the scorers, each
    judge knows the summary alone and is read in closed form; "rule" is the film's `fit` with the
    true wishes (None without a gold profile), "rule on the summary" with those of the summary. The
    judge from memory is one of them if `memory`. A language model that cannot rank gives no films.
    """
    catalogue = roles.catalogue
    if not examples or not isinstance(roles.recommender.llm, Ranks):
        return [{"dialog_id": x.dialog_id, "turn_id": x.turn_id, "films": []} for x in examples]
    histories = [x.history for x in examples]
    ranked = roles.likeliest(histories, o.ranked_titles)
    profiles = roles.complete(roles.summaries(histories, SUMMARY_TOKENS, [0] * len(histories)))
    rows: list[Row] = []
    cases: list[tuple[Row, Item, str, Dialogue]] = []  # the scores of a film, profile, dialogue
    for x, profile, best in zip(examples, profiles, ranked, strict=True):
        known, films = {RULE: x.profile, "rule on the summary": profile}, []
        wishes = {k: read_profile(text, catalogue) for k, text in known.items() if text is not None}
        for item, _ in best:
            hit = is_target(catalogue, (item,), x.items)
            scores: Row = {k: fit(item, wishes[k]) if k in wishes else None for k in known}
            films.append({"title": item.title, "found": hit, "scores": scores})
            tried = add_turn(x.history, "recommender", agents.announce(item.title))
            cases.append((scores, item, profile, tried))
        ids = {"dialog_id": x.dialog_id, "turn_id": x.turn_id}
        rows.append({**ids, "profile": profile, "films": films})
    said, told = [x[-1].text for *_, x in cases], [profile for *_, profile, _ in cases]
    shown = {"judge with cards": [card(item) for _, item, *_ in cases]}
    shown |= {"judge from memory": roles.remember(said, SUMMARY_TOKENS)} if memory else {}
    asked = {"internal judge": [agents.internal_judge_prompt(x, y) for *_, y, x in cases]}
    asked |= {name: list(map(agents.card_prompt, said, x, told)) for name, x in shown.items()}
    for name, prompts in asked.items():
        marks = roles.judge(prompts, Votes(0, o.vote_temperature), [0] * len(cases))
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


# --- the search -------------------------------------------------------------------------------


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
    found = {name: [x[name] for x in figures] for name in figures[0]}
    return {k: mean_interval(x, seed, None, groups, limits.get(k, UNIT)) for k, x in found.items()}


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
