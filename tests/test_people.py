"""benchmarks/people.py and correlation.py: figures by hand, and the command on hand-made talks."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import SURE, Scripted, role_of
from small_run import write_small_data, write_small_model

import infer
from usbrec.chat import Request
from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue, read_item
from usbrec.crs.dialogue import Utterance
from usbrec.options import UserError
from usbrec.runs import read_rows

sys.path.append(str(Path(infer.__file__).parent / "benchmarks"))
import correlation  # noqa: E402
import people  # noqa: E402

ITEMS = {
    "1": {"name": "Brass Harbour (1991)", "genre": ["Horror"], "director": ["Ada Prow"]},
    "2": {"name": "Velvet Orchard (2004)", "genre": ["Comedy"], "director": ["Ida Lund"]},
}
FILMS = Catalogue(map(read_item, ITEMS.values()))
STATISTICS = (
    correlation.pearson,
    correlation.spearman,
    correlation.kappa,
    correlation.auc,
    correlation.across(["a", "b", "c", "d"] * 5),
)


def value(statistic: correlation.Statistic, x: Any, y: Any) -> float:
    """Return the statistic of rows that count once each."""
    return float(statistic(np.array(x, float), np.array(y, float), np.ones((1, len(x))))[0])


# --- the statistics ---------------------------------------------------------------------------


def test_pearson_is_numpys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 1, 50), rng.normal(-3, 2, 50)
    assert value(correlation.pearson, x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert value(correlation.pearson, [1, 2, 3], [6, 4, 2]) == pytest.approx(-1)


def test_spearman_gives_equal_values_the_middle_rank() -> None:
    """Ranks [1, 2.5, 2.5, 4] and [1, 3, 2, 4]: (2.25 + 0 + 0 + 2.25) / sqrt(4.5 * 5) = 0.9487."""
    found = value(correlation.spearman, [1, 2, 2, 30], [1, 3, 2, 4])
    assert found == pytest.approx(4.5 / math.sqrt(22.5))


def test_kappa_has_quadratic_weights() -> None:
    """One pair of four differs by 2: 4 / 4 = 1. Unrelated pairs: half differ by 2, so 2."""
    assert value(correlation.kappa, [0, 0, 2, 2], [0, 2, 2, 2]) == pytest.approx(0.5)
    near, far = ([0, 1, 2, x] for x in (1, 2))  # the same mistake, by 1 and by 2
    one, two = (value(correlation.kappa, x, [0, 1, 2, 0]) for x in (near, far))
    assert one > two
    assert value(correlation.kappa, [1, 1, 1], [0, 1, 2]) == pytest.approx(0)


def test_few_rows_that_agree_are_no_certainty() -> None:
    """Five dialogues: 0.025 ** (1 / 5) = 0.4782, so 0.5218 of all may be otherwise."""
    names, marks = list("abcde"), [0.0, 1.0, 2.0, 0.0, 1.0]
    found = correlation.measured(correlation.kappa, marks, marks, names, 0)
    assert (found["mean"], found["high"]) == (1, 1)
    assert found["low"] == pytest.approx(1 - 2 * 0.5218, abs=1e-4)
    found = correlation.measured(correlation.auc, [2, 1], [1, 0], ["a", "b"], 0)
    assert found["mean"] == 1 and found["low"] == pytest.approx(0.025 ** (1 / 2))


def test_the_area_counts_half_of_the_ties() -> None:
    """Of 2 and 1 over 1 and 0, three pairs win and one is a tie: 3.5 of 4."""
    assert value(correlation.auc, [2, 1, 1, 0], [1, 0, 1, 0]) == pytest.approx(0.875)


def test_systems_are_ranked_by_their_means() -> None:
    """Means 1, 2, 3 and 5, 9, 7 have the ranks 1, 2, 3 and 1, 3, 2: 1 - 6 * 2 / (3 * 8) = 0.5."""
    names, scores = ["a", "a", "b", "c"], [0, 2, 2, 3]
    assert value(correlation.across(names), scores, [10, 0, 9, 7]) == pytest.approx(0.5)
    w = np.array([[1, 1, 1, 0]])
    assert np.isnan(correlation.across(names)(np.array(scores), np.array([1, 2, 3, 4]), w)).all()


@pytest.mark.parametrize("number", range(len(STATISTICS)))
def test_a_row_that_counts_thrice_is_three_rows(number: int) -> None:
    rng, statistic = np.random.default_rng(number), STATISTICS[number]
    x, y = rng.integers(0, 4, 20).astype(float), rng.integers(0, 2, 20).astype(float)
    counts = rng.integers(1, 4, 20)
    names = np.repeat(["a", "b", "c", "d"] * 5, counts)
    plain = correlation.across(list(names)) if number == len(STATISTICS) - 1 else statistic
    found = statistic(x, y, counts[None].astype(float))[0]
    assert found == pytest.approx(value(plain, np.repeat(x, counts), np.repeat(y, counts)))


def test_an_interval_draws_whole_dialogues() -> None:
    """Every row twice in its dialogue: the same value and interval as once, with twice the n."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    y, names = x + rng.normal(size=30), [f"d{i:02d}" for i in range(30)]
    once = correlation.measured(correlation.spearman, x.tolist(), y.tolist(), names, 0)
    doubled = [np.repeat(z, 2).tolist() for z in (x, y)]
    twice = correlation.measured(correlation.spearman, *doubled, [*np.repeat(names, 2)], 0)
    pearson = correlation.measured(correlation.pearson, *doubled, [*np.repeat(names, 2)], 0)
    assert once["low"] < once["mean"] < once["high"] and (once["n"], twice["n"]) == (30, 60)
    assert [twice[k] for k in ("mean", "low", "high")] == pytest.approx(
        [once[k] for k in ("mean", "low", "high")], abs=1e-9
    )
    r = pearson["mean"]
    by_fisher = [math.tanh(math.atanh(r) + z / math.sqrt(27)) for z in (-1.96, 1.96)]
    assert [pearson["low"], pearson["high"]] == pytest.approx(by_fisher, abs=0.1)


