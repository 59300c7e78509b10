"""The decoder and packed rows against transformers, and against themselves."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_decoder
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from usbrec.llm.lora import (
    LoraConfig,
    LoraLinear,
    Route,
    Siblings,
    adapter_parameters,
    add_adapter,
    prepare_adapter,
    remove_adapter,
)
from usbrec.llm.model import Decoder, ModelConfig
from usbrec.llm.packing import Branch, Tree, pack

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
    return reference.eval(), ModelConfig(model_type=kind, **settings)


def logits_of(model: Decoder, ids: list[int], routes: list[Route] | None = None) -> torch.Tensor:
    """The plain layout: one branch from its beginning."""
    row = pack([Tree([Branch(ids, [0] * len(ids))])])
    return model.logits(model(row.input_ids, row.position_ids, row.attention, routes or []))


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
    row = pack(trees)
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
def test_supervised_tokens_name_source_target_and_owner(seed: int) -> None:
    """Every weighted token that has a predecessor is a target; its source is the token before."""
    trees = random_trees(seed)
    row = pack(trees)
    expected, start, owner = [], 0, 0
    for tree in trees:
        ends: list[int] = []
        for branch in tree.branches:
            for i, weight in enumerate(branch.weights):
                before = start + i - 1
                if i == 0:
                    before = -1 if branch.parent is None else ends[branch.parent]
                if weight and before >= 0:
                    expected.append((before, branch.ids[i], owner))
            start += len(branch.ids)
            ends.append(start - 1)
            owner += 1
    found = zip(row.sources.tolist(), row.targets.tolist(), row.owners.tolist(), strict=True)
    assert list(found) == expected


def test_an_adapter_changes_its_own_rows_only(tiny_model: Decoder) -> None:
    """Rows outside the route equal the base bit for bit; a fresh adapter changes nothing at all."""
    add_adapter(tiny_model, "one", LoraConfig(r=4), seed=0)
    row = pack([Tree([Branch(list(range(n)), [0] * n)]) for n in (5, 9)])

    def hidden(*routes: Route) -> torch.Tensor:
        return tiny_model(row.input_ids, row.position_ids, row.attention, routes)

    with torch.no_grad():
        base = hidden()
        torch.testing.assert_close(hidden(Route("one", 0, 14)), base, atol=0, rtol=0)
        for name, parameter in adapter_parameters(tiny_model, "one").items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
        mixed = hidden(Route("one", 5, 14))
    assert torch.equal(mixed[:5], base[:5])
    assert not torch.allclose(mixed[5:], base[5:])


def test_every_adapter_tensor_gets_a_gradient_and_the_base_none(tiny_model: Decoder) -> None:
    add_adapter(tiny_model, "one", LoraConfig(r=4), seed=0)
    parameters = adapter_parameters(tiny_model, "one")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    logits_of(tiny_model, [1, 2, 3, 4], [Route("one", 0, 4)]).logsumexp(-1).sum().backward()
    assert len(parameters) == 3 * 7 * 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert all(p.grad is None for n, p in tiny_model.named_parameters() if "lora" not in n)


@pytest.mark.parametrize("rows", [3, 500])
@pytest.mark.parametrize("bias", [True, False])
def test_sibling_layers_give_the_same_together_and_each_by_itself(rows: int, bias: bool) -> None:
    """Adapters of two ranks, one of them at two of the layers alone; rows of neither between."""
    generator = torch.Generator().manual_seed(0)
    layers = [LoraLinear(32, out, bias=bias).bfloat16() for out in (48, 16, 16)]
    for layer in layers:
        for parameter in (layer.weight, layer.bias) if bias else (layer.weight,):
            parameter.data.normal_(0, 0.2, generator=generator)
    for name, r, own in (("one", 4, layers), ("two", 2, layers[1:])):
        for layer in own:
            layer.add(name, LoraConfig(r=r), generator)
            layer.lora_B[name].data.normal_(0, 0.3, generator=generator)
    x = torch.randn(rows + 9, 32, generator=generator).bfloat16()
    routes = [Route("one", 2, rows + 2), Route("two", rows + 5, rows + 9)]
    together = Siblings(layers)
    together.order()
    plain = [layer(x, routes) for layer in layers]  # with gradients
    for layer, out in zip(layers, plain, strict=True):
        wanted = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
        for name, start, stop in routes:
            if name in layer.lora_A:
                wanted[start:stop] += x[start:stop].float() @ layer.delta_weight(name).T
        torch.testing.assert_close(out.float(), wanted, rtol=2**-6, atol=2**-4)

    def compare() -> None:
        side_by_side = together(x, routes)
        torch.testing.assert_close(side_by_side, torch.cat(plain, -1), rtol=2**-6, atol=2**-4)
        assert torch.equal(torch.cat(list(together.apart(x, routes)), -1), side_by_side)

    compare()
    with torch.no_grad():
        for prepared in ("one", "two"):  # with one of them prepared, each layer works by itself
            compare()
            together.prepare(prepared)
        compare()
        if together.ordered is not None:
            assert torch.equal(together(x, routes)[:2], together(x, [])[:2])


def test_a_prepared_adapter_is_forgotten_when_it_is_removed_or_trained() -> None:
    model = random_decoder(TINY).bfloat16()
    model.order_weights()
    for seed in (0, 1):
        add_adapter(model, "one", LoraConfig(r=4), seed)
        for parameter in adapter_parameters(model, "one").values():
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        route = [Route("one", 0, 3)]
        plain = logits_of(model, [1, 2, 3], route).detach()
        prepare_adapter(model, "one")
        with torch.no_grad():
            off = logits_of(model, [1, 2, 3], route) - plain
        assert off.norm() < 0.03 * plain.norm()
        remove_adapter(model, "one")
