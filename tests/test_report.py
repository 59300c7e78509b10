"""The report: figures and recall by hand, the fields that readers rely on, a search to be read."""

import json
from dataclasses import replace
from typing import Any

import pytest
from scripted import talk
from test_evaluation import FILMS, LOFT, NEW, OLD, WELL

from usbrec.chat import Row
from usbrec.crs.agents import announce
from usbrec.crs.dialogue import Example
from usbrec.extras.baselines import copied, popular
from usbrec.extras.report import (
    build_report,
    format_recall,
    format_report,
    format_search,
    interval,
    ranked_recall,
    report_of,
)
from usbrec.settings import COMPARED


def label(found: bool, repeated: bool = False) -> dict[str, Any]:
    return {"title": "T", "repeated": repeated, "found": found}


def row(number: int, score: float | None, *labels: dict[str, Any], grade: int = 0) -> Row:
    return {
        "dialog_id": f"d{number}", "turn_id": 1, "replies": ["r"], "items": [[]],
        "labels": list(labels), "hit": grade == 2, "grade": grade, "score": score, "label": None,
        "digit_probability": 0.5, "parse_rate": None, "explanation": "", "transcript": [],
        "searches": [],
    }  # fmt: skip


PLAIN = [row(0, 0.0, label(False)), row(1, 1.0, label(False), label(True, repeated=True)),
         row(2, None, label(False))]  # fmt: skip
TUNED = [PLAIN[0] | {"score": 1.5, "labels": [label(True)], "hit": True, "grade": 2},
         PLAIN[1] | {"score": 2.0, "grade": 1}, PLAIN[2] | {"score": 1.0}]  # fmt: skip
SEARCH = {
    "turn": 1, "profile": "Likes: war.", "best": 0, "facts": {"right": 1, "told": 1, "true": 2},
    "candidates": [
        {"title": "T", "found": True, "fit": 2},
        {"title": None, "found": False, "fit": 0},
    ],
}  # fmt: skip
FACTS = {"options": {"turns": 2}, "counts": {"test": 3}}
MEAN = {"mean": 0.75, "low": 0.5, "high": 1.0, "n": 8}
WITHIN = {"internal judge": {"all": MEAN, "broken": MEAN}, "rule": {"all": MEAN, "broken": MEAN}}
READ = {"auc": 0.9, "low": 0.8, "high": 1.0, "n": 9, "means": [1.5, 0.25], "unparsed": 1}
UNREAD = {"auc": None, "low": None, "high": None, "n": 0, "means": [None, None], "unparsed": 9}
JUDGE = {
    "skipped": 0, "external": READ, "internal": UNREAD, "cards": READ, "within_dialogue": WITHIN
}  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    methods = {"B/L": PLAIN, "RL+SES": [x | {"searches": [SEARCH]} for x in TUNED]}
    baselines = {"copy-last": [row["labels"] for row in PLAIN]}
    return build_report(methods, baselines, JUDGE, seed=0) | FACTS


