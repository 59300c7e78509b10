"""GGUF files converted to Hugging Face folders on arrival, with transformers as oracle."""

import json
import random
import shutil

import gguf
import numpy as np
import pytest
import torch
from test_checkpoint import LLAMA31_ROPE, logits_of, oracle_of, random_ids
from test_tokenizer import family_folder, normalized, random_chat, random_text
from tokenizers import Tokenizer, models

from usbrec.extras import default_model
from usbrec.extras.default_model import GGUF, find_model
from usbrec.extras.merge import merge
from usbrec.llm import checkpoint
from usbrec.llm.adapter_files import save_adapter
from usbrec.llm.checkpoint import load_model
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.llm.model import rotary_frequencies
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.options import UserError

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SPLIT = {"split_max_tensors", "small_first_shard"}
KINDS = {"smollm2": "smollm", "llama3.1": "llama-bpe", "qwen2.5": "qwen2"}


def permuted(weight, heads):
    """What llama.cpp's converter does to the rows of q and k in Llama models."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name):
    names = {theirs: ours for ours, theirs in GGUF["tensors"].items()}
    path, _, kind = name.rpartition(".")
    if path.startswith("model.layers."):
        number, _, rest = path.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{names[rest]}.{kind}"
    return f"{names[path]}.{kind}"


def write_gguf(path, model, tokenizer=None, quantisation="F32", doubled_factor=None, **overrides):
    """Write transformers' `model` (and a tokenizer's folder) as llama.cpp's converter would."""
    config = model.config
    arch = config.model_type
    split = {key: overrides.pop(key) for key in SPLIT & overrides.keys()}
    writer = gguf.GGUFWriter(path, overrides.pop("architecture", arch), **split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:  # else it need not be there
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(overrides.pop("eos", 2))
    for key, value in overrides.items():
        if isinstance(value, str):
            writer.add_string(key.replace("__", "."), value)
        else:
            writer.add_uint32(key.replace("__", "."), value)
    write_tokenizer(writer, *(tokenizer or few_tokens(config.vocab_size)))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            q = "q_proj" in name
            data = permuted(data, config.num_attention_heads if q else config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType["F32" if data.ndim == 1 else quantisation]
        data = data if kind.name == "F32" else gguf.quantize(data, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    scaling = config.rope_parameters
    if scaling["rope_type"] == "llama3":
        asked = scaling["rope_theta"], config.head_dim
        factors = (rotary_frequencies(*asked, None) / rotary_frequencies(*asked, scaling)).numpy()
        if doubled_factor is not None:
            factors[doubled_factor] *= 2
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer, tokenizer, pre):
    """Write a byte-level BPE's tokens in the order of their ids, its merges and control tokens."""
    content = json.loads(tokenizer.to_str())
    added = {token["content"] for token in content["added_tokens"]}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)


def few_tokens(count):
    """(a tokenizer of so many tokens and a single merge, its pre-tokenizer's name)."""
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(3, count))]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")])
    return Tokenizer(bpe), "smollm"


def converted(path):
    """Return the folder that a GGUF file becomes, in `models` beside it."""
    return find_model(str(path), path.parent / "models")


