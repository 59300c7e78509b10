"""Conversations that share a beginning, laid out once: a tree of branches in one flat row.

A preference pair is three branches, [prompt | chosen | rejected]: both responses see the prompt and
not each other, and the prompt is computed once. A dialogue with loss on several turns is a single
branch. Many trees share one row without padding:

    tree 0: prompt        chosen  rejected     tree 1: dialogue
    ids     p0 p1 p2 p3   c0 c1   r0 r1 r2             d0 d1 d2 d3
    pos      0  1  2  3    4  5    4  5  6              0  1  2  3      (along each branch)
    seen    own beginning  p+own   p+own               own beginning

Each branch attends to its own path and to nothing else, so loss and gradients are those of the
plain layout, one padded row a path, to rounding.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.chat import Lesson
from usbrec.llm.kernels import Window, window_attention
from usbrec.llm.tokenizer import ChatTokenizer

CPU_WINDOW = 128  # queries that attend at once; with 256 a pass of 250-token trees took 10% longer


@dataclass(frozen=True)
class Branch:
    """A run of tokens that continues branch number `parent` of its tree (None: a beginning).

    `weights[i]` multiplies the loss of predicting `ids[i]`; 0 means it is not predicted.
    """

    ids: Sequence[int]
    weights: Sequence[float]
    parent: int | None = None


@dataclass(frozen=True)
class Tree:
    """Branches of one conversation; parents stand before their children."""

    branches: Sequence[Branch]

    def __len__(self) -> int:
        """The number of tokens, each counted once."""
        return sum(len(branch.ids) for branch in self.branches)


def lesson_tree(tokenizer: ChatTokenizer, lesson: Lesson) -> Tree:
    """Lay a lesson out in token ids: its trunk first, then every branch after the trunk."""
    trunk = Branch(*tokenizer.render(lesson.trunk, closed=not lesson.branches))
    branches = [Branch(*tokenizer.render(b, first=False), 0) for b in lesson.branches]
    return Tree([trunk, *branches])


def plain_layout(tree: Tree) -> Tree:
    """Give every branch that is learned from a copy of its whole path; the others become empty.

    Branches keep their numbers and their supervised tokens. For comparison with the packed layout.
    """
    paths: list[tuple[list[int], list[float]]] = []
    branches = []
    for branch in tree.branches:
        past, zeros = ([], []) if branch.parent is None else paths[branch.parent]
        ids, weights = past + list(branch.ids), zeros + list(branch.weights)
        paths.append((ids, [0.0] * len(ids)))
        branches.append(Branch(ids, weights) if any(branch.weights) else Branch([], []))
    return Tree(branches)


class TreeAttention:
    """Attention of a packed row: every branch sees its own path."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, H_kv, d) -> (T, H, d); the layer's number does not matter."""
        if q.device.type == "cpu":
            return window_attention(q, k, v, self.windows)
        out = [
            attend(q[w.start : w.stop], k[w.first : w.stop], v[w.first : w.stop], w.visible)
            for w in self.windows
        ]
        return torch.cat(out)


def tree_windows(first: int, paths: Sequence[Sequence[int]], device: torch.device) -> list[Window]:
    """Return the windows of one tree that begins at `first`, from the path of each branch.

    A path ends with the branch's own tokens, in a row after those of the branches before. On the
    CPU a window is short, so that keys after its last query cost nothing; a GPU takes a tree whole.
    """
    size = max(path[-1] for path in paths if path) + 1 - first
    visible = torch.zeros(size, size, dtype=torch.bool)
    own = 0
    for path in paths:
        n = sum(place >= first + own for place in path)
        columns = torch.tensor(path, dtype=torch.long) - first
        visible[own : own + n, columns] = torch.ones(n, len(path)).tril(len(path) - n).bool()
        own += n
    parts = math.ceil(size / CPU_WINDOW) if device.type == "cpu" else 1
    edges = [size * i // parts for i in range(parts + 1)]
    windows = []
    for start, stop in itertools.pairwise(edges):
        skipped = int(
            visible[start:stop].any(0).int().argmax()
        )  # before the first key that is seen
        seen = visible[start:stop, skipped:stop].to(device)
        windows.append(Window(first + skipped, first + start, first + stop, seen))
    return windows


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on a GPU: q (n, H, d), k, v (S, H_kv, d), mask (n, S).

    The query heads of one key head form the inner batch dimension, so keys are never copied per
    query head.
    """
    H_kv = k.shape[1]
    q = q.unflatten(1, (H_kv, -1)).permute(1, 2, 0, 3)  # (H_kv, g, n, d)
    g = q.shape[1]
    k, v = (x.transpose(0, 1)[:, None].expand(-1, g, -1, -1) for x in (k, v))  # (H_kv, g, S, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.permute(2, 0, 1, 3).flatten(1, 2)  # (n, H, d)


@dataclass(frozen=True)
class Packed:
    """A flat row of T tokens with M supervised ones: hidden[sources] predict targets."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    sources: Tensor  # (M,) the position whose hidden state predicts the target
    targets: Tensor  # (M,)
    weights: Tensor  # (M,) fp32
    owners: Tensor  # (M,) the branch a target belongs to, counted over the whole row
    attention: TreeAttention


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu") -> Packed:
    """Lay the trees into one row; the first token of a beginning is never predicted."""
    ids: list[int] = []
    positions: list[int] = []
    supervised: list[tuple[int, int, float, int]] = []  # source, target, weight, owner
    windows: list[Window] = []
    owner = 0
    for tree in trees:
        first = len(ids)
        paths: list[list[int]] = []  # of each branch: where its whole path lies in the row
        for branch in tree.branches:
            past = [] if branch.parent is None else paths[branch.parent]
            start = len(ids)
            path = past + list(range(start, start + len(branch.ids)))
            for i, (token, weight) in enumerate(zip(branch.ids, branch.weights, strict=True)):
                at = len(past) + i
                if weight and at:
                    supervised.append((path[at - 1], token, weight, owner))
            ids.extend(branch.ids)
            positions.extend(range(len(past), len(path)))
            paths.append(path)
            owner += 1
        if len(ids) > first:
            windows += tree_windows(first, paths, torch.device(device))
    sources, targets, weights, owners = zip(*supervised, strict=True) if supervised else [()] * 4
    return Packed(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        sources=torch.tensor(sources, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        owners=torch.tensor(owners, dtype=torch.long, device=device),
        attention=TreeAttention(windows),
    )
