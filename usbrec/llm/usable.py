"""Filters of training trees: unusable dialogues and pairs are dropped and counted."""

from collections.abc import Callable, Mapping, Sequence

from usbrec.llm.loss import Sft
from usbrec.llm.packing import Tree, tree_paths

Reason = Callable[[Tree], bool]


def usable_dialogues(trees: Sequence[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Return the usable dialogues, and the number dropped per reason."""
    reasons = {"dropped with nothing to learn": lambda tree: Sft().size(tree) <= 0}
    return drop(trees, max_length, reasons)


def usable_pairs(trees: Sequence[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Return the usable pairs, and the number dropped per reason.

    A response of fewer than two tokens is empty: it has nothing before its end-of-turn token.
    """
    reasons: dict[str, Reason] = {
        "dropped for an empty response": lambda tree: (
            not tree.branches[0].ids or any(len(branch.ids) < 2 for branch in tree.branches[1:])
        ),
        "dropped for equal responses": lambda tree: tree.branches[1] == tree.branches[2],
    }
    return drop(trees, max_length, reasons)


def drop(
    trees: Sequence[Tree], max_length: int, reasons: Mapping[str, Reason]
) -> tuple[list[Tree], dict[str, int]]:
    """Return the trees to which no reason applies, and the number dropped per reason.

    The first reason is a conversation of more than `max_length` tokens.
    """
    kept, dropped = [], dict.fromkeys(("dropped as too long", *reasons), 0)
    for tree in trees:
        found = [name for name, holds in reasons.items() if holds(tree)]
        if any(len(path) > max_length for path in tree_paths(tree)):
            dropped["dropped as too long"] += 1
        elif found:
            dropped[found[0]] += 1
        else:
            kept.append(tree)
    return kept, dropped
