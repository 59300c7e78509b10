"""Weights rounded to 8 or 4 bits, laid out as the processor's kernels read them.

    int8    w = s q              q in -127..127, a scale s for each output
    int4    w = s (q - 8) + z    q in 0..15, scale s and offset z for each 32 inputs of an output

Rounded to nearest: the scales come from the largest (int8) or outermost (int4) weights and are
themselves numbers of the model's dtype. Whoever rounds a weight also gets the matrix that the
rounded form stands for, so that products of many rows, for which these kernels are slow, see the
same weights: in fp32 to its rounding, in bf16 to that of the matrix's entries.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUP = 32  # inputs under one int4 scale; with 64 a product takes 5% less time
INT4_OUTPUTS = 16  # the kernel takes so many outputs at a time

Kind = Literal["int8", "int4"]


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight (out, in) as the processor's kernels for `kind` read it."""

    kind: Kind
    packed: Tensor  # int8 (out, in); int4 two a byte (out, in / 2)
    scales: Tensor  # int8 (out,); int4 (in / GROUP, out, 2), s and z

    def product(self, x: Tensor) -> Tensor:
        """Return W x: (n, in) -> (n, out)."""
        if self.kind == "int8":
            return torch.ops.aten._weight_int8pack_mm(x, self.packed, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales)


def quantised(weight: Tensor, kind: Kind) -> tuple[QuantisedWeight, Tensor]:
    """Return a weight (out, in) in its rounded form, and the matrix which that stands for."""
    return quantised_int8(weight) if kind == "int8" else quantised_int4(weight)


def quantised_int8(weight: Tensor) -> tuple[QuantisedWeight, Tensor]:
    """One scale an output."""
    w = weight.float()
    scales = scale_of(w.abs().amax(-1) / 127, weight.dtype)  # (out,)
    s = scales.float()[:, None]
    q = (w / s).round().clamp(-127, 127)
    return QuantisedWeight("int8", q.to(torch.int8), scales), (q * s).to(weight.dtype)


def quantised_int4(weight: Tensor) -> tuple[QuantisedWeight, Tensor]:
    """One scale and one offset a group of inputs."""
    w = weight.float().unflatten(1, (-1, GROUP))  # (out, groups, GROUP)
    low, high = w.aminmax(dim=-1)
    scales = scale_of((high - low) / 15, weight.dtype)  # (out, groups)
    offsets = (low + 8 * scales.float()).to(weight.dtype)
    s, z = scales.float()[..., None], offsets.float()[..., None]
    q = ((w - z) / s + 8).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).int(), 1)
    pairs = torch.stack([scales, offsets], -1).transpose(0, 1).contiguous()  # (groups, out, 2)
    return QuantisedWeight("int4", packed, pairs), (s * (q - 8) + z).flatten(1).to(weight.dtype)


def scale_of(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a step as a scale of this dtype; weights that are all equal need none, and get 1."""
    scale = step.to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def fits_int4(weight: Tensor) -> bool:
    """Tell whether the int4 kernel takes a weight of this shape."""
    return weight.shape[0] % INT4_OUTPUTS == 0 and weight.shape[1] % GROUP == 0
