"""Packed rows: no token sees another branch, another tree, or what comes after it."""

import pytest
import torch
from conftest import TINY, random_decoder

from usbrec.chat import Message
from usbrec.llm.fast.kernels import windows
from usbrec.llm.model import Stretch
from usbrec.llm.packing import Branch, Tree, lesson_tree, pack, pack_rows, tree_paths, visibility
from usbrec.llm.tokenizer import ChatTokenizer


def plain_layout(tree):
    """Give every branch that is learned from a copy of its whole path; the others become empty.

    Branches keep their numbers and their supervised tokens. For comparison with the packed layout.
    """
    paths = []
    branches = []
    for branch in tree.branches:
        past, zeros = ([], []) if branch.parent is None else paths[branch.parent]
        past, zeros = past[: branch.shared], zeros[: branch.shared]
        ids, weights = past + list(branch.ids), zeros + list(branch.weights)
        paths.append((ids, [0.0] * len(ids)))
        branches.append(Branch(ids, weights) if any(branch.weights) else Branch([], []))
    return Tree(branches)


def random_trees(seed):
    """Three trees of one to six branches of one to eight tokens.

    A branch continues all of its parent's path or a beginning of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def tree():
        lengths, branches = [], []
        for parent in [None, *(draw(0, n) for n in range(1, draw(1, 7)))]:
            ids = [draw(0, 128) for _ in range(draw(1, 9))]
            shared = None if parent is None or draw(0, 2) else draw(1, lengths[parent] + 1)
            past = 0 if parent is None else shared or lengths[parent]
            lengths.append(past + len(ids))
            branches.append(Branch(ids, [1] * len(ids), parent, shared))
        return Tree(branches)

    return [tree() for _ in range(3)]


def path_of(tree, number):
    """The (branch, token) of a branch's whole path, one by one from the root."""
    branch = tree.branches[number]
    past = [] if branch.parent is None else path_of(tree, branch.parent)[: branch.shared]
    return past + [(number, i) for i in range(len(branch.ids))]


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
        path = path_of(trees[t], b)
        sees = t == changed[0] and changed[1:] in path[: path.index((b, i)) + 1]
        assert torch.equal(before[index], after[index]) == (not sees), (t, b, i)


def test_chats_of_a_lesson_share_what_they_begin_with_up_to_what_is_learned(default_model_folder):
    """Each chat's path is its own ids, and its weighted tokens are in its own branch."""
    tokenizer = ChatTokenizer.from_folder(default_model_folder)
    system, hi, bye = Message("system", "Be brief."), Message("user", "Hi, you"), "So long"
    said, learned = Message("assistant", "Hello."), Message("assistant", "Hello.", 1.0)
    lesson = [
        (system, hi, learned),
        (system, hi, said, Message("user", bye), learned),  # after the first's learned reply
        (system, Message("user", "Hi, all"), learned),  # up to the middle of a line
        (system, hi, learned),  # equal to the first, and learned once more
        (Message("system", "Else."), hi, learned),
    ]
    tree, rows = lesson_tree(tokenizer, lesson), [tokenizer.render(chat) for chat in lesson]
    paths = tree_paths(tree)
    ids = [i for branch in tree.branches for i in branch.ids]
    assert [[ids[i] for i in path] for path in paths] == [row for row, _ in rows]
    told = [[x for x in branch.weights if x] for branch in tree.branches]
    assert told == [[x for x in weights if x] for _, weights in rows] and all(told)
    header = tokenizer.render([system, Message("user", "")])[0]
    assert [branch.parent for branch in tree.branches] == [None, 0, 0, 0, 0]
    shared = [branch.shared for branch in tree.branches]
    assert shared[1] == len(rows[0][0]) and len(header) - 2 < shared[2] < shared[3]
    assert shared[3] == len(tokenizer.prompt(lesson[0][:2]))
    other = lesson_tree(
        tokenizer, [lesson[0], (system, hi, learned, Message("user", bye), learned)]
    )
    assert other.branches[1].shared == shared[3]  # what is learned twice has two losses


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