def test_scores_that_are_all_alike_have_no_correlation() -> None:
    for statistic in (correlation.pearson, correlation.spearman):
        found = correlation.measured(statistic, [1.0] * 4, [0, 1, 2, 2], list("abcd"), 0)
        assert found == {"mean": None, "low": None, "high": None, "n": 4}
    assert correlation.measured(correlation.auc, [], [], [], 0)["n"] == 0


# --- the correction ---------------------------------------------------------------------------


def calibration(right: int, wrong: int, total: int) -> tuple[list[float], list[float], list[str]]:
    """Return verdicts, truths, dialogues: of `total` good and bad replies so many are passed."""
    verdicts = [float(i < n) for n in (right, wrong) for i in range(total)]
    return verdicts, [1.0] * total + [0.0] * total, [f"d{i}" for i in range(total)] * 2


def corrected(passed: list[float], own: tuple[list[float], list[float], list[str]]) -> Any:
    """Return the corrected rate of replies of a dialogue each."""
    return correlation.corrected_rate(passed, [f"t{i}" for i in range(len(passed))], *own, 0)


def test_a_rate_is_corrected_by_rogan_and_gladens_formula() -> None:
    """Sensitivity 0.8, specificity 0.7, passed 0.55: (0.55 + 0.7 - 1) / 0.5 = 0.5."""
    passed = [1.0] * 55 + [0.0] * 45
    found = corrected(passed, calibration(80, 30, 100))
    assert found["mean"] == pytest.approx(0.5) and found["n"] == 100
    assert (found["sensitivity"], found["specificity"]) == pytest.approx((0.8, 0.7))
    assert found["low"] < 0.4 and found["high"] > 0.6  # wider than 0.1 / 0.5 of the raw rate
    assert "errs" in found["assumes"] and found["calibrated_on"] == 200


def test_the_interval_of_a_correction_carries_the_calibrations_uncertainty() -> None:
    passed = [1.0] * 550 + [0.0] * 450
    widths = []
    for total in (20, 100, 2000):
        own = calibration(8 * total // 10, 3 * total // 10, total)
        found = corrected(passed, own)
        widths.append(found["high"] - found["low"])
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2] > 0


def test_a_judge_without_power_corrects_nothing() -> None:
    passed = [1.0, 0.0]
    for right, wrong in ((54, 45), (30, 70)):
        found = corrected(passed, calibration(right, wrong, 100))
        assert (found["mean"], found["low"], found["high"]) == (None, None, None)
        assert found["sensitivity"] == right / 100
    for own in ([1.0] * 90 + [0.0] * 10, [1.0] * 10 + [0.0] * 90):
        weak = corrected(own, calibration(11, 8, 20))
        assert (weak["low"], weak["high"]) == (0.0, 1.0)  # many draws have none


