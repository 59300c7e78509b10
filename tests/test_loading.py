"""The models behind a run are what its options say."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_decoder
from small_run import write_small_model
from test_merge import whole_model

from usbrec.chat import Message, Request
from usbrec.crs.dialogue import Example
from usbrec.extras.default_model import find_model
from usbrec.llm.adapter_files import save_adapter
from usbrec.llm.cache import token_bytes
from usbrec.llm.engine import default_kv_bytes
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.loading import (
    ModelOptions,
    Models,
    load_engine,
    pick_rows,
    usage_of,
    weights_digest,
)
from usbrec.options import UserError

HELLO = (Message("user", "Hello"),)


def rows_of(sizes):
    """Return examples of dialogues that have so many rows each."""
    return [Example(name, turn, (), "", ()) for name, n in sizes.items() for turn in range(n)]


def test_a_dialogue_of_many_rows_is_picked_as_often_as_one_of_a_single_row():
    """5 of 10 dialogues: in 400 picks each stands some 200 times, with a deviation of 10."""
    rows = rows_of({"many": 9, **{f"one {i}": 1 for i in range(9)}})
    picks = [pick_rows(rows, 5, seed, apart=True) for seed in range(400)]
    assert all(len({x.dialog_id for x in pick}) == 5 for pick in picks)
    counts = Counter(x.dialog_id for pick in picks for x in pick)
    assert all(150 < counts[x.dialog_id] < 250 for x in rows)
    turns = Counter(x.turn_id for pick in picks for x in pick if x.dialog_id == "many")
    assert len(turns) == 9  # and its rows stand for it in turn


def test_a_pick_depends_on_ids_and_seed_alone():
    rows = rows_of({"a": 3, "b": 1, "c": 4, "d": 2})
    for apart in (False, True):
        whole = pick_rows(rows, 0, 7, apart)
        assert whole == pick_rows(rows[::-1], 0, 7, apart) != pick_rows(rows, 0, 8, apart)
        assert whole[:2] == pick_rows(rows, 2, 7, apart)
    fewer = [x for x in rows if x.dialog_id != "c"]
    left = [x for x in pick_rows(rows, 0, 7, True) if x.dialog_id != "c"]
    assert pick_rows(fewer, 0, 7, True) == left


def first_prompt(**options):
    tokenizer = load_engine(
        ModelOptions(dtype="float32", device="cpu", **options), find_model
    ).tokenizer
    return tokenizer.decode(tokenizer.prompt(HELLO))


def test_an_option_pins_llamas_date_line(tmp_path):
    whole_model("llama3.1", tmp_path)
    assert "Today Date: 26 Jul 2024\n" in first_prompt(model=str(tmp_path))
    other = first_prompt(model=str(tmp_path), chat_date="01 Jan 2030")
    assert "Today Date: 01 Jan 2030\n" in other and "26 Jul" not in other


def test_an_option_names_the_chat_format(tmp_path):
    whole_model("qwen2.5", tmp_path)
    assert "You are Qwen" in first_prompt(model=str(tmp_path))
    assert "You are" not in first_prompt(model=str(tmp_path), chat_format="chatml")
    with pytest.raises(UserError, match="llama2 needs the control token <s>"):
        first_prompt(model=str(tmp_path), chat_format="llama2")


@pytest.fixture
def options(tmp_path: Path) -> ModelOptions:
    return ModelOptions(str(write_small_model(tmp_path / "model")), dtype="float32", device="cpu")


def test_the_memory_for_keys_and_values_is_no_fact_of_a_result() -> None:
    assert ModelOptions(kv_memory=1.5).facts() == ModelOptions().facts()
    assert ModelOptions(max_length=64).facts() != ModelOptions().facts()
    with pytest.raises(ValueError, match="kv_memory must be at least 0"):
        ModelOptions(kv_memory=-1.0)


@pytest.fixture
def models(options: ModelOptions, tmp_path: Path) -> Models:
    """Return models whose base is loaded, beside an adapter of it in the folder `adapter`."""
    engine = load_engine(options, find_model)
    add_adapter(engine.model, "one", LoraConfig(r=2), seed=1)
    save_adapter(engine.model, "one", tmp_path / "adapter", "base")
    return Models(options, find_model, tmp_path / "answers.jsonl", engines={"none": engine})


def test_a_simulator_is_the_base_an_adapter_beside_it_or_a_model_of_its_own(
    models: Models, tmp_path: Path
) -> None:
    engine = models.engines["none"]
    base = models.side("none", "simulator")
    assert base.llm is engine and base.adapter is None
    beside = models.side(str(tmp_path / "adapter"), "simulator")
    assert beside.llm is engine and beside.adapter == "simulator"
    copy = str(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    again = models.side(str(tmp_path / "adapter"), "simulator")
    assert again == beside, "an adapter is loaded once"
    own, other = models.side(copy, "simulator"), models.engines[copy]
    assert own.llm is other is not engine and own.adapter is None
    assert models.side(copy, "judge") == own, "a model is loaded once"
    assert other.max_length == engine.max_length
    other.generate([Request(HELLO)])
    engine.generate([Request(HELLO), Request(HELLO, adapter=beside.adapter)])
    both = usage_of([engine, other])
    assert both.calls == 2
    assert both.decoded_tokens == engine.usage.decoded_tokens + other.usage.decoded_tokens
    with pytest.raises(UserError, match="/no/such/model"):
        models.side("/no/such/model", "simulator")


def test_other_weights_have_another_digest(options: ModelOptions, tmp_path: Path) -> None:
    engine = load_engine(options, find_model)
    for name, seed in (("one", 1), ("two", 2)):
        add_adapter(engine.model, name, LoraConfig(r=48), seed)
        save_adapter(engine.model, name, tmp_path / name, "base")
    places = [str(tmp_path / name) for name in ("one", "two", "model")]
    digests = [weights_digest(place, find_model) for place in (*places, "none")]
    assert len(set(digests)) == 4
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert weights_digest(str(tmp_path / "copy"), find_model) == digests[0]
    copied = tmp_path / "copy" / "adapter_model.safetensors"
    data = bytearray(copied.read_bytes())
    assert len(data) > 2**17
    data[-1] ^= 1
    copied.write_bytes(data)
    assert weights_digest(str(tmp_path / "copy"), find_model) != digests[0]
    weights = next((tmp_path / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    for i in range(len(data) % 4096, len(data), 4096):  # as training does, at the same size
        data[i] ^= 1
    weights.write_bytes(data)
    assert weights_digest(places[2], find_model) not in digests
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 5000.0'))
    changed = weights_digest(places[2], find_model)
    assert changed != digests[2]
    with (tmp_path / "model" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert weights_digest(places[2], find_model) not in (changed, digests[2])
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no such file: .*adapter_model\.safetensors"):
        weights_digest(places[0], find_model)


def test_the_default_memory_is_a_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thirty-second of the machine, 256 MiB at least; no more than 256 full rows would use."""
    per_token = token_bytes(TINY, torch.float32)
    small = random_decoder(replace(TINY, max_position_embeddings=100))
    assert default_kv_bytes(small) == 256 * 100 * per_token
    large = random_decoder(replace(TINY, max_position_embeddings=10**9))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert default_kv_bytes(large) == max(machine // 32, 256 * 1024**2)
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert default_kv_bytes(large) == 256 * 1024**2


def test_an_adapter_without_its_settings_is_told_as_one_that_lacks_them(
    models: Models, tmp_path: Path
) -> None:
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json"):
        models.side(str(tmp_path / "adapter"), "simulator")
