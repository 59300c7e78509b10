"""Recommenders whose order is known: can the measures tell the good from the bad?

    python benchmarks/known.py [--run-dir RUN] [--limit 100] [--seed N]

Six recommenders answer the same dialogues of `valid`, from the best to the worst:

    gold           the dataset's own reply
    kindred film   the same, rewritten for a film of grade 1 (`Catalogue.grade`)
    other film     the same, rewritten for a film of grade 0
    invented film  the same with a title that no film has
    no film        a reply that recommends nothing
    empty          nothing at all

The films are drawn as for the simulator's lessons (`Suggestions.draw`), the dialogues are not among
the lessons. A dialogue counts if it has all six replies. Each reply is scored, 0 to 2, by

    iEval                    the external judge, as the report asks it: the recommender explains
                             the reply first, though it is not its own
    given explanation        the external judge, who reads the row's own explanation, rewritten like
                             the reply; "no film" explains nothing, "empty" says nothing
    internal judge           knows a summary of the dialogue alone; no explanation
    judge with cards         the same with the facts of the reply's first title
    rule on the summary      the fit of that title's card with the summary; no judge
    rule grade               the grade of that title against the target; no judge

The first table has the means, the second how often the better of two neighbours scores higher in a
dialogue, ties half. "in order" is the share of bootstrap draws of dialogues in which the means of
all six fall strictly; "films in order" is that of the first three.

Rows are in known/ in the run folder: the same command goes on from there. The figures are kept
beside them as known/NAME.json, without a sentence of the data.
"""

import json
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from contest import show
from sweep import held_out, tell_end

import infer
from usbrec import loading, runs
from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Sampling
from usbrec.crs.agents import Roles, external_judge_prompt
from usbrec.crs.dialogue import Example, Examples, add_turn
from usbrec.crs.evaluation import EvaluationOptions
from usbrec.crs.lessons import FILMLESS, Suggestion, Suggestions, popularity_of
from usbrec.crs.ses import Node, SearchOptions, score_nodes
from usbrec.crs.wishes import fit, read_profile
from usbrec.extras.intervals import mean_interval
from usbrec.extras.measures import SUMMARY_TOKENS
from usbrec.extras.report import interval
from usbrec.llm.training import digest
from usbrec.options import Parser, UserError, add_flags, from_flags, seed_for
from usbrec.parallel import run_together
from usbrec.runs import Results, Row, run_chunks
from usbrec.settings import PRESETS

ORDER = ("gold", "kindred film", "other film", "invented film", "no film", "empty")  # best first
FILMS = 3  # the first of them, which name a film
JUDGES = {
    "internal judge": SearchOptions(),
    "judge with cards": SearchOptions(**PRESETS["ses_cards"]),
}
SCORERS = ("iEval", "given explanation", *JUDGES, "rule on the summary", "rule grade")
DRAWS = 1_000
LIMITS = (0.0, 2.0)  # of a score
SHOWN = "run-dir limit data data-dir recommender simulator judge model device seed chunk-size"
Scores = dict[str, float | None]  # by scorer


# --- replies and scores -----------------------------------------------------------------------


def replies_of(draws: Suggestions, example: Example, key: int) -> list[Suggestion]:
    """Return the replies of ORDER with their explanations; none if one of them is missing."""
    made = draws.draw(example, key)
    named = {x.score: x for x in made[:-1]}  # the last names no film
    if len(named) < FILMS:
        return []
    generator = np.random.default_rng(seed_for(key, "no film"))
    reply, why = map(str, generator.choice(FILMLESS, 2))
    invented = draws.invented(example, generator)
    lesser = [(invented, named[2].explanation), (reply, why), ("", "")]
    return [named[2], named[1], named[0], *(Suggestion(*each, 0) for each in lesser)]


