"""Quicker operations against the definitions that they replace: values, gradients, whole models."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_decoder

from usbrec.llm.fast import FusedLinear, accelerate, lay_out, prepack, product
from usbrec.llm.fast.kernels import (
    WindowAttention,
    adapted_linear,
    attend_in_rectangles,
    lean_rms_norm,
    rectangles,
    windows,
)
from usbrec.llm.lora import (
    AdapterSpan,
    LoraConfig,
    LoraLinear,
    adapter_parameters,
    add_adapter,
)
from usbrec.llm.model import Decoder, ModelConfig, Stretch, attend, linear, rms_norm

CHATGLM = replace(TINY, attention_bias=True, chatglm=True)
CONFIGS = {
    "llama": TINY,
    "qwen2": replace(TINY, attention_bias=True),
    "tied": replace(TINY, tie_word_embeddings=True),
    "chatglm": CHATGLM,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random tensor that asks for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def compare(ours: Any, plain: Any, inputs: Any, tolerance: float = 1e-5) -> None:
    """Compare two functions of the same inputs, and their gradients under a random pull."""
    results = [function(*inputs) for function in (ours, plain)]
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
    pull = random(*results[0].shape, seed=99).detach().to(results[0].dtype)
    grads = [torch.autograd.grad(result, inputs, pull) for result in results]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


# --- operations and their gradients -----------------------------------------------------------


def adapted(outputs: int, inputs: int, bias: bool = False, r: int = 3) -> LoraLinear:
    """A layer with an adapter "one" of rank r that changes something, scaled by 1.5."""
    layer = LoraLinear(inputs, outputs, bias)
    layer.weight.copy_(random(outputs, inputs, seed=1).detach())
    if bias:
        layer.bias.copy_(random(outputs, seed=2).detach())
    A, B = (0.5 * random(*shape, seed=3).detach() for shape in ((r, inputs), (outputs, r)))
    layer.add("one", LoraConfig(r=r, lora_alpha=1.5 * r), A, B)
    return layer


def alone(layer: LoraLinear, x: torch.Tensor, spans: list[AdapterSpan]) -> torch.Tensor:
    """The kernel's output for one layer."""
    return adapted_linear((layer,), (layer.weight,), x, spans)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("covered", [(0, 1, 2), (0, 2), (1,)])
def test_adapted_layers_equal_their_definition(bias: bool, covered: tuple[int, ...]) -> None:
    """Three layers that read one input, of unlike widths and ranks; the adapter skips some."""
    layers = [adapted(10, 6, bias), adapted(4, 6, bias, r=3), adapted(7, 6, bias, r=1)]
    for i in {0, 1, 2}.difference(covered):
        del layers[i].lora_A["one"], layers[i].lora_B["one"], layers[i].configs["one"]
    apart = [layer.weight for layer in layers]
    x, spans = random(7, 6), [AdapterSpan("one", 0, 7)]
    adapters = [(layers[i].lora_A["one"], layers[i].lora_B["one"]) for i in covered]
    learned = [x, *itertools.chain(*adapters)]
    got, same, expected = (
        (out, *torch.autograd.grad(out.square().sum(), learned))
        for out in (
            adapted_linear(layers, apart, x, spans),
            adapted_linear(layers, [torch.cat(apart)], x, spans),
            linear(layers, x, spans),
        )
    )
    for ours, joined, plain in zip(got, same, expected, strict=True):
        torch.testing.assert_close(ours, plain)
        assert torch.equal(ours, joined)


def test_an_adapted_layer_over_bf16_keeps_fp32_adapters_and_gradients() -> None:
    """Against the same numbers in fp32, an error of some bf16 roundings (2^-8 each)."""
    layer = adapted(48, 64, r=4)
    x, A, B = random(50, 64, dtype=torch.bfloat16), layer.lora_A["one"], layer.lora_B["one"]
    layer.weight.data = layer.weight.data.bfloat16()
    out = alone(layer, x, [AdapterSpan("one", 0, 50)])
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert A.grad is not None and B.grad is not None and x.grad is not None
    assert A.grad.dtype == B.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    wide = x.detach().float()
    exact = wide @ layer.weight.float().T + 1.5 * (wide @ A.T @ B.T)
    expected = torch.autograd.grad(exact.square().sum(), (A, B))
    assert (out - exact).norm() < 0.01 * exact.norm()
    for got, exact_grad in zip((A.grad, B.grad), expected, strict=True):
        assert (got - exact_grad).norm() < 0.02 * exact_grad.norm()


