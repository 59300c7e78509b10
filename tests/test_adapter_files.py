"""Adapters in peft's files, both ways, and merged weights that transformers loads.

For ChatGLM3, which transformers does not have, peft works on a small module with its names.
"""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import FAMILIES, logits_of, oracle_of, random_ids

from usbrec.extras.merge import main as merge_main
from usbrec.extras.merge import merge
from usbrec.llm.adapter_files import load_adapter, read_adapter, save_adapter
from usbrec.llm.checkpoint import empty_decoder, load_model
from usbrec.llm.lora import AdapterSpan, LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.model_config import load_config
from usbrec.llm.packing import Branch, Tree, pack
from usbrec.options import UserError

LAYOUTS = {
    "all linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "subset": {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "one layer": {"r": 2, "lora_alpha": 3, "target_modules": ["model.layers.1.mlp.down_proj"]},
    "pattern": {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.[02]\..*o_proj"},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "use_rslora": True},
}


def adapted_logits(model, ids, name):
    packed = pack([Tree([Branch(ids, [0.0] * len(ids))])], model)
    spans = [AdapterSpan(name, 0, len(ids))]
    with torch.no_grad():
        return model.logits(model(packed.input_ids, packed.position_ids, packed.attention, spans))


def randomise(parameters):
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.data.normal_(0, 0.2, generator=generator)


def oracle_logits(oracle, ids):
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    oracle_of(request.param).save_pretrained(folder)
    return folder, request.param


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    oracle_of("llama-3.1").save_pretrained(folder)
    return folder


def peft_adapter(name, layout, folder):
    """Save a random adapter by peft; return peft's model."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", **LAYOUTS[layout])
    oracle = peft.get_peft_model(oracle_of(name), config).eval()
    randomise(p for key, p in oracle.named_parameters() if "lora_" in key)
    oracle.save_pretrained(folder)
    return oracle


def our_adapter(base, folder, **options):
    """Save a random adapter of ours; return our model."""
    model = load_model(base)
    add_adapter(model, "sft", LoraConfig(**options), seed=0)
    randomise(adapter_parameters(model, "sft").values())
    save_adapter(model, "sft", folder, str(base))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pefts_adapters_load_with_equal_logits(base, layout, tmp_path):
    folder, name = base
    oracle = peft_adapter(name, layout, tmp_path)
    model = load_model(folder)
    load_adapter(model, tmp_path, "theirs")
    config, _ = read_adapter(model, tmp_path)
    assert (config.r, config.lora_alpha) == (LAYOUTS[layout]["r"], LAYOUTS[layout]["lora_alpha"])
    ids = random_ids(40)
    expected = oracle_logits(oracle, ids)
    actual = adapted_logits(model, ids, "theirs")
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (actual - logits_of(model, ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 5.0, "target_modules": ("k_proj", "up_proj")},
        {"use_rslora": True},
        {"lora_alpha": 2.5},
    ],
)
def test_our_adapters_load_in_peft_with_equal_logits(base, options, tmp_path):
    import peft

    folder, name = base
    model = our_adapter(folder, tmp_path, **options)
    oracle = peft.PeftModel.from_pretrained(oracle_of(name), tmp_path).eval()
    ids = random_ids(40)
    actual = adapted_logits(model, ids, "sft")
    torch.testing.assert_close(actual, oracle_logits(oracle, ids), atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_loads_as_the_same(llama, tmp_path):
    model = our_adapter(llama, tmp_path, r=4)
    again = load_model(llama)
    load_adapter(again, tmp_path, "other")
    before, after = adapter_parameters(model, "sft"), adapter_parameters(again, "other")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in after.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pefts_adapter_saved_again_is_what_it_was(base, layout, tmp_path):
    """Rank, alpha and rsLoRA as they came; peft computes the same from the second file."""
    import peft

    folder, name = base
    oracle = peft_adapter(name, layout, tmp_path / "theirs")
    model = load_model(folder)
    load_adapter(model, tmp_path / "theirs", "adapter")
    save_adapter(model, "adapter", tmp_path / "ours", str(folder))
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "use_rslora"):
        assert settings[key] == LAYOUTS[layout].get(key, False)
    again = peft.PeftModel.from_pretrained(oracle_of(name), tmp_path / "ours").eval()
    ids = random_ids(40)
    assert torch.equal(oracle_logits(again, ids), oracle_logits(oracle, ids))
    load_adapter(model, tmp_path / "ours", "again")  # it names the layers that it has, no others
    first, second = (adapter_parameters(model, x) for x in ("adapter", "again"))
    assert first.keys() == second.keys()


def test_loading_over_a_name_replaces_the_adapter(llama, tmp_path):
    model = our_adapter(llama, tmp_path, r=4)
    ids = random_ids(10)
    expected = adapted_logits(model, ids, "sft")
    randomise(p * 2 for p in adapter_parameters(model, "sft").values())
    load_adapter(model, tmp_path, "sft")
    assert torch.equal(adapted_logits(model, ids, "sft"), expected)


def test_an_adapter_of_fewer_layers_leaves_nothing_of_the_one_it_replaces(llama, tmp_path):
    model = our_adapter(llama, tmp_path / "all")
    our_adapter(llama, tmp_path / "few", target_modules=("q_proj",))
    load_adapter(model, tmp_path / "few", "sft")
    assert {path.split(".")[-3] for path in adapter_parameters(model, "sft")} == {"q_proj"}


def test_an_alpha_of_zero_is_no_adapter(llama, tmp_path):
    model = our_adapter(llama, tmp_path)
    path, ids = tmp_path / "adapter_config.json", random_ids(10)
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 0}))
    load_adapter(model, tmp_path, "none")
    assert read_adapter(model, tmp_path)[0].lora_alpha == 0
    assert torch.equal(adapted_logits(model, ids, "none"), logits_of(model, ids))


def test_an_adapter_is_refused_on_its_base_with_an_adapter_merged_in(llama, tmp_path):
    our_adapter(llama, tmp_path / "adapter")
    merge(llama, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(UserError, match="merged into it already: name the base"):
        load_adapter(load_model(tmp_path / "merged"), tmp_path / "adapter", "again")


def test_a_base_without_values_knows_no_weight_beside_loras(llama, tmp_path):
    """As on the meta device, where adapters are checked before a model is loaded."""
    our_adapter(llama, tmp_path, target_modules=("q_proj",))
    key, path = "base_model.model.model.norm.weight", tmp_path / "adapter_model.safetensors"
    own = load_file(llama / "model.safetensors")["model.norm.weight"]
    save_file({**load_file(path), key: own}, path)
    read_adapter(load_model(llama), tmp_path)
    with pytest.raises(UserError, match="norm.weight, neither LoRA"):
        read_adapter(empty_decoder(load_config(llama)), tmp_path)


def test_keys_and_settings_are_pefts(llama, tmp_path):
    our_adapter(llama, tmp_path, target_modules=("q_proj",))
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 16, "LORA")


def test_an_interrupted_save_leaves_the_old_adapter(llama, tmp_path, monkeypatch):
    model = our_adapter(llama, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    randomise(p for p in adapter_parameters(model, "sft").values())

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("usbrec.runs.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, "sft", tmp_path, "base")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [90, 91]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"some_new_thing": {"a": 1}}, "some_new_thing"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r must"),
        ({"r": 100_000}, "r must"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 1e10}, "lora_alpha"),
        ({"lora_alpha": 1e-40}, "lora_alpha"),
        ({"target_modules": ["proj"]}, "names no linear layer"),
        ({"target_modules": ["q.proj"]}, "names no linear layer"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"target_modules": "("}, "pattern"),
        ({"r": 5}, r"lora_A.weight has shape \[8, 48\], expected \[5, 48\]"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks the tensor .*k_proj.lora_A"),
    ],
)
def test_what_is_not_honoured_in_adapter_config_is_refused_by_name(llama, tmp_path, changes, named):
    model = our_adapter(llama, tmp_path, target_modules=("q_proj",))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=named):
        load_adapter(model, tmp_path, "again")
    assert not adapter_parameters(model, "again")


def test_an_adapter_of_another_base_is_refused_with_key_and_shapes(llama, tmp_path):
    import transformers as hf

    our_adapter(llama, tmp_path / "adapter")
    config = hf.LlamaConfig.from_pretrained(llama, hidden_size=60, num_hidden_layers=2, head_dim=8)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    message = r"layers.0.self_attn.q_proj.lora_A.weight has shape \[8, 48\], expected \[8, 60\]"
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(tmp_path / "other"), tmp_path / "adapter", "sft")


@pytest.mark.parametrize("name", ["llama-3.1", "llama-tied", "qwen2.5"])
@pytest.mark.parametrize(
    "saved, wanted",
    [
        ({"target_modules": ["q_proj", "c_attn", "query_key_value"]}, "q_proj"),
        ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, "v_proj"),
        ({"target_modules": ["v_proj"], "modules_to_save": ["norm"]}, "v_proj"),
    ],
)
def test_spare_targets_and_weights_kept_as_they_were_load_as_in_peft(name, saved, wanted, tmp_path):
    import peft

    oracle_of(name).save_pretrained(tmp_path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **saved)
    oracle = peft.get_peft_model(oracle_of(name), config).eval()
    randomise(p for key, p in oracle.named_parameters() if "lora_" in key)
    oracle.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path)
    load_adapter(model, tmp_path / "adapter", "theirs")
    assert {path.split(".")[-3] for path in adapter_parameters(model, "theirs")} == {wanted}
    ids = random_ids(20)
    expected = oracle_logits(oracle, ids)
    torch.testing.assert_close(adapted_logits(model, ids, "theirs"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["other values", "more rows", "head adapted", "a bf16 base"])
def test_a_weight_beside_loras_loads_if_it_is_the_bases_alone(change, llama, tmp_path):
    our_adapter(llama, tmp_path, target_modules=("q_proj",))
    model = load_model(llama, torch.bfloat16 if change == "a bf16 base" else torch.float32)
    key = "base_model.model.model.embed_tokens.weight"
    whole, named = load_file(llama / "model.safetensors")["model.embed_tokens.weight"], key
    if change == "other values":
        whole[3, 3] += 1
    elif change == "more rows":
        whole = torch.cat([whole, whole[:1]])
    elif change == "a bf16 base":
        named = ""
    elif change == "head adapted":
        named = "base_model.model.lm_head.lora_A.weight, neither LoRA of a linear"
        key, whole = "base_model.model.lm_head.lora_A.weight", torch.ones(2, 48)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), key: whole}, file)
    with pytest.raises(UserError, match=named) if named else nullcontext():
        load_adapter(model, tmp_path, "again")


@pytest.mark.parametrize("fault", ["missing", "extra", "nan", "pickle", "no folder", "truncated"])
def test_a_faulty_adapter_file_is_one_clear_error(llama, tmp_path, fault):
    model = our_adapter(llama, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    named = key
    if fault == "missing":
        del tensors[key]
    elif fault == "extra":
        named = "base_model.model.lm_head.lora_A.weight"
        tensors[named] = torch.ones(1)
    elif fault == "nan":
        tensors[key][0, 0] = float("nan")
    save_file(tensors, file)
    if fault == "pickle":
        named = "adapter_model.bin is a pickle"
        file.rename(tmp_path / "adapter_model.bin")
    elif fault == "no folder":
        named, tmp_path = "no such file: .*nowhere/adapter_config.json", tmp_path / "nowhere"
    elif fault == "truncated":
        named = "truncated"
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=named):
        load_adapter(model, tmp_path, "again")


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_merged_weights_load_in_transformers_and_equal_the_adapter(
    base, tmp_path, shard_bytes, monkeypatch
):
    import transformers as hf

    monkeypatch.setattr("usbrec.llm.checkpoint.SHARD_BYTES", shard_bytes)
    folder, _ = base
    model = our_adapter(folder, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    shards = list((tmp_path / "merged").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 1 << 30)
    # in fp64 on both sides, for in fp32 transformers' own rounding alone exceeds 1e-4
    oracle = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    ids = random_ids(40)
    expected = adapted_logits(model.double(), ids, "sft").float()
    truth = oracle_logits(oracle.eval(), ids).float()
    torch.testing.assert_close(expected, truth, atol=1e-4, rtol=1e-4)
    ours = logits_of(load_model(tmp_path / "merged", torch.float64), ids).float()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_merging_happens_in_fp32_and_keeps_the_dtype(llama, tmp_path):
    """bf16 base 1.0, delta 2 x 0.0029: summed in fp32 and rounded once; bf16 steps are 0.0078."""
    model = our_adapter(llama, tmp_path / "adapter", target_modules=("q_proj",))
    base = tmp_path / "base"
    oracle_of("llama-3.1").to(torch.bfloat16).save_pretrained(base)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    layer = model.model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = layer.configs["sft"].scaling * (layer.lora_B["sft"].data @ layer.lora_A["sft"].data)
    expected = before[name].float() + delta
    assert after[name].dtype == torch.bfloat16
    assert torch.equal(after[name], expected.to(torch.bfloat16))
    unchanged = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[unchanged], before[unchanged])


def test_a_second_merge_is_refused(llama, tmp_path, capsys):
    our_adapter(llama, tmp_path / "adapter")
    flags = ["--adapter", str(tmp_path / "adapter"), "--model"]
    assert merge_main([*flags, str(llama), "--out", str(tmp_path / "once")]) == 0
    assert merge_main([*flags, str(tmp_path / "once"), "--out", str(tmp_path / "twice")]) == 2
    assert "merged into it already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    assert merge_main([*flags, str(llama), "--out", str(tmp_path / "once")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "once"}
