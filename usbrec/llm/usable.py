"""Filters of training trees: unusable dialogues and pairs are dropped and counted."""

from collections.abc import Callable, Mapping, Sequence

from usbrec.llm.loss import Sft
from usbrec.llm.packing import Tree, tree_paths


def longest_path(tree: Tree) -> int:
    """Return the number of tokens of the tree's longest conversation."""
    return max(map(len, tree_paths(tree)), default=0)


def usable_dialogues(trees: Sequence[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Return the usable dialogues, and the number dropped per reason."""
    reasons: dict[str, Callable[[Tree], bool]] = {
        "dropped as too long": lambda tree: longest_path(tree) > max_length,
        "dropped with nothing to learn": lambda tree: Sft().size(tree) <= 0,
    }
    return drop(trees, reasons)


def usable_pairs(trees: Sequence[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Return the usable pairs, and the number dropped per reason.

    A response of fewer than two tokens is empty: it has nothing before its end-of-turn token.
    """
    reasons: dict[str, Callable[[Tree], bool]] = {
        "dropped as too long": lambda tree: longest_path(tree) > max_length,
        "dropped for an empty response": lambda tree: (
            not tree.branches[0].ids or any(len(branch.ids) < 2 for branch in tree.branches[1:])
        ),
        "dropped for equal responses": lambda tree: tree.branches[1] == tree.branches[2],
    }
    return drop(trees, reasons)


def drop(
    trees: Sequence[Tree], reasons: Mapping[str, Callable[[Tree], bool]]
) -> tuple[list[Tree], dict[str, int]]:
    """Return the trees to which no reason applies, and the number dropped per reason."""
    kept, dropped = [], dict.fromkeys(reasons, 0)
    for tree in trees:
        reason = next((name for name, holds in reasons.items() if holds(tree)), None)
        if reason is None:
            kept.append(tree)
        else:
            dropped[reason] += 1
    return kept, dropped
