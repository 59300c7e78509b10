"""The decoder and packed rows against transformers, and against themselves."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from usbrec.llm.lora import (
    AdapterSpan,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    lora_layers,
    remove_adapter,
)
from usbrec.llm.model import Decoder, ModelConfig, attend, rms_norm, rotary_tables, rotate
from usbrec.llm.packing import Branch, Tree, pack
from usbrec.options import UserError

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
)
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def oracle(kind: str) -> tuple[torch.nn.Module, ModelConfig]:
    """A random transformers model and our settings for the same weights."""
    torch.manual_seed(1)
    settings = dict(SIZES, head_dim=8, rope_theta=10000.0)
    if kind == "qwen2":
        reference = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_theta=10000.0))
        settings["attention_bias"] = True
    elif kind == "llama31":
        reference = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA31_ROPE))
        settings.update(rope_theta=500000.0, rope_scaling=LLAMA31_ROPE)
    else:
        reference = LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=10000.0))
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return reference.eval(), ModelConfig(**settings)


def logits_of(
    model: Decoder, ids: list[int], spans: list[AdapterSpan] | None = None
) -> torch.Tensor:
    """The plain layout: one branch from its beginning."""
    row = pack([Tree([Branch(ids, [0] * len(ids))])], model)
    return model.logits(model(row.input_ids, row.position_ids, row.attention, spans or []))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama31"])
def test_logits_equal_those_of_transformers(kind: str) -> None:
    reference, config = oracle(kind)
    model = Decoder(config)
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert not missing and not unexpected
    ids = torch.randint(0, 128, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits_of(model, ids), theirs, atol=1e-4, rtol=1e-4)


def random_trees(seed: int) -> list[Tree]:
    """Two to four trees of random shape and unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    trees = []
    for _ in range(draw(2, 5)):
        branches: list[Branch] = []
        for number in range(draw(1, 6)):
            length = draw(1, 9)
            ids = [draw(0, 128) for _ in range(length)]
            weights = [float(draw(0, 2)) for _ in range(length)]
            branches.append(Branch(ids, weights, draw(0, number) if number else None))
        trees.append(Tree(branches))
    return trees


def path_ids(tree: Tree, number: int) -> list[int]:
    """The ids from the beginning to the end of a branch."""
    branch = tree.branches[number]
    past = [] if branch.parent is None else path_ids(tree, branch.parent)
    return past + list(branch.ids)


@pytest.mark.parametrize("seed", range(8))
def test_a_packed_row_equals_every_path_on_its_own(tiny_model: Decoder, seed: int) -> None:
    """Hidden states of each branch in the packed row are those of its path run alone."""
    trees = random_trees(seed)
    row = pack(trees, tiny_model)
    with torch.no_grad():
        packed = tiny_model.logits(tiny_model(row.input_ids, row.position_ids, row.attention))
        start = 0
        for tree in trees:
            for number, branch in enumerate(tree.branches):
                n = len(branch.ids)
                alone = logits_of(tiny_model, path_ids(tree, number))[-n:]
                torch.testing.assert_close(packed[start : start + n], alone, atol=1e-4, rtol=1e-4)
                start += n


@pytest.mark.parametrize("seed", range(4))
def test_supervised_tokens_name_position_target_and_segment(tiny_model: Decoder, seed: int) -> None:
    """Every weighted token that has a predecessor is a target, predicted at the token before it."""
    trees = random_trees(seed)
    row = pack(trees, tiny_model)
    expected, start, segment = [], 0, 0
    for tree in trees:
        ends: list[int] = []
        for branch in tree.branches:
            for i, weight in enumerate(branch.weights):
                before = start + i - 1
                if i == 0:
                    before = -1 if branch.parent is None else ends[branch.parent]
                if weight and before >= 0:
                    expected.append((before, branch.ids[i], segment))
            start += len(branch.ids)
            ends.append(start - 1)
            segment += 1
    columns = row.label_positions, row.targets, row.segment_ids
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


def test_an_adapter_changes_its_own_rows_only(tiny_model: Decoder) -> None:
    """Rows outside the span equal the base bit for bit; a fresh adapter changes nothing at all."""
    add_adapter(tiny_model, "one", LoraConfig(r=4), seed=0)
    row = pack([Tree([Branch(list(range(n)), [0] * n)]) for n in (5, 9)], tiny_model)

    def hidden(*spans: AdapterSpan) -> torch.Tensor:
        return tiny_model(row.input_ids, row.position_ids, row.attention, spans)

    with torch.no_grad():
        base = hidden()
        torch.testing.assert_close(hidden(AdapterSpan("one", 0, 14)), base, atol=0, rtol=0)
        for name, parameter in adapter_parameters(tiny_model, "one").items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
        mixed = hidden(AdapterSpan("one", 5, 14))
    assert torch.equal(mixed[:5], base[:5])
    assert not torch.allclose(mixed[5:], base[5:])


