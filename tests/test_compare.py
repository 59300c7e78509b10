"""benchmarks/compare.py: results of runs and replies, paired on the rows that they share."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import write_small_data
from test_report import PLAIN, TUNED

import usbrec

sys.path.append(str(Path(usbrec.__file__).parents[1] / "benchmarks"))
import compare

FACTS: dict[str, Any] = {"dir": None, "reply": {"seed": 0}}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_run(folder: Path, judge: bytes, methods: dict[str, Any]) -> Path:
    """Write what `compare` reads of a run: options, judge, and the talks of its methods."""
    note, adapter = folder / "options/report.json", folder / "simulator/adapter_model.safetensors"
    for path in (note, adapter):
        path.parent.mkdir(parents=True)
    note.write_text(json.dumps({"eval": {"turns": 1}, "model": {}}), "utf-8")
    adapter.write_bytes(judge)
    rows = [dict(zip(methods, talks, strict=True)) for talks in zip(*methods.values(), strict=True)]
    write_lines(folder / "rows.jsonl", rows)
    (folder / "report.json").touch()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("small") / "data", rows=4)


@pytest.fixture
def replies(data: Path, tmp_path: Path) -> list[Path]:
    """Two results files: the gold reply to all four test rows, and to the last two of them."""
    asked = [json.loads(x) for x in (data / "test.jsonl").read_text("utf-8").splitlines()]
    paths = []
    for name, known in (("a", range(4)), ("b", range(2, 4))):
        rows = [{x: row[x] for x in ("dialog_id", "turn_id")} for row in asked]
        for i, row in enumerate(rows):
            row |= {
                "gold": asked[i]["rec"],
                "reply": asked[i]["resp"] if i in known else "No idea.",
            }
        paths.append(write_lines(tmp_path / f"{name}.jsonl", rows))
        note = Path(f"{paths[-1]}.options.json")
        note.write_text(json.dumps(FACTS | {"data": str(data)}), "utf-8")
    return paths


def compared(tmp_path: Path, *words: Any) -> dict[str, Any]:
    out = tmp_path / "figures.json"
    assert compare.main([*map(str, words), "--json", str(out)]) == 0
    return json.loads(out.read_text("utf-8"))


def test_replies_are_scored_by_the_rules_and_paired(replies: list[Path], tmp_path: Path) -> None:
    found = compared(tmp_path, *replies)
    one, other = map(str, replies)
    assert found["rows"] == 4 and found["against"] == one
    assert [found["columns"][x]["recall@1"]["mean"] for x in (one, other)] == [1.0, 0.5]
    assert [found["columns"][x]["rule_grade"]["mean"] for x in (one, other)] == [2.0, 1.0]
    assert found["columns"][one]["ieval"]["mean"] is None
    assert found["differences"][other]["hit"]["mean"] == -0.5
    assert (
        compared(tmp_path, *replies, "--against", other)["differences"][one]["hit"]["mean"] == 0.5
    )


def test_only_rows_that_all_have_are_compared(replies: list[Path], tmp_path: Path) -> None:
    lines = replies[1].read_text("utf-8").splitlines(keepends=True)
    replies[1].write_text("".join(lines[1:3]), "utf-8")
    found = compared(tmp_path, *replies)
    assert found["rows"] == 2
    assert [x["hit"]["mean"] for x in found["columns"].values()] == [1.0, 0.5]


def test_ieval_is_compared_only_under_the_same_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", b"x", {"SFT": PLAIN, "RL": TUNED})
    same = write_run(tmp_path / "same", b"x", {"RL": TUNED})
    other = write_run(tmp_path / "other", b"y", {"RL": TUNED})
    gaps = compared(tmp_path, one, same, other)["differences"]
    assert list(gaps) == [f"{one}, RL", f"{same}, RL", f"{other}, RL"]
    assert gaps[f"{one}, RL"] == gaps[f"{same}, RL"] and "ieval" in gaps[f"{one}, RL"]
    assert "ieval" not in gaps[f"{other}, RL"]
    assert gaps[f"{other}, RL"]["hit"] == gaps[f"{one}, RL"]["hit"]
    assert f"| {other}, RL | other judge |" in capsys.readouterr().out


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert compare.main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_what_cannot_be_paired_is_refused(
    replies: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = replies
    assert "found nothing" in refused([one, tmp_path / "none"], capsys)
    assert "each result can be named once" in refused([one, one], capsys)
    assert "--against must be one of" in refused([one, "--against", "RL"], capsys)
    run = write_run(tmp_path / "run", b"x", {"RL": TUNED})
    assert "share no row" in refused([one, run], capsys)
    edited = [json.loads(x) for x in other.read_text("utf-8").splitlines()]
    edited[1]["gold"] = ["Up (2009)"]
    write_lines(other, edited)
    assert f"{other}, line 2: the dataset {data} has no such row" in refused([other], capsys)
    write_lines(other, [edited[0], edited[0]])
    assert "rows of the same ids" in refused([other], capsys)


def test_other_gold_titles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = json.loads(json.dumps(TUNED))
    changed[0]["labels"][0]["title"] = "Up (2009)"
    runs = [write_run(tmp_path / x, b"x", {"RL": y}) for x, y in (("a", TUNED), ("b", changed))]
    assert "has the gold titles ['Up (2009)'" in refused(runs, capsys)
    shutil.rmtree(runs[0] / "options")
    assert refused(runs, capsys)
