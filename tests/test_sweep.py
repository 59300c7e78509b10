"""benchmarks/sweep.py: the grid and its faults, equal draws in every cell, the table by hand."""

import importlib.util
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, role_of
from small_run import write_small_data, write_small_model
from test_evaluation import EXAMPLES, FILMS
from test_report import label, row

import infer
from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Reply, Request, Sampling
from usbrec.crs.agents import Roles, Side
from usbrec.crs.ses import SearchOptions, plan
from usbrec.crs.wishes import attributes, write_attribute, write_profile
from usbrec.llm.engine import Usage
from usbrec.runs import read_rows
from usbrec.settings import PRESETS

sys.path.append(str(Path(infer.__file__).parent / "benchmarks"))
import sweep  # noqa: E402

ASKED = [replace(EXAMPLES[i % 2], dialog_id=f"d{i}") for i in range(5)]
SHORT = [
    "--max-new-tokens", "6", "--ses-turns", "1", "--ses-max-new-tokens", "6",
    "--ses-summary-tokens", "6", "--chunk-size", "2", "--limit", "0",
]  # fmt: skip


class Counting(Scripted):
    """A scripted model that names a film by its seed and counts ten prompt tokens a request."""

    def __init__(self) -> None:
        titles = [item.title for item in FILMS]
        super().__init__(lambda request: f"{titles[request.seed % len(titles)]}!")
        self.usage = Usage()

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        self.usage.computed_tokens += 10 * len(requests)
        self.usage.decoded_tokens += len(requests)
        return super().generate(requests)

    def choice_logprobs(self, requests: Sequence[Request], choices: Any) -> list[list[float]]:
        self.usage.computed_tokens += 10 * len(requests)
        return super().choice_logprobs(requests, choices)

    def clear_cache(self) -> None:
        pass


def grid(words: str) -> sweep.Cells:
    """Return the cells of a command line."""
    return sweep.read_grid(sweep.build_parser().parse_intermixed_args(words.split()))