def test_every_adapter_tensor_gets_a_gradient_and_the_base_none(tiny_model: Decoder) -> None:
    add_adapter(tiny_model, "one", LoraConfig(r=4), seed=0)
    parameters = adapter_parameters(tiny_model, "one")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    logits_of(tiny_model, [1, 2, 3, 4], [AdapterSpan("one", 0, 4)]).logsumexp(-1).sum().backward()
    assert len(parameters) == 3 * 7 * 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert all(p.grad is None for n, p in tiny_model.named_parameters() if "lora" not in n)


def test_a_fresh_adapter_is_drawn_as_pefts_by_its_seed(tiny_model: Decoder) -> None:
    """A is uniform within 1 / sqrt(in), B is zero."""
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        add_adapter(tiny_model, name, LoraConfig(r=64), seed)
    for layer in lora_layers(tiny_model).values():
        A, bound = layer.lora_A["one"], layer.in_features**-0.5
        assert 0.95 * bound < A.max() <= bound and -bound <= A.min() < -0.95 * bound
        assert torch.equal(A, layer.lora_A["same"]) and not torch.equal(A, layer.lora_A["other"])
        assert not layer.lora_B["one"].any()


def test_a_removed_adapter_leaves_the_base(tiny_model: Decoder) -> None:
    ids = [1, 2, 3, 4]
    with torch.no_grad():
        base = logits_of(tiny_model, ids)
        add_adapter(tiny_model, "one", LoraConfig(r=4), seed=0)
        for parameter in adapter_parameters(tiny_model, "one").values():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(logits_of(tiny_model, ids, [AdapterSpan("one", 0, 4)]), base)
        remove_adapter(tiny_model, "one")
        assert torch.equal(logits_of(tiny_model, ids, [AdapterSpan("one", 0, 4)]), base)
    assert not adapter_parameters(tiny_model, "one")


def test_a_target_module_that_the_model_lacks_is_a_users_error(tiny_model: Decoder) -> None:
    with pytest.raises(UserError, match=r"names no linear layer of this model: \['c_attn'\]"):
        add_adapter(tiny_model, "one", LoraConfig(target_modules=("q_proj", "c_attn")), seed=0)
    assert not adapter_parameters(tiny_model, "one")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    """[3, 4] has mean square 12.5, with eps 0 the norm of [3, 4] is [3, 4] / 3.5355."""
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.5])
    expected = torch.tensor([[2 * 3 / 12.5**0.5, 0.5 * 4 / 12.5**0.5]])
    torch.testing.assert_close(rms_norm(x, weight, 0.0), expected)
    torch.testing.assert_close(rms_norm(x, weight, 3.5), expected * (12.5 / 16) ** 0.5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("r", [2, 4])
def test_rotation_equals_complex_multiplication(interleaved: bool, r: int) -> None:
    """A pair (a, b) turned by t is (a + ib) e^it; heads of 8 dimensions, 2 r of which turn."""
    angles, x = random(5, 1, r, seed=1), random(5, 3, 8)
    head, rest = x[..., : 2 * r], x[..., 2 * r :]
    pairs = head.unflatten(-1, (r, 2)) if interleaved else head.unflatten(-1, (2, r)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)
    back = torch.view_as_real(turned)
    back = back.flatten(-2) if interleaved else back.mT.flatten(-2)
    ours = rotate(x, *rotary_tables(angles, interleaved), interleaved)
    torch.testing.assert_close(ours, torch.cat((back, rest), -1))


@pytest.mark.parametrize("seed", range(3))
def test_attention_equals_torchs_own(seed: int) -> None:
    """Four query heads over two key heads, seven queries over twelve keys, under a random mask."""
    q, k, v = random(7, 4, 8), random(2, 12, 8, seed=1), random(2, 12, 8, seed=2)
    visible = torch.rand(7, 12, generator=torch.Generator().manual_seed(seed)) < 0.5
    visible[:, 3] = True
    wide_k, wide_v = (x.repeat_interleave(2, 0) for x in (k, v))
    scaled = torch.nn.functional.scaled_dot_product_attention
    expected = scaled(q.transpose(0, 1), wide_k, wide_v, attn_mask=visible).transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, visible), expected)


def test_in_bf16_norms_and_angles_are_computed_in_fp32(tiny_model: Decoder) -> None:
    """Each is the fp32 result rounded once; bf16 itself cannot tell position 1001 from 1000."""
    x, weight = random(5, 64).bfloat16(), torch.ones(64).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.float(), weight, 1e-5).bfloat16())
    places = torch.tensor([1000, 1001])
    exact = tiny_model.rotary(places)
    rounded = tiny_model.to(torch.bfloat16).rotary(places)
    assert all(torch.equal(y, z.bfloat16()) for y, z in zip(rounded[:2], exact[:2], strict=True))
