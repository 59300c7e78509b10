"""benchmarks/blind.py: the sheet and its key, sheets as they come back, and the figures by hand."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import label, row

import infer

sys.path.append(str(Path(infer.__file__).parent / "benchmarks"))
import blind  # noqa: E402

Rewriting = Callable[[list[dict[str, str]]], None]


def met(number: int, reply: str, score: float | None, grade: int) -> dict[str, Any]:
    """Return a talk of one reply about a dialogue of two lines, one of them with a line break."""
    said = [["seeker", f"Film {number}?\nSoon"], ["recommender", "Which?"], ["seeker", "Any; dark"]]
    own = {"replies": [reply.strip()], "transcript": [*said, ["recommender", reply.strip()]]}
    return {**row(number, score, label(False), grade=grade), **own}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of 12 dialogues; in 0 and 6 both methods reply alike but for a space.

    The second method's score is higher in the odd ones, its grade in every third.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    rows = []
    for i in range(12):
        other = f"Try  {i}." if i % 6 == 0 else f'=Better, {i}; "good"'
        found = {"RL": met(i, f"Try {i}.", 1.0, 0)}
        found["RL+SES+cards"] = met(i, other, 1.02 + (i % 2), 2 * (i % 3 == 0))
        rows.append({"place": i, "agreement": {}, **found})
    text = "".join(json.dumps(x) + "\n" for x in rows)
    (folder / "rows.jsonl").write_text(text, "utf-8")
    (folder / "report.json").touch()
    return folder


@pytest.fixture
def sheet(run: Path, tmp_path: Path) -> Path:
    """Return the sheet of all dialogues of the run."""
    path = tmp_path / "sheet.csv"
    assert blind.main(["--export", str(path), "--run-dir", str(run), "--limit", "0"]) == 0
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def key_of(sheet: Path) -> dict[str, Any]:
    return json.loads(sheet.with_suffix(".key.json").read_text("utf-8"))


def fill(sheet: Path, name: str, better: Callable[[dict[str, Any]], str]) -> Path:
    """Write a copy of the sheet in which `better` of a row of the key tells what is preferred."""
    rows, path = read(sheet), sheet.with_name(name)
    for cells, known in zip(rows, key_of(sheet)["rows"], strict=True):
        cells["better"] = better(known)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def second(known: dict[str, Any]) -> str:
    """Return the side of the second method."""
    return next(side for side, name in known["methods"].items() if name == "RL+SES+cards")


def first(known: dict[str, Any]) -> str:
    return "AB"[second(known) == "A"]


def number_of(known: dict[str, Any]) -> int:
    """Return the number of the run's dialogue."""
    return int(known["dialog_id"][1:])


