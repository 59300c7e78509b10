"""Packed rows: no token sees another branch, another tree, or what comes after it."""

import pytest
import torch
from conftest import TINY, random_decoder

from usbrec.llm.fast.kernels import windows
from usbrec.llm.model import Stretch
from usbrec.llm.packing import Branch, Tree, pack, pack_rows, visibility


def plain_layout(tree):
    """Give every branch that is learned from a copy of its whole path; the others become empty.

    Branches keep their numbers and their supervised tokens. For comparison with the packed layout.
    """
    paths = []
    branches = []
    for branch in tree.branches:
        past, zeros = ([], []) if branch.parent is None else paths[branch.parent]
        ids, weights = past + list(branch.ids), zeros + list(branch.weights)
        paths.append((ids, [0.0] * len(ids)))
        branches.append(Branch(ids, weights) if any(branch.weights) else Branch([], []))
    return Tree(branches)


def random_trees(seed):
    """Three trees of one to six branches of one to eight tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    return [
        Tree(
            [
                Branch(ids := [draw(0, 128) for _ in range(draw(1, 9))], [1] * len(ids), parent)
                for parent in [None, *(draw(0, n) for n in range(1, draw(1, 7)))]
            ]
        )
        for _ in range(3)
    ]


def descends(tree, branch, ancestor):
    while branch is not None and branch != ancestor:
        branch = tree.branches[branch].parent
    return branch == ancestor


@pytest.mark.parametrize("seed", range(6))
def test_a_changed_token_reaches_those_that_continue_it_and_nobody_else(tiny_model, seed):
    """Every hidden state outside the changed token's future keeps every bit; the rest change."""
    trees = random_trees(seed)
    places = [(t, b, i) for t, tree in enumerate(trees) for b, branch in enumerate(tree.branches)
              for i in range(len(branch.ids))]  # fmt: skip
    changed = places[
        int(torch.randint(len(places), (1,), generator=torch.Generator().manual_seed(seed)))
    ]
    row = pack(trees, tiny_model)
    other_ids = row.input_ids.clone()
    other_ids[places.index(changed)] = (other_ids[places.index(changed)] + 1) % 128
    with torch.no_grad():
        before = tiny_model(row.input_ids, row.position_ids, row.attention)
        after = tiny_model(other_ids, row.position_ids, row.attention)
    for index, (t, b, i) in enumerate(places):
        sees = t == changed[0] and descends(trees[t], b, changed[1])
        sees = sees and (b != changed[1] or i >= changed[2])
        assert torch.equal(before[index], after[index]) == (not sees), (t, b, i)


def stretch(tree):
    """A tree alone in its row."""
    return Stretch(torch.arange(len(tree)), visibility(tree))


def test_a_window_holds_the_keys_that_it_sees_alone():
    """Two conversations in one tree: the second one's window has no column for the first.

    In a tree of prompt and two branches the second branch's window skips the first branch.
    """
    tree = Tree([Branch([1] * 128, [0] * 128), Branch([2] * 128, [0] * 128)])
    (start, stop, keys, hidden), second = windows([stretch(tree)])
    assert (start, stop, keys.tolist()) == (0, 128, [*range(128)])
    assert (*second[:2], second[2].tolist()) == (128, 256, [*range(128, 256)])
    assert torch.equal(hidden == 0, torch.ones(128, 128).tril().bool())
    parts = [Branch([1] * 128, [0] * 128, parent) for parent in (None, 0, 0)]
    _, _, keys, _ = windows([stretch(Tree(parts))])[2]
    assert keys.tolist() == [*range(128), *range(256, 384)]


def test_rows_are_filled_longest_first():
    trees = [Tree([Branch([1] * n, [0] * n)]) for n in (4, 6, 4, 6, 12)]
    assert [[len(tree) for tree in row] for row in pack_rows(trees, 10)] == [[12], [6, 4], [6, 4]]


def test_an_empty_branch_is_passed_over():
    tree = Tree([Branch([1, 2], [0, 0]), Branch([], [], 0), Branch([3], [1], 1)])
    row = pack([tree, Tree([Branch([], [])])], random_decoder(TINY))
    assert row.position_ids.tolist() == [0, 1, 2]
    labels = row.label_positions, row.targets, row.segment_ids
    assert [label.tolist() for label in labels] == [[1], [3], [2]]
    assert row.num_segments == 4


def test_the_plain_layout_copies_paths_and_keeps_branch_numbers():
    """Prompt 1 2, chosen 3, rejected 4 5 (its first token unlearned)."""
    tree = Tree([Branch([1, 2], [0, 0]), Branch([3], [1], 0), Branch([4, 5], [0, 1], 0)])
    plain = plain_layout(tree)
    assert [list(branch.ids) for branch in plain.branches] == [[], [1, 2, 3], [1, 2, 4, 5]]
    assert [list(branch.weights) for branch in plain.branches] == [[], [0, 0, 1], [0, 0, 0, 1]]
    assert {branch.parent for branch in plain.branches} == {None}
