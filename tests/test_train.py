"""The main job as a user starts it: once on the real model, else on a small random one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import SUPPRESS
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from small_run import STAGE_FLAGS, bytes_of, flags, write_small_data, write_small_model

import infer
import train
from usbrec import loading
from usbrec.chat import Message
from usbrec.crs.datasets import SPLITS, load_split
from usbrec.llm.engine import Engine
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.options import UserError
from usbrec.runs import locked, read_json, read_rows
from usbrec.settings import ADAPTERS, DEFAULTS, FLAGS, PRESETS, SHOWN, STAGES, DataOptions, Settings

METHODS = ["B/L", "SFT", "RL", "RL+SES", "RL+SES+cards"]
ROUNDS = ["--stages", "simpo", "--rounds", "3"]  # of the twelve training rows, four each
WORD = "Zanzibar"  # stands in every test row of the small dataset and nowhere else
DIES = """
import os, runpy, signal, sys

whole, path, left = os.write, sys.argv[1], int(sys.argv[2])

def write(descriptor, data):
    global left
    if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        left -= 1
        if not left:
            whole(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    return whole(descriptor, data)

os.write = write
sys.argv[:3] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # train.py, killed when half of the n-th write to a file is done


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small model and dataset, as flags."""
    place = tmp_path_factory.mktemp("inputs")
    model = write_small_model(place / "model")
    data = write_small_data(place / "data", test_word=WORD)
    often = {"--simulator-save-every": 2}
    return {"--model": model, "--data": data, "--dtype": "float32", **STAGE_FLAGS, **often}


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small model that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(["--run-dir", str(folder), *flags(inputs)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Start train.py with what it must refuse: exit code 2, one sentence on stderr, returned."""
    try:
        code = train.main(arguments)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(told) == 1 and told[0].startswith("train.py: "), told
    return told[0]


def check_report(folder: Path, dialogues: int, judged: int) -> None:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert list(report["methods"]) == METHODS
    for found in report["methods"].values():
        for key in ("ieval", "recall@1", "hit"):
            assert {"mean", "low", "high", "n"} <= found[key].keys()
            assert found[key]["low"] <= found[key]["mean"] <= found[key]["high"]
        assert found["hit"]["n"] == dialogues
    for name in ("RL+SES - B/L", "SFT - B/L"):
        for key in ("ieval", "recall@1"):
            assert {"mean", "low", "high"} <= report["differences"][name][key].keys()
    listeners = {"rule listener", "random listener"}
    assert set(report["baselines"]) == {"copy-last", "most-popular", "nearest"} | listeners
    scorers = {"rule", "rule on the summary", "internal judge", "judge with cards"}
    assert set(report["judge"]["within_dialogue"]) == scorers
    assert report["search"]["RL+SES"]["random"]["n"] == dialogues
    assert report["summary"]["all"]["exact"]["n"] == dialogues
    for name in ("external", "internal", "cards"):
        assert {"auc", "low", "high", "n"} <= report["judge"][name].keys()
        assert report["judge"][name]["n"] == judged
    assert set(report["unparsed"]) == set(METHODS)
    assert report["options"]["eval"]["turns"] == 1
    assert report["counts"]["test"] == dialogues


def check_files(folder: Path) -> None:
    for adapter in ("simulator", "sft", "rl"):
        config = json.loads((folder / adapter / "adapter_config.json").read_text("utf-8"))
        assert config["peft_type"] == "LORA"
        assert (folder / adapter / "adapter_model.safetensors").stat().st_size > 0
    assert {path.name for path in (folder / "options").iterdir()} == {f"{x}.json" for x in STAGES}
    fields = {
        "prompt", "chosen", "rejected", "chosen_score", "rejected_score",
        "chosen_from", "rejected_from",
    }  # fmt: skip
    for pair in read_rows(folder / "pairs.jsonl"):
        assert set(pair) == fields
        for side in ("prompt", "chosen", "rejected"):
            assert all(set(message) == {"role", "content"} for message in pair[side])
    for adapter in ADAPTERS.values():
        assert read_rows(folder / adapter / "training" / "metrics.jsonl")
    timed = read_rows(folder / "timings.jsonl")
    assert [row["stage"] for row in timed] == list(STAGES)
    assert all(row["seconds"] >= 0 and row["peak_memory_bytes"] > 0 for row in timed)
    asked = {row["stage"] for row in timed if row["decoded_tokens"] and row["computed_tokens"]}
    assert asked == {"pairs", "report"}


def test_the_default_model_goes_through_all_stages_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's two commands on the real model with a handful of rows."""
    monkeypatch.setattr(train.runs, "RUNS", tmp_path)
    monkeypatch.setattr(infer, "RUNS", tmp_path)
    few = STAGE_FLAGS | {"--max-simulator": 2, "--max-pairs": 3, "--max-eval": 2}
    few |= {"--simulator-steps": 8, "--pairs-max-new-tokens": 12, "--loraplus-lr-ratio": 1}
    few |= {"--sft-learning-rate": 2e-3, "--simulator-learning-rate": 1e-3}
    assert train.main([*flags(few), "--pairs-worst", "below-two"]) == 0
    check_files(tmp_path / "sample")
    check_report(tmp_path / "sample", dialogues=2, judged=2)
    assert "RL+SES" in capsys.readouterr().out
    short = ["--ses-max-new-tokens", "8", "--ses-summary-tokens", "8", "--ses-samples", "2"]
    assert infer.main(["--ses", "--json", "--ses-turns", "1", *short]) == 0
    [line] = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert answer["reply"] in [c["reply"] for c in answer["search"]["candidates"]]


def test_a_run_of_a_small_model_leaves_all_files(finished: Path) -> None:
    check_files(finished)
    check_report(finished, dialogues=3, judged=2)


def test_a_second_start_uses_finished_stages(
    run: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load_engine(*options: object) -> None:
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(loading, "load_engine", load_engine)
    before = bytes_of(run)
    assert train.main(["--run-dir", str(run), *flags(inputs)]) == 0
    assert bytes_of(run) == before
    said = capsys.readouterr().out
    assert all(f"{stage}: done before" in said for stage in STAGES)


def test_a_missing_stage_alone_is_made_again_with_the_same_bytes(
    run: Path, finished: Path, inputs: dict[str, Any]
) -> None:
    shutil.rmtree(run / "rl")
    (run / "report.json").unlink()
    assert train.main(["--run-dir", str(run), *flags(inputs)]) == 0
    assert bytes_of(run) == bytes_of(finished)


def test_fresh_starts_the_chosen_stages_over(run: Path, inputs: dict[str, Any]) -> None:
    before = bytes_of(run)
    other = flags(inputs | {"--ses-samples": 3})
    assert train.main(["--run-dir", str(run), *other, "--stages", "report", "--fresh"]) == 0
    after = bytes_of(run)
    changed = {name for name in before if before[name] != after[name]}
    of_report = {"options/report.json", "report.json", "report.txt", "report.html", "rows.jsonl"}
    assert {"report.json", "rows.jsonl"} <= changed <= of_report


def test_the_report_computes_equal_requests_once(
    run: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three searches read the same summaries, and two of them rank the same titles."""
    asked: list[Any] = []

    def note(call: str) -> None:
        compute = getattr(Engine, call)

        def noting(engine: Engine, requests: Any, *others: Any) -> Any:
            asked.extend((call, request, str(others)) for request in requests)
            return compute(engine, requests, *others)

        monkeypatch.setattr(Engine, call, noting)

    for call in ("generate", "choice_logprobs", "best_texts"):
        note(call)
    command = ["--run-dir", str(run), *flags(inputs | {"--chunk-size": 3})]  # all rows
    assert train.main([*command, "--stages", "report", "--fresh"]) == 0
    assert {call for call, *_ in asked} == {"generate", "choice_logprobs", "best_texts"}
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model", "/typo"], ["--data", "/typo"], ["--device", "abacus"], ["--simulator", "/typo"],
        ["--seed", "-1"], ["--stages", "pairs"], ["--stages", "simpo"],
    ],
)  # fmt: skip
def test_fresh_deletes_nothing_before_all_that_is_needed_is_loaded(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    """The last two: the adapter that PODCS samples is broken, a pair has no prompt."""
    if "--stages" in wrong:
        (run / "sft" / "adapter_model.safetensors").write_bytes(b"torn")
        (run / "pairs.jsonl").write_text('{"chosen": []}')
    before = bytes_of(run)
    refused(["--run-dir", str(run), *flags(inputs), *wrong, "--fresh"], capsys)
    assert bytes_of(run) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "stage"),
    [
        ("train.jsonl", '"resp": "', '"resp": "Well. ', "sft/adapter_model.safetensors"),
        ("items.json", '"mood": ["', '"mood": ["odd and ', "sft/adapter_model.safetensors"),
        ("test.jsonl", WORD, WORD.upper(), "report.json"),
    ],
)
def test_changed_data_is_noticed_by_the_stages_that_read_it(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str],
    name: str, old: str, new: str, stage: str,
) -> None:  # fmt: skip
    path, before = inputs["--data"] / name, bytes_of(run)
    text = path.read_text("utf-8")
    assert old in text
    try:
        path.write_text(text.replace(old, new, 1), "utf-8")
        told = refused(["--run-dir", str(run), *flags(inputs)], capsys)
    finally:
        path.write_text(text, "utf-8")
    assert f"{stage} was made with data-contents-{name.split('.')[0]} " in told
    assert bytes_of(run) == before


def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_bytes(
    inputs: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the second chunk of PODCS, then before the second chunk of the report."""
    run = tmp_path / "run"
    for name in ("build_pairs", "judge_agreement"):
        whole, calls = getattr(train, name), []

        def stopped(*arguments: Any, whole: Any = whole, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return whole(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train, name, stopped)
            assert train.main(["--run-dir", str(run), *flags(inputs)]) == 130
    assert len(read_rows(run / "rows.jsonl")) == 2
    assert train.main(["--run-dir", str(run), *flags(inputs)]) == 0
    assert bytes_of(run) == bytes_of(finished)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("simulator/training/state.safetensors.part", 3),
        ("samples.jsonl", 2),
        ("report.json.part", 1),
    ],
)
def test_a_run_killed_in_the_midst_of_a_write_goes_on_to_the_same_bytes(
    inputs: dict[str, Any], finished: Path, tmp_path: Path, name: str, count: int
) -> None:
    """SIGKILL with a file half written: a state of the simulator, a chunk of PODCS, the report."""
    run = tmp_path / "run"
    command = [str(train.__file__), "--run-dir", str(run), *flags(inputs)]
    child = subprocess.run(
        [sys.executable, "-c", DIES, str(run / name), str(count), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert bytes_of(run)[name] != bytes_of(finished).get(name)
    assert train.main(["--run-dir", str(run), *flags(inputs)]) == 0
    assert bytes_of(run) == bytes_of(finished)


def test_the_simulator_begins_as_a_copy_of_the_sft_adapter(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    """At a rate of next to nothing it stays one."""
    command = ["--run-dir", str(tmp_path), *flags(inputs | {"--simulator-learning-rate": 1e-12})]
    assert train.main([*command, "--stages", "sft", "simulator"]) == 0
    files = (tmp_path / x / "adapter_model.safetensors" for x in ("sft", "simulator"))
    learned, copied = map(load_file, files)
    assert any(bool(x.any()) for name, x in learned.items() if "lora_B" in name)
    for name, tensor in learned.items():
        torch.testing.assert_close(copied[name], tensor, rtol=0, atol=1e-8)


def test_the_external_judge_learns_first_and_all_others_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The later lessons are spread evenly, each kind in its own order."""
    made = {"simulator": (list("abcd"), list("ij")), "summary": list("stuv"), "card": list("12345")}
    for name, lessons in made.items():
        monkeypatch.setattr(train.lessons, f"{name}_lessons", lambda *_, own=lessons: own)
    monkeypatch.setattr(train.lessons, "Suggestions", lambda *_: None)
    taught: list[list[str]] = []
    monkeypatch.setattr(train, "teach", lambda _, stage, make: taught.append(make(lambda _: [])))
    train.train_simulator(MagicMock())
    [order] = taught
    assert "".join(order) == "abcd" + "1si2t3u4jv5"


VALIDATED = {  # at this rate the loss of sft's validation rises at last
    "--max-valid": 3, "--sft-epochs": 10, "--sft-save-every": 2, "--sft-learning-rate": 1,
    "--sft-schedule": "constant", "--lesson-sft-chats": 1, "--sft-loraplus-lr-ratio": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def validated(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two stages with validation."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    command = ["--run-dir", str(folder), *flags(inputs | VALIDATED)]
    assert train.main([*command, "--stages", "simulator", "sft"]) == 0
    return folder


def test_with_validation_the_best_state_is_used(validated: Path) -> None:
    """The adapter's file holds what the training's own state calls best, not what it calls last."""
    for stage in ("sft", "simulator"):
        state = load_file(validated / stage / "training" / "state.safetensors")
        found = load_file(validated / stage / "adapter_model.safetensors")
        for name, tensor in found.items():
            assert torch.equal(tensor, state[name.replace("base_model.model", "best")]), name
        last = {name: state[name.replace("base_model.model", "last")] for name in found}
        assert stage != "sft" or any(not torch.equal(x, last[name]) for name, x in found.items())
    curves = {}
    for stage in ("simulator", "sft"):
        lines = read_rows(validated / stage / "training" / "metrics.jsonl")
        curves[stage] = [row["eval/loss"] for row in lines if "eval/loss" in row]
    assert curves["simulator"] and min(curves["sft"]) < curves["sft"][-1]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("simulator/training/metrics.jsonl", 4),
        ("sft/training/state.safetensors.part", 2),
        ("sft/adapter_model.safetensors.part", 1),
    ],
)
def test_a_validated_run_that_is_killed_goes_on_to_the_same_bytes(
    inputs: dict[str, Any], validated: Path, tmp_path: Path, name: str, count: int
) -> None:
    run = tmp_path / "run"
    stages = ["--stages", "simulator", "sft"]
    command = ["--run-dir", str(run), *flags(inputs | VALIDATED), *stages]
    child = subprocess.run(
        [sys.executable, "-c", DIES, str(run / name), str(count), train.__file__, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (run / name.split("/")[0] / "adapter_model.safetensors").exists()
    assert train.main(command) == 0
    assert bytes_of(run) == bytes_of(validated)


def pair_rows(dialogues: int) -> list[dict[str, Any]]:
    """Pairs as in pairs.jsonl: two turns of each dialogue, the first ones first."""

    def row(number: int, turns: int) -> dict[str, Any]:
        lines = [("user", f"Film {number}?"), ("assistant", "Heat."), ("user", "Another!")]
        prompt = [{"role": role, "content": text} for role, text in lines[: 2 * turns - 1]]
        sides = {"chosen": f"Up {number}.", "rejected": "No idea."}
        return {"prompt": prompt} | {
            side: [{"role": "assistant", "content": text}] for side, text in sides.items()
        }

    return [row(number, turns) for turns in (1, 2) for number in range(dialogues)]


def test_simpo_learns_from_all_pairs_after_the_prompts_of_inference(
    run: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max-valid takes none of them away; without its notes the SFT adapter is from elsewhere."""
    shutil.rmtree(run / "rl")
    shutil.rmtree(run / "options")
    lines = "".join(json.dumps(row) + "\n" for row in pair_rows(10))
    (run / "pairs.jsonl").write_text(lines, "utf-8")
    learned, plain = [], train.lay_out_pairs
    monkeypatch.setattr(train, "lay_out_pairs", lambda *x: learned.append(plain(*x)) or learned[-1])
    command = ["--run-dir", str(run), *flags(inputs | {"--max-valid": 3}), "--stages", "simpo"]
    assert train.main(command) == 0
    assert [len(trees) for trees in learned] == [20]
    messages = [Message(**message) for message in pair_rows(10)[0]["prompt"]]
    prompt = ChatTokenizer.from_folder(inputs["--model"]).prompt(messages)
    assert list(learned[0][0].branches[0].ids) == prompt


def until_simpo(finished: Path, run: Path) -> Path:
    """A copy of the run without what SimPO and the report have made."""
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("rl", "report*", "rows*"))
    (run / "options" / "simpo.json").unlink()
    return run


@pytest.fixture(scope="module")
def rounds(
    inputs: dict[str, Any], finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three rounds of pairs and SimPO."""
    run = until_simpo(finished, tmp_path_factory.mktemp("rounds") / "run")
    assert train.main(["--run-dir", str(run), *flags(inputs), *ROUNDS]) == 0
    return run


def test_each_round_learns_on_from_pairs_of_its_own_samples_of_other_rows(
    inputs: dict[str, Any], finished: Path, rounds: Path, tmp_path: Path
) -> None:
    """The first is a run of one round; the second is SimPO on its adapter and pairs."""
    weights = "adapter_model.safetensors"
    places = [rounds, rounds / "rl" / "round-2", rounds / "rl" / "round-3"]
    samples = [read_rows(place / "samples.jsonl") for place in places]
    speakers = [{row["adapters"]["recommender"] for row in rows} for rows in samples]
    assert speakers == [{"sft"}, {"rl"}, {"rl"}]
    assert len({(row["dialog_id"], row["turn_id"]) for rows in samples for row in rows}) == 12
    first, second, last = (rounds / "rl" / x for x in ("round-1", "round-2", "."))
    assert (first / weights).read_bytes() == (finished / "rl" / weights).read_bytes()
    run = until_simpo(finished, tmp_path / "run")
    shutil.copy(first / weights, run / "sft")
    shutil.copy(second / "pairs.jsonl", run)
    assert train.main(["--run-dir", str(run), *flags(inputs), "--stages", "simpo"]) == 0
    assert (run / "rl" / weights).read_bytes() == (second / weights).read_bytes()
    assert (last / weights).read_bytes() != (second / weights).read_bytes()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rl/round-1/adapter_model.safetensors.part", 1),
        ("rl/round-2/samples.jsonl", 2),
        ("rl/round-3/pairs.jsonl.part", 1),
        ("rl/training/state.safetensors.part", 1),
    ],
)
def test_rounds_that_are_killed_go_on_to_the_same_bytes(
    inputs: dict[str, Any], finished: Path, rounds: Path, tmp_path: Path, name: str, count: int
) -> None:
    run = until_simpo(finished, tmp_path / "run")
    command = [str(train.__file__), "--run-dir", str(run), *flags(inputs), *ROUNDS]
    child = subprocess.run(
        [sys.executable, "-c", DIES, str(run / name), str(count), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert train.main(["--run-dir", str(run), *flags(inputs), *ROUNDS]) == 0
    assert bytes_of(run) == bytes_of(rounds)


def test_after_the_last_rows_a_round_has_the_first_ones_again(
    inputs: dict[str, Any], finished: Path, rounds: Path, tmp_path: Path
) -> None:
    run = until_simpo(finished, tmp_path / "run")
    assert train.main(["--run-dir", str(run), *flags(inputs), *ROUNDS[:-1], "4"]) == 0
    places = [run, run / "rl" / "round-2", run / "rl" / "round-3", run / "rl" / "round-4"]
    tried = [
        [(row["dialog_id"], row["turn_id"]) for row in read_rows(place / "samples.jsonl")]
        for place in places
    ]
    assert tried[3] == tried[0] and len({row for rows in tried for row in rows}) == 12


def test_rounds_without_a_simulator_are_told_before_the_first(
    inputs: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = until_simpo(finished, tmp_path / "run")
    shutil.rmtree(run / "simulator")
    assert train.main(["--run-dir", str(run), *flags(inputs), *ROUNDS]) == 2
    assert "simulator/adapter_model.safetensors" in capsys.readouterr().err
    assert not (run / "rl").exists()


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_every_pair_of_an_edited_file_is_learned_from(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str], end: str
) -> None:
    shutil.rmtree(run / "rl")
    rows = [{**row, "mine": 1} for row in pair_rows(3)]
    rows[0]["prompt"][0]["note"] = "an extra key"
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + end, "utf-8")
    command = ["--run-dir", str(run), *flags(inputs), "--stages", "simpo"]
    assert train.main(command) == 0
    assert "simpo: 6 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["human", ["user"], None])
def test_a_pair_that_is_none_is_named_with_its_line(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str], role: Any
) -> None:
    shutil.rmtree(run / "rl")
    rows = pair_rows(2)
    rows[1]["prompt"][0]["role"] = role
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    told = refused(["--run-dir", str(run), *flags(inputs), "--stages", "simpo"], capsys)
    assert f"{run / 'pairs.jsonl'}, line 2: prompt must be" in told


def test_pairs_that_teach_nothing_are_counted_and_without_others_refused(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal, empty, and a reply of more tokens than there is room for."""
    shutil.rmtree(run / "rl")
    wrong = pair_rows(3)[:3]
    wrong[0]["chosen"] = wrong[0]["rejected"]
    wrong[1]["chosen"][0]["content"] = ""
    wrong[2]["chosen"][0]["content"] = "so " * 5000
    command = ["--run-dir", str(run), *flags(inputs), "--stages", "simpo"]
    for rows, code in ((wrong, 2), (wrong + pair_rows(2), 0)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "pairs.jsonl").write_text(text, "utf-8")
        assert train.main(command) == code
        found = capsys.readouterr()
        for reason in ("as too long", "for an empty response", "for equal responses"):
            assert f"1 dropped {reason}" in found.out
        assert ("holds no pair to learn from" in found.err) == (code == 2)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"--max-sft": 3}, "sft/adapter_model.safetensors was made with max-sft 2, got 3"),
        ({"--lora-r": 3}, f"was made with lora-r {DEFAULTS['lora']['r']}, got 3"),
        ({"--ses-turns": 2}, "report.json was made with ses-turns 1, got 2"),
        ({"--seed": 1}, "sft/adapter_model.safetensors was made with seed 0, got 1"),
        ({"--learning-rate": 0.5}, "was made with sft-learning-rate 0.0005, got 0.5"),
        ({"--sft-epochs": 2}, "was made with sft-epochs 1.0, got 2.0"),
    ],
)
def test_other_options_are_refused_and_nothing_is_lost(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str],
    other: dict[str, Any], named: str,
) -> None:  # fmt: skip
    before = bytes_of(run)
    told = refused(["--run-dir", str(run), *flags(inputs | other)], capsys)
    stages = [*STAGES]
    made = next(x for x in stages if STAGES[x]["makes"][0] in told)
    later = " ".join(stages[stages.index(made) :])
    assert named in told and f"; add --stages {later} --fresh to start over from there, or" in told
    assert bytes_of(run) == before
    assert train.main(["--run-dir", str(run), *flags(inputs)]) == 0  # the old options still do