def met(
    llm: Counting, words: str, folder: Path, size: int = 5, **facts: Any
) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """Return the sweep of a scripted recommender over five dialogues, and the rows of each cell."""
    options, sampling = ReplyOptions(chunk_size=size, seed=facts.pop("seed", 0)), Sampling(6, 0.0)
    roles = Roles(Side(llm, "rl"), Side(llm, "simulator"), FILMS)
    engines: Any = [llm]
    answering = Recommender(roles, engines, options, sampling, SearchOptions(), False)
    asked = facts.pop("asked", ASKED)
    found = sweep.run_sweep(answering, grid(words), asked, {"model": "scripted", **facts}, folder)
    return found, [read_rows(folder / cell["rows"]) for cell in found["cells"]]


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without their seconds and checksums, which alone differ from run to run."""
    return [{**x, "costs": {**x["costs"], "seconds": 0}, "check": ""} for x in rows]


# --- the grid ---------------------------------------------------------------------------------


def test_a_grid_has_the_plain_reply_first_and_its_last_option_changes_fastest() -> None:
    plain, *cells = grid("samples=1,3 rollout-temperature=0,0.5")
    assert plain == ({}, None)
    pairs = [(1, 0.0), (1, 0.5), (3, 0.0), (3, 0.5)]
    assert [tuple(values.values()) for values, _ in cells] == pairs
    expected = [SearchOptions(samples=n, rollout_temperature=t) for n, t in pairs]
    assert [search for _, search in cells] == expected


def test_every_kind_of_option_can_be_swept_and_equal_values_are_one_cell() -> None:
    searches = [x for _, x in grid("mode=chain,tree cards=no,yes start_turn=1,2 veto=no") if x]
    assert len(set(searches)) == len(searches) == 8
    assert {(x.mode, x.cards, x.start_turn, x.veto) for x in searches} >= {("tree", True, 2, False)}
    assert len(grid("temperature=0,0.0,0 samples=2,2")) == 2


def test_flags_hold_for_every_cell_and_cards_bring_their_own_defaults() -> None:
    _, (_, one), (_, two) = grid("cards=no,yes --ses-turns 4")
    assert one == SearchOptions(turns=4)
    assert two == SearchOptions(**{**PRESETS["ses_cards"], "turns": 4})
    _, (_, one), (_, two) = grid("samples=2,3 --ses-cards --ses-turns 4")
    own = {**PRESETS["ses_cards"], "turns": 4}
    assert (one, two) == tuple(SearchOptions(**{**own, "samples": n}) for n in (2, 3))


def test_the_ladder_leads_from_the_papers_search_to_those_that_know_films() -> None:
    plain, *rungs = grid("--ladder")
    searches = [asdict(search) for _, search in rungs if search]
    assert plain == ({}, None) and searches[0] == asdict(SearchOptions())
    for search, name in zip(searches[-2:], ("ses_cards", "ses_memory"), strict=True):
        assert search == asdict(SearchOptions(**PRESETS[name]))
    changes = [{k for k in a if a[k] != b[k]} for a, b in itertools.pairwise(searches)]
    # two: what was tried goes back, or is new
    assert list(map(len, changes)) == [1, 2, 1, 2, 1, 2, 1, 1, 2]


def test_flags_may_stand_between_the_words() -> None:
    assert grid("samples=1 --limit 3 mode=tree") == grid("--limit 3 samples=1 mode=tree")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("samples=1,two", ("samples", "'two'", "a whole number")),
        ("samples=1.5", ("samples", "'1.5'", "a whole number")),
        ("samples=1,,3", ("samples", "''", "a whole number")),
        ("samples=", ("samples", "''", "a whole number")),
        ("samples", ("'samples'", "OPTION=VALUE")),
        ("temperature=warm", ("temperature", "'warm'", "a number")),
        ("cards=maybe", ("cards", "'maybe'", "yes or no")),
        ("samples=1,0", ("samples", "0", "at least 1")),
        ("temperature=-1", ("temperature", "-1", "at least 0")),
        ("temperature=nan", ("temperature", "nan", "of a size")),
        ("mode=chain,star", ("mode", "'star'", "chain, tree")),
        ("width=3", ("'width=3'", "samples, turns, mode")),
        ("samples=2 --ses-samples 3", ("samples=2", "--ses-samples")),
        ("samples=2 --split test", ("--split",)),
        ("samples=2 --limit -1", ("--limit", "-1")),
        ("samples=2 --plot x.xyz", ("--plot", "x.xyz", ".png")),
        ("samples=2 --plot nowhere/x.png", ("--plot", "no folder nowhere")),
        ("", ("OPTION=VALUES", "--ladder")),
        ("--ladder --budgets", ("--ladder", "--budgets")),
        ("--budgets samples=2", ("OPTION=VALUES", "--budgets")),
        ("--ladder samples=2", ("--ladder", "OPTION=VALUES")),
        ("--ladder --ses-samples 2", ("--ladder", "--ses")),
    ],
)
def test_a_wrong_word_is_one_sentence(
    capsys: pytest.CaptureFixture[str], words: str, named: tuple[str, ...]
) -> None:
    assert sweep.main(words.split()) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("sweep.py: ") and all(x in told for x in named), told


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    assert sweep.main(["samples=2", "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# --- the cells --------------------------------------------------------------------------------


def test_every_cell_meets_the_same_dialogues_with_the_same_seeds(tmp_path: Path) -> None:
    llm = Counting()
    _, rows = met(llm, "temperature=0.2,0.9 --ses-turns 1", tmp_path)
    assert [[x["dialog_id"] for x in own] for own in rows] == [[f"d{i}" for i in range(5)]] * 3
    calls = [[(role_of(x), x) for x in requests] for requests in llm.generated]
    explained = [[x.seed for role, x in call if role == "explainer"] for call in calls]
    first, *others = [seeds for seeds in explained if seeds]
    assert len(first) == 5 and others == [first, first]
    plain, cold, warm = (
        own for call in calls if (own := [x for role, x in call if role == "recommender"])
    )
    assert {x.sampling.temperature for x in plain} == {0.0}
    assert [x.seed for x in cold] == [x.seed for x in warm]
    assert {x.sampling.temperature for x in cold} == {0.2}
    assert {x.sampling.temperature for x in warm} == {0.9}


def test_every_search_takes_place_whatever_its_start_turn(tmp_path: Path) -> None:
    _, rows = met(Counting(), "start_turn=1,3 --ses-samples 1", tmp_path)
    turns = [{tuple(search["turn"] for search in x["searches"]) for x in own} for own in rows]
    assert turns == [{()}, {(1, 2, 3)}, {(3,)}]
    assert {len(x["replies"]) for own in rows for x in own} == {3}


def test_the_cost_is_that_of_the_replies_without_the_judge(tmp_path: Path) -> None:
    """Per dialogue: one request; with N=2 a summary, 2 replies and 2 scores that decode nothing.

    A chunk's cost is shared equally. The two replies of a dialogue may be equal: one score then.
    """
    found, rows = met(Counting(), "samples=2 --ses-turns 1", tmp_path, size=2)
    plain, cell = (x["costs"] for x in found["cells"])
    assert (plain["prompt_tokens"], plain["decoded_tokens"], plain["times"]) == (10, 1, 1)
    searches = [x["searches"][0] for x in rows[1]]
    scores = sum(len({y["reply"] for y in x["candidates"]}) for x in searches)
    assert cell["prompt_tokens"] == pytest.approx(10 * (3 + scores / 5))
    assert cell["decoded_tokens"] == 3
    assert cell["times"] == pytest.approx(cell["seconds"] / plain["seconds"])


def test_a_cell_is_not_computed_twice(tmp_path: Path) -> None:
    first, _ = met(Counting(), "samples=1,2", tmp_path)
    llm = Counting()
    assert met(llm, "samples=1,2", tmp_path)[0] == first  # its costs, too
    assert llm.generated == [] and llm.scored == []
    wider, _ = met(llm, "samples=2,1,3", tmp_path)
    explained = [x for call in llm.generated for x in call if role_of(x) == "explainer"]
    assert len(explained) == 5  # those of the new cell alone
    for mine, other in ((0, 0), (1, 2), (2, 1)):
        for key in ("ieval", "recall@1", "costs"):
            assert wider["cells"][mine][key] == first["cells"][other][key]
    assert wider["name"] != first["name"]


def test_other_dialogues_seeds_or_facts_make_other_cells(tmp_path: Path) -> None:
    names: list[str] = []
    for other in ({}, {"seed": 1}, {"asked": ASKED[:4]}, {"model": "other"}, {"size": 2}):
        found, _ = met(Counting(), "samples=1", tmp_path, **other)
        names += [x["rows"] for x in found["cells"]]
    assert len(set(names)) == len(names) == 10


def test_an_interrupted_sweep_ends_with_the_same_rows(tmp_path: Path) -> None:
    class Stopped(Counting):
        def choice_logprobs(self, *call: Any) -> list[list[float]]:
            if len(self.scored) == 6:  # three chunks of the plain reply, then 2, 1 of the search
                raise KeyboardInterrupt
            return super().choice_logprobs(*call)

    words = "samples=2,3"
    found, whole = met(Counting(), words, tmp_path / "whole", size=2)
    with pytest.raises(KeyboardInterrupt):
        met(Stopped(), words, tmp_path / "torn", size=2)
    torn = tmp_path / "torn" / found["cells"][1]["rows"]
    kept = read_rows(torn)
    assert len(kept) == 2
    with torn.open("a", encoding="utf-8") as file:
        file.write('{"place": 2, "dial')
    again, rows = met(Counting(), words, tmp_path / "torn", size=2)
    assert again["name"] == found["name"]
    assert [*map(untimed, rows)] == [*map(untimed, whole)] and rows[1][:2] == kept
    for one, other in zip(found["cells"], again["cells"], strict=True):
        for name in ("prompt_tokens", "decoded_tokens"):
            assert one["costs"][name] == other["costs"][name]


# --- the table and the picture ----------------------------------------------------------------

PLAIN = [row(0, 0.0, label(False)), row(1, 1.0, label(True)), row(2, 1.0, label(False))]
SEARCHED = [row(0, 2.0, label(True)), row(1, 1.0, label(True)), row(2, None, label(False))]
CHEAP = [{"seconds": x, "prompt_tokens": 100, "decoded_tokens": 10} for x in (1.0, 2.0, 3.0)]
DEAR = [{"seconds": 5.0, "prompt_tokens": x, "decoded_tokens": 40} for x in (500, 600, 700)]


def sweep_by_hand() -> dict[str, Any]:
    """Return a sweep of four searches with the same rows, beside the plain reply."""
    plain = {"values": {}, **sweep.figures((PLAIN, CHEAP), (PLAIN, CHEAP), seed=0)}
    search = sweep.figures((SEARCHED, DEAR), (PLAIN, CHEAP), seed=0)
    pairs = [(n, cards) for n in (0, 1) for cards in (False, True)]
    ruled = {"rule": sweep.mean_interval([], 0), "value": sweep.mean_interval([0.5], 0)}
    cells = [{"values": {"votes": n, "cards": cards}, **search, **ruled} for n, cards in pairs]
    plain |= ruled
    return {"swept": ["votes", "cards"], "cells": [plain, *cells]}


def test_the_figures_are_those_of_the_rows_and_the_differences_are_paired() -> None:
    """Recall@1 1/3 and 2/3; iEval 2/3 and 3/2, of the two that both have (2 + 0) / 2 more."""
    plain, cell, *_ = sweep_by_hand()["cells"]
    assert (plain["recall@1"]["mean"], cell["recall@1"]["mean"]) == pytest.approx((1 / 3, 2 / 3))
    assert (plain["ieval"]["mean"], cell["ieval"]["mean"]) == pytest.approx((2 / 3, 3 / 2))
    gaps = cell["differences"]
    assert (gaps["ieval"]["mean"], gaps["ieval"]["n"]) == (1.0, 2)
    assert gaps["recall@1"]["mean"] == pytest.approx(1 / 3)
    assert {x["mean"] for x in plain["differences"].values()} == {0.0}
    assert cell["costs"] == {
        "seconds": 5.0, "prompt_tokens": 600.0, "decoded_tokens": 40.0, "times": 2.5,
        "tokens": 640 / 110,
    }  # fmt: skip


def test_the_table_has_a_line_per_cell_with_its_values_as_they_are_given() -> None:
    found = sweep_by_hand()
    assert sweep.header_of(found) == [
        "", "votes", "cards", "iEval, 0 to 2", "Recall@1", "iEval, 0 to 2 - plain",
        "Recall@1 - plain", "value", "time / plain", "tokens / plain", "prompt tokens",
        "decoded tokens", "by rule",
    ]  # fmt: skip
    plain, *searches = [sweep.line_of(found, cell) for cell in found["cells"]]
    assert plain[:3] == ["plain reply", "", ""] and plain[3].startswith("0.667 [")
    values = [["0", "no"], ["0", "yes"], ["1", "no"], ["1", "yes"]]
    assert [line[:3] for line in searches] == [["search", *x] for x in values]
    assert searches[0][3].startswith("1.500 [") and searches[0][5].startswith("+1.000 [")
    assert searches[0][-6].startswith("0.500 [")
    assert searches[0][-5:] == ["2.5", "5.8", "600.0", "40.0", "none"]


def test_the_rule_chooses_the_candidate_whose_card_fits_the_summary() -> None:
    """The second film fits, the third does too but comes later, and one reply names no film."""
    liked, other, *_ = FILMS
    wish = write_profile([write_attribute(*x) for x in attributes(liked)], [])
    tried = [(None, False), (other.title, False), (liked.title, True), (liked.title, False)]
    candidates = [{"title": title, "found": found} for title, found in tried]
    talks = [PLAIN[0] | {"searches": [{"profile": wish, "candidates": candidates}]}, PLAIN[1]]
    found = sweep.rule_recall(talks, FILMS, 0)
    assert (found["mean"], found["n"]) == (1.0, 1)
    talks[0]["searches"][0]["profile"] = "Likes: unknown."  # all films fit alike: the first one
    assert sweep.rule_recall(talks, FILMS, 0)["mean"] == 0.0


def test_a_plot_has_a_point_per_cell_and_a_line_per_combination_of_the_others() -> None:
    found = sweep_by_hand()
    lines = sweep.lines_of(found, "ieval")
    assert {name: list(points) for name, points in lines.items()} == {
        "cards no": [0, 1], "cards yes": [0, 1],
    }  # fmt: skip
    found["swept"] = ["cards", "votes"]
    lines = sweep.lines_of(found, "ieval")
    assert {name: list(points) for name, points in lines.items()} == {
        "votes 0": ["no", "yes"], "votes 1": ["no", "yes"],
    }  # fmt: skip


def write_run(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Return a run folder of a tiny model, and the first row of each validation dialogue."""
    run = folder / "run"
    model, data = write_small_model(folder / "model"), write_small_data(folder / "data", rows=3)
    valid = [json.loads(x) for x in (data / "valid.jsonl").read_text("utf-8").splitlines()]
    with (data / "valid.jsonl").open("a", encoding="utf-8") as file:  # a dialogue's second row
        file.write(json.dumps({**valid[0], "turn_id": valid[0]["turn_id"] + 2}) + "\n")
    made = {"model": {"model": str(model), "dtype": "float32"}, "data": str(data)}
    (run / "options").mkdir(parents=True)
    (run / "options" / "simulator.json").write_text(json.dumps(made), "utf-8")
    (run / "simulator").mkdir()
    (run / "simulator" / "adapter_model.safetensors").touch()  # the run has got so far
    return run, valid


