"""Folders of every family into our decoder, with transformers as oracle."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from usbrec.llm import checkpoint
from usbrec.llm.checkpoint import load_model
from usbrec.llm.model_config import load_config
from usbrec.llm.packing import Branch, Tree, pack
from usbrec.options import UserError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # at the default 0.02 attention is all but uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def oracle_of(name):
    """A tiny random model of transformers in the layout of the family `name`, fp32."""
    import transformers as hf

    torch.manual_seed(0)
    kinds = {
        "llama-2": (hf.LlamaForCausalLM, hf.LlamaConfig, {"num_key_value_heads": 6}),
        "llama-3": (hf.LlamaForCausalLM, hf.LlamaConfig, {"rope_theta": 500000.0}),
        "llama-3.1": (hf.LlamaForCausalLM, hf.LlamaConfig, {"rope_parameters": LLAMA31_ROPE}),
        "llama-3.2": (
            *(hf.LlamaForCausalLM, hf.LlamaConfig),
            {"rope_parameters": {**LLAMA31_ROPE, "factor": 32.0}, "tie_word_embeddings": True},
        ),
        "llama-tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
        "llama-wide-head": (hf.LlamaForCausalLM, hf.LlamaConfig, {"head_dim": 16}),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": None}),
        "qwen2.5": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
        "qwen2.5-tied": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {"tie_word_embeddings": True}),
    }
    model_class, config_class, extra = kinds[name]
    model = model_class(config_class(**{**SIZES, **extra})).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:  # else all zeros and all ones
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return model


LLAMAS = ["llama-2", "llama-3", "llama-3.1", "llama-3.2", "llama-tied", "llama-wide-head"]
FAMILIES = [*LLAMAS, "mistral", "qwen2.5", "qwen2.5-tied"]


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """(folder as transformers saves it, the model itself)."""
    model = oracle_of(request.param)
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama's folder, for faults to be put in."""
    oracle_of("llama-3.1").save_pretrained(tmp_path)
    return tmp_path


def logits_of(model, ids):
    """(T,) ids -> (T, V): our decoder over a single row."""
    packed = pack([Tree([Branch(ids, [0.0] * len(ids))])], model)
    with torch.no_grad():
        hidden = model(packed.input_ids, packed.position_ids, packed.attention)
        return model.logits(hidden)


def random_ids(length=100, vocab_size=96):
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def test_logits_equal_transformers_in_fp32(family):
    folder, oracle = family
    ids = random_ids()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(load_model(folder), ids), expected, atol=1e-4, rtol=0)


def test_a_sharded_folder_equals_a_single_file(family, tmp_path_factory):
    folder, oracle = family
    sharded = tmp_path_factory.mktemp("sharded")
    oracle.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = load_model(folder).state_dict(), load_model(sharded).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_frequencies_that_old_checkpoints_hold_are_passed_over(folder, tmp_path_factory):
    """In a single file, and in shards whose index names them; either way they are computed."""
    expected, tensors = load_model(folder).state_dict(), load_file(folder / "model.safetensors")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file({**tensors, **old}, folder / "model.safetensors")
    sharded = tmp_path_factory.mktemp("sharded")
    (sharded / "config.json").write_bytes((folder / "config.json").read_bytes())
    parts = {"a.safetensors": tensors, "b.safetensors": old}
    for name, part in parts.items():
        save_file(part, sharded / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for each in (folder, sharded):
        found = load_model(each).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_shards_are_as_full_as_they_may_be_and_two_have_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)
    sizes = {"a": 60, "b": 40, "c": 60}
    checkpoint.write_shards(tmp_path, sizes, lambda name: torch.zeros(sizes[name] // 4))
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1]}
    assert index["metadata"] == {"total_size": 160}
    assert sorted(load_file(tmp_path / names[0])) == ["a", "b"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_in_place_of_weights_is_refused_by_name(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_frozen_in_the_target_dtype(folder, dtype):
    model = load_model(folder, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype and not parameter.requires_grad
        assert torch.equal(parameter, stored[name].to(dtype))


def test_the_weights_do_not_live_in_the_file(folder):
    """Copied, not mapped: a file that is changed or removed afterwards changes no weight."""
    model = load_model(folder)
    before = model.model.norm.weight.clone()
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(-4096, 2)
        handle.write(b"\0" * 4096)
    assert torch.equal(model.model.norm.weight, before)


def test_a_tied_head_is_the_embeddings(tmp_path):
    oracle_of("llama-tied").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_stored_head_that_contradicts_tying_is_refused(tmp_path):
    oracle_of("llama-tied").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    load_model(tmp_path)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="tie_word_embeddings.*lm_head.weight"):
        load_model(tmp_path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": None}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 10000.0, "factor": 8.0}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"original_max_position_embeddings": 32}, "original_max_position_embeddings"),
        ({"is_causal": False}, "is_causal"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"num_experts": 8}, "num_experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rope_parameters": {**LLAMA31_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_a_setting_that_is_not_honoured_is_refused_by_name(folder, changes, named):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=named):
        load_model(folder)


def test_a_window_as_wide_as_the_context_is_no_window(folder):
    edit_config(folder, model_type="mistral", sliding_window=512)
    assert not load_config(folder).attention_bias
    edit_config(folder, model_type="qwen2", sliding_window=128, use_sliding_window=False)
    assert load_config(folder).attention_bias


def test_rope_settings_are_read_in_both_spellings(folder):
    new = load_config(folder)
    scaling = {key: value for key, value in LLAMA31_ROPE.items() if key != "rope_theta"}
    edit_config(folder, rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    assert load_config(folder) == new
    assert new.rope_theta == 500000.0


def test_rope_scaling_beside_rope_parameters_counts_as_in_transformers(folder):
    """As model cards tell people to add it; without a theta of its own it has the usual one."""
    import transformers as hf

    scaling = {key: value for key, value in LLAMA31_ROPE.items() if key != "rope_theta"}
    edit_config(folder, rope_scaling={**scaling, "factor": 2.0})
    oracle, ids = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), random_ids()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(load_model(folder), ids), expected, atol=1e-4, rtol=0)


def test_a_missing_folder_or_config_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no such file: .*nowhere/config.json"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file: .*config.json"):
        load_model(tmp_path)


def test_the_default_models_logits_equal_transformers(default_model_folder):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.float32)
    ids = random_ids(60, 49152)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    actual = logits_of(load_model(default_model_folder), ids)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