@pytest.mark.parametrize(
    ("stage", "other", "named"),
    [
        ("pairs", {"--seed": 1}, "sft/adapter_model.safetensors was made with seed 0, got 1"),
        ("pairs", {"--sft-epochs": 2}, "sft/adapter_model.safetensors was made with sft-epochs"),
        ("simpo", {"--max-pairs": 3}, "pairs.jsonl was made with max-pairs 4, got 3"),
        ("report", {"--simpo-loss-beta": 1}, "rl/adapter_model.safetensors was made with simpo"),
    ],
)
def test_a_stage_never_builds_on_earlier_ones_of_other_options(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str],
    stage: str, other: dict[str, Any], named: str,
) -> None:  # fmt: skip
    """Neither where its result is missing, nor with --fresh, which deletes nothing then."""
    for path in STAGES[stage]["makes"]:
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink(missing_ok=True)
    before, note = bytes_of(run), f"options/{stage}.json"
    command = ["--run-dir", str(run), "--stages", stage]
    for more in ([], ["--fresh"]):
        assert named in refused([*command, *flags(inputs | other), *more], capsys)
        assert bytes_of(run) | {note: b""} == before | {note: b""}  # of a stage that made nothing


def test_sides_and_chunk_size_are_each_stages_own(run: Path, inputs: dict[str, Any]) -> None:
    own = flags(inputs | {"--chunk-size": 3, "--simulator": "none", "--methods": "RL+SES+memory"})
    assert train.main(["--run-dir", str(run), *own, "--stages", "report", "--fresh"]) == 0
    first = read_rows(run / "rows.jsonl")[0]
    assert "RL+SES+memory" in first
    assert "judge from memory" in first["ranked"]["films"][0]["scores"]