def test_the_command_sweeps_validation_dialogues_of_a_run_and_keeps_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, valid = write_run(tmp_path)
    plot = tmp_path / "cells.png"
    command = ["--run-dir", str(run), "--simulator", "none", *SHORT, "candidates=sampled,ranked"]
    drawn = ["--plot", str(plot)] if importlib.util.find_spec("matplotlib") else []
    assert sweep.main([*command, *drawn]) == 0
    said = capsys.readouterr()
    head, _, *lines = said.out.splitlines()
    assert head.startswith("|  | candidates | iEval")
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| plain reply", ""], ["| search", "sampled"], ["| search", "ranked"],
    ]  # fmt: skip
    [path] = (x for x in (run / "sweep").glob("*.json") if not x.name.endswith(".options.json"))
    assert str(path) in said.err
    found = json.loads(path.read_text("utf-8"))
    assert path.stem == found["name"] and found["n"] == 3
    assert found["eval"]["max_new_tokens"] == 6
    rows = [read_rows(run / "sweep" / cell["rows"]) for cell in found["cells"]]
    ids = [[x["dialog_id"] for x in own] for own in rows]
    assert sorted(ids[0]) == sorted(x["dialog_id"] for x in valid) and ids == [ids[0]] * 3
    assert all(cost > 0 for cell in found["cells"] for cost in cell["costs"].values())
    assert not drawn or plot.stat().st_size > 1000


