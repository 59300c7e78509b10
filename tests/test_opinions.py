"""benchmarks/opinions.py: who is asked what, figures and signs by hand, the command on a run."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import SURE, Scripted, role_of
from small_run import write_small_data, write_small_model
from test_evaluation import EXAMPLES, FILMS, LOFT, WELL
from test_report import label, row

import infer
from usbrec.chat import Request
from usbrec.crs.agents import Roles, Side, Votes
from usbrec.crs.evaluation import EvaluationOptions, evaluate_method
from usbrec.crs.ses import SearchOptions
from usbrec.options import UserError
from usbrec.runs import Row, read_rows, write_rows

sys.path.append(str(Path(infer.__file__).parent / "benchmarks"))
import opinions  # noqa: E402

ASKED = [replace(EXAMPLES[i % 2], dialog_id=f"d{i}") for i in range(3)]
BOTH = replace(EXAMPLES[0], dialog_id="both", items=(WELL.title, LOFT.title))


def by_text(request: Request) -> list[float]:
    """Return log-probabilities that depend on every word of the prompt."""
    return SURE[sum(map(len, (x.content for x in request.messages))) % 3]


def reply(request: Request) -> str:
    """Return a vote by the seed, or a title by the temperature and the seed."""
    if role_of(request) in ("judge", "internal_judge") or request.sampling.max_new_tokens == 16:
        return str(request.seed % 3)
    return [x.title for x in FILMS][(request.seed + (request.sampling.temperature > 0)) % 4]


def roles(llm: Scripted, second: Scripted | None = None) -> Roles:
    outer = Side(second, "judge") if second else None
    return Roles(Side(llm, "rl"), Side(llm, "simulator"), FILMS, outer)


def met(llm: Scripted, options: EvaluationOptions, examples: Any = (*ASKED, BOTH)) -> list[Row]:
    """Return the rows of a run with the talks of a plain method and of a search."""
    searches = {"RL": None, "RL+SES": SearchOptions(samples=2, turns=1)}
    talks = {
        name: evaluate_method(roles(llm), examples, 5, options, x) for name, x in searches.items()
    }
    rows = [{name: own[i] for name, own in talks.items()} for i in range(len(examples))]
    return json.loads(json.dumps(rows))


def judges(llm: Scripted) -> list[list[Request]]:
    """Return the calls that ask the external judge for log-probabilities."""
    return [call for call in llm.scored if role_of(call[0]) == "judge"]


def judged(
    rows: list[Row], llm: Scripted, votes: Votes | None = None, second: Scripted | None = None
) -> list[Row]:
    """Return the opinions on a run with seed 5."""
    told = opinions.Reported(5, votes or Votes(), None)
    cast = roles(llm, second)
    asked = opinions.opinions_of(told, cast.external, 9)
    return opinions.judge_chunk(cast, asked, ["RL", "RL+SES"], rows)


# --- who is asked what ------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2])
def test_the_first_opinion_asks_what_the_report_asked_and_gets_its_scores(turns: int) -> None:
    before, llm = Scripted(reply, by_text), Scripted(reply, by_text)
    rows = met(before, EvaluationOptions(turns=turns))
    made = judged(rows, llm)
    assert judges(llm)[:2] == judges(before) and len(judges(before)) == 2
    scored = opinions.scored_talks(rows, made, ["RL", "RL+SES"])
    assert len({talk["score"] for talk in opinions.joined(scored["report"])}) > 1
    assert opinions.repeated(rows, scored["report"]) == {
        "n": 8, "equal": 8, "same": 8, "greatest_difference": 0, "unparsed": 0,
    }  # fmt: skip
    assert scored["report"] == {m: [x[m] for x in rows] for m in ("RL", "RL+SES")}
    assert [own["dialog_id"] for own in made] == ["d0", "d1", "d2", "both"]


def test_a_report_of_sampled_votes_is_repeated_vote_by_vote() -> None:
    options = EvaluationOptions(votes=3, vote_temperature=0.4)
    before, llm = Scripted(reply), Scripted(reply)
    rows = met(before, options)
    made = judged(rows, llm, Votes(3, 0.4))
    asked = [call for call in before.generated if call[0].sampling.max_new_tokens == 16]
    assert llm.generated[:2] == asked
    scored = opinions.scored_talks(rows, made, ["RL", "RL+SES"])
    assert opinions.repeated(rows, scored["report"])["equal"] == 8
    assert len(llm.generated[2]) == 4 * 20
    assert not {x.seed for x in llm.generated[2]} & {x.seed for x in llm.generated[0]}


def test_votes_are_sampled_and_other_words_ask_the_same_of_the_same_talk() -> None:
    llm = Scripted(reply, by_text)
    rows = met(Scripted(reply, by_text), EvaluationOptions())
    made = judged(rows, llm)
    assert [len(call) for call in llm.generated] == [80, 80]  # 20 votes for 4 dialogues
    assert {x.sampling.temperature for x in llm.generated[0]} == {0.7}
    plain, other = llm.scored[0], llm.scored[2]
    assert len(llm.scored) == 4
    for one, two in zip(plain, other, strict=True):
        assert one.messages[:-1] == two.messages[:-1] and one.adapter == two.adapter
        assert one.messages[-1].role == two.messages[-1].role == "system"
        assert one.messages[-1].content != two.messages[-1].content
    assert "{targets}" not in other[3].messages[-1].content
    for title in BOTH.items:
        assert title in other[3].messages[-1].content
    assert list(made[0]["opinions"]) == ["report", "20 votes", "other words"]
    votes = made[0]["opinions"]["20 votes"]["RL"]
    assert votes["parse_rate"] == 1 and votes["digit_probability"] is None


def test_a_second_judge_is_asked_the_reports_question_and_nothing_else() -> None:
    llm, second = Scripted(reply, by_text), Scripted(reply, lambda request: SURE[2])
    rows = met(Scripted(reply, by_text), EvaluationOptions())
    made = judged(rows, llm, second=second)
    assert second.generated == [] and {x.adapter for x in second.scored[0]} == {"judge"}
    assert [[x.messages for x in call] for call in second.scored] == [
        [x.messages for x in call] for call in llm.scored[:2]
    ]
    labels = {own["opinions"]["second judge"]["RL"]["label"] for own in made}
    assert labels == {2}


# --- the figures ------------------------------------------------------------------------------


def talks(*told: tuple[float | None, int | None, int]) -> list[Row]:
    """Return talks of a score, a class and a grade each; grade 2 is found, and a hit."""
    made = []
    for i, (score, mark, grade) in enumerate(told):
        said = [["seeker", "Hi"], ["recommender", f"Film {i}"]]
        own = {"label": mark, "transcript": said, "replies": [f"Film {i}"]}
        made.append({**row(i, score, label(grade == 2), grade=grade), **own})
    return made


ONE = talks((0.1, 0, 0), (1.0, 1, 1), (1.9, 2, 2), (0.2, 0, 0))
OTHER = talks((0.3, 0, 0), (1.4, 2, 1), (None, None, 2), (0.2, 0, 0))


def test_an_opinion_stands_beside_the_first_where_both_have_a_score() -> None:
    """Of three pairs 0.1, 0.3; 1.0, 1.4; 0.2, 0.2 the mean difference is 0.2; one class differs.

    Classes 0, 1, 0 and 0, 2, 0: 1/3 over 2/9 + 8/9 + 1/9 gives kappa 1 - 3/11.
    """
    found = opinions.against_first({"report": ONE, "other": OTHER}, 0)
    assert list(found) == ["other"]
    other = found["other"]
    assert other["mean_difference"]["mean"] == pytest.approx(0.2)
    expected = np.corrcoef([0.1, 1.0, 0.2], [0.3, 1.4, 0.2])[0, 1]
    assert other["pearson"]["mean"] == pytest.approx(expected)
    assert other["kappa"]["mean"] == pytest.approx(1 - 3 / 11)
    assert other["unparsed"] == 0.25 and other["pearson"]["n"] == 3


def test_a_score_that_cannot_be_read_is_the_reports_only_if_that_could_not_be_read() -> None:
    rows = [{"RL": x} for x in OTHER]
    same = opinions.repeated(rows, {"RL": OTHER})
    assert (same["equal"], same["same"], same["unparsed"]) == (4, 4, 0.25)
    assert "25.0% could not be read" in opinions.repetition(same)
    near = [{**x, "score": x["score"] and x["score"] + 0.01} for x in OTHER]
    told = opinions.repeated(rows, {"RL": near})
    assert (told["equal"], told["same"]) == (1, 4)
    assert told["greatest_difference"] == pytest.approx(0.01)
    assert "judged as the report did: 1 of 4" in opinions.repetition(told)
    read = opinions.repeated(rows, {"RL": ONE})
    assert (read["equal"], read["same"]) == (1, 1)
    assert opinions.repetition(read).startswith("NOT THE REPORT'S SCORES")


def test_methods_differ_by_each_opinion_and_by_rule() -> None:
    """RL+SES finds one film more; its score is higher by 0.5 in the report, lower by the other."""
    better = talks((0.6, 0, 2), (1.5, 1, 1), (2.0, 2, 2), (0.7, 0, 0))
    worse = talks((0.2, 0, 2), (1.4, 2, 1), (1.0, 1, 2), (0.2, 0, 0))
    scored = {"report": {"RL": ONE, "RL+SES": better}, "other": {"RL": OTHER, "RL+SES": worse}}
    rows = [{"RL": x, "RL+SES": y} for x, y in zip(ONE, better, strict=True)]
    found = opinions.measure(rows, scored, 0)
    [gap] = found["differences"].values()
    assert list(found["differences"]) == ["RL+SES - RL"]
    assert gap["report"]["mean"] == pytest.approx((0.5 + 0.5 + 0.1 + 0.5) / 4)
    assert (gap["other"]["mean"], gap["other"]["n"]) == (pytest.approx(-0.1 / 3), 3)
    for name in ("hit", "recall@1"):
        assert gap[name]["mean"] == 0.25
    assert gap["rule_grade"]["mean"] == 0.5
    means = found["methods"]["RL"]
    assert (means["report"]["mean"], means["other"]["n"]) == (pytest.approx(0.8), 3)
    assert means["recall@1"]["mean"] == 0.25 and means["other"]["low"] >= 0


def test_the_calibration_is_the_grades_of_the_rules_by_the_score() -> None:
    """Bins are a quarter wide; one holds 0.25 to 0.49, the last 1.75 to 2."""
    told = talks((0.25, 0, 0), (0.49, 0, 2), (2.0, 2, 2), (1.75, 2, 1), (None, None, 2), (0, 0, 0))
    found = opinions.calibration(told, 0)
    assert list(found) == ["0.00 to 0.25", "0.25 to 0.50", "1.75 to 2.00"]
    second, last = found["0.25 to 0.50"], found["1.75 to 2.00"]
    assert second["score"] == pytest.approx(0.37) and last["score"] == pytest.approx(1.875)
    assert (second["grade 2"]["mean"], second["grade 1 or more"]["mean"]) == (0.5, 0.5)
    assert (last["grade 2"]["mean"], last["grade 1 or more"]["mean"]) == (0.5, 1)
    assert last["grade 2"]["n"] == 2


# --- signs of failure -------------------------------------------------------------------------


def signs(scored: opinions.Scored) -> dict[str, list[str]]:
    first = scored["report"]
    rows = [{m: first[m][i] for m in first} for i in range(len(next(iter(first.values()))))]
    return opinions.measure(rows, scored, 0)["signs"]


def spoken(number: int, *lines: str, replies: int = 1) -> Row:
    """Return a talk of these lines, the seeker's first, of which the last are the method's."""
    told = [[("seeker", "recommender")[i % 2], text] for i, text in enumerate(lines)]
    made = [text for who, text in told if who == "recommender"][-replies:]
    [talk] = talks((number % 3, number % 3, 0))
    return {**talk, "dialog_id": f"d{number}", "transcript": told, "replies": made}


def test_scores_that_do_not_move_are_a_sign() -> None:
    close = talks(*[(1 + i / 1000, i % 2, 0) for i in range(40)])
    assert "standard deviation is 0.012" in opinions.stillness(close)
    one = talks(*[(i % 2, 1, 0) for i in range(39)], (2, 2, 0))
    assert "39 of 40 are of class 1" in opinions.stillness(one)
    assert opinions.stillness([*one[:38], *talks((2, 2, 0), (2, 2, 0))]) == ""  # 95% exactly
    assert opinions.stillness(talks((None, None, 0))) == ""
    moving = [spoken(i, "Hi", f"Film {i}") for i in range(40)]
    still = [
        {**x, **{k: y[k] for k in ("score", "label")}} for x, y in zip(moving, close, strict=True)
    ]
    told = signs({"report": {"RL": moving}, "20 votes": {"RL": still}})
    [sentence] = told["scores that do not move"]
    assert sentence.startswith("RL by 20 votes: ") and told["loops"] == []


def test_a_reply_that_was_said_before_in_its_dialogue_is_a_loop() -> None:
    assert opinions.repeats(spoken(0, "Hi", "Try  Heat", "No", "try heat")) == ["try heat"]
    assert opinions.repeats(spoken(0, "Hi", "Heat", "No", "Ran", "No", "Ran", replies=2)) == ["Ran"]
    assert opinions.repeats(spoken(0, "Hi", "Hi")) == ["Hi"]  # the seeker's words
    # the history's own repetition, the seeker's, and silence are none of the method
    assert opinions.repeats(spoken(0, "Hi", "Heat", "Hi", "Heat", "Hi", "Ran")) == []
    assert opinions.repeats(spoken(0, "Hi", "...", "No", "...", replies=2)) == []
    told = opinions.loops([spoken(0, "Hi", "Hi"), spoken(1, "Hi", "Ran")])
    assert told == ["1 of 2 replies repeat an earlier line of their dialogue, such as 'Hi'"]


def test_one_reply_for_many_dialogues_is_a_loop() -> None:
    many = [spoken(i, "Hi", "Try  Heat" if i < 3 else f"Film {i}") for i in range(10)]
    [told] = opinions.loops(many)
    assert told == "the same reply in 3 of 10 dialogues, 'Try  Heat'"
    fewer = [spoken(i, "Hi", "Try Heat" if i < 2 else f"Film {i}") for i in range(10)]
    assert opinions.loops(fewer) == []  # a fifth exactly
    assert opinions.loops(many[:1]) == []  # one dialogue is not several


def test_a_method_that_scores_above_another_and_finds_less_is_a_sign() -> None:
    """Ten dialogues: RL finds all, the search none; the report scores the search higher by 1."""

    def method(score: float, grade: int) -> list[Row]:
        return talks(*[(score + (i % 2) / 2, i % 3, grade) for i in range(10)])

    found, missed = method(0.1, 2), method(1.1, 0)
    scored = {"report": {"RL": found, "RL+SES": missed}, "other": {"RL": missed, "RL+SES": missed}}
    told = signs(scored)["high iEval with low recall"]
    assert len(told) == 1 and told[0].startswith("RL+SES - RL by report: iEval +1.000 [")
    assert "Recall@1 -1.000 [" in told[0]
    turned = {"report": {"RL": missed, "RL+SES": found}}
    [told_too] = signs(turned)["high iEval with low recall"]
    assert told_too.startswith("RL+SES - RL by report: iEval -1.000 [")
    alike = {"report": {"RL": method(0.1, 0), "RL+SES": missed}}
    assert signs(alike)["high iEval with low recall"] == []


# --- the run ----------------------------------------------------------------------------------


def write_note(run: Path, **changed: Any) -> Path:
    """Write options/report.json of a run with seed 5, as far as it is read."""
    facts = {"seed": 5, "eval": asdict(EvaluationOptions()), **changed}
    (run / "options").mkdir(parents=True, exist_ok=True)
    (run / "options" / "report.json").write_text(json.dumps(facts), "utf-8")
    return run


def test_the_reports_judge_is_that_of_its_notes(tmp_path: Path) -> None:
    assert opinions.as_reported(write_note(tmp_path)) == opinions.Reported(5, Votes(), None)
    voted = {**asdict(EvaluationOptions()), "votes": 7, "vote_temperature": 0.3}
    other = {"eval": voted, "other-judge": {"path": "runs/x/simulator", "digest": ""}}
    told = opinions.as_reported(write_note(tmp_path, **other))
    assert told == opinions.Reported(5, Votes(7, 0.3), "runs/x/simulator")
    with pytest.raises(UserError, match=r"report\.json is not as train\.py"):
        opinions.as_reported(write_note(tmp_path, eval={}))
    with pytest.raises(UserError, match="profile no external judge was asked"):
        opinions.as_reported(write_note(tmp_path, eval={**voted, "protocol": "profile"}))


def test_rows_are_those_of_the_first_dialogues_that_all_methods_met(tmp_path: Path) -> None:
    rows = [{"RL": x, "RL+SES": x, "agreement": {}} for x in ONE]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"RL": ONE[0], "agreement": {}}, {"agreement": {}}])
    with pytest.raises(UserError, match=r"report\.json"):
        opinions.read_talks(tmp_path, ["RL", "RL+SES"])  # some rows may be missing yet
    (tmp_path / "report.json").touch()
    assert opinions.read_talks(tmp_path, ["RL", "RL+SES"]) == rows
    assert opinions.read_talks(tmp_path, ["RL+SES"], 2) == rows[:2]
    assert len(opinions.read_talks(tmp_path, ["RL"])) == 5
    with pytest.raises(UserError, match=r"RL, RL\+SES, which .*rows\.jsonl has; got 'SFT'"):
        opinions.read_talks(tmp_path, ["RL", "SFT"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a small random model with the talks of two methods about three dialogues."""
    folder = tmp_path_factory.mktemp("opinions")
    run = folder / "run"
    model, data = write_small_model(folder / "model"), write_small_data(folder / "data", rows=3)
    made = {"model": {"model": str(model), "dtype": "float32"}, "data": str(data)}
    write_note(run)
    (run / "options" / "simulator.json").write_text(json.dumps(made), "utf-8")
    (run / "simulator").mkdir()
    (run / "simulator" / "adapter_model.safetensors").touch()  # the run has got so far
    words = ("--run-dir", str(run), "--simulator", "none", "--recommender", "none")
    own = infer.load_recommender(*words)
    asked = infer.set_up(infer.build_parser().parse_args(words)).rows("test")
    options = EvaluationOptions(max_new_tokens=6)
    searching = SearchOptions(samples=2, turns=1, max_new_tokens=6, summary_tokens=6)
    talked = {
        name: evaluate_method(own.roles, asked, 5, options, x)
        for name, x in (("RL", None), ("RL+SES", searching))
    }
    rows = [{name: x[i] for name, x in talked.items()} for i in range(len(asked))]
    write_rows(run / "rows.jsonl", rows)
    (run / "report.json").touch()
    write_small_model(folder / "other", num_hidden_layers=1)
    return run