def test_a_dialogues_good_and_bad_reply_are_drawn_together() -> None:
    """Sensitivity 0.75 and 1 - specificity 0.25, the same dialogues' or others'.

    The rate moves with the sum of both. Where each dialogue passes one reply, the sum is 1 in every
    draw, and the replies' own uncertainty is left.
    """
    passed, widths = [1.0, 0.0] * 500, []
    for kept in (range(25), range(75, 100)):
        verdicts, truths, groups = calibration(75, 0, 100)
        verdicts[100:] = [float(i in kept) for i in range(100)]
        found = corrected(passed, (verdicts, truths, groups))
        assert found["mean"] == pytest.approx(0.5)
        widths.append(found["high"] - found["low"])
    assert widths[0] > 2 * widths[1] > 0


def test_a_judge_without_an_error_among_few_may_still_err() -> None:
    """Ten of ten: 0.025 ** (1 / 10) = 0.69 is the bound, so a rate of 0.5 may be 0.5 / 0.69."""
    found = corrected([1.0, 0.0] * 500, calibration(10, 0, 10))
    assert found["mean"] == pytest.approx(0.5)
    assert found["low"] < 0.35 and found["high"] > 0.65


# --- the files --------------------------------------------------------------------------------


def talk(name: str, overall: int, *lines: tuple[str, str, int | None]) -> dict[str, Any]:
    """Return a dialogue in the format of crs_arena_eval.json: a wish, a reply, its rating, ..."""
    told: list[dict[str, Any]] = []
    for wish, reply, rating in lines:
        rated = {"turn_level_aggregated": {"relevance": rating, "interestingness": 0}}
        told.append({"turn_ind": len(told), "role": "USER", "utterance": wish})
        told.append({"turn_ind": len(told), "role": "ASST", "utterance": reply, **rated})
    return {
        "conv_id": name,
        "dialogue": told,
        "dial_level_aggregated": {"dialogue_overall": overall},
    }


ARENA = [
    talk(
        "one_redial_a-b_c", 4, ("A horror film?", "Try Brass Harbour (1991).", 2), ("Fine.", "", 1)
    ),
    talk("two_redial_b", 0, ("Something scary?", "Try Velvet Orchard (2004).", 0)),
    talk("two_redial_c", 1, ("A comedy?", "Hello to you.", None), ("Well?", "Brass Harbour", 0)),
    talk("one_opendialkg_d", 3, ("A comedy?", "Velvet Orchard is one.", 2)),
]


def message(who: int, text: str) -> dict[str, Any]:
    return {"senderWorkerId": who, "text": text}


def marks(**liked: int) -> dict[str, dict[str, int]]:
    """Return the answers to the films of these ids, all suggested: 0 no, 1 yes, 2 did not say."""
    return {name[1:]: {"suggested": 1, "seen": 0, "liked": x} for name, x in liked.items()}


LIKED = {
    "conversationId": "77",
    "initiatorWorkerId": 5,
    "movieMentions": {"1": "Brass  Harbour (1991)", "2": "Velvet Orchard (2004)", "3": None},
    "initiatorQuestions": marks(_1=1, _2=0, _3=1),
    "messages": [
        message(9, "Hello! Seen @3?"),  # before the seeker has said anything
        message(5, "No."),
        message(5, "A horror film?"),
        message(9, "Then"),
        message(9, "@1 is one"),
        message(5, ""),
        message(5, "Another?"),
        message(9, "@1 or @2"),  # two films, one of them known
        message(5, "Hm"),
        message(9, "I mean @1 again"),
        message(5, "One more?"),
        message(9, "@2"),  # known
    ],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content) + "\n", "utf-8")
    return path


def test_replies_are_read_with_their_ratings_and_all_that_stood_before(tmp_path: Path) -> None:
    turns = people.read_arena(write(tmp_path / "arena.json", ARENA))
    assert [x.rating for x in turns] == [2, 1, 0, None, 0, 2]
    assert [x.system for x in turns[::2]] == ["one_redial", "two_redial", "two_redial"]
    assert [x.overall for x in turns] == [4, 4, 0, 1, 1, 3]
    assert turns[0].history == (Utterance("seeker", "A horror film?"),)
    before = ("seeker", "recommender", "seeker")
    assert tuple(x.speaker for x in turns[1].history) == before
    assert (turns[1].place, turns[1].reply, turns[-1].domain) == (3, "", "opendialkg")


