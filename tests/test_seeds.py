"""benchmarks/seeds.py: runs that differ in their seed alone, pooled by dialogue."""

import json
import sys
from pathlib import Path

import pytest
from test_report import PLAIN, TUNED

import infer

sys.path.append(str(Path(infer.__file__).parent / "benchmarks"))
import seeds  # noqa: E402


def write_run(folder: Path, seed: int, turns: int = 1) -> Path:
    """Write what `seeds` reads of a run: its options and the talks of two methods."""
    (folder / "options").mkdir(parents=True)
    options = {"seed": seed, "sft": {"seed": 7 * seed}, "eval": {"turns": turns}}
    (folder / "options" / "report.json").write_text(json.dumps(options), "utf-8")
    pairs = zip(PLAIN, TUNED, strict=True)
    rows = [{"place": i, "SFT": a, "RL": b} for i, (a, b) in enumerate(pairs)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, "utf-8")
    (folder / "report.json").touch()
    return folder


def test_a_run_whose_report_is_unfinished_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1)
    (part / "report.json").unlink()
    assert seeds.main([str(whole), str(part)]) == 2
    assert f"{part / 'report.json'}" in capsys.readouterr().err


def test_runs_of_several_seeds_are_pooled_by_dialogue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows twice: the means of one run, and no narrower interval than of one."""
    one, two = (write_run(tmp_path / str(n), n) for n in (1, 2))
    for runs in ([one], [one, two]):
        path = tmp_path / f"{len(runs)}.json"
        assert seeds.main([*map(str, runs), "--json", str(path)]) == 0
    single, double = (json.loads((tmp_path / f"{n}.json").read_text("utf-8")) for n in (1, 2))
    assert double["dialogues"] == single["dialogues"] == 3
    for key in ("ieval", "recall@1"):
        gaps = [found["differences"]["RL - SFT"][key] for found in (single, double)]
        assert gaps[1]["n"] == 2 * gaps[0]["n"]
        for end in ("mean", "low", "high"):
            assert gaps[1][end] == pytest.approx(gaps[0][end])
    table = capsys.readouterr().out
    assert str(two) in table and "| RL - SFT | +" in table


def test_runs_with_other_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_run(tmp_path / "1", 1), write_run(tmp_path / "2", 2, turns=3)
    assert seeds.main([str(one), str(two)]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert str(two) in told and "only seeds may differ" in told
    assert seeds.main([str(one), str(tmp_path / "none")]) == 2
    assert "is missing" in capsys.readouterr().err
