"""Measures of the search: every figure by hand."""

from dataclasses import replace
from typing import Any

import pytest
from scripted import talk
from test_evaluation import FILMS, LOFT, NEW, OLD, WELL
from test_report import label, row

from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import EvalRow, checked
from usbrec.crs.measures import search_figures, summaries, summary_facts

GOLD = "Likes: horror, by Ann Ray. Dislikes: Red Loft (2001)."  # three facts
EXAMPLE = Example("d1", 2, talk("Dark, please."), "x", (WELL.title,), profile=GOLD)


def record(profile: str, *replies: str, best: int = 0) -> dict[str, Any]:
    candidates = [{"reply": reply, "value": 1.0, "leaves": []} for reply in replies]
    return {"turn": 1, "profile": profile, "best": best, "candidates": candidates}


def searched(example: Example, *told: Any, number: int = 0, best: int = 0) -> EvalRow:
    """Return the row of a dialogue whose only search is checked against the example."""
    search = checked(FILMS, example, record(*told, best=best))
    return replace(row(number, 1.0, label(False)), searches=[search])


def means(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name]["mean"] for name in found}


# --- what a search's record is checked for ------------------------------------------------------


def test_a_checked_search_tells_titles_targets_fit_and_facts() -> None:
    """Likes: horror is right, war is not; "Night Ferry" leaves the year open."""
    replies = ("Dark Well (1999)!", "Red Loft (2001) or Dark Well (1999)", "Night Ferry", "Hm.")
    found = checked(FILMS, EXAMPLE, record("Likes: horror, war. Dislikes: nothing said.", *replies))
    told = [(x["title"], x["found"], x["fit"]) for x in found["candidates"]]
    assert told == [
        (WELL.title, True, 2),
        (LOFT.title, False, 0),
        (f"{OLD.title} or {NEW.title}", False, 0),
        (None, False, 0),
    ]
    assert [x["reply"] for x in found["candidates"]] == [*replies]
    assert found["facts"] == {"right": 1, "told": 2, "true": 3}


def test_an_open_title_fits_as_the_worst_of_its_readings() -> None:
    example = replace(EXAMPLE, profile="Likes: crime, 1950s.", items=(OLD.title,))
    (candidate,) = checked(FILMS, example, record("", "Night Ferry!"))["candidates"]
    assert (candidate["fit"], candidate["found"]) == (1, False)
    (candidate,) = checked(FILMS, example, record("", "Night Ferry (1950)!"))["candidates"]
    assert (candidate["fit"], candidate["found"]) == (2, True)


def test_without_a_gold_profile_there_is_neither_fit_nor_fact() -> None:
    found = checked(FILMS, replace(EXAMPLE, profile=None), record("Likes: war.", WELL.title))
    assert found["facts"] is None
    assert [(x["found"], x["fit"]) for x in found["candidates"]] == [(True, None)]


# --- the summary --------------------------------------------------------------------------------


def test_facts_are_right_by_attitude_kind_and_value() -> None:
    """Told 1, 3 and 0 facts with 1, 3 and 0 right, one each time of 3 true: 4 / 4, 4 / 9, 1 / 3.

    Then one that takes the refused film for a liked one, and a director for a star: 1 of 3.
    """
    rows = [
        searched(EXAMPLE, "Likes: horror. Dislikes: nothing said.", "x"),
        searched(EXAMPLE, "Likes: by Ann Ray, horror. Dislikes: Red Loft (2001).", "x", number=1),
        searched(EXAMPLE, "The seeker wants horror.", "x", number=2),
    ]
    found = summary_facts(rows, 0)
    assert means(found) == {"precision": 1.0, "recall": pytest.approx(4 / 9), "exact": 1 / 3}
    assert [found[x]["n"] for x in found] == [4, 9, 3]
    wrong = searched(EXAMPLE, "Likes: horror, with Ann Ray, Red Loft (2001).", "x", number=3)
    found = summary_facts([*rows, wrong], 0)
    assert means(found) == {"precision": 5 / 7, "recall": pytest.approx(5 / 12), "exact": 1 / 4}
    more = searched(EXAMPLE, f"{GOLD[:-1]}, war.", "x")
    assert means(summary_facts([more], 0)) == {"precision": 3 / 4, "recall": 1.0, "exact": 0.0}