def test_test_dialogues_enter_no_lesson_and_no_pair(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word marks all test rows: the report meets it, what is trained on never does."""
    lessons = []
    plain = train.lesson_tree
    monkeypatch.setattr(
        train, "lesson_tree", lambda tokenizer, x, n: lessons.append(x) or plain(tokenizer, x, n)
    )
    options = inputs | {
        "--max-simulator": 0,
        "--max-sft": 0,
        "--max-pairs": 0,
        "--pairs-worst": "below-two",  # whatever the small judge thinks of a sample
        "--run-dir": tmp_path,
    }
    assert train.main(flags(options)) == 0
    assert len(lessons) >= 12
    assert WORD not in str(lessons)
    assert WORD in (tmp_path / "rows.jsonl").read_text("utf-8")
    for name in ("samples.jsonl", "pairs.jsonl"):
        text = (tmp_path / name).read_text("utf-8")
        assert text and WORD not in text


def test_lessons_may_be_left_out_but_not_all_of_a_stage(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {f"--max-{kind}": -1 for kind in ("profiles", "simulator", "summaries", "cards")}
    command = ["--run-dir", str(tmp_path), *flags(inputs | none), "--stages"]
    assert train.main([*command, "sft"]) == 0
    assert (tmp_path / "sft" / "adapter_model.safetensors").exists()
    capsys.readouterr()
    assert "simulator: there is nothing to train on" in refused([*command, "simulator"], capsys)


def test_pairs_take_all_samples_and_keep_the_gold_replies_of_their_rows(finished: Path) -> None:
    data = Path(read_json(finished / "options" / "pairs.json")["data"])
    gold = {row["resp"] for row in read_rows(data / "train.jsonl")}
    records = read_rows(finished / "samples.jsonl")
    assert len(records) == 4
    for pair in read_rows(finished / "pairs.jsonl"):
        for side in ("chosen", "rejected"):
            if pair[f"{side}_from"] == "gold":
                assert pair[side][0]["content"] in gold


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stages", "sleep"], "sleep"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--dtype", "int3"], "int3"),
        (["--lora-r", "0"], "r must be at least 1 and at most 65536, got 0"),
        (["--lora-r", "9000000000"], "r must be at least 1 and at most 65536, got 9000000000"),
        (["--sft-learning-rate", "nan"], "learning_rate must be 0, or of a size from"),
        (["--sft-warmup", "2"], "warmup must be at least 0 and at most 1, got 2.0"),
        (["--lora-alpha", "inf"], "lora_alpha must be 0, or of a size from"),
        (["--simulator-epochs", "1e308"], "epochs must be 0, or of a size from"),
        (["--batch-size", "1" + "0" * 30], "batch_size must be 0, or of a size from"),
        (["--ses-samples", "1000000000"], "samples must be at least 1 and at most 10000"),
        (["--device", "meta"], "--device meta: no such device"),
        (["--run-dir", ""], "argument --run-dir: must not be empty"),
        (["--eval-turns", "0"], "turns"),
        (["--pairs-temperature", "-1"], "temperature"),
        (["--eval-max-new-tokens", "0"], "max_new_tokens"),
        (["--max-eval", "-1"], "max_eval"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--chunk-size", "0"], "chunk_size"),
        (["--simpo-schedule", "square"], "square"),
        (["--learning-rate", "-1"], "learning_rate must be above 0, got -1"),
        (["--kv-memory", "-1"], "kv_memory must be at least 0 and at most 1000000.0, got -1"),
        (["--kv-memory", "1e12"], "kv_memory must be at least 0 and at most 1000000.0, got 10"),
        (["--simulator", "/no/such/simulator"], "/no/such/simulator"),
        (["--rounds", "2", "--recommender", "http://localhost:1/v1#m"], "rounds above 1 need"),
        (["--ses-start-turn", "2"], "--ses-start-turn is above --eval-turns"),
        (["--data", "netflix"], "netflix"),
        (["--data", "redial", "--data-dir", "/no/such"], "/no/such"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_a_wrong_flag_is_one_sentence(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(["--run-dir", str(tmp_path / "run"), *arguments], capsys)


def spoil(folder: Path, name: str, fault: str) -> None:
    """Put a fault into a copy of the small model or dataset."""
    path = folder / name
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        lines = path.read_text("utf-8").splitlines()
        path.write_text("\n".join([*lines[:2], fault, *lines[3:]]) + "\n", "utf-8")


@pytest.mark.parametrize(
    ("flag", "name", "fault", "named"),
    [
        ("--model", "config.json", "missing", r"config\.json"),
        ("--model", "tokenizer.json", "missing", r"tokenizer\.json"),
        ("--model", "model.safetensors", "truncated", r"model\.safetensors"),
        ("--data", "items.json", "missing", r"items\.json"),
        ("--data", "test.jsonl", "missing", r"test\.jsonl"),
        ("--data", "train.jsonl", "{broken", r"train\.jsonl, line 3: not JSON"),
        ("--data", "test.jsonl", '{"dialog_id": "x"}', r"test\.jsonl, line 3: .*turn_id"),
    ],
)
def test_a_faulty_file_is_one_sentence_that_names_it(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    flag: str, name: str, fault: str, named: str,
) -> None:  # fmt: skip
    copy = shutil.copytree(inputs[flag], tmp_path / "copy")
    spoil(Path(copy), name, fault)
    told = refused(["--run-dir", str(tmp_path / "run"), *flags(inputs | {flag: copy})], capsys)
    assert re.search(named, told)


def test_a_stage_without_the_one_before_says_which_to_run(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(["--run-dir", str(tmp_path), *flags(inputs), "--stages", "simpo"], capsys)
    assert "--stages pairs" in told


def test_two_runs_never_share_a_folder(
    run: Path, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run-dir", str(run), *flags(inputs)]
    with locked(run):
        assert "in use by another train.py" in refused(command, capsys)
    assert train.main(command) == 0


# --- flags ------------------------------------------------------------------------------------


def settings(*words: str) -> Any:
    return train.read_settings(train.build_parser().parse_args(words))


def test_a_note_that_several_splits_have_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = load_split
    noted = lambda *asked: plain(*asked)._replace(notes=["of the whole file"])  # noqa: E731
    monkeypatch.setattr("usbrec.work.load_split", noted)
    assert train.Work(settings(), tmp_path, train.find_model).notes == ["of the whole file"]
    assert capsys.readouterr().out == "note: of the whole file\n"


def test_a_dataset_and_a_model_are_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for typed in (
        "mine",
        "./mine",
        "mine/",
        "../" + tmp_path.name + "/mine",
        str(tmp_path / "mine"),
    ):
        assert settings("--data", typed).data.data == str(tmp_path / "mine")
        assert settings("--data-dir", typed).data.data_dir == str(tmp_path / "mine")
        for name in ("simulator", "judge"):
            assert getattr(settings(f"--{name}", typed).data, name) == str(tmp_path / "mine")
        assert settings("--model", typed).model.model == str(tmp_path / "mine")
    for name in ("http://host:1/v1#m", "none", "some/model"):
        assert settings("--simulator", name, "--model", name).data.simulator == name
    assert settings("--data", "redial").data.data == "redial"


def test_the_larger_preset_changes_defaults_and_no_flag() -> None:
    plain, full = settings(), settings("--full", "--max-pairs", "7")
    assert full.data.rows("sft") > plain.data.rows("sft")
    assert full.data.rows("pairs") == 7 and full.sft.epochs > plain.sft.epochs
    assert list(full.data.methods) == list(train.COMPARED)


def test_the_tables_of_the_stages_name_what_is_there() -> None:
    """A name that is misspelt there would silently be no fact of the stage, or no file of it."""
    groups, data = get_type_hints(Settings), get_type_hints(DataOptions)
    earlier: list[str] = []
    for name, stage in STAGES.items():
        assert set(stage) - {"adapter", "data"} == {"options", "sides", "needs", "makes"}
        assert set(stage.get("data", ())) <= set(data)
        assert all(x in groups or f"max_{x}" in data for x in stage["options"])
        assert set(stage["sides"]) <= set(data) and set(stage["needs"]) <= set(earlier)
        if adapter := stage.get("adapter"):
            assert stage["makes"] == [f"{adapter}/adapter_model.safetensors", adapter]
        earlier.append(name)
    for stage, search in train.COMPARED.values():
        assert stage in {None, *ADAPTERS} and search in {None, "ses", *PRESETS}


def test_a_search_with_cards_has_defaults_of_its_own_and_the_same_flags() -> None:
    plain = settings()
    assert not plain.ses.cards and plain.ses_cards.cards
    assert plain.ses_cards.candidates == "ranked" and plain.ses.candidates == "sampled"
    assert settings("--ses-samples", "5").ses_cards.samples == 5


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match=r"methods must be of B/L, .*, got SFT\+CES"):
        settings("--methods", "SFT+CES")


def test_a_stages_flag_goes_before_the_shared_one_then_the_stages_default() -> None:
    """`simulator` has a learning rate of its own by default, `simpo` a batch; nobody a norm."""
    plain = settings()
    assert (plain.simulator.learning_rate, plain.simulator.max_grad_norm) == (5e-4, 1.0)
    shared = settings("--learning-rate", "0.5", "--max-grad-norm", "2", "--no-shuffle")
    for stage in ("simulator", "sft", "simpo"):
        options = getattr(shared, stage)
        assert (options.learning_rate, options.max_grad_norm) == (0.5, 2.0)
        assert not options.shuffle
    assert (shared.sft.batch_size, shared.simpo.batch_size) == (1, 4)
    own = settings("--learning-rate", "0.5", "--simpo-learning-rate", "0.25", "--sft-shuffle")
    assert (own.sft.learning_rate, own.simpo.learning_rate) == (0.5, 0.25)
    assert own.sft.shuffle and not own.simulator.shuffle


@pytest.mark.parametrize("stage", ["simulator", "sft", "simpo"])
def test_every_training_option_can_be_overridden_for_one_stage(stage: str) -> None:
    others = {"--schedule": "constant", "--warmup": 0.5, "--save-every": 7, "--steps": 7}
    others |= {"--eval-every": 7, "--batch-size": 7, "--tokens-per-pass": 7, "--epochs": 7}
    others |= {"--weight-decay": 7, "--max-grad-norm": 7, "--learning-rate": 7}
    others |= {"--loraplus-lr-ratio": 7}
    words = [word.replace("--", f"--{stage}-", 1) for word in flags(others)]
    found, plain = settings(*words, f"--{stage}-checkpointing"), settings()
    for name in ("simulator", "sft", "simpo"):
        changed = asdict(getattr(found, name)).items() - asdict(getattr(plain, name)).items()
        assert len(changed) == (13 if name == stage else 0)
    assert set(asdict(plain.sft)) == {x[2:].replace("-", "_") for x in others} | {
        "checkpointing", "shuffle", "seed",
    }  # fmt: skip


@pytest.mark.parametrize("script", [train, infer])
def test_help_is_short_and_help_all_tells_of_every_flag(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def told(flag: str) -> list[str]:
        with pytest.raises(SystemExit) as stop:
            script.build_parser().parse_args([flag])
        assert stop.value.code == 0
        return capsys.readouterr().out.splitlines()

    short, whole = told("--help"), "\n".join(told("--help-all"))
    assert len(short) <= 80 and max(map(len, short)) <= 80
    parser = script.build_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    shown = SHOWN[script.__name__].split()
    assert {f"--{name}" for name in shown} <= known
    assert all(f"  --{flag}" in "\n".join(short) for flag in shown)
    listed = {flag for x in parser._actions if x.help != SUPPRESS for flag in x.option_strings}
    assert all(flag in whole for flag in listed)
    assert "--sft-epochs" in known - listed or script is infer


def test_the_flags_of_the_table_offer_what_there_is() -> None:
    stages = FLAGS["job"]["--stages"]
    assert stages["choices"] == stages["default"] == list(STAGES)
    assert FLAGS["what to answer"]["--split"]["choices"] == list(SPLITS)
    assert ", ".join(STAGES) in stages["help"]


def test_a_wrong_flag_says_where_every_flag_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(see train.py --help-all)" in refused(["--no-such-flag"], capsys)


# --- another simulator ------------------------------------------------------------------------


def pairs_with(
    simulator: Path, finished: Path, inputs: dict[str, Any], run: Path
) -> tuple[list[str], int]:
    """Run sft's successors with another simulator; return the command and its exit code."""
    shutil.copytree(finished / "sft", run / "sft")
    (run / "options").mkdir()
    shutil.copy(finished / "options" / "sft.json", run / "options")
    command = ["--run-dir", str(run), *flags(inputs), "--simulator", str(simulator)]
    return command, train.main(command)


def test_another_adapter_can_play_the_user(
    inputs: dict[str, Any], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own simulator's adapter by its path: all that it decides is the same."""
    command, code = pairs_with(finished / "simulator", finished, inputs, tmp_path / "run")
    assert code == 0
    assert "nothing to train" in capsys.readouterr().out
    made, wanted = bytes_of(tmp_path / "run"), bytes_of(finished)
    assert not (tmp_path / "run" / "simulator").exists()
    for name in ("samples.jsonl", "pairs.jsonl", "rl/adapter_model.safetensors", "rows.jsonl"):
        assert made[name] == wanted[name], name
    other = [*command[:-1], str(finished / "sft")]
    told = refused(other, capsys)
    assert "was made with other-simulator-path" in told


def test_a_model_of_its_own_can_play_the_user(
    inputs: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded once, beside the recommender's; a copy of the base without an adapter speaks alike.

    The timings count both engines' tokens.
    """
    copy = Path(shutil.copytree(inputs["--model"], tmp_path / "model"))
    loaded, plain = [], loading.load_engine

    def noted(options: Any, *rest: Any) -> Any:
        loaded.append(options.model)
        return plain(options, *rest)

    monkeypatch.setattr(loading, "load_engine", noted)
    _, code = pairs_with(copy, finished, inputs, tmp_path / "own")
    assert code == 0
    assert loaded == [str(inputs["--model"]), str(copy)]
    _, code = pairs_with(Path("none"), finished, inputs, tmp_path / "none")
    assert code == 0
    own, none = bytes_of(tmp_path / "own"), bytes_of(tmp_path / "none")
    for name in ("samples.jsonl", "pairs.jsonl", "rows.jsonl"):
        assert own[name] == none[name], name
    decoded = [
        [row["decoded_tokens"] for row in read_rows(tmp_path / name / "timings.jsonl")]
        for name in ("own", "none")
    ]
    assert decoded[0] == decoded[1]