# --- budgets ----------------------------------------------------------------------------------


def test_the_command_tries_shares_of_the_whole_searches_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole search drops nothing, a quarter of its tokens keeps fewer candidates."""
    run, _ = write_run(tmp_path)
    command = ["--run-dir", str(run), "--simulator", "none", "--limit", "0", "--budgets"]
    short = ["--max-new-tokens", "6", "--ses-max-new-tokens", "6", "--ses-summary-tokens", "6"]
    assert sweep.main([*command, *short]) == 0
    lines = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    shares = [(name, str(share)) for name in sweep.BUDGETED for share in (1.0, 0.5, 0.25)]
    assert lines == [["| plain reply", "", ""], *[["| search", *x] for x in shares]]
    [path] = (x for x in (run / "sweep").glob("*.json") if not x.name.endswith(".options.json"))
    _, *cells = json.loads(path.read_text("utf-8"))["cells"]
    for whole, *less in (cells[:3], cells[3:]):
        searches = [x["searches"][0] for x in read_rows(run / "sweep" / whole["rows"])]
        assert not any("budget" in x for x in searches)
        for cell in less:
            searches = [x["searches"][0] for x in read_rows(run / "sweep" / cell["rows"])]
            assert all(x["budget"]["widths"] != [8] * len(x["candidates"]) for x in searches)
            assert cell["costs"]["tokens"] < whole["costs"]["tokens"]
            assert cell["search"]["budget_tokens"] < whole["search"]["budget_tokens"]


def test_all_of_the_tokens_are_the_least_that_drop_nothing() -> None:
    search = SearchOptions(samples=4)
    whole = sweep.whole_tokens(ASKED, search)
    for tokens, less in ((whole, False), (whole - 1, True)):
        plans = [plan(x.history, replace(search, budget_tokens=tokens)) for x in ASKED]
        assert any(plans) == less


def test_the_value_of_a_choice_is_that_which_the_whole_search_gives_it() -> None:
    """The budget's choice was not judged, and is written out; the whole search gives it 1.5."""

    def searched(best: int, *values: float | None) -> Any:
        told = [{"lines": [["recommender", f"Film {i}."]]} for i in range(len(values))]
        candidates = [
            {"reply": f"Film {i}. Good." if i == best else f"Film {i}.", "value": x, "leaves": [y]}
            for i, (x, y) in enumerate(zip(values, told, strict=True))
        ]
        return {**PLAIN[0], "searches": [{"best": best, "candidates": candidates}]}

    whole, less = searched(0, 2.0, 1.5, 0.0), searched(1, 0.1, None)
    assert sweep.chosen_value([less], [whole], 0)["mean"] == 1.5
    assert sweep.chosen_value([whole], [whole], 0)["mean"] == 2.0
    assert sweep.chosen_value(PLAIN, PLAIN, 0)["n"] == 0


def test_the_help_shows_the_flags_of_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    told = capsys.readouterr().out
    assert "--budgets " in told and "--ses-samples N" in told and "--top-k" not in told