def score_chunk(roles: Roles, draws: Suggestions, seed: int, chunk: Examples) -> list[Row]:
    """Return one row per dialogue: the summary, and the replies of ORDER with their scores.

    A dialogue without all six has no replies. The draws of its six are those of one key.
    """
    keys = [seed_for(seed, "known", x.dialog_id, x.turn_id) for x in chunk]
    found = [replies_of(draws, x, key) for x, key in zip(chunk, keys, strict=True)]
    heard = [x.history for x, own in zip(chunk, found, strict=True) if own]
    profiles = iter(roles.complete(roles.summaries(heard, SUMMARY_TOKENS, [0] * len(heard))))
    rows: list[Row] = []
    told: list[tuple[Example, int, str, Suggestion, Scores]] = []
    for x, key, own in zip(chunk, keys, found, strict=True):
        profile = next(profiles) if own else None
        replies = {}
        for name, each in zip(ORDER, own, strict=False):
            scores: Scores = {}
            replies[name] = {"reply": each.reply, "explanation": each.explanation, "scores": scores}
            told.append((x, key, profile or "", each, scores))
        ids = {"dialog_id": x.dialog_id, "turn_id": x.turn_id}
        rows.append({**ids, "profile": profile, "replies": replies})
    score_replies(roles, told)
    return rows


def score_replies(
    roles: Roles, told: Sequence[tuple[Example, int, str, Suggestion, Scores]]
) -> None:
    """Set the scores of replies: (example, key, summary, reply, its scores) each."""
    o, films = EvaluationOptions(), roles.catalogue
    plain = Sampling(o.max_new_tokens, o.temperature)
    talks = [add_turn(x.history, "recommender", each.reply) for x, _, _, each, _ in told]
    targets, keys = [x.items for x, *_ in told], [key for _, key, *_ in told]
    explained = roles.explain_and_judge(talks, targets, keys, plain, o)
    pairs = zip(talks, told, strict=True)
    prompts = [external_judge_prompt(d, x[3].explanation, x[0].items) for d, x in pairs]
    seeds = [seed_for(key, "judge") for key in keys]
    given = roles.judge(prompts, o, seeds, roles.external)
    searched: dict[str, list[Node]] = {}
    for name, judge in JUDGES.items():
        searched[name] = [Node(d, x[2], 0) for d, x in zip(talks, told, strict=True)]
        score_nodes(roles, searched[name], judge)
    for i, (x, _, profile, each, scores) in enumerate(told):
        facts = read_profile(profile, films)
        scores["iEval"], scores["given explanation"] = explained[i][1].score, given[i].score
        scores |= {name: nodes[i].score.score for name, nodes in searched.items()}
        fits = [fit(item, facts) for item in films.first(each.reply)]
        scores["rule on the summary"] = float(min(fits, default=0))
        scores["rule grade"] = float(films.grade_of(each.reply, x.items))


def score_all(
    recommender: Recommender, draws: Suggestions, asked: Examples, facts: Row, folder: Path
) -> tuple[list[Row], str]:
    """Return the rows of the dialogues, and the name of their file, after all that decided them."""
    roles, o = recommender.roles, recommender.options
    own = {**facts, "seed": o.seed, "chunk-size": o.chunk_size, "dialogues": digest(asked)}
    own |= {"judges": {name: asdict(x) for name, x in JUDGES.items()}}
    own |= {"eval": asdict(EvaluationOptions()), "catalogue": digest(roles.catalogue)}
    own["films"] = digest([*draws.pool, *draws.shares.tolist()])
    name = f"valid-{digest([json.dumps(own, sort_keys=True)])[:16]}"
    path = folder / f"{name}.jsonl"
    results = Results(path, o.chunk_size, "known", own, recommender.engines)
    return run_chunks(results, asked, partial(score_chunk, roles, draws, o.seed)), name


# --- figures ----------------------------------------------------------------------------------


def measure(rows: Sequence[Row], seed: int) -> Row:
    """Return the figures of every scorer in JSON's types.

    {"dialogues", "skipped", "scorers": {scorer: {"means", "unparsed", "pairs", "in_order",
    "films_in_order"}}}
    """
    used = [row["replies"] for row in rows if row["replies"]]
    found: Row = {"dialogues": len(used), "skipped": len(rows) - len(used), "scorers": {}}
    for scorer in SCORERS:
        scores = {name: [x[name]["scores"][scorer] for x in used] for name in ORDER}
        pairs = {f"{a} > {b}": wins(scores[a], scores[b]) for a, b in pairwise(ORDER)}
        found["scorers"][scorer] = {
            "means": {name: mean_interval(x, seed, limits=LIMITS) for name, x in scores.items()},
            "unparsed": {name: share_unread(x) for name, x in scores.items()},
            "pairs": {name: mean_interval(x, seed) for name, x in pairs.items()},
            "in_order": share_in_order([*scores.values()], seed),
            "films_in_order": share_in_order([*scores.values()][:FILMS], seed),
        }
    return found