def test_a_liked_film_counts_where_it_is_alone_new_and_the_recommenders(tmp_path: Path) -> None:
    turns = people.read_liked(write(tmp_path / "liked.jsonl", LIKED))
    assert [(x.reply, x.rating) for x in turns] == [("Then Brass Harbour (1991) is one", 1.0)]
    said = [(x.speaker, x.text) for x in turns[0].history]
    assert said == [("recommender", "Hello! Seen @3?"), ("seeker", "No. A horror film?")]
    later = [*LIKED["messages"][:5], message(5, "More?"), message(9, "@2!")]
    other = write(tmp_path / "other.jsonl", {**LIKED, "messages": later})
    [_, last] = people.read_liked(other)
    assert (last.reply, last.rating, last.dialog_id) == ("Velvet Orchard (2004)!", 0.0, "77")
    for answers in (marks(_1=2), {"1": {**marks(_1=1)["1"], "suggested": 0}}, [], None):
        found = people.read_liked(
            write(tmp_path / "x.jsonl", {**LIKED, "initiatorQuestions": answers})
        )
        assert found == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not JSON"),
        ('[{"dialogue": []}]', "conv_id"),
        ('[{"conv_id": "a_b_c", "dialogue": []}]', "SYSTEM_DOMAIN_NAME"),
        ('[{"conv_id": "a_redial_c"}]', "dial_level_aggregated"),
        ("[3]", "TypeError"),
    ],
)
def test_a_file_of_another_form_is_one_sentence(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "arena.json").write_text(content)
    with pytest.raises(UserError, match=named) as error:
        people.read_arena(tmp_path / "arena.json")
    assert str(error.value).startswith(str(tmp_path / "arena.json"))
    with pytest.raises(UserError, match="x.jsonl, line 1"):
        people.read_liked(write(tmp_path / "x.jsonl", {"messages": []}))


def test_a_higher_limit_begins_with_the_batches_of_a_lower_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "BATCH", 2)
    turns = people.read_arena(write(tmp_path / "arena.json", ARENA))
    found = {n: people.batches(turns, n, 3) for n in (1, 2, 3, 4, 0)}
    counts = {n: [len({x.dialog_id for x in part}) for part in x] for n, x in found.items()}
    assert counts == {1: [1], 2: [2], 3: [2, 1], 4: [2, 2], 0: [2, 2]}
    assert found[3][0] == found[2][0] == found[0][0] and found[4] == found[0]
    everything = [x for part in found[0] for x in part]
    assert sorted(map(str, everything)) == sorted(map(str, turns))
    assert people.batches([], 0, 3) == []


# --- the scores -------------------------------------------------------------------------------


def judged(llm: Scripted, number: int = 3) -> list[dict[str, Any]]:
    """Return the rows of ReDial's replies among ARENA."""
    turns = [turn for value in ARENA[:number] for turn in people.rated_turns(value)]
    return people.judge_chunk(Roles(Side(llm, "rl"), Side(llm, "simulator"), FILMS), turns)


def test_the_judges_are_asked_as_the_search_asks_them() -> None:
    """Two of five replies name no film, so three cards are shown; the summary sees no reply."""
    llm = Scripted(lambda request: "Likes: horror.")
    rows = judged(llm)
    [summaries] = llm.generated
    assert {role_of(x) for x in summaries} == {"summariser"} and len(summaries) == 5
    assert summaries[0].messages[-1].content == "Seeker: A horror film?"
    assert not any("Harbour" in x.messages[-1].content for x in (summaries[0], summaries[-1]))
    plain, cards = llm.scored
    assert {role_of(x) for x in plain} == {"internal_judge"} and len(plain) == 5
    assert {role_of(x) for x in cards} == {"card_judge"} and len(cards) == 3
    assert "Likes: horror" in cards[0].messages[-1].content
    assert [x["judges"]["judge with cards"]["score"] for x in rows][1] == 0
    assert [x["title"] for x in rows] == [
        "Brass Harbour (1991)", None, "Velvet Orchard (2004)", None, "Brass Harbour (1991)",
    ]  # fmt: skip
    assert [x["rules"]["rule on the summary"] for x in rows] == [2, 0, 0, 0, 2]
    assert [x["rules"]["rule on the seeker's words"] for x in rows] == [2, 0, 1, 0, 0]


