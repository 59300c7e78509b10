"""benchmarks/gpu.py rehearsed on the CPU: every row is there, and what fails stops nothing else."""

import json
import sys
from pathlib import Path

import pytest
import torch

import usbrec
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.llm.loss import Simpo, SimpoOptions

sys.path.append(str(Path(usbrec.__file__).parents[1] / "benchmarks"))
import gpu  # noqa: E402
import shapes  # noqa: E402
from contest import in_our_order, learn, options_for  # noqa: E402

DECODING = ("batch1", "batch8", "batch32", "batch1_adapter", "batch8_adapter", "batch32_adapter")
TRAINING = ("simpo16", "simpo4", "simpo1500", "simpo1500_checkpointing")
WITH_PEER = {
    *DECODING, "siblings32", "ses_chain", "ses_tree", "training", "logits_error",
    *(f"{name}_{what}" for name in TRAINING for what in ("pairs", "memory")),
}  # fmt: skip
ALONE = {
    "batch1_share", "batch1_adapter_share", "trees32_seconds",
    "greedy", "same_greedy", "same_replies",
    *(f"{name}_share" for name in TRAINING),
}  # fmt: skip


def broken(bench: gpu.Bench) -> gpu.Rows:
    """Yield a row, then fail."""
    yield gpu.figure("kept", "s", 2.0)
    raise torch.OutOfMemoryError("on purpose")


def test_every_row_is_there_and_a_failing_measurement_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "MEASURES", {"broken": broken, **gpu.MEASURES})
    assert gpu.main(["--tiny", "--minutes", "60", "--json", str(tmp_path / "rows.jsonl")]) == 1
    machine, *rows, end = map(json.loads, (tmp_path / "rows.jsonl").open(encoding="utf-8"))
    assert machine["torch"] == torch.__version__ and machine["copy_TB_per_s"] > 0
    kept, failure, *found = rows
    assert (kept["name"], kept["ratio"]) == ("kept", 2)
    assert failure == {"name": "broken", "failed": "out of memory"} and end["failed"] == ["broken"]
    assert {row["name"] for row in found if row["peer"] is None} == ALONE
    assert {row["name"]: row["peer"] for row in found if isinstance(row["peer"], str)} == {}
    assert {row["name"] for row in found if row["peer"] is not None} == WITH_PEER
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in found)
    *lines, last = capsys.readouterr().out.splitlines()
    claim = json.loads(last)
    assert claim["ratios"].keys() == WITH_PEER | ALONE | {"kept"}
    assert claim["benchmark"] == "gpu" and claim["reach"].keys() <= claim["ratios"].keys()
    assert "| broken | out of memory |" in lines
    assert sum(line.startswith("| ") for line in lines) == 1 + len(rows)  # and the header


def test_when_the_time_is_over_nothing_new_starts_and_what_was_left_out_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--tiny", "--minutes", "0", "--only", "ses", "decode"]) == 0
    *_, counts, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["ratios"] == {}
    assert counts.endswith("failed: none, left out: ses, decode")


def test_the_peer_has_our_weights_and_its_step_has_our_loss(tmp_path: Path) -> None:
    bench = shapes.Bench(shapes.REHEARSAL, torch.device("cpu"), tmp_path)
    pairs = gpu.make_pairs(8, 9, 3)
    add_adapter(bench.model, "a", LoraConfig(r=8), seed=0)
    objective = Simpo(SimpoOptions(beta=gpu.BETA, gamma_beta_ratio=gpu.RATIO))
    found = learn(bench.model, pairs, objective, options_for(2, 4))
    order = in_our_order(pairs, 2, 4)
    peer = gpu.their_simpo(bench, [order[:4], order[4:]], recompute=False)
    assert peer["losses"] == pytest.approx(found["losses"], abs=0.02)
    weight = bench.peer(adapted=False).model.layers[1].self_attn.v_proj.weight
    own = bench.model.get_submodule("model.layers.1.self_attn.v_proj").weight
    assert weight.data_ptr() == own.data_ptr()


def test_a_peer_that_fails_leaves_a_reason_in_its_place() -> None:
    reason = gpu.beside(lambda: int("eight"))
    assert reason == "failed: ValueError: invalid literal for int() with base 10: 'eight'"
    assert gpu.against("x", "s", 1.0, reason).ratio is None
    assert gpu.against("x", "s", 1.0, 4.0).ratio == 0.25
