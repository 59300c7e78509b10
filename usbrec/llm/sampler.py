"""The sampler of one token per row: temperature, top-k, top-p, min-p, a seed per row.

A draw takes one uniform number per row and compares it with the cumulative sum of the row's
probabilities, so that a row's draws never depend on the rows beside it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from usbrec.chat import Sampling
from usbrec.options import UserError

PORTION = 8  # rows drawn at once: the processor's cache holds their weights, 1.6 MB in fp32
NOT_FINITE = "logits are not finite numbers: damaged weights, or try --dtype float32"


class Sampler:
    """A sampler of one token per step for each of B rows.

    Temperature 0 takes the most probable token, the lowest id on a tie. All settings are on the
    device before the first step, since every transfer to a GPU waits for it.
    """

    def __init__(self, samplings: Sequence[Sampling], uniforms: Tensor) -> None:
        """`uniforms` (B, N) in [0, 1) are the numbers of N steps, on the device of the logits."""
        device = uniforms.device
        self.uniforms, self.step = uniforms.float(), 0
        warm = [how.temperature > 0 for how in samplings]
        self.some_warm, self.warm = any(warm), torch.tensor(warm).to(device)
        # (B, 1); that of a greedy row is not read
        self.temperatures = torch.tensor([[float(x.temperature)] for x in samplings]).to(device)
        limits = [(how.top_k or 2**31, how.top_p, how.min_p) for how in samplings]
        self.limits = torch.tensor(limits, dtype=torch.float32).to(device)  # (B, 3)
        self.truncated = any(limit != (2**31, 1, 0) for limit in limits)

    def draw(self, logits: Tensor) -> Tensor:
        """Return the next token of each row, (B, V) -> (B,); -1 if its logits are not finite."""
        portion = PORTION if logits.device.type == "cpu" else len(logits)
        starts = range(0, len(logits), portion)
        tokens = torch.cat([self.draw_rows(logits, slice(at, at + portion)) for at in starts])
        self.step += 1
        return tokens

    def draw_rows(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the next tokens of the neighbouring rows `rows` alone, (B, V) -> (b,)."""
        logits = logits[rows].float()
        top, likeliest = logits.max(-1)
        likeliest = torch.where(top.isfinite(), likeliest, -1)  # told later: reading waits
        if not self.some_warm:
            return likeliest
        probs = (logits / self.temperatures[rows]).softmax(-1)
        if self.truncated:
            probs = truncate(probs, self.limits[rows])
        drawn = pick(probs, self.uniforms[rows, self.step])
        return torch.where(self.warm[rows] & (likeliest >= 0), drawn, likeliest)


def finite(numbers: Tensor) -> Tensor:
    """Return the numbers; raises UserError if one is infinite or none, as from damaged weights."""
    if not numbers.isfinite().all():
        raise UserError(NOT_FINITE)
    return numbers


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the tokens (B,) where the summed weights (B, V) reach the shares `uniforms` (B,)."""
    ends = weights.cumsum(-1)
    last = ends[:, -1:]
    # rounding must not step past the last growth
    target = torch.minimum(uniforms[:, None] * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(ends, target, right=True)[:, 0]


def truncate(probs: Tensor, limits: Tensor) -> Tensor:
    """Return the probabilities (B, V) with 0 beyond the rows' limits (B, 3), not normalised again.

    The limits are applied in the order top_k, top_p, min_p. top_p is a share of the probability
    that top_k left, and keeps the token that crosses it.
    """
    top_k, top_p, min_p = limits.split(1, 1)
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    ordered = ordered * (torch.arange(probs.shape[-1], device=probs.device) < top_k)
    before = ordered.cumsum(-1) - ordered
    keep = (before < top_p * ordered.sum(-1, keepdim=True)) | (top_p >= 1)
    keep &= ordered >= min_p * ordered[:, :1]
    return torch.zeros_like(probs).scatter(1, index, ordered * keep)


def uniform_numbers(seed: int, count: int) -> Tensor:
    """Return the uniform numbers of one row, (count,) in fp64, from its own seed."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).random(count))