def wins(better: Sequence[float | None], worse: Sequence[float | None]) -> list[float | None]:
    """Return 1 where the better one scores higher, 1/2 for a tie, 0, or None without a score."""
    pairs = zip(better, worse, strict=True)
    return [None if a is None or b is None else (a > b) + (a == b) / 2 for a, b in pairs]


def share_unread(scores: Sequence[float | None]) -> float | None:
    """Return the share of scores that could not be read."""
    return sum(x is None for x in scores) / len(scores) if scores else None


def share_in_order(scores: Sequence[Sequence[float | None]], seed: int) -> float | None:
    """Return the share of DRAWS draws of dialogues in which each mean is above the next.

    `scores` has a list per recommender, best first. A score that could not be read enters no mean.
    """
    values = np.array(scores, float)  # (recommenders, dialogues); None becomes NaN
    n = values.shape[1]
    if n == 0:
        return None
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    read = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # a draw without a score has no mean, and no order
        means = (counts @ np.where(read, values, 0).T) / (counts @ read.T)
    return float((means[:, :-1] > means[:, 1:]).all(1).mean())


# --- the tables -------------------------------------------------------------------------------


def show_all(found: Mapping[str, Any]) -> None:
    """Print the means, then the pairs."""
    print(f"{found['dialogues']} dialogues, {found['skipped']} skipped\n")
    means, pairs = [], []
    for name, own in found["scorers"].items():
        unread = [x for x in own["unparsed"].values() if x is not None]
        share = f"{sum(unread) / len(unread):.1%}" if unread else ""
        means.append([name, *map(interval, own["means"].values()), share])
        shares = (own["in_order"], own["films_in_order"])
        shown = ["" if x is None else f"{x:.3f}" for x in shares]
        pairs.append([name, *map(interval, own["pairs"].values()), *shown])
    show(means, ["mean score, 0 to 2", *ORDER, "unparsed"])
    print()
    heads = [f"{a} > {b}" for a, b in pairwise(ORDER)]
    show(pairs, ["the better one scores higher", *heads, "in order", "films in order"])


# --- the command ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: how many dialogues, and those flags of infer.py that say who judges."""
    parser = Parser(SHOWN, prog="known.py", description=__doc__, usage="known.py [FLAGS]")
    parser.add_argument("--limit", type=int, default=100, help="dialogues, 0 for all (default 100)")
    parser.add_argument("--data", help="sample, redial, opendialkg or a folder (or the run's)")
    parser.add_argument("--data-dir", help="the folder of a downloaded dataset")
    parser.add_argument("--run-dir", type=Path, help="a run of train.py (default: the newest)")
    parser.add_argument("--recommender", help="explains: an adapter, a model, URL#MODEL, or none")
    parser.add_argument("--simulator", help="the same, which sums up and judges")
    told = "the same, as the external judge (default: the simulator)"
    parser.add_argument("--judge", default=SUPPRESS, help=told)
    add_flags(parser, loading.ModelOptions)
    add_flags(parser, ReplyOptions, skip=("ses", "rank", "rank_tokens"))
    parser.set_defaults(verbose=False)
    return parser


def measure_known(arguments: Sequence[str] | None) -> None:
    """Score the replies, print the tables, and keep the figures."""
    flags = build_parser().parse_args(arguments)
    if flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    setup, seed = infer.set_up(flags), from_flags(ReplyOptions, flags).seed
    asked = held_out(setup, flags.limit, seed_for(seed, "known"))
    recommender = infer.assemble(setup, flags)
    films = recommender.roles.catalogue
    draws = Suggestions(films, popularity_of(setup.rows("train"), films))
    folder = setup.folder / "known"
    rows, name = score_all(recommender, draws, asked, setup.facts(), folder)
    found = {"seed": seed, "limit": flags.limit, **measure(rows, seed_for(seed, "known"))}
    show_all(found)
    runs.write_json(folder / f"{name}.json", found)
    tell_end(recommender, folder / f"{name}.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("known.py", lambda: measure_known(arguments))


if __name__ == "__main__":
    sys.exit(main())