def oracle(name, **extra):
    import transformers as hf

    config = oracle_of(name).config
    rope = dict(LLAMA31_ROPE, original_max_position_embeddings=8192)
    if name == "llama-3.1":
        extra["rope_parameters"] = rope
    settings = {**config.to_dict(), **SIZES, "head_dim": 16, **extra}
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(type(config)(**settings)).eval()


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *((x, {}) for x in ("llama-3.1", "llama-tied", "qwen2.5", "qwen2.5-tied")),
        ("llama-tied", {"num_key_value_heads": 4}),  # as many as of queries: not in the file
    ],
)
def test_logits_equal_transformers(name, heads, tmp_path):
    model = oracle(name, **heads)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    path = write_gguf(tmp_path / "model.gguf", model)
    loaded = load_model(converted(path))
    for parameter in model.parameters():  # as the folder's weights are
        parameter.data = parameter.data.bfloat16().float()
    ids = random_ids()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(loaded, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_unpacked(kind, tmp_path):
    """Within the step of the quantisation, or bf16's; a wrong order of rows would be far off."""
    model = oracle("llama-tied")
    loaded = load_model(converted(write_gguf(tmp_path / "x.gguf", model, quantisation=kind)))
    steps = {"F16": 5e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q5_0": 0.08, "Q5_1": 0.08}
    for name, parameter in loaded.named_parameters():
        expected = model.state_dict()[name]
        assert (parameter - expected).abs().max() <= steps.get(kind, 0.16) * expected.abs().max()


@pytest.fixture(params=["llama3.1", "qwen2.5", "smollm2"])
def with_tokenizer(request, tmp_path):
    """(a GGUF file with a family's tokenizer, the family's own folder)."""
    if request.param == "smollm2":
        folder = request.getfixturevalue("default_model_folder")
    else:
        folder = family_folder(request.param, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    name = "qwen2.5" if request.param == "qwen2.5" else "llama-tied"
    model = oracle(name, vocab_size=tokenizer.get_vocab_size())
    path = tmp_path / "model.gguf"
    return write_gguf(path, model, (tokenizer, KINDS[request.param])), folder


def test_the_tokenizer_inside_equals_the_familys_own(with_tokenizer):
    path, folder = with_tokenizer
    ours, expected = (ChatTokenizer.from_folder(f) for f in (converted(path), folder))
    assert ours.chat_format == expected.chat_format
    for seed in range(200):
        text = random_text(random.Random(seed), 120)
        assert ours.encode(text) == expected.encode(text)
        assert ours.decode(ours.encode(text)) == normalized(ours, text)
        chat = random_chat(random.Random(seed))
        assert ours.prompt(chat) == expected.prompt(chat)


def test_a_gguf_file_merges_into_a_folder_that_transformers_loads(with_tokenizer, tmp_path):
    import transformers as hf

    path, folder = with_tokenizer
    base = converted(path)
    model = load_model(base)
    add_adapter(model, "sft", LoraConfig(r=2), seed=0)
    save_adapter(model, "sft", tmp_path / "adapter", "base")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    expected = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a film from 1999 <|im_end|>") == expected("a film from 1999 <|im_end|>")


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"architecture": "gpt2"}, "gpt2"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__attention__sliding_window": 128}, "sliding_window"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type"),
        ({"llama__rope__scaling__factor": 4}, "rope.scaling.factor"),
        ({"llama__rope__scale_linear": 4}, "rope.scale_linear"),
        ({"llama__attention__causal": 0}, "attention.causal"),
        ({"llama__rope__dimension_count": 8}, "part of a head"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(tmp_path, overrides, named):
    path = write_gguf(tmp_path / "model.gguf", oracle("llama-tied"), **overrides)
    with pytest.raises(UserError, match=named):
        converted(path)
    assert list((tmp_path / "models").iterdir()) == []


def test_an_unknown_pre_tokenizer_is_refused_by_name(with_tokenizer, tmp_path, monkeypatch):
    path, _ = with_tokenizer
    monkeypatch.setitem(GGUF, "tokenizers", {"other": {}})
    with pytest.raises(UserError, match="pre-tokenizer"):
        converted(path)


def test_rope_factors_that_are_not_llama3s_are_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", oracle("llama-3.1"), doubled_factor=3)
    with pytest.raises(UserError, match="rope_freqs.weight is not Llama 3.1's"):
        converted(path)


def test_damaged_files_are_one_clear_error(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", oracle("llama-tied"))
    content = path.read_bytes()
    for cut in (0, 3, 10, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match="model.gguf"):
            converted(path)
    with pytest.raises(UserError, match="no such folder or GGUF file"):
        converted(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["sha256-0a1b", "MODEL.GGUF", "Llama-3.2", "model.bin"])
def test_a_gguf_file_is_told_by_its_first_bytes(tmp_path, name):
    path = write_gguf(tmp_path / "model.gguf", oracle("llama-tied")).rename(tmp_path / name)
    load_model(converted(path))
    path.write_bytes(b"GGU " + path.read_bytes()[4:])
    with pytest.raises(UserError, match=f"{name}: neither a model's folder nor a GGUF file"):
        converted(path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(the tied model, its GGUF file in parts: the first has no tensors, the others up to 12)."""
    folder, model = tmp_path_factory.mktemp("parts"), oracle("llama-tied")
    write_gguf(folder / "m.gguf", model, split_max_tensors=12, small_first_shard=True)
    return model, sorted(folder.glob("m-0000?-of-0000?.gguf"))


def test_all_parts_are_read_from_any_of_them(parts):
    model, paths = parts
    assert [path.name for path in paths] == [f"m-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    [folder] = {converted(path) for path in paths}  # converted once
    weights = load_model(folder).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight.bfloat16().float(), atol=0, rtol=0)


def test_a_part_without_the_others_is_refused(parts, tmp_path):
    _, paths = parts
    for path in paths[:3]:
        shutil.copy(path, tmp_path)
    for path in paths[:3]:
        with pytest.raises(UserError, match="is by its name one of 4 parts: .*m-00004-of-00004"):
            converted(tmp_path / path.name)
    for path in paths:
        with pytest.raises(
            UserError, match="renamed is one of several parts: name them X-00001-of"
        ):
            converted(shutil.copy(path, tmp_path / "renamed"))


def test_a_file_of_a_vocabulary_alone_is_refused(tmp_path):
    model = oracle("llama-tied")
    model.state_dict = dict
    with pytest.raises(UserError, match="v.gguf has no tensor token_embd.weight: is it a vocab"):
        converted(write_gguf(tmp_path / "v.gguf", model))


def test_a_file_that_names_one_end_id_ends_at_the_other_end_tokens_too(tmp_path):
    """Qwen2.5's file names <|im_end|>, its own generation_config.json <|endoftext|> as well."""
    folder = family_folder("qwen2.5", tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = oracle("qwen2.5", vocab_size=tokenizer.get_vocab_size())
    end, other = map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>"))
    path = write_gguf(tmp_path / "q.gguf", model, (tokenizer, "qwen2"), eos=end)
    assert (
        json.loads((converted(path) / "generation_config.json").read_text())["eos_token_id"] == end
    )
    assert ChatTokenizer.from_folder(converted(path)).stop_ids == {end, other}


def test_a_file_is_converted_once_and_anew_when_it_has_changed(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", oracle("llama-tied"))
    first = converted(path)
    assert first.parent == tmp_path / "models" and first.name.startswith("model-")
    with monkeypatch.context() as patch:
        patch.setattr(default_model, "unpack", None)  # a second call needs nothing
        assert converted(path) == first
        assert converted(path.rename(tmp_path / "models" / "model.gguf").rename(path)) == first
    before = load_model(first).model.norm.weight
    changed = oracle("llama-tied")
    changed.model.norm.weight.data.mul_(2)
    size = path.stat().st_size
    write_gguf(path, changed)
    assert path.stat().st_size == size
    second = converted(path)
    assert second != first
    assert torch.equal(load_model(second).model.norm.weight, 2 * before)
    assert torch.equal(load_model(converted(path)).model.norm.weight, 2 * before)


def test_a_large_file_is_converted_a_shard_at_a_time(tmp_path, monkeypatch):
    """Shards of 20 kB; the embeddings alone are 12 kB, each matrix of an MLP 12 kB."""
    path = write_gguf(tmp_path / "model.gguf", oracle("qwen2.5"))
    written = []
    save = checkpoint.save

    def recorded(tensors, *args, **kwargs):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        return save(tensors, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", recorded)
    default_model.unpack(path, tmp_path / "single")
    assert len(written) == 1
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    default_model.unpack(path, tmp_path / "sharded")
    assert len(written) > 6 and max(written[1:]) <= 20_000
    one, many = (load_model(tmp_path / name).state_dict() for name in ("single", "sharded"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", oracle("llama-tied"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(path)
    assert list((tmp_path / "models").iterdir()) == []
    (converted(path) / "model.safetensors").write_bytes(b"torn")
    load_model(converted(path))
