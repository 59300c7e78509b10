"""benchmarks/titles.py: every figure of a few hand-made rows, counted by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import write_small_data

from usbrec.crs.catalogue import Catalogue, read_item

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(SCRIPTS))
import titles  # noqa: E402

FILMS = ("Alien (1979)", "Titanic (1997)", "It (2017)", "Up (2009)", "War (2007)")


def row(dialog: str, context: list[str], entity: list[str], rec: list[str], resp: str) -> Any:
    fields = {"dialog_id": dialog, "turn_id": len(context), "context": context}
    return {**fields, "entity": entity, "rec": rec, "resp": resp}


ROWS = [
    row("a", ["A film like Alien (1979)?"], ["Alien (1979)", "horror"], ["It (2017)"], "It (2017)"),
    row(
        "a",
        ["A film like Alien (1979)?", "It (2017)", "It is up to her. I saw alien, and Titanic."],
        ["Alien (1979)", "It (2017)"],
        ["Titanic (1997)"],
        "So Titanic (1997) Alien (1979) again!",
    ),
    row("b", ["", "Hi! War is sad.", "Watch Up!"], [], ["Alien (1979)"], "try Alien (1979)"),
]


@pytest.fixture(scope="module")
def films() -> Catalogue:
    return Catalogue(read_item({"name": title}) for title in FILMS)


@pytest.fixture(scope="module")
def rows(films: Catalogue) -> list[titles.Row]:
    return titles.read_rows(ROWS, films)


def test_an_annotated_title_belongs_to_the_next_line_in_which_it_stands() -> None:
    lines = ["heat and Up", "Up, then Up", "Heat"]
    assert titles.placed(lines, ["Heat", "Up", "Up", "Heat"]) == [
        ("Heat", "Up"),
        ("Up",),
        ("Heat",),
    ]
    assert titles.placed(lines, ["Jaws", "Up"]) == [(), (), ()]


def test_rows_have_lines_with_speakers_titles_and_the_answer(rows: list[titles.Row]) -> None:
    assert [len(x.context) for x in rows] == [1, 3, 2]  # the empty line is left out
    assert [x.is_seeker for x in rows[2].context] == [False, True]
    assert rows[0].answer == rows[1].context[2] and rows[1].answer is None
    assert [x.titles for x in rows[1].context] == [("Alien (1979)",), ("It (2017)",), ()]
    assert len(titles.lines_of(rows)) == 7  # two of nine lines are repeated


def test_precision_and_recall_count_each_mention_of_each_line_once(
    films: Catalogue, rows: list[titles.Row]
) -> None:
    """Annotated: Alien, It, Titanic, Alien in the four lines that have one, all found.

    Found besides: Titanic in the seeker's second line, Alien in the second reply, which is no gold
    title of it, and Up in "Watch Up!". Not found, and annotated nowhere: "alien", "War is sad".
    """
    found = titles.judge_finding(titles.lines_of(rows), films)
    every, ordinary = found["all titles"], found["one ordinary word"]
    assert (every["recall"]["mean"], every["recall"]["n"]) == (1, 4)
    assert (every["precision"]["mean"], every["precision"]["n"]) == (4 / 7, 7)
    assert (ordinary["recall"]["mean"], ordinary["recall"]["n"]) == (1, 1)  # It
    assert (ordinary["precision"]["mean"], ordinary["precision"]["n"]) == (0.5, 2)  # It, not Up
    assert every["precision"]["low"] < 4 / 7 < every["precision"]["high"]


def test_an_annotated_title_that_is_not_found_lowers_recall(films: Catalogue) -> None:
    line = titles.Line("a", 0, True, "alien, alien (1979), it", ("Alien (1979)", "It (2017)"))
    assert titles.judge_finding([line], films)["all titles"]["recall"]["mean"] == 0.5


def test_leaks_are_counted_before_and_after_hiding(
    films: Catalogue, rows: list[titles.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeker names the gold title of row 2 alone: "I saw alien, and Titanic."

    Of the ordinary words only row 1 asks. Its reply in lower case without the year is "it".
    """
    hiding = titles.judge_hiding(rows, films)
    spoken = hiding["seeker's lines, all titles"]
    assert (spoken["before"]["mean"], spoken["after"]["mean"]) == (1 / 3, 0)
    assert hiding["seeker's lines, one ordinary word"]["before"]["n"] == 1
    assert hiding["replies as written, all titles"]["after"]["mean"] == 0
    lower = hiding["replies lower case without year, one ordinary word"]["after"]
    assert (lower["mean"], lower["n"]) == (0, 1)  # "it" is the whole line, so it is hidden
    monkeypatch.setattr(Catalogue, "hide", lambda self, text, gold: text)
    blind = titles.judge_hiding(rows, films)
    assert blind["seeker's lines, all titles"]["after"]["mean"] == 1 / 3
    assert {blind[f"replies {x}, all titles"]["after"]["mean"] for x in titles.FORMS} == {1}


