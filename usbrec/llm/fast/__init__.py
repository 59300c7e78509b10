"""Faster equivalents of the operations in model.py, which `accelerate(model)` puts in their place.

    linear      layers that read the same input become one product, their weights in one storage;
                on a CPU with bf16 a copy is kept in the processor's own order
    adapters    laid out once, in the dtype of the base, until `Ops.clear`
    rms_norm, linear, attend    hand-written gradients in training (kernels.py)
    attend      windows of plain products on the CPU, torch's own attention on a GPU
    decoding, learn    on a GPU: steps and passes that are recorded and replayed (graphs.py)

Without this folder, and without the line that calls `accelerate`, a program is slower and its
results are the same to rounding (tests/test_fast.py).
"""

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.llm.fast import graphs, kernels
from usbrec.llm.model import Decoder, DecoderLayer, Layers, Ops, Spans, linear

Fused = dict[Layers, "FusedLinear"]


def accelerate(model: Decoder) -> None:
    """Replace the model's operations by faster equivalents; the model is on its device already."""
    fused: Fused = {}
    adapters = cache(lay_out)
    if not model.sharded:  # sharded weights are here only while their layer computes
        groups: list[Layers] = [(model.lm_head,)]
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer), "a decoder's layers"
            attention, mlp = layer.self_attn, layer.mlp
            groups += [attention.qkv, (attention.o_proj,), mlp.gate_up, (mlp.down_proj,)]
        fused = {layers: FusedLinear(layers, adapters) for layers in groups}
    ops = Ops(linear=partial(fused_linear, fused), clear=adapters.cache_clear)
    if model.device.type == "cpu":
        ops.rms_norm = kernels.lean_rms_norm
        ops.arrange, ops.attend = kernels.windows, kernels.WindowAttention.apply
    else:
        record_on_gpu(model, ops, adapters.cache_clear)
    model.ops = ops


def record_on_gpu(model: Decoder, ops: Ops, forget_adapters: Callable[[], None]) -> None:
    """Give `ops` a GPU's large kernels, and passes that are recorded."""
    if model.device.type == "cuda":
        torch.set_num_threads(1)  # waking a thread takes longer than what is left to do here
        torch.cuda.set_device(model.device)  # passes are recorded on the thread's own
    heads, dtype = model.config.num_key_value_heads, model.dtype
    ops.rms_norm = lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
    ops.arrange = partial(kernels.rectangles, H_kv=heads, dtype=dtype, device=model.device)
    ops.attend = kernels.attend_in_rectangles
    if not model.sharded:
        decoding = graphs.RecordedDecoding(ops)

        def clear() -> None:
            forget_adapters()
            decoding.clear()

        ops.clear, ops.decoding = clear, decoding.begin
        ops.learn = graphs.RecordedLearning(model)


class FusedLinear:
    """Layers that read the same input, as one product; `adapters` is a cached `lay_out`."""

    @torch.no_grad()
    def __init__(self, layers: Layers, adapters: Callable[..., tuple[Tensor, ...]]) -> None:
        self.layers, self.adapters = layers, adapters
        self.rows = kernels.joined([layer.weight.detach() for layer in layers])
        if len(layers) > 1:  # one storage: each layer's own weight becomes a view of it
            parts = self.rows.split([layer.out_features for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight = torch.nn.Parameter(part, requires_grad=False)
        biases: list[Tensor] = [x.bias for x in layers if x.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    @cached_property
    def weight(self) -> Tensor:
        """The weight in `prepack`'s order: made when it is first used, since training does not."""
        return prepack(self.rows)

    def __call__(self, x: Tensor, spans: Spans) -> Tensor:
        """Return the layers' outputs side by side, (T, in) -> (T, outs)."""
        out = product(x, self.weight, self.bias)
        for name, start, stop in spans:
            if adapter := self.adapters(self.layers, name):
                low = product(x[start:stop], adapter[0])  # (stop - start, R)
                if adapter[1].is_mkldnn:
                    out[start:stop] += product(low, adapter[1])
                else:
                    out[start:stop].addmm_(low, adapter[1].T)
        return out


@torch.no_grad()
def lay_out(layers: Layers, name: str) -> tuple[Tensor, ...]:
    """Return an adapter's A (R, in), stacked, and its scaled B (out, R), block-diagonal.

    R is the sum of the ranks. The result is () if the adapter covers none of the layers.
    """
    A, B = [], []
    for layer in layers:
        if name in layer.lora_A:
            A.append(layer.lora_A[name])
            B.append(layer.configs[name].scaling * layer.lora_B[name])
        else:
            B.append(torch.zeros(layer.out_features, 0, device=layer.weight.device))
    both = (torch.cat(A), torch.block_diag(*B)) if A else ()
    return tuple(prepack(x.to(layers[0].weight.dtype)) for x in both)


def fused_linear(fused: Fused, layers: Layers, x: Tensor, spans: Spans) -> Tensor:
    """Return `model.linear`: one product for all layers, with or without gradients."""
    found = fused.get(layers)
    if torch.is_grad_enabled():
        weights = [found.rows] if found else [layer.weight for layer in layers]
        return kernels.adapted_linear(layers, weights, x, spans)
    return linear(layers, x, spans) if found is None else found(x, spans)


def prepack(weight: Tensor) -> Tensor:
    """Return a frozen weight (out, in) in the order of the processor's bf16 kernels, if it has any.

    The time of a product of few rows is that of reading the weight, a third less in this order.
    """
    there = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if there and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (T, out) for a weight of `prepack`."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
