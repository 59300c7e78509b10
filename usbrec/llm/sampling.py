"""One token a row from its logits: temperature, penalty, top-k, top-p, min-p, seeds a row."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.chat import Sampling

DRAWN_AT_ONCE = 8  # rows; their weights in fp32 take 1.6 MB
RUN = 128
LEAST_TEMPERATURE = 1e-6


class Sampler:
    """Draws one token a step for each of B rows.

    One uniform number a row against the cumulative sum of its probabilities; temperature 0 takes
    the most probable token, the lowest id on a tie. All that the rows' settings come to lies on
    their device before the first step: on a GPU, to send something there is to wait for it.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        uniforms: Tensor,
        texts: Iterable[Sequence[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the numbers of N steps, (B, N) in [0, 1), and the ids of the rows' texts so far."""
        self.uniforms = uniforms.to(device, torch.float32)
        self.step = 0
        self.portions = [
            Portion(slice(i, i + DRAWN_AT_ONCE), samplings[i : i + DRAWN_AT_ONCE], device)
            for i in range(0, len(samplings), DRAWN_AT_ONCE)
        ]
        self.held: Tensor | None = None  # (B, V): what a penalty is for
        if any(how.repetition_penalty != 1 for how in samplings):
            held = torch.zeros(len(samplings), vocab_size, dtype=torch.bool)
            for row, ids in zip(held, texts, strict=True):
                row[list(ids)] = True
            self.held = held.to(device)
            self.penalties = column([how.repetition_penalty for how in samplings], device)

    def draw(self, logits: Tensor) -> Tensor:
        """Draw the next token of each row, (B, V) -> (B,)."""
        uniforms = self.uniforms[:, self.step]
        self.step += 1
        if self.held is not None:
            logits = penalise(logits, self.penalties, self.held)
        tokens = torch.cat([p.draw(logits[p.rows], uniforms[p.rows]) for p in self.portions])
        if self.held is not None:
            self.held.scatter_(1, tokens[:, None], True)
        return tokens


class Portion:
    """Some neighbouring rows: so few that the processor's cache holds what is read again."""

    def __init__(
        self, rows: slice, samplings: Sequence[Sampling], device: torch.device | str
    ) -> None:
        self.rows = rows
        hot = torch.tensor([how.temperature > 0 for how in samplings])
        self.cold, self.warm = ((hot == x).nonzero()[:, 0].to(device) for x in (False, True))
        warm = [how for how in samplings if how.temperature > 0]
        floor = LEAST_TEMPERATURE  # as good as greedy; quotients beyond fp32 would be no numbers
        self.temperatures = column([max(how.temperature, floor) for how in warm], device)
        self.limits: tuple[Tensor, Tensor, Tensor] | None = None
        if any(how.top_k or how.top_p < 1 or how.min_p for how in warm):
            self.limits = limits(warm, device)

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw for these rows, (b, V) and (b,) -> (b,)."""
        tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        if len(self.cold):
            tokens[self.cold] = logits[self.cold].float().argmax(-1)  # in bf16 five times as long
        if len(self.warm):
            own = logits[self.warm] if len(self.cold) else logits
            probs = own.to(torch.float32, copy=True).div_(self.temperatures).softmax(-1)
            if self.limits is not None:
                probs = truncate(probs, *self.limits)
            tokens[self.warm] = pick(probs, uniforms[self.warm])
        return tokens


def column(numbers: Sequence[float], device: torch.device | str) -> Tensor:
    """Return a number a row, (b, 1)."""
    return torch.tensor(numbers)[:, None].to(device)


def limits(
    samplings: Sequence[Sampling], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows' top_k, top_p and min_p, (b, 1) each; no top_k is more than there are."""
    top_k = column([how.top_k or 2**31 for how in samplings], device)
    top_p = column([how.top_p for how in samplings], device)
    return top_k, top_p, column([how.min_p for how in samplings], device)


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return where the shares `uniforms` (b,) of the summed weights (b, V) are reached -> (b,).

    First the run of RUN weights, by the runs' sums, then the place in it: a cumulative sum over all
    V takes as long as everything else in `draw`.
    """
    missing = -weights.shape[-1] % RUN
    runs = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, RUN))
    ends = runs.sum(-1).cumsum(-1)  # (b, V / RUN)
    run, rest = place(ends, uniforms[:, None] * ends[:, -1:])
    within = runs.take_along_dim(run[:, :, None], 1)[:, 0].cumsum(-1)  # (b, RUN)
    at, _ = place(within, rest)
    return (run * RUN + at)[:, 0]


def place(ends: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a growing row first exceeds the target, and the target less what is before.

    ends (b, n), target (b, 1) -> (b, 1) each. Rounding cannot step past the last growth.
    """
    last = ends[:, -1:]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    at = torch.searchsorted(ends, target, right=True)
    before = F.pad(ends, (1, 0)).gather(1, at)
    return at, target - before


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what the rows' `limits` leave out, in their order, (b, V) -> (b, V), of any sum.

    top_p is a share of what top_k left, and keeps the token that crosses it.
    """
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    ordered = ordered * (torch.arange(probs.shape[-1], device=probs.device) < top_k)
    before = ordered.cumsum(-1) - ordered
    keep = (before < top_p * ordered.sum(-1, keepdim=True)) | (top_p >= 1)
    keep &= ordered >= min_p * ordered[:, :1]
    return torch.zeros_like(probs).scatter(1, index, ordered * keep)


def penalise(logits: Tensor, penalties: Tensor, held: Tensor) -> Tensor:
    """Make the tokens that a row's text holds less likely (arXiv 1909.05858), -> (B, V) in fp32.

    A positive logit is divided by the row's penalty (B, 1), a negative one multiplied; held (B, V).
    """
    logits = logits.float()
    weighed = torch.where(logits < 0, logits * penalties, logits / penalties)
    return torch.where(held, weighed, logits)


def uniform_numbers(seed: int, count: int) -> np.ndarray:
    """Return the `count` uniform numbers of one row, by its own seed."""
    return np.random.Generator(np.random.Philox(seed)).random(count)
