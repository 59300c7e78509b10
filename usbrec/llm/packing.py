"""Packed rows: chats that begin alike as a tree of branches, many trees in one row.

A preference pair is three branches, [prompt | chosen | rejected]: both responses see the prompt and
not each other, and the prompt is computed once. A chat with loss on several turns is a single
branch. Many trees share one row without padding:

    tree 0: prompt        chosen  rejected     tree 1: a chat
    ids     p0 p1 p2 p3   c0 c1   r0 r1 r2             d0 d1 d2 d3
    pos      0  1  2  3    4  5    4  5  6              0  1  2  3      (along each branch)
    seen    own beginning  p+own   p+own               own beginning

Each branch attends to its own path and to nothing else, so loss and gradients are those of padded
rows, one for each path, to rounding.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from usbrec.chat import Lesson
from usbrec.llm.model import Decoder, Stretch
from usbrec.llm.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Branch:
    """A run of tokens that continues branch number `parent` of its tree (None: a root).

    Before it come the first `shared` tokens of the parent's path (None: all), from the root on.
    `weights[i]` multiplies the loss of predicting `ids[i]`; a token of weight 0 is not predicted.
    """

    ids: Sequence[int]
    weights: Sequence[float]
    parent: int | None = None
    shared: int | None = None


@dataclass(frozen=True)
class Tree:
    """Branches of one conversation; parents come before their children."""

    branches: Sequence[Branch]

    def __len__(self) -> int:
        """The number of tokens, each counted once."""
        return sum(len(branch.ids) for branch in self.branches)


Trees = Sequence[Tree]


def lesson_tree(tokenizer: ChatTokenizer, lesson: Lesson, limit: float = math.inf) -> Tree:
    """Return the tree of a lesson, a branch per chat: what chats begin with alike is computed once.

    A token that is learned is its chat's own, so the loss is that of the chats one by one. A chat
    of more than `limit` tokens is left out.
    """
    rows = [(ids, weights) for ids, weights in map(tokenizer.render, lesson) if len(ids) <= limit]
    branches = list[Branch]()
    for number, (ids, weights) in enumerate(rows):
        free = next((i for i, weight in enumerate(weights) if weight), len(ids))
        alike = [len(commonprefix([ids[:free], other])) for other, _ in rows[:number]]
        shared = max(alike, default=0)
        parent = alike.index(shared) if shared else None
        branches.append(Branch(ids[shared:], weights[shared:], parent, shared))
    return Tree(branches)


def pair_tree(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Tree:
    """Return the tree of a preference pair, one prompt and two responses of weight 1 per token.

    Both responses end with the end-of-turn token, which thus counts in sum and length.
    """
    responses = [Branch(ids, [1.0] * len(ids), 0) for ids in (chosen, rejected)]
    return Tree([Branch(prompt, [0.0] * len(prompt)), *responses])


def tree_paths(tree: Tree) -> list[list[int]]:
    """Return per branch the places of its path in the tree: its ancestors' first, then its own."""
    paths, start = list[list[int]](), 0
    for branch in tree.branches:
        past = [] if branch.parent is None else paths[branch.parent][: branch.shared]
        paths.append([*past, *range(start, start + len(branch.ids))])
        start += len(branch.ids)
    return paths


def visibility(tree: Tree) -> Tensor:
    """Return the visibility (n, n) of a tree, bool: a token sees its own path up to itself."""
    n, start = len(tree), 0
    on_path = torch.zeros(n, n, dtype=torch.bool)
    for branch, path in zip(tree.branches, tree_paths(tree), strict=True):
        on_path[start : start + len(branch.ids), torch.tensor(path, dtype=torch.long)] = True
        start += len(branch.ids)
    return on_path.tril()


def pack_rows(trees: Trees, tokens_per_pass: int) -> list[list[Tree]]:
    """Return the trees in rows of at most `tokens_per_pass` tokens: longest first, first fit.

    A longer tree has its own row.
    """
    rows: list[list[Tree]] = []
    for tree in sorted(trees, key=len, reverse=True):
        fitting = (row for row in rows if sum(map(len, row)) + len(tree) <= tokens_per_pass)
        if row := next(fitting, None):
            row.append(tree)
        else:
            rows.append([tree])
    return rows


class PackedAttention:
    """The attention of a packed row: each tree is a stretch that sees itself alone."""

    def __init__(self, trees: Trees, model: Decoder) -> None:
        ends = itertools.accumulate(map(len, trees))
        places = (torch.arange(end - len(tree), end) for end, tree in zip(ends, trees, strict=True))
        self.stretches = list(map(Stretch, places, map(visibility, trees)))
        self.ops = model.ops

    @cached_property
    def arranged(self) -> Any:
        """The stretches as `Ops.attend` wants them."""
        return self.ops.arrange(self.stretches)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, H_kv, d) -> (T, H, d)."""
        return self.ops.attend(q, k.transpose(0, 1), v.transpose(0, 1), self.arranged)


@dataclass(frozen=True)
class Packed:
    """A flat row of T tokens, M of them predicted: hidden[label_positions] predict targets."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    label_positions: Tensor  # (M,) the place whose hidden state predicts the target
    targets: Tensor  # (M,)
    weights: Tensor  # (M,) fp32
    segment_ids: Tensor  # (M,) the branch of the target, counted over the whole row
    num_segments: int
    attention: PackedAttention


def pack(trees: Trees, model: Decoder) -> Packed:
    """Return the packed row of the trees; the first token of a root branch is never predicted."""
    ids, at = list[int](), list[int]()  # the tokens, and the position of each
    labels: list[tuple[int, int, float, int]] = []  # place, target, weight, segment
    segment = 0
    for tree in trees:
        first = len(ids)
        for branch, path in zip(tree.branches, tree_paths(tree), strict=True):
            own = range(len(path) - len(branch.ids), len(path))  # positions of its tokens
            ids += branch.ids
            at += own
            for i, token, weight in zip(own, branch.ids, branch.weights, strict=True):
                if weight and i:
                    labels.append((first + path[i - 1], token, weight, segment))
            segment += 1
    places, targets, weights, owners = zip(*labels, strict=True) if labels else [()] * 4
    weigh = torch.tensor(weights, dtype=torch.float32, device=model.device)
    attend = PackedAttention([tree for tree in trees if len(tree)], model)
    row = partial(torch.tensor, dtype=torch.long, device=model.device)
    return Packed(row(ids), row(at), row(places), row(targets), weigh, row(owners), segment, attend)
