"""benchmarks/known.py: six replies a dialogue, who is asked what, figures by hand, the command."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import SURE, Scripted, role_of, talk
from small_run import write_small_data, write_small_model

import infer
from usbrec.chat import Request
from usbrec.crs.agents import EXPLAIN, Roles, Side
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Example
from usbrec.crs.lessons import FILMLESS, Suggestions
from usbrec.runs import read_rows

sys.path.append(str(Path(infer.__file__).parent / "benchmarks"))
import known  # noqa: E402

HARBOUR = Item("Brass Harbour (1991)", "Brass Harbour", 1991, ("horror",), ("Ada Prow",))
GARDEN = Item("Glass Garden (1995)", "Glass Garden", 1995, ("war",), ("Ada Prow",))
ORCHARD = Item("Velvet Orchard (2004)", "Velvet Orchard", 2004, ("comedy",), ("Ida Lund",))
FILMS = Catalogue([HARBOUR, GARDEN, ORCHARD])
DRAWS = Suggestions(FILMS, {item.title: 1 for item in FILMS})
ASKED = Example(
    "d1", 1, talk("Something with ghosts?"), "Try Brass Harbour (1991), by Ada Prow.",
    (HARBOUR.title,), explanation="Brass Harbour is a 1991 horror film.",
)  # fmt: skip


def scored(
    mark: Callable[[str], int | None], *asked: Example
) -> tuple[Scripted, list[dict[str, Any]]]:
    """Return the rows of a judge that marks by the text it is shown, and whom the rows asked."""

    def logprobs(request: Request) -> list[float]:
        said = [x.content for x in request.messages if x.content != EXPLAIN]
        shown = said[1] if role_of(request) == "card_judge" else "\n".join(said[2:-1])
        score = mark(shown)
        return [-math.inf] * 3 if score is None else SURE[score]

    def reply(request: Request) -> str:
        return "Likes: horror." if role_of(request) == "summariser" else "Told by the model."

    llm = Scripted(reply, logprobs)
    roles = Roles(Side(llm, "rl"), Side(llm, "simulator"), FILMS)
    return llm, known.score_chunk(roles, DRAWS, 0, asked or (ASKED,))


def by_film(shown: str) -> int:
    """Mark the harbour 2, the garden 1, all else 0, an invented title too."""
    reply = shown.splitlines()[0]
    return 2 if "Brass Harbour" in reply else int("Glass Garden" in reply)


def scores_of(row: dict[str, Any], scorer: str) -> list[float]:
    return [row["replies"][name]["scores"][scorer] for name in known.ORDER]


# --- the replies ------------------------------------------------------------------------------


def test_the_six_replies_are_in_their_order() -> None:
    made = known.replies_of(DRAWS, ASKED, 3)
    assert [x.reply for x in made[:3]] == [
        "Try Brass Harbour (1991), by Ada Prow.",
        "Try Glass Garden (1995), by Ada Prow.",
        "Try Velvet Orchard (2004), by Ida Lund.",
    ]
    assert made[1].explanation == "Glass Garden is a 1995 war film."
    assert re.fullmatch(r"Try \w+ \w+ \(1991\), by Ada Prow\.", made[3].reply)
    assert not FILMS.find(made[3].reply) and made[3].explanation == made[0].explanation
    assert made[4].reply in FILMLESS and made[5].reply == made[5].explanation == ""
    assert [FILMS.grade_of(x.reply, ASKED.items) for x in made] == [2, 1, 0, 0, 0, 0]


def test_a_dialogue_without_all_six_is_skipped() -> None:
    silent = replace(ASKED, response="Try that one.")  # names no gold film
    llm, rows = scored(by_film, silent, ASKED)
    assert [len(x["replies"]) for x in rows] == [0, 6] and rows[0]["profile"] is None
    assert [role_of(x) for x in llm.generated[0]] == ["summariser"]
    found = known.measure(rows, 0)
    assert (found["dialogues"], found["skipped"]) == (1, 1)
    lonely = Suggestions(Catalogue([HARBOUR, ORCHARD]), {HARBOUR.title: 1, ORCHARD.title: 1})
    assert known.replies_of(lonely, ASKED, 0) == []  # no kindred film
    llm, rows = scored(by_film, silent)
    assert known.measure(rows, 0)["scorers"]["iEval"]["in_order"] is None


# --- the scores -------------------------------------------------------------------------------


def test_each_judge_is_asked_as_the_report_and_the_search_ask_it() -> None:
    llm, [row] = scored(by_film)
    summaries, explained = llm.generated
    assert [role_of(x) for x in summaries] == ["summariser"]
    assert [role_of(x) for x in explained] == ["explainer"] * 6
    assert {x.adapter for x in explained} == {"rl"}
    own, given, plain, cards = llm.scored
    for calls, role in ((own, "judge"), (given, "judge"), (plain, "internal_judge")):
        assert [role_of(x) for x in calls] == [role] * 6
    assert {x.adapter for x in own + given + plain + cards} == {"simulator"}
    assert [role_of(x) for x in cards] == ["card_judge"] * 3  # three replies name no film
    assert [x.messages[-2].content for x in own] == ["Told by the model."] * 6
    told = [x.messages[-2].content for x in given]
    assert told[:2] == ["Brass Harbour is a 1991 horror film.", "Glass Garden is a 1995 war film."]
    assert told[3] == told[0] and told[4] in FILMLESS and told[5] == "..."
    assert row["profile"] == "Likes: horror."


def test_every_scorer_has_a_score_of_each_reply() -> None:
    _, [row] = scored(by_film)
    for scorer in ("iEval", "given explanation", "internal judge", "judge with cards"):
        a, b, c, *lesser = scores_of(row, scorer)
        assert a > b > c == pytest.approx(scores_of(row, "internal judge")[2])
        assert lesser == ([0, 0, 0] if scorer == "judge with cards" else [c, c, c])
    assert scores_of(row, "rule on the summary") == [2, 0, 0, 0, 0, 0]  # only one is horror
    assert scores_of(row, "rule grade") == [2, 1, 0, 0, 0, 0]


def test_a_score_that_cannot_be_read_enters_nothing_and_is_counted() -> None:
    other = replace(ASKED, dialog_id="d2")
    _, rows = scored(
        lambda shown: None if "Glass Garden" in shown else by_film(shown), ASKED, other
    )
    own = known.measure(rows, 0)["scorers"]["iEval"]
    assert own["unparsed"] == {
        "gold": 0, "kindred film": 1, "other film": 0,
        "invented film": 0, "no film": 0, "empty": 0,
    }  # fmt: skip
    assert own["means"]["kindred film"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert own["pairs"]["gold > kindred film"]["n"] == 0
    assert own["pairs"]["other film > invented film"] == {
        **own["pairs"]["other film > invented film"], "mean": 0.5, "n": 2
    }  # fmt: skip
    assert own["in_order"] == own["films_in_order"] == 0


# --- the figures ------------------------------------------------------------------------------


def test_ties_count_half() -> None:
    assert known.wins([2, 1, 0, None], [1, 1, 1, 1]) == [1, 0.5, 0, None]


def test_means_that_fall_in_every_draw_are_in_order_and_equal_ones_never() -> None:
    falling = [[2.0, 1.9], [1.0, 1.1], [0.5, 0.4]]
    assert known.share_in_order(falling, 0) == 1
    assert known.share_in_order(falling[::-1], 0) == 0
    assert known.share_in_order([[1.0, 1.0], [1.0, 1.0]], 0) == 0
    assert known.share_in_order([[], []], 0) is None


def test_the_share_in_order_is_that_of_the_draws() -> None:
    """Differences 1 and -1 of two dialogues: the mean is above 0 in a quarter of the draws."""
    share = known.share_in_order([[1.0, 0.0], [0.0, 1.0]], 0)
    assert share == pytest.approx(0.25, abs=0.05)
    unread = known.share_in_order([[1.0, None], [0.0, 0.5]], 0)
    assert unread == pytest.approx(0.75, abs=0.05)  # no mean where the second is drawn twice


def test_a_judge_that_knows_the_order_shows_it() -> None:
    rows = scored(by_film, *(replace(ASKED, dialog_id=f"d{i}") for i in range(4)))[1]
    own = known.measure(rows, 0)["scorers"]
    assert own["iEval"]["pairs"]["gold > kindred film"]["mean"] == 1
    assert own["iEval"]["pairs"]["no film > empty"]["mean"] == 0.5
    assert (own["iEval"]["films_in_order"], own["iEval"]["in_order"]) == (1, 0)
    means = own["rule grade"]["means"]
    assert [means[name]["mean"] for name in known.ORDER] == [2, 1, 0, 0, 0, 0]
    assert means["gold"]["low"] < 2  # four dialogues that agree say little


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return a command line over a run of a small random model."""
    run = tmp_path / "run"
    model, data = write_small_model(tmp_path / "model"), write_small_data(tmp_path / "data", 40)
    made = {"model": {"model": str(model), "dtype": "float32"}, "data": str(data)}
    for folder in (run / "options", run / "simulator"):
        folder.mkdir(parents=True)
    (run / "options" / "simulator.json").write_text(json.dumps(made))
    (run / "simulator" / "adapter_model.safetensors").touch()  # the run has got so far
    words = ["--run-dir", str(run), "--simulator", "none", "--chunk-size", "2", "--limit", "5"]
    return words