def test_intervals_of_facts_draw_whole_dialogues() -> None:
    """Of the first all 3 facts are told, of the second none: 0 to 1, not 0.17 to 0.83."""
    rows = [searched(EXAMPLE, GOLD, "x"), searched(EXAMPLE, "Likes: war.", "x", number=1)]
    found = summary_facts(rows, 0)["recall"]
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0.0, 1.0)
    same = summary_facts([replace(x, dialog_id="d0") for x in rows], 0)["recall"]
    assert (same["mean"], same["low"], same["high"]) == (0.5, 0.5, 0.5)


def test_equal_summaries_are_reported_once_and_others_per_method() -> None:
    right, wrong = searched(EXAMPLE, GOLD, "x"), searched(EXAMPLE, "Likes: war.", "x")
    plain = replace(right, searches=[])
    same = summaries({"RL": [plain], "SES": [right], "RL+SES": [right]}, 0)
    assert list(same) == ["all"] and same["all"]["exact"]["mean"] == 1
    other = summaries({"SES": [right], "RL+SES": [wrong]}, 0)
    assert {name: x["exact"]["mean"] for name, x in other.items()} == {"SES": 1, "RL+SES": 0}
    assert summaries({"SES": [searched(replace(EXAMPLE, profile=None), GOLD, "x")]}, 0) == {}


# --- the candidates -----------------------------------------------------------------------------


def test_the_candidates_of_a_method_by_target_rule_choice_and_chance() -> None:
    """Two dialogues of three candidates.

                 titles                different  target  rule    chosen  random
    d0  Loft, Well, Well                  2         1     Well 1  Well 1   2/3
    d1  Night Ferry (1990), none, Loft    2         0     first 0  Loft 0   0
    """
    well, loft, ferry = WELL.title, LOFT.title, NEW.title
    rows = [
        searched(EXAMPLE, GOLD, loft, well, f"{well}!", best=2),
        searched(EXAMPLE, GOLD, ferry, "Hm.", loft, number=1, best=2),
        replace(row(2, 1.0, label(True)), searches=[]),
    ]
    assert means(search_figures(rows, 0)) == {
        "different_titles": 2.0,
        "pass@N": 0.5,
        "best_by_rule": 0.5,
        "chosen": 0.5,
        "random": pytest.approx(1 / 3),
    }
    assert search_figures(rows, 0)["pass@N"]["n"] == 2


def test_the_best_by_rule_is_the_first_of_equals() -> None:
    """Both horror films fit half the wishes of this profile alike; the target comes second."""
    example = replace(EXAMPLE, profile="Likes: horror, comedy.")
    for replies, found in (((LOFT.title, WELL.title), 0.0), ((WELL.title, LOFT.title), 1.0)):
        assert search_figures([searched(example, "", *replies)], 0)["best_by_rule"]["mean"] == found


def test_without_gold_profiles_nothing_is_best_by_rule() -> None:
    example = replace(EXAMPLE, profile=None)
    found = search_figures([searched(example, GOLD, WELL.title)], 0)
    assert found["best_by_rule"]["mean"] is None and found["pass@N"]["mean"] == 1


def test_the_number_of_titles_may_reach_that_of_the_candidates() -> None:
    """One dialogue excludes next to nothing: 1 + 0.975 * (3 - 1) titles."""
    rows = [searched(EXAMPLE, GOLD, WELL.title, WELL.title, WELL.title)]
    found = search_figures(rows, 0)["different_titles"]
    assert (found["mean"], found["high"]) == (1.0, pytest.approx(2.95))
