"""Weights rounded to 4 bits in the format of the processor's kernels: w = s (q - 8) + z.

q is in 0..15, with a scale s and an offset z per 32 inputs of an output, rounded to nearest and in
the dtype of the model. The layers' own weights become the rounded values, so that products of many
rows, for which these kernels are slow, use the same weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from usbrec.llm.lora import FrozenLinear
from usbrec.llm.model import Decoder
from usbrec.options import UserError

GROUP = 32  # inputs under one scale; with 64 a product takes 5% less time
OUTPUTS = 16  # of one step of the kernel
MOST_ROWS = 4  # with more rows the plain product is quicker

Layers = tuple[FrozenLinear, ...]


class Int4Weight:
    """The rounded weights (out, in) of layers that read the same input, stacked."""

    @torch.no_grad()
    def __init__(self, layers: Layers) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        w = weight.float().unflatten(1, (-1, GROUP))  # (out, groups, GROUP)
        low, high = w.aminmax(dim=-1)
        scales = ((high - low) / 15).to(weight.dtype)  # (out, groups)
        scales = scales.masked_fill(scales == 0, 1)  # equal weights need no scale
        offsets = (low + 8 * scales.float()).to(weight.dtype)
        s, z = scales.float()[..., None], offsets.float()[..., None]
        q = ((w - z) / s + 8).round().clamp(0, 15)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).int(), 1)
        self.scales = torch.stack([scales, offsets], -1).transpose(0, 1).contiguous()
        rounded = (s * (q - 8) + z).flatten(1).split([len(layer.weight) for layer in layers])
        for layer, own in zip(layers, rounded, strict=True):
            layer.weight.copy_(own)

    def product(self, x: Tensor) -> Tensor:
        """Return W x: (n, in) -> (n, out)."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales)

    @classmethod
    def round_all(cls, model: Decoder, groups: Sequence[Layers]) -> dict[Layers, "Int4Weight"]:
        """Return the rounded weights of all groups of layers; UserError comes before any rounding.

        The caller leaves out the head and embeddings tied to it: in int4 the default model's head
        costs 2% of perplexity.
        """
        if model.device.type != "cpu":
            raise UserError(f"--int4 works on the CPU only, the model is on {model.device}")
        for layer in (layer for layers in groups for layer in layers):
            if layer.out_features % OUTPUTS or layer.in_features % GROUP:
                raise UserError(
                    f"--int4 needs inputs in groups of {GROUP} and outputs in groups of {OUTPUTS}, "
                    f"got a layer with {layer.in_features} inputs and {layer.out_features} outputs"
                )
        return {layers: cls(layers) for layers in groups}