def test_the_command_prints_both_tables_and_goes_on_from_its_rows(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert known.main(command) == 0
    table = capsys.readouterr().out
    for told in ("mean score, 0 to 2", "| gold > kindred film |", "| iEval |", "| rule grade |"):
        assert told in table
    folder = tmp_path / "run" / "known"
    [path], [figures] = folder.glob("*.jsonl"), folder.glob("valid-????????????????.json")
    rows, text = read_rows(path), figures.read_text("utf-8")
    found = json.loads(text)
    assert len(rows) == 5 and found["dialogues"] + found["skipped"] == 5
    assert found["dialogues"] > 1
    replies = [x["reply"] for row in rows for x in row["replies"].values() if x["reply"]]
    assert replies and not any(x in text for x in replies)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"place": 2, "di')
    asked: list[int] = []
    score = known.score_chunk

    def counting(roles: Roles, draws: Suggestions, seed: int, chunk: Any) -> Any:
        asked.append(len(chunk))
        return score(roles, draws, seed, chunk)

    monkeypatch.setattr(known, "score_chunk", counting)
    assert known.main(command) == 0
    assert asked == [2, 1] and path.read_bytes() == whole
    assert figures.read_text("utf-8") == text and capsys.readouterr().out == table


def test_a_users_fault_is_one_sentence(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for changed, named in ((["--limit", "-1"], "--limit"), (["--data", "nowhere"], "nowhere")):
        assert known.main([*command, *changed]) == 2
        [told] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("known.py: ")]
        assert named in told