def figures(*sheets: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what --human makes of the sheets."""
    out = sheets[0].with_name("figures.json")
    assert blind.main(["--human", *map(str, sheets), *more, "--json", str(out)]) == 0
    return json.loads(out.read_text("utf-8"))


# --- the sheet --------------------------------------------------------------------------------


def test_a_sheet_has_both_replies_unnamed_and_the_key_tells_the_sides(sheet: Path) -> None:
    rows, key = read(sheet), key_of(sheet)
    assert list(rows[0]) == ["number", "dialogue", "A", "B", "better"]
    assert {x["better"] for x in rows} == {""} and len(rows) == 10
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbfnumber")  # by which Excel knows UTF-8
    assert "RL" not in sheet.read_text("utf-8-sig")
    for cells, known in zip(rows, key["rows"], strict=True):
        i = number_of(known)
        said = f"Seeker: Film {i}? Soon\nRecommender: Which?\nSeeker: Any; dark"
        assert cells["dialogue"] == said and cells["number"] == str(known["number"])
        assert cells[first(known)] == f"Try {i}."
        assert cells[second(known)] == f' =Better, {i}; "good"'  # no formula
        assert known["scores"] == {first(known): 1.0, second(known): 1.02 + (i % 2)}
        assert known["grades"] == {first(known): 0, second(known): 2 * (i % 3 == 0)}
    assert 2 < [second(known) for known in key["rows"]].count("A") < 8
    order = [number_of(known) for known in key["rows"]]
    assert sorted(order) != order


def test_equal_replies_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], sheet: Path
) -> None:
    """The output of the fixture that makes the sheet is read."""
    key = key_of(sheet)
    assert (key["equal"], key["dialogues"]) == (2, 12)
    assert {number_of(known) for known in key["rows"]}.isdisjoint({0, 6})
    assert "2 of 12 dialogues are left out" in capsys.readouterr().out


def test_the_choice_and_the_sides_are_seeded(run: Path, sheet: Path, tmp_path: Path) -> None:
    whole = sheet.read_bytes()

    def made(name: str, *more: str) -> Path:
        path = tmp_path / f"{name}.csv"
        assert blind.main(["--export", str(path), "--run-dir", str(run), *more]) == 0
        return path

    assert made("again").read_bytes() == whole
    few = made("few", "--limit", "4")
    assert read(few) == read(sheet)[:4]
    other = key_of(made("other", "--limit", "4", "--seed", "1"))["rows"]
    assert [x["dialog_id"] for x in other] != [x["dialog_id"] for x in key_of(few)["rows"]]


def test_nothing_is_overwritten(run: Path, sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, key = ["--export", str(sheet), "--run-dir", str(run)], sheet.with_suffix(".key.json")
    whole, known = sheet.read_bytes(), key.read_bytes()
    assert blind.main(command) == 2
    assert f"{sheet} is there already" in capsys.readouterr().err
    sheet.unlink()
    assert blind.main(command) == 2
    assert f"{key} is there already" in capsys.readouterr().err
    assert not sheet.exists() and key.read_bytes() == known
    key.unlink()
    assert blind.main([*command, "--limit", "0"]) == 0
    assert (sheet.read_bytes(), key.read_bytes()) == (whole, known)


def test_without_a_run_that_of_the_sample_set_is_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.rename(tmp_path / "sample")
    monkeypatch.setattr(blind.runs, "RUNS", tmp_path)
    assert blind.main(["--export", str(tmp_path / "other.csv")]) == 0
    named = ["--run-dir", str(tmp_path / "sample")]
    assert blind.main(["--export", str(tmp_path / "same.csv"), *named]) == 0
    assert (tmp_path / "other.csv").read_bytes() == (tmp_path / "same.csv").read_bytes()


def test_a_talk_of_several_turns_is_shown_to_its_end() -> None:
    """The dialogue that both met has one line; what follows is not the same."""
    lines = [["seeker", "Hi"], ["recommender", "A"], ["seeker", "No"], ["recommender", "..."]]
    talk = {"transcript": lines, "replies": ["A", ""]}
    assert blind.parted(talk) == ("Seeker: Hi", "Recommender: A\nSeeker: No\nRecommender: ...")
    silent = {"transcript": [*lines[:1], lines[3]], "replies": [""]}
    assert blind.parted(silent) == ("Seeker: Hi", "(no reply)")


# --- sheets as they come back -----------------------------------------------------------------


def test_the_win_rate_counts_a_tie_as_a_half(sheet: Path) -> None:
    """Of ten: the second method in 4 (1, 2, 3, 4), a tie in 5 and 7, the first in 8 and 9."""

    def better(known: dict[str, Any]) -> str:
        i = number_of(known)
        if i > 9:
            return ""
        return second(known) if i < 5 else "=" if i < 8 else first(known)

    found = figures(fill(sheet, "ann.csv", better), more=("--key", str(sheet)[:-4] + ".key.json"))
    [ann] = found["people"].values()
    assert (ann["filled"], ann["unfilled"]) == (8, 2)
    assert ann["win_rate"]["mean"] == pytest.approx(5 / 8) and ann["win_rate"]["n"] == 8
    assert ann["win_rate"]["low"] < 5 / 8 < ann["win_rate"]["high"]
    assert found["win_rate"]["all people"] == ann["win_rate"]
    assert found["agreement"]["two people"]["kappa"]["n"] == 0


def test_agreement_is_with_the_judges_scores_and_the_rules_grades(sheet: Path) -> None:
    """The second method scores more in five odd ones, else nearly the same; its grade in 3, 9."""
    key = ("--key", str(sheet.with_suffix(".key.json")))
    like = fill(sheet, "like.csv", lambda x: second(x) if number_of(x) % 2 else "=")
    found = figures(like, more=key)["agreement"]
    assert found["people and judge"]["same"]["mean"] == 1
    assert found["people and judge"]["kappa"]["mean"] == pytest.approx(1)
    # of 10 rows the rules say so in 3 and 9, people in 1, 3, 5, 7, 9, 11
    assert found["people and rules"]["same"]["mean"] == pytest.approx(6 / 10)
    one, other = [1, 0, 1, 0, 1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    apart = sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / 10
    chance = sum((a - b) ** 2 for a in one for b in other) / 100
    assert found["people and rules"]["kappa"]["mean"] == pytest.approx(1 - apart / chance)
    against = fill(sheet, "against.csv", lambda x: first(x) if number_of(x) % 2 else "=")
    assert figures(against, more=key)["agreement"]["people and judge"]["kappa"]["mean"] < 0


def test_people_are_compared_where_they_judged_the_same_rows(
    sheet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ann all ten, Bo the first four like her, Cy one of these otherwise: 4 + 1 + 1 pairs."""
    ann = fill(sheet, "ann.csv", second)
    bo = fill(sheet, "bo.csv", lambda x: second(x) if x["number"] < 5 else "")
    cy = fill(sheet, "cy.csv", lambda x: first(x) if x["number"] == 1 else "")
    ann.rename(sheet)  # beside the key
    found = figures(sheet, bo, cy)
    assert [x["filled"] for x in found["people"].values()] == [10, 4, 1]
    assert [x["unfilled"] for x in found["people"].values()] == [0, 6, 9]
    two = found["agreement"]["two people"]
    assert (two["same"]["mean"], two["same"]["n"]) == (pytest.approx(4 / 6), 6)
    # the first dialogue's mean is 2/3, the others are won
    assert found["win_rate"]["all people"]["mean"] == pytest.approx((9 + 2 / 3) / 10)
    assert found["win_rate"]["all people"]["n"] == 10
    said = capsys.readouterr().out
    assert "RL+SES+cards against RL, 10 dialogues (2 of the 12 dialogues had equal" in said
    assert f"| {bo} | 4 | 6 | 1.000 [" in said


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_sheet_as_a_spreadsheet_program_saves_it_is_read(
    sheet: Path, separator: str, ends: str
) -> None:
    """A byte order mark, other separators and line ends, columns moved, added, small letters."""
    told = [second, first, lambda x: "="]
    plain = fill(sheet, "plain.csv", lambda x: told[x["number"] % 3](x))
    key = ("--key", str(sheet.with_suffix(".key.json")))
    expected = figures(plain, more=key)
    rows, path = read(plain), sheet.with_name("saved.csv")
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        names = ["better", "B", "A", "remark", "dialogue", "number"]
        writer = csv.DictWriter(file, names, delimiter=separator, lineterminator=ends)
        writer.writeheader()
        for cells in rows[::-1]:
            lines = cells["dialogue"].replace("\n", ends)
            moved = {"better": f" {cells['better'].lower()} ", "remark": "x", "dialogue": lines}
            writer.writerow({**cells, **moved})
        file.write(separator * 5 + ends)
    found = figures(path, more=key)
    for name in ("win_rate", "agreement"):
        assert found[name] == expected[name]


def change(column: str, value: str) -> Rewriting:
    """Return the change of a cell in the third row."""

    def rewrite(rows: list[dict[str, str]]) -> None:
        rows[2][column] = value

    return rewrite


@pytest.mark.parametrize(
    ("rewrite", "named"),
    [
        (change("better", "C"), ("line 8", "A, B, = or empty", "'C'")),
        (change("better", "AB"), ("line 8", "'AB'")),
        (change("number", "99"), ("line 8", "number", "'99'")),
        (change("number", ""), ("line 8", "number", "''")),
        (change("number", "1"), ("line 8", "number 1 comes twice")),
        (change("A", "another reply"), ("line 8", "another sheet")),
        (lambda rows: [x.pop("better") for x in rows], ("no column 'better'", "first line")),
        (lambda rows: rows.clear(), ("no column 'number'",)),
    ],
)
def test_a_wrong_entry_is_one_sentence_with_its_line(
    sheet: Path, capsys: pytest.CaptureFixture[str], rewrite: Rewriting, named: tuple[str, ...]
) -> None:
    """The header is line 1 and a dialogue has three lines, so the third row begins in line 8."""
    rows = read(sheet)
    rewrite(rows)
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    assert blind.main(["--human", str(sheet)]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"blind.py: {sheet}") and all(x in told for x in named), told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--export x.txt", ("--export", ".csv", "x.txt")),
        ("--export x.csv --limit -1", ("--limit", "-1")),
        ("--export x.csv --methods RL RL", ("two different methods", "'RL'")),
        ("--export x.csv --methods RL SFT", ("--methods", "'SFT'", "rows.jsonl")),
        ("--export x.csv --human y.csv", ("--human", "--export")),
        ("", ("--export", "--human", "required")),
        ("--human y.csv", ("y.key.json is missing", "--key")),
        ("--human y.csv y.csv", ("twice",)),
        ("--human y.csv --key run/rows.jsonl", ("rows.jsonl", "JSON")),
        ("--human y.csv --key other.json", ("other.json", "not a key")),
        ("--human y.csv --key sheet.key.json", ("y.csv", "missing")),
    ],
)
def test_a_users_fault_is_one_sentence(
    sheet: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    named: tuple[str, ...],
) -> None:
    monkeypatch.chdir(sheet.parent)
    Path("other.json").write_text('{"methods": ["RL", "SFT"], "rows": [{}], "equal": 0}')
    capsys.readouterr()
    more = ["--run-dir", "run"] if "--export" in words else []
    assert blind.main([*words.split(), *more]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("blind.py: ") and all(x in told for x in named), told
    assert not Path("x.csv").exists() and not Path("x.key.json").exists()


def test_methods_that_reply_alike_make_no_sheet(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(x) for x in (run / "rows.jsonl").read_text("utf-8").splitlines()]
    text = "".join(json.dumps({**x, "SFT": x["RL"]}) + "\n" for x in rows)
    (run / "rows.jsonl").write_text(text, "utf-8")
    command = ["--export", str(tmp_path / "x.csv"), "--run-dir", str(run)]
    assert blind.main([*command, "--methods", "SFT", "RL"]) == 2
    assert "all replies of SFT and RL are equal" in capsys.readouterr().err