def command(run: Path, *more: str) -> list[str]:
    words = ["--run-dir", str(run), "--simulator", "none", "--methods", "RL", "RL+SES"]
    return [*words, "--chunk-size", "2", *more]


def kept(run: Path, suffix: str) -> list[Path]:
    found = sorted((run / "opinions").glob(f"*{suffix}"))
    return [path for path in found if not path.name.endswith(".options.json")]


@pytest.fixture
def run(finished: Path) -> Path:
    """Return the run without the opinions of other tests."""
    for path in (finished / "opinions").glob("*"):
        path.unlink()
    return finished


def test_the_command_repeats_the_reports_scores_and_keeps_the_figures(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    drawn = ["--plot", str(tmp_path / "bins.png")] if importlib.util.find_spec("matplotlib") else []
    assert opinions.main(command(run, "--judge", str(run.parent / "other"), *drawn)) == 0
    said = capsys.readouterr()
    assert said.out.startswith("judged as the report did: ") and "of 6 scores are" in said.out
    for told in (
        "| against the report's, all |",
        "| 20 votes |",
        "| other words |",
        "| second judge |",
        "| against the report's, RL+SES |",
        "| mean score by | report | 20 votes | other words | second judge | Recall@1 |",
        "| RL+SES - RL |",
        "| score, second judge | score | grade 2 | grade 1 or more |",
        "scores that do not move: ",
        "loops: ",
        "high iEval with low recall: ",
    ):
        assert told in said.out, told
    [rows], [figures] = kept(run, ".jsonl"), kept(run, ".json")
    assert figures.stem == rows.stem and str(figures) in said.err
    found = json.loads(figures.read_text("utf-8"))
    assert found["dialogues"] == 3 and found["repeated"]["same"] == 6
    assert found["repeated"]["greatest_difference"] < 1e-4
    other = found["opinions"]["all"]["second judge"]
    assert other["mean_difference"]["mean"] > 0 and other["mean_difference"]["n"] == 6
    ids = [x["RL"]["dialog_id"] for x in read_rows(run / "rows.jsonl")]
    assert [x["dialog_id"] for x in read_rows(rows)] == ids
    assert not drawn or (tmp_path / "bins.png").stat().st_size > 1000


def test_an_interrupted_command_goes_on_and_ends_alike(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opinions.main(command(run)) == 0
    [path], [figures] = kept(run, ".jsonl"), kept(run, ".json")
    whole, told = path.read_bytes(), figures.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"place": 2, "di')
    figures.unlink()
    asked: list[int] = []
    judge = opinions.judge_chunk
    monkeypatch.setattr(opinions, "judge_chunk", lambda *x: asked.append(len(x[-1])) or judge(*x))
    assert opinions.main(command(run)) == 0
    assert asked == [1]
    assert path.read_bytes() == whole and figures.read_bytes() == told
    assert opinions.main(command(run, "--limit", "2")) == 0  # other rows, in a file of their own
    assert asked == [1, 2] and len(kept(run, ".jsonl")) == 2 and path.read_bytes() == whole


def test_scores_of_another_judge_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if the judge's adapter had been trained anew since the report."""
    assert opinions.main([*command(run), "--simulator", str(run.parent / "other")]) == 0
    assert capsys.readouterr().out.startswith("NOT THE REPORT'S SCORES: 0 of 6 ")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--limit", "-1"], ("--limit", "-1")),
        (["--methods", "RL", "SFT"], ("--methods", "'SFT'", "RL, RL+SES")),
        (["--plot", "x.pdf"], ("--plot", ".png")),
        (["--run-dir", "nowhere"], ("nowhere", "report")),
        (["--judge", "nowhere"], ("nowhere",)),
    ],
)
def test_a_users_fault_is_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], more: list[str], named: tuple[str, ...]
) -> None:
    assert opinions.main(command(run, *more)) == 2
    [told] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opinions.py: ")]
    assert all(x in told for x in named), told


def test_a_model_of_ones_own_needs_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert opinions.main(["--model", "x"]) == 2
    assert "--run-dir" in capsys.readouterr().err
