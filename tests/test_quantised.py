"""Rounded weights: every product sees the matrix they stand for, adapters and cache included."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_decoder
from test_engine import LetterTokenizer, chat, ids_of, plain_logits, plain_reply

from usbrec.chat import Sampling
from usbrec.llm.engine import Engine
from usbrec.llm.lora import (
    QUANTISED_ROWS,
    LoraConfig,
    LoraLinear,
    Route,
    Siblings,
    adapter_parameters,
    add_adapter,
)
from usbrec.llm.model import Decoder
from usbrec.llm.quantised import quantised
from usbrec.options import UserError

FITTING = replace(TINY, num_attention_heads=4, intermediate_size=64)  # int4: groups of 32 inputs
KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_with_adapter(kind: str, tied: bool = False) -> Decoder:
    model = random_decoder(replace(FITTING, tie_word_embeddings=tied))
    add_adapter(model, "one", LoraConfig(r=4), seed=0)
    for parameter in adapter_parameters(model, "one").values():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    model.quantise_weights(kind)
    return model


@KINDS
@DTYPES
def test_a_product_is_that_of_the_matrix_the_rounded_form_stands_for(
    kind: str, dtype: torch.dtype
) -> None:
    """bf16: the matrix and the result are rounded once each, by 2^-9 of their size at most."""
    weight, x = random(48, 64).to(dtype), random(3, 64, seed=1).to(dtype)
    form, matrix = quantised(weight, kind)
    expected = x.float() @ matrix.float().T
    off = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(form.product(x).float(), expected, rtol=off, atol=10 * off)


@KINDS
def test_a_weight_moves_by_half_a_step_at_most(kind: str) -> None:
    weight = random(48, 64)
    _, matrix = quantised(weight, kind)
    groups = weight if kind == "int8" else weight.unflatten(1, (-1, 32))
    wide = groups.abs().amax(-1) if kind == "int8" else groups.amax(-1) - groups.amin(-1)
    steps = wide / (127 if kind == "int8" else 15)
    moved = (matrix - weight).abs().view_as(groups).amax(-1)
    assert (moved <= steps * 0.501).all() and (moved > 0).all()


@DTYPES
def test_weights_on_a_grid_of_16_values_a_group_stay_as_they_are(dtype: torch.dtype) -> None:
    """Scales 2^-4 and offsets in eighths are exact in both dtypes; every group has both ends."""
    q = torch.randint(0, 16, (48, 2, 32), generator=torch.Generator().manual_seed(0))
    q[..., 0], q[..., 1] = 0, 15
    weight = (q / 16 + torch.arange(2)[:, None] / 8).flatten(1).to(dtype)
    assert torch.equal(quantised(weight, "int4")[1], weight)


@KINDS
def test_weights_that_are_all_equal_or_zero_stay_finite_and_as_they_are(kind: str) -> None:
    for value in (0.0, 0.5):
        form, matrix = quantised(torch.full((16, 32), value), kind)
        torch.testing.assert_close(matrix, torch.full((16, 32), value))
        torch.testing.assert_close(form.product(torch.ones(1, 32)), torch.full((1, 16), 32 * value))


@KINDS
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_the_same_result_whatever_form_its_rows_read(kind: str, bias: bool) -> None:
    """A row alone, among more rows than the rounded form is for, and in a pass with gradients."""
    layers = [LoraLinear(64, out, bias=bias) for out in (48, 16)]
    for seed, layer in enumerate(layers):
        layer.weight.copy_(random(layer.out_features, 64, seed=seed))
        if bias:
            layer.bias.copy_(random(layer.out_features, seed=seed + 2))
    together = Siblings(layers)
    together.quantise(kind)
    x = random(QUANTISED_ROWS + 1, 64, seed=1)
    learned = together(x, []).detach()
    with torch.no_grad():
        torch.testing.assert_close(together(x, []), learned)
        few = together(x[:QUANTISED_ROWS], [])
        assert not torch.equal(few, learned[:QUANTISED_ROWS])  # another form was read
        torch.testing.assert_close(few, learned[:QUANTISED_ROWS], rtol=1e-4, atol=1e-4)


@KINDS
def test_an_adapter_adds_the_same_to_a_rounded_weight(kind: str) -> None:
    layer = LoraLinear(64, 48)
    layer.weight.copy_(random(48, 64))
    layer.add("one", LoraConfig(r=4), torch.Generator().manual_seed(0))
    layer.lora_B["one"].data.normal_(generator=torch.Generator().manual_seed(1))
    x, route = random(2, 64, seed=3), [Route("one", 0, 2)]
    alone = Siblings([layer])
    with torch.no_grad():
        added = layer(x, route) - layer(x)
        alone.quantise(kind)
        alone.prepare("one")
        rounded = alone(x, route) - alone(x, [])
        torch.testing.assert_close(rounded, added, rtol=1e-4, atol=1e-4)


@KINDS
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_tokens_equal_uncached_ones(kind: str, tied: bool, temperature: float) -> None:
    """Prefill and the reference read the matrix, decoding the rounded form; turn 2 reads both."""
    model = model_with_adapter(kind, tied)
    engine = Engine(model, LetterTokenizer())
    sampling = Sampling(max_new_tokens=16, temperature=temperature)
    asked = [chat("a common beginning, one", "one"), chat("a common beginning, two")]
    for _ in range(2):
        replies = engine.generate(asked, sampling, [3, 4])
        for c, seed, reply in zip(asked, (3, 4), replies, strict=True):
            assert ids_of(reply) == plain_reply(model, c, sampling, seed)
        asked = [chat(c.messages[0].content + "!", c.adapter) for c in asked]
    assert engine.usage.reused_tokens > 0


@KINDS
def test_rounding_a_model_changes_its_logits_and_leaves_head_and_embeddings(kind: str) -> None:
    model = model_with_adapter(kind, tied=True)
    whole = random_decoder(replace(FITTING, tie_word_embeddings=True))
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    ids = list(range(3, 40))
    gap = (plain_logits(model, ids, None) - plain_logits(whole, ids, None)).abs().max()
    assert gap > 1e-3


def test_a_layer_that_does_not_fit_int4_is_named_and_nothing_is_rounded() -> None:
    model = random_decoder(TINY)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.o_proj has 48 and 32: take int8"):
        model.quantise_weights("int4")
    assert model.model.layers[0].self_attn.inputs.quantised is None
    model.quantise_weights("int8")


def test_another_device_is_refused() -> None:
    with pytest.raises(UserError, match="int8 weights work on the CPU only, the model is on meta"):
        random_decoder(TINY).to("meta").quantise_weights("int8")