def test_agreement_by_turn_is_that_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratings 2, 1, 0, 0 of those that have one. The judge says 2 of the harbour, else 0.

    It passes one of two relevant replies, and refuses one of two others.
    """

    def logprobs(request: Request) -> list[float]:
        shown = [x.content for x in request.messages if x.role != "system"][-1]
        return SURE[2 if "Harbour" in shown else 0]

    rows = judged(Scripted(lambda request: "Likes: horror.", logprobs))
    found = people.measure_turns(rows, 0)
    own = found["internal judge"]
    assert own["true_positive"]["mean"] == own["true_negative"]["mean"] == 0.5
    assert own["spearman"]["n"] == own["true_positive"]["n"] + own["true_negative"]["n"] == 4
    ranks = value(correlation.pearson, [3.5, 1.5, 1.5, 3.5], [4, 3, 1.5, 1.5])
    assert own["spearman"]["mean"] == pytest.approx(ranks)
    assert own["kappa"]["mean"] == pytest.approx(
        value(correlation.kappa, [2, 0, 0, 2], [2, 1, 0, 0])
    )
    one = found["one score"]
    assert (one["true_positive"]["mean"], one["true_negative"]["mean"]) == (1, 0)
    assert one["spearman"]["mean"] is None and one["kappa"]["mean"] == pytest.approx(0)
    named = found["names a title"]
    assert (named["true_positive"]["mean"], named["true_negative"]["mean"]) == (0.5, 0)
    assert "kappa" not in found["length in words"]
    words = value(correlation.pearson, [4, 0, 4, 2], [2, 1, 0, 0])
    assert found["length in words"]["pearson"]["mean"] == pytest.approx(words)


def test_a_score_that_cannot_be_read_is_counted_and_enters_nothing() -> None:
    def logprobs(request: Request) -> list[float]:
        unread = "Orchard" in request.messages[-2].content
        return [-math.inf] * 3 if unread else SURE[1]

    rows = judged(Scripted(lambda request: "Likes: horror.", logprobs))
    found = people.measure_turns(rows, 0)["internal judge"]
    assert found["unparsed"] == 1 and found["spearman"]["n"] == 3
    assert people.measure_turns(rows, 0)["one score"]["unparsed"] == 0
    assert people.measure_dialogues(rows, 0)["internal judge"]["pearson"]["n"] == 2  # of three


def row(talk: str, score: float, **changed: Any) -> dict[str, Any]:
    mark = {"score": score, "label": round(score), "digit_probability": 0.9}
    plain = {"system": "a_redial", "rating": 0, "overall": 0, "words": 1, "title": None}
    judges = dict.fromkeys(people.JUDGES, mark)
    return {"dialog_id": talk, "turn_id": 1, **plain, "rules": {}, "judges": judges, **changed}


def test_a_dialogues_score_is_the_mean_of_its_replies() -> None:
    """Means 1, 0.5, 2 against 3, 0, 4: ranks 2, 1, 3 both; the systems' means 0.75 and 2."""
    rows = [row("x", 2, overall=3), row("x", 0, overall=3), row("y", 0.5, overall=0)]
    rows += [row("z", 2, overall=4, system="b_redial"), row("w", 1, overall=None)]
    found = people.measure_dialogues(rows, 0)["internal judge"]
    assert (found["spearman"]["mean"], found["spearman"]["n"]) == (pytest.approx(1), 3)
    expected = value(correlation.pearson, [1, 0.5, 2], [3, 0, 4])
    assert found["pearson"]["mean"] == pytest.approx(expected)
    assert found["systems"]["mean"] == pytest.approx(1)


def test_liked_films_are_compared_with_disliked_ones() -> None:
    """Of 2 and 1 over 1 and 0, three pairs win and one is a tie: 3.5 of 4."""
    rows = [row(x, y, rating=z) for x, y, z in (("a", 2, 1), ("a", 1, 0), ("b", 1, 1), ("c", 0, 0))]
    found = people.measure_liked(rows, 0)
    assert found["internal judge"]["auc"]["mean"] == pytest.approx(0.875)
    assert found["one score"]["auc"]["mean"] == pytest.approx(0.5)


