"""The prefix cache: keys and values that conversations share, in a radix tree over token ids.

Every computed token has a slot in one arena of keys and values. A node of the tree is a run of
tokens with their slots. A prompt reuses the slots of its cached prefix and adds the rest:

    root --[system, dialogue]--+--[reply A]--[seeker to A]
                               +--[reply B]

So a sibling or a later turn computes its own tokens only. There is one tree per adapter; `clear`
empties all trees after a change of weights. When the arena is full, the least recently used tokens
are evicted; tokens of the present call never are. A call that is broken off, as by Ctrl-C, may
leave tokens that were not computed, so the next one begins with empty trees.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from usbrec.llm.model_config import ModelConfig
from usbrec.options import UserError


@dataclass(eq=False)
class TreeNode:
    """A run of tokens; the keys and values of token i lie in `slots[i]`."""

    ids: list[int]
    slots: Tensor  # (n,) on the CPU
    children: dict[int, "TreeNode"] = field(default_factory=dict)  # by their first token
    last_used: int = 0


class PrefixCache:
    """The arena of keys and values, (layers, H_kv, slots, d) each, and the trees over it.

    Its `size` is given in bytes.
    """

    def __init__(self, c: ModelConfig, dtype: torch.dtype, device: torch.device, size: int) -> None:
        L, H_kv, d = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        self.capacity = size // token_bytes(c, dtype)
        self.k = torch.empty(L, H_kv, self.capacity, d, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.clear()

    def clear(self) -> None:
        """Drop every cached token."""
        self.roots: dict[Hashable, TreeNode] = {}
        self.free = torch.arange(self.capacity - 1, -1, -1)  # a stack: the next slot is its last
        # the number of the present call, and whether every cached token has been computed
        self.clock, self.complete = 0, True

    def insert(self, adapter: Hashable, ids: list[int]) -> tuple[Tensor, int]:
        """Return the slots (n,) of the row `ids`, on the CPU, and how many tokens were cached.

        Missing tokens get new slots, still without content: the caller computes them, and then sets
        `complete`. Raises UserError if the arena cannot hold all tokens of the present call.
        """
        self.complete = False
        node, found, num_cached = self.find(adapter, ids)
        if num_cached < len(ids):
            found.append(self.allocate(len(ids) - num_cached))
            node.children[ids[num_cached]] = TreeNode(ids[num_cached:], found[-1], {}, self.clock)
        return torch.cat(found), num_cached

    def find(self, adapter: Hashable, ids: list[int]) -> tuple[TreeNode, list[Tensor], int]:
        """Return the last node, slots and length of a row's cached prefix; mark it as used."""
        node = self.roots.setdefault(adapter, TreeNode([], torch.empty(0, dtype=torch.long)))
        slots, at = [node.slots], 0
        while at < len(ids) and ids[at] in node.children:
            child = node.children[ids[at]]
            common = shared_length(child.ids, ids[at:])
            node = split(node, child, common) if common < len(child.ids) else child
            node.last_used = self.clock
            slots.append(node.slots)
            at += common
        return node, slots, at

    def allocate(self, count: int) -> Tensor:
        """Return `count` free slots (count,), evicting tokens if there are too few."""
        if count > len(self.free):
            self.evict(count - len(self.free))
        self.free, taken = self.free.split([len(self.free) - count, count])
        return taken.flip(0)

    def evict(self, count: int) -> None:
        """Free at least `count` slots, leaf by leaf, the least recently used first."""
        while count > 0:
            leaves = [pair for pair in self.leaves() if pair[1].last_used < self.clock]
            if not leaves:
                raise UserError(f"the memory holds {self.capacity} tokens, too few (--kv-memory)")
            for parent, leaf in sorted(leaves, key=lambda pair: pair[1].last_used):
                if count > 0:
                    del parent.children[leaf.ids[0]]
                    self.free = torch.cat([self.free, leaf.slots])
                    count -= len(leaf.ids)

    def leaves(self) -> Iterator[tuple[TreeNode, TreeNode]]:
        """Yield (parent, leaf) for the nodes without children of all trees, roots left out."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield from ((node, child) for child in node.children.values() if not child.children)


def split(parent: TreeNode, node: TreeNode, n: int) -> TreeNode:
    """Cut a child after `n` tokens; return the upper part, which replaces it under `parent`."""
    upper = TreeNode(node.ids[:n], node.slots[:n], {node.ids[n]: node})
    parent.children[upper.ids[0]] = upper
    node.ids, node.slots = node.ids[n:], node.slots[n:]
    return upper


def token_bytes(c: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of equal leading tokens of two rows."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
