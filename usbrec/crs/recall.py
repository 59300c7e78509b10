"""Recall of the ranked catalogue: how often a gold title is among the K best, beside two baselines.

A film is ranked by the probability that the recommender's reply begins with `announce(title)`: one
phrase for all, whose full stop also tells "Heat" from "Heat (1995)". Copy-last guesses the titles
of the dialogue, newest first; most-popular the training labels, most frequent first. Labels are
split into those that the dialogue has already (repeated) and new ones, as in report.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import Guesses, copied, gold_labels, popular
from usbrec.crs.report import interval, recall

CUTS = (1, 10, 50)


def announce(title: str) -> str:
    """Return the beginning of a reply that recommends the title."""
    return f"I recommend {title}."


def ranked_recall(
    catalogue: Catalogue,
    examples: Sequence[Example],
    ranked: Sequence[Sequence[str]],
    popularity: Mapping[str, int],
    seed: int,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return {method: {K: `recall` at K}} for each K of CUTS that the rankings, best first, reach.

    As in iEvaLM the mean is over labels; intervals draw whole dialogues.
    """
    groups = [example.dialog_id for example in examples]
    blank = [gold_labels(catalogue, example, ()) for example in examples]
    golds = [[set(catalogue.named(label["title"])) for label in row] for row in blank]
    cuts = [k for k in CUTS if k <= max(map(len, ranked))]
    methods: dict[str, Sequence[Guesses]] = {
        "ranked": [[catalogue.named(title) for title in titles] for titles in ranked],
        "copy-last": [copied(catalogue, example) for example in examples],
        "most-popular": [popular(catalogue, popularity)] * len(examples),
    }
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, guesses in methods.items():
        found[name] = {}
        for k in cuts:
            labels = [
                [{**x, "found": any(set(guess) <= gold for guess in row[:k])}
                 for x, gold in zip(titles, targets, strict=True)]
                for titles, targets, row in zip(blank, golds, guesses, strict=True)
            ]  # fmt: skip
            found[name][k] = recall(labels, groups, seed)
    return found


def format_recall(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a line a method and K: over all labels, repeated ones and new ones."""
    columns = ("recall@1", "recall@1_repeated", "recall@1_new")
    lines = [f"{'Recall':<18}" + "".join(f"{name:<30}" for name in ("all", "repeated", "new"))]
    for name, cuts in found.items():
        for k, values in cuts.items():
            cells = "".join(f"{interval(values[column]):<30}" for column in columns)
            lines.append(f"{f'{name} @{k}':<18}{cells}")
    return "\n".join(line.rstrip() for line in lines)
