"""Folders made to harm: each is refused in one clear sentence, and nothing outside is read."""

import json
import os
import pickle
import random
import resource
import struct

import pytest
import torch
from edits import mutated
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_config, oracle_of

from usbrec.llm.adapter_files import load_adapter, save_adapter
from usbrec.llm.checkpoint import load_model, mapped_tensors, write_shards
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.llm.model_config import file_in, load_config
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.options import UserError
from usbrec.runs import write_json

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    oracle_of("llama-3.1").save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A sharded folder for faults to be put in."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in original.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def point_index(folder, file, name="model.norm.weight"):
    """Let the index say that the tensor `name` is in `file`."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(content))


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", "..\\x"],
)
def test_an_index_that_points_outside_is_refused_and_nothing_there_is_read(folder, name):
    outside = folder.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(48)}, outside)
    point_index(folder, name)
    with pytest.raises(UserError, match="leads out of the folder"):
        load_model(folder)


def test_a_link_that_leads_outside_is_refused(folder):
    outside = folder.parent / "outside.safetensors"
    shard = shard_of(folder, "model.norm.weight")
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(UserError, match="link that leads out of the folder"):
        load_model(folder)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link that leads out of the folder"):
        load_config(folder)
    with pytest.raises(UserError, match="link that leads out of the folder"):
        ChatTokenizer.from_folder(folder)


def test_the_hub_caches_links_into_its_blobs_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"blob-{path.name}", snapshot))
    load_model(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(UserError, match="link that leads out"):
        load_model(snapshot)


def test_a_missing_shard_is_named(folder):
    shard = shard_of(folder, "model.norm.weight")
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_model(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(folder):
    other = shard_of(folder, "model.embed_tokens.weight").name
    point_index(folder, other)
    with pytest.raises(UserError, match="lacks the tensor model.norm.weight"):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    other = shard_of(folder, "model.embed_tokens.weight")
    edit_tensors(other, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48)}))
    with pytest.raises(UserError, match="holds the tensor model.norm.weight"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_a_malformed_index_is_named(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(UserError, match=INDEX):
        load_model(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    file = shard_of(folder, "model.norm.weight")
    edit_tensors(file, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[47\], expected \[48\]"):
        load_model(folder)


def test_a_missing_and_an_extra_tensor_are_named(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(UserError, match="model.layers.2.input_layernorm.weight, which this model"):
        load_model(folder)
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(UserError, match="lacks the tensor model.layers.3"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(folder, value, dtype):
    def spoil(tensors):
        weight = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
        weight[3, 5] = value
        tensors["model.layers.1.mlp.up_proj.weight"] = weight

    edit_tensors(shard_of(folder, "model.layers.1.mlp.up_proj.weight"), spoil)
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinite"):
        load_model(folder)


def header_file(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": entry(0, 4)}, b"\0" * 3),  # truncated
        ({"a": entry(0, 4)}, b"\0" * 5),  # bytes that belong to nothing
        ({"a": entry(0, 4, (2,))}, b"\0" * 4),  # shape against bytes
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4),  # overlap
        ({"a": entry(4, 8)}, b"\0" * 8),  # gap
        ({"a": entry(4, 0)}, b"\0" * 4),
        ({"a": entry(-4, 0)}, b"\0" * 4),
        ({"a": entry(0, 4, (-1,))}, b"\0" * 4),
        ({"a": entry(0, 4, (1 << 62, 1 << 62))}, b"\0" * 4),
        ({"a": entry(0, 4, dtype="I32")}, b"\0" * 4),
        ({"a": entry(0, True)}, b"\0"),
        ({"a": 3}, b""),
        ([], b""),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"\0" * 4),  # twice
        (b'{"a"', b""),
        (b"[" * 100_000, b""),
        (b"\xff\xfe", b""),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, data):
    file = header_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        mapped_tensors(file)


@pytest.mark.parametrize("length", [4 << 30, (1 << 64) - 1, 0, 1, 1000])
def test_a_header_length_that_cannot_be_is_refused_without_reading_it(tmp_path, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(UserError, match="is damaged.*(?i:header)"):
        mapped_tensors(file)


def test_a_file_shorter_than_the_length_field_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    for size in range(8):
        file.write_bytes(b"\1" * size)
        with pytest.raises(UserError, match="damaged"):
            mapped_tensors(file)


class Trap:
    """Unpickling it makes a file: the test looks whether that happened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", INDEX, "config.json"])
def test_no_pickle_is_opened_under_any_name(tmp_path, original, name):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match="pickle" if name.endswith(".bin") else name):
        load_model(folder)
    assert not sprung.exists()


def test_no_adapter_pickle_is_opened(original, tmp_path):
    model, sprung = load_model(original), tmp_path / "sprung"
    add_adapter(model, "sft", LoraConfig(), seed=0)
    save_adapter(model, "sft", tmp_path, "base")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    load_adapter(model, tmp_path, "again")  # the safetensors file beside it is taken
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        load_adapter(model, tmp_path, "again")
    assert not sprung.exists()


def test_a_duplicate_key_in_a_settings_file_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"hidden_size": 1,' + text[1:])
    with pytest.raises(UserError, match="duplicate key 'hidden_size'"):
        load_model(folder)


def test_fuzzed_headers_are_read_or_refused(original, tmp_path):
    """Whatever the bytes: shapes that fit the file, or UserError; never another exception."""
    source = min(original.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = source.read_bytes()
    file = tmp_path / "model.safetensors"
    length = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    for seed in range(600):
        rng = random.Random(seed)
        file.write_bytes(mutated(rng, content[:length]) + content[length:])
        try:
            entries = mapped_tensors(file).values()
            assert sum(4 * torch.Size(e.shape).numel() for e in entries) <= len(content) + 60
        except UserError:
            refused += 1
    assert refused > 400


def test_fuzzed_end_ids_are_read_or_refused(default_model_folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((default_model_folder / name).read_bytes())
    for value in ("x", {"a": 1}, [[1]], [None], True, -1, 1.5):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": value})
        with pytest.raises(UserError, match="eos_token_id must be token ids"):
            ChatTokenizer.from_folder(tmp_path)


def test_a_plain_name_in_the_folder_is_found(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    assert file_in(tmp_path, "a.json") == tmp_path / "a.json"
    with pytest.raises(UserError, match="no such file"):
        file_in(tmp_path, "b.json")


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_no_part_of_a_model_and_is_one_sentence(tmp_path, room):
    """A limit of a file's size stands for the disk: the system's error is of the same kind."""
    weights = {"a": torch.ones(5000), "b": torch.ones(3)}
    sizes = {name: weight.nbytes for name, weight in weights.items()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match="model.safetensors cannot be written: File too large"):
            write_shards(tmp_path, sizes, weights.__getitem__)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    write_shards(tmp_path, sizes, weights.__getitem__)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    write_json(tmp_path / "any.json", {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "others may read the settings, but not the weights"