def test_an_input_that_wants_no_gradient_gets_none() -> None:
    layer = adapted(10, 6)
    alone(layer, torch.ones(2, 6), [AdapterSpan("one", 0, 2)]).sum().backward()
    assert layer.lora_A["one"].grad is not None and layer.lora_B["one"].grad is not None


def test_a_pass_with_gradients_that_mixes_adapters_takes_the_definition() -> None:
    layer, x = adapted(10, 6), random(7, 6)
    for spans in ([], [AdapterSpan("one", 2, 7)], [AdapterSpan("one", 0, 5)]):
        assert torch.equal(alone(layer, x, spans), layer(x, spans))
    for spans in ([AdapterSpan("other", 0, 7)], [AdapterSpan("one", 0, 3)] * 2):
        assert torch.equal(alone(layer, x, spans), layer(x, spans))


def test_rms_norm_equals_its_definition() -> None:
    weight = random(12, seed=1).detach()
    plain = (random(5, 12),)
    compare(lambda x: lean_rms_norm(x, weight, 1e-3), lambda x: rms_norm(x, weight, 1e-3), plain)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [9, 300])
def test_windows_of_attention_equal_the_definition_under_random_masks(seed: int, n: int) -> None:
    """Continuations of 0, 1 and 40 keys; 300 queries are cut into three windows."""
    past = (0, 1, 40, 0)[seed]
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(n, past + n, generator=generator) < 0.5
    visible |= torch.eye(past + n, dtype=torch.bool)[past:]
    visible &= torch.ones(n, past + n, dtype=torch.bool).tril(past)
    visible[n // 2 :, : past + n // 3] = False
    inputs = random(n, 4, 8, seed=1), random(2, past + n, 8, seed=2), random(2, past + n, 8, seed=3)
    places = torch.arange(past + n)
    arranged = windows([Stretch(places, visible)])
    assert len(arranged) == -(-n // 128)
    plain = lambda *x: attend(*x, visible)  # noqa: E731
    compare(lambda *x: WindowAttention.apply(*x, arranged), plain, inputs)
    arranged = rectangles([Stretch(places, visible)], 2, torch.float32, torch.device("cpu"))
    compare(lambda *x: attend_in_rectangles(*x, arranged), plain, inputs)


def test_one_mask_serves_two_dtypes() -> None:
    visible = torch.ones(3, 3, dtype=torch.bool).tril()
    arranged = windows([Stretch(torch.arange(3), visible)])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        q = random(3, 2, 8, dtype=dtype)
        k = q[:, :1].transpose(0, 1)
        assert WindowAttention.apply(q, k, k, arranged).dtype == dtype


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_prepacked_weight_gives_the_same_product(rows: int) -> None:
    weight, bias = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16()
    packed = prepack(weight)
    assert packed.is_mkldnn == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    x = torch.randn(rows, 32).bfloat16()
    plain = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(product(x, packed, bias).float(), plain, rtol=2**-7, atol=2**-5)


def test_weights_of_other_dtypes_are_not_prepacked() -> None:
    weight = torch.randn(48, 32)
    assert prepack(weight) is weight


# --- layers that read the same input ----------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 500])
@pytest.mark.parametrize("bias", [True, False])
@DTYPES
def test_fused_layers_give_the_same_as_each_by_itself(
    rows: int, bias: bool, dtype: torch.dtype
) -> None:
    """Adapters of two ranks, one of them at two of the layers alone; rows of neither between."""
    generator = torch.Generator().manual_seed(0)
    layers = tuple(LoraLinear(32, out, bias=bias).to(dtype) for out in (48, 16, 16))
    for layer in layers:
        for parameter in (layer.weight, layer.bias) if bias else (layer.weight,):
            parameter.data.normal_(0, 0.2, generator=generator)
    for name, r, own in (("one", 4, layers), ("two", 2, layers[1:])):
        for layer in own:
            A = torch.randn(r, 32, generator=generator)
            B = torch.randn(layer.out_features, r, generator=generator)
            layer.add(name, LoraConfig(r=r), 0.1 * A, 0.3 * B)
    x = torch.randn(rows + 9, 32, generator=generator).to(dtype)
    spans = [AdapterSpan("one", 2, rows + 2), AdapterSpan("two", rows + 5, rows + 9)]
    with torch.no_grad():
        plain = torch.cat([layer(x, spans) for layer in layers], -1)
        fused = FusedLinear(layers, lay_out)
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        if dtype == torch.bfloat16:
            tolerance = {"rtol": 2**-6, "atol": 2**-4}
        torch.testing.assert_close(fused(x, spans), plain, **tolerance)
        torch.testing.assert_close(torch.cat([y(x, spans) for y in layers], -1), plain)
        if dtype == torch.bfloat16:  # rows of no adapter are the base to the last bit
            assert torch.equal(fused(x, spans)[:2], fused(x, [])[:2])


def test_fused_weights_lie_in_memory_once() -> None:
    layers = tuple(LoraLinear(32, out) for out in (48, 16))
    fused = FusedLinear(layers, lay_out)
    assert layers[0].weight.data_ptr() == fused.weight.data_ptr()
    assert layers[1].weight.data_ptr() == fused.weight[48:].data_ptr()


# --- whole models -----------------------------------------------------------------------------


class CausalRow:
    """Attention of independent sequences of these lengths in one row."""

    def __init__(self, model: Decoder, lengths: list[int]) -> None:
        self.ops, self.lengths = model.ops, lengths
        ends = itertools.accumulate(lengths)
        stretches = [Stretch(torch.arange(end - n, end), torch.ones(n, n, dtype=torch.bool).tril())
                     for n, end in zip(lengths, ends, strict=True)]  # fmt: skip
        self.arranged = self.ops.arrange(stretches)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self.ops.attend(q, k.transpose(0, 1), v.transpose(0, 1), self.arranged)


def with_adapters(config: ModelConfig) -> Decoder:
    """A random model with adapters "one" and "two" that change something, and biases."""
    model = random_decoder(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
    for name, r in (("one", 4), ("two", 2)):
        add_adapter(model, name, LoraConfig(r=r), seed=r)
        for parameter in adapter_parameters(model, name).values():
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


SPANS = {
    "none": [],
    "all": [AdapterSpan("one", 0, 180)],
    "mixed": [AdapterSpan("one", 0, 100), AdapterSpan("two", 140, 180)],
}


def logits_and_gradients(model: Decoder, spans: list[AdapterSpan], learn: bool) -> list[Any]:
    """Return the logits of a row of sequences of 140 and 40 tokens, and adapter one's gradients."""
    ids = torch.randint(0, 128, (180,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(140), torch.arange(40)])
    with torch.set_grad_enabled(learn):
        logits = model.logits(model(ids, positions, CausalRow(model, [140, 40]), spans))
    if not learn:
        return [logits]
    own = list(adapter_parameters(model, "one").values())
    return [logits, *torch.autograd.grad(logits.logsumexp(-1).mean(), own)]


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("family", CONFIGS)
def test_an_accelerated_model_equals_the_plain_one(family: str, spans: str, learn: bool) -> None:
    if learn and spans == "none":
        learn = False  # nothing to learn, and no gradient either
    plain, quick = with_adapters(CONFIGS[family]), with_adapters(CONFIGS[family])
    accelerate(quick)
    results = [logits_and_gradients(model, SPANS[spans], learn) for model in (plain, quick)]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_the_same_when_activations_are_recomputed(checkpointing: bool) -> None:
    model = with_adapters(TINY)
    accelerate(model)
    expected = logits_and_gradients(model, SPANS["all"], True)
    model.checkpointing = checkpointing
    for got, wanted in zip(logits_and_gradients(model, SPANS["all"], True), expected, strict=True):
        assert torch.equal(got, wanted)


def test_an_adapter_that_has_changed_is_laid_out_anew_after_clear() -> None:
    plain, quick = with_adapters(TINY), with_adapters(TINY)
    accelerate(quick)
    for seed in (0, 1):
        for model in (plain, quick):
            for parameter in adapter_parameters(model, "one").values():
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
            model.ops.clear()
        expected, got = (logits_and_gradients(x, SPANS["all"], False) for x in (plain, quick))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_acceleration_leaves_every_weight_as_it_was() -> None:
    plain, quick = with_adapters(TINY), with_adapters(TINY)
    accelerate(quick)
    expected, got = plain.state_dict(), quick.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