def test_a_name_within_another_annotated_title_is_not_named(films: Catalogue) -> None:
    line = titles.Line("a", 0, True, "ALIEN 2 (1990)", ("Alien 2 (1990)",))
    assert not titles.is_named(line, line.text, "Alien (1979)", films)
    assert titles.is_named(line._replace(titles=()), line.text, "Alien (1979)", films)
    assert titles.times("An alien, Alien! aliens", "Alien (1979)") == 2


def test_false_alarms_are_counted_in_seeker_lines_without_titles(
    films: Catalogue, rows: list[titles.Row]
) -> None:
    """Two such lines: the second of dialogue a ("It is up to her"), and "Watch Up!"."""
    alarms = titles.count_false_alarms(titles.lines_of(rows), films)
    counts = {name: (x["stands"], x["found"], x["per_1000_lines"]) for name, x in alarms.items()}
    assert counts == {
        "It": (1, 0, 0),
        "Up": (2, 1, 500),
        "War": (0, 0, 0),
        "all of them": (3, 1, 500),
    }


def test_the_catalogue_is_filled_up_with_titles_of_its_own_words(films: Catalogue) -> None:
    items = titles.padded(films, 200)
    assert len(items) == len({item.title for item in items}) == 200
    assert tuple(items[:5]) == films.items
    assert {word for item in items for word in item.name.split()} == {
        word for item in films for word in item.name.split()
    }


@pytest.mark.parametrize("limit", [None, 2])
def test_the_command_prints_tables_and_one_line_of_json(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
) -> None:
    monkeypatch.setattr(titles, "PADDED", 100)
    (tmp_path / "items.json").write_text(json.dumps({t: {"name": t} for t in FILMS}), "utf-8")
    text = "".join(json.dumps(x) + "\n" for x in ROWS)
    (tmp_path / "test.jsonl").write_text(text, "utf-8")
    command = ["--data", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    assert titles.main(command + ["--limit", str(limit)] * bool(limit)) == 0
    *tables, last = capsys.readouterr().out.splitlines()
    told, figures = json.loads(last), json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert told["benchmark"] == "titles" and told["reach"] == {"find": 1, "find_100k_items": 1}
    assert set(told["reach"]) < set(told["ratios"])
    assert figures["hiding"]["seeker's lines, all titles"]["before"]["n"] == (limit or 3)
    assert sum(line.startswith("| ") for line in tables) >= 4 + 2 + 12 + 4 + 2
    if limit is None:
        assert told["ratios"]["precision_all_titles"] == 0.5714
        assert told["ratios"]["named_before_all_titles"] == 0.3333
        assert told["ratios"]["false_alarms_per_1000"] == 500


def test_a_missing_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert titles.main(["--data", "redial", "--data-dir", "nowhere"]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert "nowhere" in told


def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_small_data(tmp_path / "data", rows=2)
    rows = map(json.loads, (data / "test.jsonl").read_text("utf-8").splitlines())
    bare = [json.dumps({k: x for k, x in row.items() if k != "entity"}) for row in rows]
    (data / "test.jsonl").write_text("\n".join(bare), "utf-8")  # as docs/DATA.md has them
    for words, told in (
        (["--limit", "-1"], "--limit must be at least 0, got -1"),
        (["--data", str(data)], "a row has no entity"),
    ):
        assert titles.main(words) == 2
        assert capsys.readouterr().err.startswith(f"titles.py: {told}")


def test_the_script_imports_no_torch() -> None:
    code = "import sys, titles; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS)
