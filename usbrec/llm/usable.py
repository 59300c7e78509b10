"""Filters of training trees: unusable dialogues and pairs are dropped and counted."""

from collections import Counter
from collections.abc import Callable, Sequence

from usbrec.llm.loss import Sft
from usbrec.llm.packing import Tree, tree_paths


def dialogue_fault(tree: Tree) -> str:
    """Return why a dialogue cannot be learned from, or ""."""
    return "" if Sft().size(tree) > 0 else "dropped with nothing to learn"


def pair_fault(tree: Tree) -> str:
    """Return why a pair cannot be learned from, or "".

    A response of fewer than two tokens is empty: it has nothing before its end-of-turn token.
    """
    prompt, chosen, rejected = tree.branches
    if not prompt.ids or len(chosen.ids) < 2 or len(rejected.ids) < 2:
        return "dropped for an empty response"
    return "dropped for equal responses" if chosen == rejected else ""


def usable(
    trees: Sequence[Tree], max_length: int, fault: Callable[[Tree], str]
) -> tuple[list[Tree], dict[str, int]]:
    """Return the trees without a fault, and the number dropped per reason.

    A conversation of more than `max_length` tokens is dropped before `fault` is asked.
    """
    kept, dropped = [], Counter[str]()
    for tree in trees:
        too_long = any(len(path) > max_length for path in tree_paths(tree))
        if reason := "dropped as too long" if too_long else fault(tree):
            dropped[reason] += 1
        else:
            kept.append(tree)
    return kept, dict(sorted(dropped.items()))
