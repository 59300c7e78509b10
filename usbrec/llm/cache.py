"""Keys and values that conversations share by prefix: a radix tree over token ids.

Every computed token has a slot in one arena of keys and values; a node of the tree is a run of
tokens with their slots. A prompt first takes what the tree has of it, then adds its new tokens:

    root --[system, dialogue]--+--[reply A]--[seeker to A]
                               +--[reply B]

so a sibling or a later turn pays for its own tokens only. Trees are keyed by adapter, and
`forget` empties them when weights change. What was used longest ago leaves first when the arena
is full; what the present call uses never leaves.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from usbrec.llm.model import ModelConfig
from usbrec.options import UserError

# What a second product costs in a step, in keys read: to share fewer is slower than not to share
SHARING_COSTS, SHARING_COSTS_A_ROW = 1300, 25


@dataclass(eq=False)
class Node:
    """A run of tokens after `parent`; `slots[i]` is where token i's keys and values lie."""

    ids: list[int]
    slots: Tensor  # (n,) on the CPU
    parent: "Node | None"
    children: dict[int, "Node"] = field(default_factory=dict)
    last_used: int = 0


@dataclass(frozen=True)
class Path:
    """A row of tokens in the tree: the slot of each, and how many were there before."""

    slots: Tensor  # (n,) on the CPU
    known: int


class PrefixCache:
    """The arena of keys and values, (layers, H_kv, slots, d) each, and the trees over it.

    Slots lie within a head, so that a product can read a stretch of them where it is.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, budget_bytes: int
    ) -> None:
        L, H_kv, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.capacity = budget_bytes // (2 * L * H_kv * d * dtype.itemsize)
        self.k = torch.empty(L, H_kv, self.capacity, d, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.forget()

    def forget(self) -> None:
        """Drop every cached token."""
        self.roots: dict[Hashable, Node] = {}
        self.free = torch.arange(self.capacity - 1, -1, -1)  # a stack: the next slot is its last
        self.clock = 0

    @property
    def used(self) -> int:
        """How many tokens are cached."""
        return self.capacity - len(self.free)

    def tick(self) -> None:
        """Begin a new call: whatever is used from now on is safe until the next tick."""
        self.clock += 1

    def insert(self, key: Hashable, ids: Sequence[int]) -> Path:
        """Find the row in the tree of `key` and add what is missing, in slots that are yet empty.

        Raises UserError where the arena cannot hold what the present call uses.
        """
        ids = list(ids)
        node, found, known = self.find(key, ids)
        if known < len(ids):
            slots = self.allocate(len(ids) - known)
            node.children[ids[known]] = Node(ids[known:], slots, node, last_used=self.clock)
            found.append(slots)
        return Path(torch.cat(found), known)

    def find(self, key: Hashable, ids: list[int]) -> tuple[Node, list[Tensor], int]:
        """Mark what the tree has of a row as used: the last node, the slots, how many tokens."""
        node = self.roots.setdefault(key, Node([], torch.empty(0, dtype=torch.long), None))
        slots, at = [node.slots], 0
        while at < len(ids) and ids[at] in node.children:
            child = node.children[ids[at]]
            common = shared_length(child.ids, ids[at:])
            node = self.split(child, common) if common < len(child.ids) else child
            node.last_used = self.clock
            slots.append(node.slots)
            at += common
        return node, slots, at

    def split(self, node: Node, length: int) -> Node:
        """Cut a node after `length` tokens; the upper part takes its place and is returned."""
        assert node.parent is not None
        upper = Node(node.ids[:length], node.slots[:length], node.parent, last_used=node.last_used)
        node.parent.children[upper.ids[0]] = upper
        node.ids, node.slots, node.parent = node.ids[length:], node.slots[length:], upper
        upper.children[node.ids[0]] = node
        return upper

    def allocate(self, count: int) -> Tensor:
        """Take `count` free slots, evicting what was used longest ago where there are too few."""
        if count > len(self.free):
            self.evict(count - len(self.free))
        taken = self.free[len(self.free) - count :].flip(0)
        self.free = self.free[: len(self.free) - count]
        return taken

    def evict(self, count: int) -> None:
        """Free at least `count` slots, leaf by leaf, oldest first."""
        while count > 0:
            leaves = [n for n in self.leaves() if n.last_used < self.clock]
            if not leaves:
                raise UserError(
                    f"the key/value memory holds {self.capacity} tokens and this call needs more: "
                    "give it a larger memory or shorter prompts"
                )
            for leaf in sorted(leaves, key=lambda n: n.last_used):
                assert leaf.parent is not None
                del leaf.parent.children[leaf.ids[0]]
                self.free = torch.cat([self.free, leaf.slots])
                count -= len(leaf.ids)
                if count <= 0:
                    break

    def leaves(self) -> Iterator[Node]:
        """Yield the ends of all trees."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children and node.parent is not None:
                yield node


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


@dataclass(frozen=True)
class Group:
    """Rows whose first `length` tokens are the same."""

    rows: list[int]
    length: int


def share_groups(paths: Sequence[Path]) -> list[Group]:
    """Group rows so that the fewest tokens are read in a decoding step.

    A group reads its shared beginning once and each row's rest on its own. Three rows of 100 + 5
    tokens make one group of length 100 (115 tokens read), not three of 105 (315). Where all that
    saves less than it costs, the rows are one group of length 0.
    """
    slots = [path.slots.numpy() for path in paths]

    def best(rows: list[int], length: int) -> tuple[int, list[Group]]:
        """Rows that agree on `length` tokens -> (tokens read, groups)."""
        length = common_prefix([slots[row] for row in rows], length)
        together = length + sum(len(slots[row]) - length for row in rows)
        branches: dict[int, list[int]] = {}
        for row in rows:
            ended = len(slots[row]) == length
            branches.setdefault(-1 if ended else int(slots[row][length]), []).append(row)
        if len(branches) == 1:
            return together, [Group(rows, length)]
        apart = 0
        groups: list[Group] = []
        for below in branches.values():
            cost, parts = best(below, length)
            apart, groups = apart + cost, groups + parts
        return (together, [Group(rows, length)]) if together < apart else (apart, groups)

    if not paths:
        return []
    everyone = list(range(len(paths)))
    read, groups = best(everyone, 0)
    saved = sum(map(len, slots)) - read
    worthwhile = saved > SHARING_COSTS + SHARING_COSTS_A_ROW * len(paths)
    return groups if worthwhile else [Group(everyone, 0)]


def common_prefix(rows: Sequence[np.ndarray], known: int) -> int:
    """How many leading entries all rows agree on, given that they agree on `known`."""
    end = min(len(row) for row in rows)
    for row in rows[1:]:
        unequal = np.flatnonzero(row[known:end] != rows[0][known:end])
        end = known + int(unequal[0]) if len(unequal) else end
    return end