def run_rows() -> list[dict[str, Any]]:
    """Return ten rows of a run: RL passes 6 of 10; gold passes in 9 of 10, a rewritten one in 2."""
    rows = []
    for i in range(10):
        external = [1.5 if i else 0.5, 1.0 if i < 2 else 0.5]
        noted = {"agreement": {"dialog_id": f"d{i}", "skipped": None, "external": external}}
        rows.append({"RL": {"score": 1.0 if i < 6 else 0.2, "dialog_id": f"d{i}"}, **noted})
    skipped = {
        "agreement": {"dialog_id": "s", "skipped": "no title"},
        "RL": {"score": None, "dialog_id": "s"},
    }
    unread = {"agreement": {"dialog_id": "u", "skipped": None, "external": [None, 1.0]}}
    return [*rows, skipped, unread]


def test_ieval_is_corrected_by_the_judges_errors_on_rewritten_replies() -> None:
    """(0.6 + 0.8 - 1) / (0.9 + 0.8 - 1) = 0.571."""
    found = people.corrected_ieval(run_rows(), 0)
    assert list(found) == ["RL"]
    assert found["RL"]["passed"]["mean"] == pytest.approx(0.6)
    assert found["RL"]["ieval"]["mean"] == pytest.approx(0.68)
    assert found["RL"]["corrected"]["mean"] == pytest.approx(0.4 / 0.7)
    assert found["RL"]["corrected"]["calibrated_on"] == 20
    alone = [{"RL": x["RL"]} for x in run_rows() if "RL" in x]
    assert "corrected" not in people.corrected_ieval(alone, 0)["RL"]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return a command line over the hand-made files, with a run of a small random model."""
    run, films = tmp_path / "run", tmp_path / "films"
    model, data = write_small_model(tmp_path / "model"), write_small_data(tmp_path / "data", rows=3)
    made = {"model": {"model": str(model), "dtype": "float32"}, "data": str(data)}
    for folder in (run / "options", run / "simulator", films / "redial", films / "opendialkg"):
        folder.mkdir(parents=True)
    write(run / "options" / "simulator.json", made)
    (run / "simulator" / "adapter_model.safetensors").touch()  # the run has got so far
    (run / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in run_rows()))
    write(run / "report.json", {"options": {"eval": {"protocol": "targets"}}})
    for domain in people.DOMAINS:
        write(films / domain / "items.json", ITEMS)
    arena = write(tmp_path / "arena.json", ARENA)
    liked = write(tmp_path / "liked.jsonl", LIKED)
    words = [
        arena,
        "--catalogues",
        films,
        "--liked",
        liked,
        "--run-dir",
        run,
        "--simulator",
        "none",
    ]
    return [*map(str, words), "--chunk-size", "2", "--json", str(tmp_path / "people.json")]


def test_the_command_prints_tables_and_writes_figures_without_a_sentence(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert people.main(command) == 0
    said = capsys.readouterr().out
    for told in (
        "by turn, all",
        "by dialogue, redial",
        "1 liked, 0 disliked",
        "| FACE |",
        "| RL |",
    ):
        assert told in said
    text = (tmp_path / "people.json").read_text("utf-8")
    found = json.loads(text)
    assert found["dialogues"] == {"rated": 4, "liked": 1}
    assert found["by turn"]["all"]["internal judge"]["spearman"]["n"] == 5
    assert found["by turn"]["opendialkg"]["judge with cards"]["pearson"]["n"] == 1
    assert 0 < found["digit_probability"]["internal judge"] < 1
    assert not any(word in text for word in ("horror", "Orchard", "Harbour", "one_redial"))
    paths = sorted(x for x in (tmp_path / "run" / "people").glob("*.jsonl"))
    assert [len(read_rows(x)) for x in paths] == [1, 1, 5]  # liked, opendialkg, redial


def test_an_interrupted_measurement_goes_on_and_ends_alike(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert people.main(command) == 0
    [path] = (tmp_path / "run" / "people").glob("redial-*.jsonl")
    whole, figures = path.read_bytes(), (tmp_path / "people.json").read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"place": 2, "di')
    asked: list[int] = []
    judge = people.judge_chunk
    monkeypatch.setattr(people, "judge_chunk", lambda r, x: asked.append(len(x)) or judge(r, x))
    assert people.main(command) == 0
    assert asked == [2, 1]
    assert path.read_bytes() == whole and (tmp_path / "people.json").read_bytes() == figures


def test_a_users_fault_is_one_sentence(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for changed, named in (
        (["--limit", "-1"], "--limit"),
        (["--liked", "nowhere.jsonl"], "nowhere"),
    ):
        assert people.main([*command, *changed]) == 2
        [told] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("people.py: ")]
        assert named in told