def test_the_report_has_the_fields_that_readers_rely_on(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert list(report["methods"]) == ["B/L", "RL+SES"]
    for found in report["methods"].values():
        for key in ("ieval", "recall@1", "hit"):
            assert set(found[key]) == {"mean", "low", "high", "n"}
    assert list(report["differences"]) == ["RL+SES - B/L"]
    for key in ("ieval", "recall@1"):
        assert {"mean", "low", "high"} <= set(report["differences"]["RL+SES - B/L"][key])
    for name in ("external", "internal", "cards"):
        assert {"auc", "low", "high", "n"} <= set(report["judge"][name])
    assert report["options"] == {"turns": 2} and report["counts"] == {"test": 3}


def test_the_intervals_of_a_report_draw_whole_dialogues() -> None:
    """Two turns of one dialogue, found and not: each draw has both. As two dialogues 0 to 1."""
    plain = [row(0, 1.0, label(False)), row(0, 1.0, label(False))]
    tuned = [row(0, 1.0, label(False)), row(0, 2.0, label(True))]
    labels = [x["labels"] for x in tuned]
    found = build_report({"B/L": plain, "RL": tuned}, {"nearest": labels}, JUDGE, 0)
    method, gap = found["methods"]["RL"], found["differences"]["RL - B/L"]
    for each in (method, gap, found["baselines"]["nearest"]):
        recall = each["recall@1"]
        share = 0.975 * (1.5 if recall["low"] < 0 else 0.5)  # to the limit: -1 of a difference
        ends = (recall["low"], recall["mean"], recall["high"])
        assert ends == pytest.approx((0.5 - share, 0.5, 0.9875))
    assert gap["ieval"]["low"] == pytest.approx(0.5 - 0.975 * 2.5)
    apart = [x | {"dialog_id": f"d{i}"} for i, x in enumerate(tuned)]
    recall = build_report({"RL": apart}, {}, JUDGE, 0)["methods"]["RL"]["recall@1"]
    assert (recall["low"], recall["high"]) == (0.0, 1.0)


def test_means_leave_out_what_was_not_read_and_count_it(report: dict[str, Any]) -> None:
    assert report["methods"]["B/L"]["ieval"]["mean"] == 0.5
    assert report["methods"]["B/L"]["ieval"]["n"] == 2
    assert report["unparsed"] == {"B/L": pytest.approx(1 / 3), "RL+SES": 0.0}
    gap = report["differences"]["RL+SES - B/L"]["ieval"]
    assert gap["mean"] == pytest.approx((1.5 + 1.0) / 2) and gap["n"] == 2


def test_recall_is_over_labels_and_split(report: dict[str, Any]) -> None:
    plain = report["methods"]["B/L"]
    assert plain["recall@1"]["mean"] == 0.25 and plain["recall@1"]["n"] == 4
    assert (plain["recall@1_repeated"]["mean"], plain["recall@1_repeated"]["n"]) == (1.0, 1)
    assert (plain["recall@1_new"]["mean"], plain["recall@1_new"]["n"]) == (0.0, 3)
    assert report["baselines"]["copy-last"]["recall@1"] == plain["recall@1"]
    gap = report["differences"]["RL+SES - B/L"]["recall@1"]
    assert gap["mean"] == pytest.approx(0.25)


def test_grades_and_scores_leave_room_up_to_two() -> None:
    """Three dialogues without a grade: 2 * (1 - 0.025 ** (1 / 3)) = 1.415."""
    report = build_report({"B/L": PLAIN, "RL": PLAIN}, {}, JUDGE, 0) | FACTS
    grade, gap = report["methods"]["B/L"]["rule_grade"], report["differences"]["RL - B/L"]
    assert (grade["low"], grade["high"]) == (0, pytest.approx(1.4152, abs=1e-4))
    assert gap["rule_grade"]["low"] == pytest.approx(-1.4152, abs=1e-4)
    assert gap["hit"]["high"] == pytest.approx(0.7076, abs=1e-4)


def test_the_rules_give_a_second_opinion(report: dict[str, Any]) -> None:
    """RL+SES has grades 2, 1 and 0 beside the judge's 1.5, 2 and 1."""
    assert report["methods"]["RL+SES"]["rule_grade"]["mean"] == 1.0


def test_methods_must_have_seen_the_same_dialogues() -> None:
    with pytest.raises(AssertionError, match="other dialogues"):
        build_report({"B/L": PLAIN, "RL": TUNED[::-1]}, {}, JUDGE, 0) | FACTS


def test_the_table_says_all_that_the_report_holds(report: dict[str, Any]) -> None:
    text = format_report(report)
    expected = (
        "B/L",
        "RL+SES - B/L",
        "copy-last",
        "AUC 0.900 [0.800, 1.000] n 9, means 1.50 and 0.25, 1 unparsed, 0 skipped",
        "AUC none, means none and none, 9 unparsed, 0 skipped",
        "internal judge",
        "33.3%",
        "digits' probability: B/L 0.50, RL+SES 0.50",
        "turns 2",
        "test 3",
        "repeated",
    )
    for words in expected:
        assert words in text, words
    assert "None" not in text


def test_the_table_is_at_most_124_wide_with_the_longest_names(report: dict[str, Any]) -> None:
    plain, searched = TUNED * 50, [x | {"searches": [SEARCH]} for x in TUNED] * 50
    methods = {name: searched if "SES" in name else plain for name in COMPARED}
    facts = {**FACTS, "options": {f"max-{chr(97 + i) * 25}": i for i in range(20)}}
    text = format_report(build_report(methods, {}, JUDGE, 0) | facts)
    (head,) = [line for line in text.splitlines() if line.startswith("difference")]
    for part in ("iEval (0-2), n 150", "Recall@1, n 200", "hit, n 150", "rule grade (0-2), n 150"):
        assert part in head
    assert not any(line.endswith("-") for line in text.splitlines())  # no flag is torn
    assert "\nRL+SES+cards - SFT+SES " in text and max(map(len, text.splitlines())) <= 124
    assert text.count("\ncandidates of ") == 2  # of five methods


def test_a_head_tells_the_least_and_the_greatest_number_of_values(report: dict[str, Any]) -> None:
    """B/L has an unread score of three, RL+SES none."""
    head, *lines = format_report(report).splitlines()[:3]
    assert head.split() == [
        *("method", "iEval", "(0-2),", "n", "2-3", "Recall@1,", "n", "4", "hit,", "n", "3"),
        *("rule", "grade", "(0-2),", "n", "3", "unparsed"),
    ]
    assert [line.split()[0] for line in lines] == ["B/L", "RL+SES"]
    assert lines[0].split()[1] == "0.500"


def test_sampled_votes_have_no_probability_of_the_digits() -> None:
    voted = [row | {"digit_probability": None, "parse_rate": 1.0} for row in PLAIN]
    report = build_report({"B/L": voted, "RL": PLAIN}, {}, JUDGE, 0) | FACTS
    shares = [found["digit_probability"] for found in report["methods"].values()]
    assert shares == [None, 0.5]
    assert "digits' probability: B/L none, RL 0.50" in format_report(report)


def test_the_text_names_the_models_and_the_notes_of_the_data(report: dict[str, Any]) -> None:
    """Scores of different judges cannot be compared; the default model has no name of its own."""
    note, judge = "train is a part of valid", {"path": "URL#M", "digest": "0"}
    options = {"turns": 2, "model": {"model": "/m", "dtype": "auto"}, "other-judge": judge}
    facts = {"options": options, "counts": {"test": 3, "notes": [note]}}
    text = format_report(report | facts)
    assert text.endswith(f"\n\nnote: {note}\n\ntest 3, turns 2, model /m, other-judge URL#M")
    plain = {"options": {"turns": 2, "model": {"model": None}}, "counts": {"test": 3, "notes": []}}
    assert format_report(report | plain) == format_report(report)


def test_every_column_of_the_table_is_explained_below_it(report: dict[str, Any]) -> None:
    text = format_report(report)
    names = ("iEval", "Recall@1", "repeated", "new", "hit", "rule grade", "unparsed")
    summary = ("summary of", "precision", "recall", "exact")
    search = ("candidates of", *(key.replace("_", " ") for key in report["search"]["RL+SES"]))
    within = ("AUC within a dialogue", *WITHIN)
    for name in (*names, *summary, *search, *within, "AUC", "digits' probability"):
        assert text.count(name) > 1 and f"{name}: " in text, name


def test_dialogues_after_the_first_ones_have_a_table_of_their_own() -> None:
    """Three dialogues, of which one was looked at: B/L's scores of the others are 1 and unread."""
    baselines = {"copy-last": [row["labels"] for row in PLAIN]}
    methods = {"B/L": PLAIN, "RL": TUNED}
    report = build_report(methods, baselines, JUDGE, 0, seen=1) | FACTS
    after = report["after"]
    assert after["seen"] == 1
    assert (after["methods"]["B/L"]["ieval"]["mean"], after["unparsed"]["B/L"]) == (1.0, 0.5)
    alone = build_report({"RL": TUNED[1:]}, {}, JUDGE, 0) | FACTS
    assert after["methods"]["RL"] == alone["methods"]["RL"]
    assert after["baselines"]["copy-last"]["recall@1"]["n"] == 3
    assert after["differences"]["RL - B/L"]["ieval"]["n"] == 1
    text = format_report(report)
    (lines,) = [x.splitlines() for x in text.split("\n\n") if x.startswith("after the first 1 ")]
    assert lines[1].startswith("B/L               1.000 ")
    for few in (0, 3, 128):
        plain = build_report(methods, baselines, JUDGE, 0, seen=few) | FACTS
        assert "after" not in plain and "\nafter the first 1 " not in format_report(plain)


def test_the_judge_within_a_dialogue_is_told_or_said_to_be_left_out(report: dict[str, Any]) -> None:
    text = format_report(report)
    assert "\nAUC within a dialogue against all misses, n 8" in text
    assert "\ninternal judge        0.750 [0.500, 1.000]" in text
    none = build_report({"B/L": PLAIN}, {}, {**JUDGE, "within_dialogue": {}}, 0) | FACTS
    assert "\nAUC within a dialogue: left out\n" in format_report(none)


def test_each_searched_methods_gain_is_predicted_from_its_own_judge() -> None:
    """A hit and a miss: the internal judge's 0.75 less 0.5. Cards and memory have other judges."""
    searched = [x | {"searches": [SEARCH]} for x in TUNED]
    methods = {name: searched for name in ("RL+SES", "RL+SES+memory", "RL+SES+cards")}
    found = build_report(methods, {}, JUDGE, 0)["search"]
    assert found["RL+SES"]["gain_predicted"]["mean"] == pytest.approx(0.25, abs=1e-3)
    for name, chooser in (
        ("RL+SES+cards", "judge with cards"),
        ("RL+SES+memory", "judge from memory"),
    ):
        assert found[name]["gain_predicted"]["mean"] is None
        judge = {**JUDGE, "within_dialogue": {chooser: {"all": {**MEAN, "mean": 0.9}}}}
        own = build_report(methods, {}, judge, 0)["search"][name]["gain_predicted"]
        assert own["mean"] == pytest.approx(0.4, abs=1e-3)


def test_a_random_guess_counts_as_its_probability() -> None:
    labels = [[label(True)], [{**label(False), "found": 0.25}]]
    report = build_report({"B/L": PLAIN[:2]}, {"random": labels}, JUDGE, 0) | FACTS
    assert report["baselines"]["random"]["recall@1"]["mean"] == 0.625


def test_the_report_is_built_from_the_rows_of_a_run() -> None:
    """The methods are in the order of the paper's table, whatever the order in the rows."""
    rows: list[Row] = [{"RL": x, "B/L": x, "agreement": {"skipped": "why"}} for x in PLAIN]
    rows[0]["ranked"] = {"dialog_id": "d0", "turn_id": 1, "films": []}
    run = {"options": {"eval": {"seen": 2}}, "counts": {}}
    found = report_of([*rows, {"agreement": {"skipped": "why"}}], {}, run, 0)
    assert list(found["methods"]) == ["B/L", "RL"] and found["methods"]["B/L"]["hit"]["n"] == 3
    assert found["judge"]["skipped"] == 4 and found["judge"]["within_dialogue"] == {}
    assert found["after"]["seen"] == 2 and found["options"] == {"eval": {"seen": 2}}


def test_the_summary_and_the_candidates_of_searched_methods_are_in_the_report(
    report: dict[str, Any],
) -> None:
    assert list(report["search"]) == ["RL+SES"] and list(report["summary"]) == ["all"]
    assert report["search"]["RL+SES"]["random"]["mean"] == 0.5
    text = format_report(report)
    assert "\nall        1.000 [0.292, 1.000] 0.500 [0.500, 0.500]" in text
    assert "\nrandom           0.500" in text and "\nbest by rule     1.000" in text
    assert "\ngain             0.500" in text and "\ngain predicted   0.250" in text
    plain = build_report({"B/L": PLAIN}, {}, JUDGE, 0) | FACTS
    assert plain["search"] == {} == plain["summary"]
    assert "\n\n\n" not in format_report(plain)


def test_a_search_is_drawn_as_a_tree() -> None:
    root = talk("Something dark?")
    far = talk("x", "Try\nWell.", "Why?", "It is dark.")[1:]
    lines = [[line.speaker, line.text] for line in far]
    leaves = [
        {"lines": lines, "value": 1.5, "label": 2, "weight": 1},
        {"lines": lines, "value": 0.5, "label": 0, "weight": 2},
    ]
    candidates = [
        {"reply": "", "value": None, "leaves": []},
        {"reply": "Try\nWell.", "value": 1.0, "leaves": leaves},
        {"reply": "Try\nWell.", "value": 1.0, "leaves": leaves},
        {
            "reply": "Loft?",
            "value": None,
            "dropped": 1,
            "leaves": [{**leaves[0], "lines": lines[:1]}],
        },
    ]
    record = {"profile": "likes dark films", "best": 1, "candidates": candidates}
    text = format_search(root, record)
    assert text.splitlines() == [
        "Seeker: Something dark?",
        "",
        "Profile: likes dark films",
        "",
        "  none  (empty)",
        "* 1.00 x2  Try Well.",
        "    ├─ 1.50  Seeker: Why?",
        "    │        Recommender: It is dark.",
        "    └─ 0.50 x2  Seeker: Why?",
        "                Recommender: It is dark.",
        "  none, dropped at turn 1  Loft?",
    ]


# --- the recall of rankings ---------------------------------------------------------------------

EXAMPLES = [
    Example("d1", 2, talk("Dark, please."), "x", (WELL.title,)),
    Example("d2", 4, talk("Seen Red Loft (2001).", "So?", "More."), "x", (LOFT.title, OLD.title)),
]
FILLER = ["Night Ferry (1990)"] * 8
SAID = (("Dark, please.", WELL), ("More.", OLD), ("Any.", OLD), ("Any.", OLD))
TRAIN = [Example(str(n), 2, talk(text), "x", (film.title,)) for n, (text, film) in enumerate(SAID)]


def test_recall_at_k_counts_labels_among_the_first_k_titles() -> None:
    """Of three labels one stands first, another third, the last nowhere: 1/3 and 2/3."""
    ranked = [
        [NEW.title, LOFT.title, WELL.title, *FILLER],
        [LOFT.title, WELL.title, NEW.title, *FILLER],
    ]
    found = ranked_recall(FILMS, EXAMPLES, ranked, TRAIN, 0)
    means = {name: {k: v["recall@1"]["mean"] for k, v in x.items()} for name, x in found.items()}
    third = 1 / 3
    assert means == {
        "ranked": {1: third, 10: 2 * third},
        "nearest": {1: 2 * third, 10: 2 * third},
        "copy-last": {1: third, 10: third},
        "most-popular": {1: third, 10: 2 * third},
        "copy, then popular": {1: third, 10: 1.0},
        "ranked - copy, then popular": {1: 0.0, 10: pytest.approx(-third)},
    }
    assert found["ranked - copy, then popular"][10]["recall@1"]["low"] == -0.5  # d2 drawn alone
    ten = found["ranked"][10]
    assert (ten["recall@1_repeated"]["mean"], ten["recall@1_repeated"]["n"]) == (1.0, 1)
    assert (ten["recall@1_new"]["mean"], ten["recall@1_new"]["n"]) == (0.5, 2)
    text = format_recall(found)
    assert "\nranked @10" in text and "\nmost-popular @1 " in text and "@50" not in text


def test_recall_goes_as_far_as_the_longest_ranking() -> None:
    ranked = [[WELL.title, *FILLER, OLD.title], [LOFT.title]]  # ten titles and one
    found = ranked_recall(FILMS, EXAMPLES, ranked, TRAIN, 0)["ranked"]
    assert {k: x["recall@1"]["mean"] for k, x in found.items()} == {1: 2 / 3, 10: 2 / 3}


def test_intervals_of_rankings_draw_whole_dialogues() -> None:
    """One dialogue of two turns, whose targets are found and not."""
    same = [
        replace(EXAMPLES[0], turn_id=turn, items=(x.title,)) for turn, x in enumerate((WELL, OLD))
    ]
    recall = ranked_recall(FILMS, same, [[WELL.title]] * 2, TRAIN, 0)["ranked"][1]["recall@1"]
    ends = (recall["low"], recall["mean"], recall["high"])
    assert ends == pytest.approx((0.0125, 0.5, 0.9875))  # of two dialogues 0 to 1


def test_no_zero_has_a_minus() -> None:
    gap = {"mean": -1e-4, "low": -4e-4, "high": 0.0, "n": 3}
    assert interval(gap, form="+.3f") == "+0.000 [+0.000, +0.000] n 3"


def test_copied_titles_are_newest_first_and_once_each() -> None:
    lines = talk("Dark Well (1999)", "Red Loft (2001) or Dark Well (1999)?", "Night Ferry")
    guesses = copied(FILMS, Example("d", 1, lines, "", ()))
    assert guesses == [(OLD, NEW), (WELL,), (LOFT,)]


def test_popular_titles_are_the_catalogues_most_frequent_labels() -> None:
    counts = {"Not Ours": 9, LOFT.title: 2, WELL.title: 2, NEW.title: 3}
    assert popular(FILMS, counts) == [(NEW,), (WELL,), (LOFT,)]


def test_an_announcement_tells_a_title_from_one_that_goes_on() -> None:
    assert not announce("Heat (1995)").startswith(announce("Heat"))
