"""Measures of the search: the summary's facts, the candidates, and the choice among them.

Each is a mean over dialogues of what their evaluation rows record at the first searched turn.
Rows that were not searched are left out, and so are rows without a gold profile where one is
needed. Nothing here asks a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from usbrec.crs.evaluation import EvalRow
from usbrec.crs.intervals import mean_interval


def summaries(methods: Mapping[str, Sequence[EvalRow]], seed: int) -> dict[str, Any]:
    """Return `summary_facts` per searched method, or once, as "all", if they had the same."""
    firsts = {name: [row.searches[:1] for row in rows] for name, rows in methods.items()}
    known = {name: x for name, x in firsts.items() if any(y and y[0]["facts"] for y in x)}
    told = [[first[0]["profile"] if first else None for first in x] for x in known.values()]
    if told and all(profiles == told[0] for profiles in told):
        return {"all": summary_facts(methods[next(iter(known))], seed)}
    return {name: summary_facts(methods[name], seed) for name in known}


def summary_facts(rows: Sequence[EvalRow], seed: int) -> dict[str, Any]:
    """Return the precision and recall of the summaries' facts, and the share of exact summaries.

    A fact is right if the gold profile has it too: attitude, kind and value. Precision is over all
    facts that are told, recall over all that are true. An exact summary tells the true facts and no
    other.
    """
    rows = [row for row in rows if row.searches and row.searches[0]["facts"]]
    groups, counts = [row.dialog_id for row in rows], [row.searches[0]["facts"] for row in rows]
    found = {}
    for name, base in (("precision", "told"), ("recall", "true")):
        shares = [x["right"] / x[base] if x[base] else None for x in counts]
        found[name] = mean_interval(shares, seed, [x[base] for x in counts], groups)
    exact = [float(x["right"] == x["told"] == x["true"]) for x in counts]
    return {**found, "exact": mean_interval(exact, seed, groups=groups)}


def search_figures(rows: Sequence[EvalRow], seed: int) -> dict[str, Any]:
    """Return a searched method's means over dialogues, each with its interval.

    different_titles    titles among a dialogue's candidates, the first of each reply
    pass@N              whether a target is among them: Recall@1 of the best by target
    best_by_rule        Recall@1 of the candidate that fits the true wishes best, ties to the first
    chosen              Recall@1 of the search's choice, which the internal judge decides
    random              Recall@1 of a random candidate, in expectation
    """
    rows = [row for row in rows if row.searches]
    searches, groups = [row.searches[0] for row in rows], [row.dialog_id for row in rows]
    tried = [search["candidates"] for search in searches]
    found = [[float(x["found"]) for x in candidates] for candidates in tried]
    fits = [[x["fit"] for x in candidates] for candidates in tried]
    titles = [float(len({x["title"] for x in candidates} - {None})) for candidates in tried]
    shares: dict[str, list[float | None]] = {
        "pass@N": [max(x) for x in found],
        "best_by_rule": [
            None if None in fit else x[fit.index(max(fit))]
            for x, fit in zip(found, fits, strict=True)
        ],
        "chosen": [x[search["best"]] for x, search in zip(found, searches, strict=True)],
        "random": [sum(x) / len(x) for x in found],
    }
    most = (0.0, float(max(map(len, tried), default=1)))
    return {
        "different_titles": mean_interval(titles, seed, groups=groups, limits=most),
        **{name: mean_interval(x, seed, groups=groups) for name, x in shares.items()},
    }
