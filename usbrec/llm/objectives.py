"""What a training step minimises over packed trees: lessons (`Sft`) or preference pairs (`Simpo`).

Also here: how a pair becomes a tree, and which items cannot be learned from and are counted out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from usbrec.llm.loss import (
    SimpoOptions,
    TokenLogps,
    response_logps,
    sft_loss,
    simpo_loss,
)
from usbrec.llm.packing import Branch, Packed, Tree

REPETITION_WINDOW = 32  # supervised tokens of the same response that a prediction may repeat


class Mean(NamedTuple):
    """A metric in the making: the parts of a step add up, and the quotient is reported."""

    total: Tensor
    number: Tensor


class Objective(Protocol):
    """A loss summed over packed trees, with the metrics that belong to it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, in the order in which a call returns them."""
        ...

    def size(self, tree: Tree) -> float:
        """Return what the tree adds to the number that a step's summed loss is divided by."""
        ...

    def __call__(
        self, tokens: TokenLogps, packed: Packed, trees: Sequence[Tree]
    ) -> tuple[Tensor, list[Mean]]:
        """Return the loss summed over the row that `trees` were packed into, and its metrics."""
        ...


def repetition(tokens: TokenLogps, packed: Packed) -> Mean:
    """Count likeliest tokens that stand already among the last supervised ones of their response.

    The rep/l of arXiv 1908.04319, read off the training pass: it grows when a policy degenerates.
    """
    place = torch.arange(len(packed.targets), device=packed.targets.device)
    gap = place[:, None] - place[None, :]  # (M, M)
    near = (gap > 0) & (gap <= REPETITION_WINDOW)
    near &= packed.owners[:, None] == packed.owners[None, :]
    hits = (near & (tokens.predictions[:, None] == packed.targets[None, :])).any(1)
    return Mean(hits.sum(), place.new_tensor(len(place)))


@dataclass(frozen=True)
class Sft:
    """The weighted mean negative log-probability of the supervised tokens."""

    metrics: tuple[str, ...] = field(default=("accuracy", "repetition"), init=False)

    def size(self, tree: Tree) -> float:
        """Return the weight of all tokens that are predicted: all but a beginning's first."""
        unpredicted = (b.weights[0] for b in tree.branches if b.parent is None and b.weights)
        return sum(sum(branch.weights) for branch in tree.branches) - sum(unpredicted)

    def __call__(
        self, tokens: TokenLogps, packed: Packed, trees: Sequence[Tree]
    ) -> tuple[Tensor, list[Mean]]:
        """Return the summed loss of a row of lessons."""
        hits = (tokens.predictions == packed.targets).sum()
        accuracy = Mean(hits, hits.new_tensor(len(packed.targets)))
        return sft_loss(tokens.logps, packed.weights, 1.0), [accuracy, repetition(tokens, packed)]


@dataclass(frozen=True)
class Simpo:
    """SimPO's loss over trees of three branches: prompt, chosen, rejected."""

    options: SimpoOptions = field(default_factory=SimpoOptions)
    metrics: tuple[str, ...] = field(
        default=(
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
            "lengths/chosen",
            "lengths/rejected",
            "repetition",
        ),
        init=False,
    )

    def size(self, tree: Tree) -> float:
        """Return 1: the loss is a mean over pairs."""
        return 1.0

    def __call__(
        self, tokens: TokenLogps, packed: Packed, trees: Sequence[Tree]
    ) -> tuple[Tensor, list[Mean]]:
        """Return the summed loss of a row of pairs; the `logps` metrics are means over tokens."""
        first = 3 * torch.arange(len(trees), device=packed.owners.device)
        chosen = response_logps(tokens.logps, packed.owners, first + 1)
        rejected = response_logps(tokens.logps, packed.owners, first + 2)
        losses, chosen_rewards, rejected_rewards = simpo_loss(
            chosen.logps, rejected.logps, chosen.lengths, rejected.lengths, self.options
        )
        columns = (
            chosen_rewards,
            rejected_rewards,
            chosen_rewards - rejected_rewards,
            (chosen_rewards > rejected_rewards).float(),
            chosen.logps.detach() / chosen.lengths,
            rejected.logps.detach() / rejected.lengths,
            chosen.lengths,
            rejected.lengths,
        )
        means = [Mean(column.sum(), losses.new_tensor(len(losses))) for column in columns]
        return losses.sum(), [*means, repetition(tokens, packed)]


def pair_tree(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Tree:
    """Lay out a preference pair with one copy of its prompt; every response token weighs 1.

    Both responses end with the end-of-turn token, which thus counts in sum and length.
    """
    return Tree(
        [
            Branch(prompt, [0.0] * len(prompt)),
            Branch(chosen, [1.0] * len(chosen), 0),
            Branch(rejected, [1.0] * len(rejected), 0),
        ]
    )


def path_lengths(tree: Tree) -> list[int]:
    """Return for each branch the number of tokens of the conversation that it ends."""
    ends: list[int] = []
    for branch in tree.branches:
        ends.append(len(branch.ids) + (0 if branch.parent is None else ends[branch.parent]))
    return ends


def longest_path(tree: Tree) -> int:
    """Return the number of tokens of the tree's longest conversation."""
    return max(path_lengths(tree), default=0)


def usable_lessons(trees: Sequence[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """Return the trees that can be learned from, and how many were dropped for which reason.

    Nothing is cut here: `limits.py` shortens conversations before they are laid out.
    """
    dropped = {"dropped as too long": 0, "dropped with nothing to learn": 0}
    kept = []
    for tree in trees:
        if longest_path(tree) > max_length:
            dropped["dropped as too long"] += 1
        elif Sft().size(tree) <= 0:
            dropped["dropped with nothing to learn"] += 1
        else:
            kept.append(tree)
    return kept, dropped


def usable_pairs(trees: Sequence[Tree], max_length: int) -> tuple[list[Tree], dict[str, int]]:
    """The same for trees of prompt, chosen and rejected.

    A response of fewer than two tokens has nothing before its end-of-turn token: it is empty.
    """
    dropped = {
        "dropped as too long": 0,
        "dropped for an empty response": 0,
        "dropped for equal responses": 0,
    }
    kept = []
    for tree in trees:
        prompt, chosen, rejected = tree.branches
        if longest_path(tree) > max_length:
            dropped["dropped as too long"] += 1
        elif not prompt.ids or min(len(chosen.ids), len(rejected.ids)) < 2:
            dropped["dropped for an empty response"] += 1
        elif list(chosen.ids) == list(rejected.ids):
            dropped["dropped for equal responses"] += 1
        else:
            kept.append(tree)
    return kept, dropped
