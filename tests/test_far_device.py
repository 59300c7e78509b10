"""Everything that computes, on a device that is not the CPU: the same results, and few reads."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from far_device import FAR, FarDevice, FarTensor, far_device, move
from safetensors.torch import load_file
from test_engine import CHATS, LetterTokenizer, drawing, engine
from test_ranking import TITLES
from test_training import QUICK, lessons, pairs

from usbrec.chat import Sampling
from usbrec.llm import decoding
from usbrec.llm.engine import Engine
from usbrec.llm.fast import accelerate
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.llm.loss import Objective, Sft, Simpo
from usbrec.llm.packing import Tree
from usbrec.llm.ranking import Ranking
from usbrec.llm.training import TrainingJob, TrainingOptions, train

NEW_TOKENS = 6


@pytest.fixture
def far() -> Iterator[FarDevice]:
    """The device, for one test."""
    with far_device() as device:
        yield device


def far_engine(quick: bool = False) -> Engine:
    """`engine` on the far device."""
    model = engine().model
    move(model)
    if quick:
        accelerate(model)
    return Engine(model, LetterTokenizer(), 10**6)  # type: ignore[arg-type]


def test_tensors_of_two_devices_do_not_meet_and_reading_back_is_counted(far: FarDevice) -> None:
    there = torch.tensor([1.0, 2.0, 3.0], device=FAR)
    there[1:] += 3
    assert isinstance(there, FarTensor) and there.device == FAR and far.reads == 0
    for meeting in (there.add, there.add_, there.mul, torch.ones(3).add_):
        other = there if meeting.__self__.device != FAR else torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            meeting(other)
    assert far.reads == 0
    assert there.tolist() == [1, 5, 6] and far.reads == 1
    assert float(there.sum()) == 12 and far.reads == 2
    assert len(there[there > 2]) == 2 and far.reads == 3
    torch.empty(3).copy_(there)
    assert far.reads == 4


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(NEW_TOKENS, temperature=0),
        Sampling(NEW_TOKENS, temperature=0.9, top_k=20, top_p=0.9),
    ],
)
def test_replies_are_the_cpus(
    far: FarDevice, monkeypatch: pytest.MonkeyPatch, how: Sampling, copied: bool, quick: bool
) -> None:
    """Unequal prompts, mixed adapters, rows that end early, a second call that goes on."""
    monkeypatch.setattr(decoding, "COPIED_TOKENS", 10**9 if copied else 0)
    here, there = engine(), far_engine(quick)
    for seeds in (range(6), range(6, 12)):
        asked = drawing(CHATS, how, seeds)
        assert there.generate(asked) == here.generate(asked)


def test_a_token_of_all_rows_is_one_read(far: FarDevice) -> None:
    there = far_engine()
    how = Sampling(NEW_TOKENS, temperature=0.9)
    replies = there.generate(drawing(CHATS, how, range(6)))
    steps = max(len(r.token_ids) + r.finished for r in replies)
    assert far.reads == steps


def test_a_step_in_which_no_row_ends_sends_nothing(far: FarDevice) -> None:
    counts = []
    for tokens in (2, 12):
        there = far_engine()
        there.tokenizer.stop_ids = frozenset()
        before = far.sends
        how = Sampling(tokens, temperature=0.9, top_p=0.9)
        hows = [how, Sampling(tokens, temperature=0)] * 3
        there.generate(drawing(CHATS, hows, range(6)))
        counts.append(far.sends - before)
    assert counts[0] == counts[1] > 0


def test_choices_are_the_cpus_and_one_read_for_all_judges(far: FarDevice) -> None:
    here, there = engine(), far_engine()
    found = there.choice_logprobs(CHATS, ["ab", "c"])
    assert far.reads == 1
    for row, expected in zip(found, here.choice_logprobs(CHATS, ["ab", "c"]), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_rankings_are_the_cpus(far: FarDevice) -> None:
    here, there = (Ranking(e, TITLES).best(CHATS, 5) for e in (engine(), far_engine()))
    for found, expected in zip(there, here, strict=True):
        assert [text for text, _ in found.texts] == [text for text, _ in expected.texts]
        scores = [score for _, score in expected.texts]
        assert [score for _, score in found.texts] == pytest.approx(scores, abs=1e-4)


def learn(
    folder: Path, objective: Objective, items: list[Tree], options: TrainingOptions, there: bool
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train a fresh adapter, here or there; return the metrics and the adapter."""
    model = engine().model
    add_adapter(model, "new", LoraConfig(r=2), seed=1)
    if there:
        move(model)
    job = TrainingJob(options, objective, folder, "far", items[:3])
    train(model, "new", items, job)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    state = load_file(folder / "state.safetensors")
    last = {name: tensor for name, tensor in state.items() if name.startswith("last.")}
    return [json.loads(line) for line in lines], last


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("objective", "items"), [(Sft(), lessons()), (Simpo(), pairs())], ids=["sft", "simpo"]
)
def test_training_is_the_cpus_and_goes_on_from_its_state(
    far: FarDevice, tmp_path: Path, objective: Objective, items: list[Tree], checkpointing: bool
) -> None:
    options = replace(QUICK, checkpointing=checkpointing)
    here, adapter_here = learn(tmp_path / "here", objective, items, options, there=False)
    there, adapter_there = learn(tmp_path / "there", objective, items, options, there=True)
    for row, expected in zip(there, here, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for name, tensor in adapter_here.items():
        torch.testing.assert_close(adapter_there[name], tensor, rtol=0, atol=1e-3)
    again, adapter_again = learn(tmp_path / "there", objective, items, options, there=True)
    assert again == there
    for name, tensor in adapter_there.items():
        assert torch.equal(adapter_again[name], tensor)


def test_what_a_step_reads_does_not_grow_with_its_passes(far: FarDevice, tmp_path: Path) -> None:
    reads = []
    for tokens in (1000, 20):
        before = far.reads
        options = TrainingOptions(steps=2, batch_size=10, tokens_per_pass=tokens)
        learn(tmp_path / str(tokens), Sft(), lessons(), options, there=True)
        reads.append(far.reads - before)
    assert reads[0] == reads[1]
