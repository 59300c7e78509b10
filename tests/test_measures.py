"""Measures of the search: every figure by hand."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted import SURE, Scripted, role_of, roles_of, talk
from test_evaluation import FILMS, LOFT, NEW, OLD, WELL
from test_report import label, row

from usbrec.chat import Messages, Ranked, Request, Row
from usbrec.crs.agents import Roles, Side, announce, card_prompt
from usbrec.crs.catalogue import Item
from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import EvaluationOptions, checked
from usbrec.crs.wishes import card
from usbrec.extras.measures import (
    hit_rate,
    judge_ranked,
    search_figures,
    summaries,
    summary_facts,
    within_dialogues,
)

GOLD = "Likes: horror, by Ann Ray. Dislikes: Red Loft (2001)."  # three facts
EXAMPLE = Example("d1", 2, talk("Dark, please."), "x", (WELL.title,), profile=GOLD)


def record(profile: str, *replies: str, best: int = 0) -> dict[str, Any]:
    candidates = [{"reply": reply, "value": 1.0, "leaves": []} for reply in replies]
    return {"turn": 1, "profile": profile, "best": best, "candidates": candidates}


def searched(example: Example, *told: Any, number: int = 0, best: int = 0) -> Row:
    """Return the row of a dialogue whose only search is checked against the example."""
    search = checked(FILMS, example, record(*told, best=best))
    return row(number, 1.0, label(False)) | {"searches": [search]}


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
    same = summary_facts([x | {"dialog_id": "d0"} for x in rows], 0)["recall"]
    one = pytest.approx((0.5, 0.0125, 0.9875))  # what one dialogue excludes: 0.025 of the rest
    assert (same["mean"], same["low"], same["high"]) == one
    exact = summary_facts([x | {"dialog_id": "d0"} for x in rows], 0)["exact"]
    assert (exact["mean"], exact["low"], exact["high"]) == one


def test_the_figures_are_those_of_the_first_searched_turn() -> None:
    """At the second the summary is wrong and the target is no longer among the candidates."""
    first, later = searched(EXAMPLE, GOLD, WELL.title), searched(EXAMPLE, "Likes: war.", LOFT.title)
    both = first | {"searches": [*first["searches"], *later["searches"]]}
    assert summary_facts([both], 0) == summary_facts([first], 0) != summary_facts([later], 0)
    figures = [search_figures([x], 0.8, 0) for x in (both, first, later)]
    assert figures[0] == figures[1] != figures[2]


def test_equal_summaries_are_reported_once_and_others_per_method() -> None:
    right, wrong = searched(EXAMPLE, GOLD, "x"), searched(EXAMPLE, "Likes: war.", "x")
    plain = right | {"searches": []}
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

    A judge with an area of 0.8 prefers Well to Loft in 0.8 of all cases, 2/15 more than chance.
    """
    well, loft, ferry = WELL.title, LOFT.title, NEW.title
    rows = [
        searched(EXAMPLE, GOLD, loft, well, f"{well}!", best=2),
        searched(EXAMPLE, GOLD, ferry, "Hm.", loft, number=1, best=2),
        row(2, 1.0, label(True)),
    ]
    found = means(search_figures(rows, 0.8, 0))
    assert found.pop("gain_predicted") == pytest.approx(1 / 15, abs=1e-3)
    assert found == {
        "different_titles": 2.0,
        "pass@N": 0.5,
        "best_by_rule": 0.5,
        "chosen": 0.5,
        "random": pytest.approx(1 / 3),
        "gain": pytest.approx(1 / 6),
    }
    assert search_figures(rows, 0.8, 0)["pass@N"]["n"] == 2
    unknown = search_figures(rows, None, 0)
    assert unknown["gain_predicted"]["mean"] is None and unknown["gain"]["mean"] is not None


def test_the_best_by_rule_is_the_first_of_equals() -> None:
    """Both horror films fit half the wishes of this profile alike; the target comes second."""
    example = replace(EXAMPLE, profile="Likes: horror, comedy.")
    for replies, found in (((LOFT.title, WELL.title), 0.0), ((WELL.title, LOFT.title), 1.0)):
        rule = search_figures([searched(example, "", *replies)], 0.5, 0)["best_by_rule"]
        assert rule["mean"] == found


def test_without_gold_profiles_nothing_is_best_by_rule() -> None:
    example = replace(EXAMPLE, profile=None)
    found = search_figures([searched(example, GOLD, WELL.title)], 0.5, 0)
    assert found["best_by_rule"]["mean"] is None and found["pass@N"]["mean"] == 1


def test_the_number_of_titles_may_reach_that_of_the_candidates() -> None:
    """One dialogue excludes next to nothing: 1 + 0.975 * (3 - 1) titles."""
    rows = [searched(EXAMPLE, GOLD, WELL.title, WELL.title, WELL.title)]
    found = search_figures(rows, 0.5, 0)["different_titles"]
    assert (found["mean"], found["high"]) == (1.0, pytest.approx(2.95))


def test_a_gain_may_be_a_loss() -> None:
    """A single candidate gains nothing; one dialogue excludes neither a gain nor a loss."""
    found = search_figures([searched(EXAMPLE, GOLD, WELL.title)], 0.8, 0)
    for name in ("gain", "gain_predicted"):
        ends = [found[name][x] for x in ("low", "mean", "high")]
        assert ends == pytest.approx([-0.975, 0, 0.975])


def test_intervals_of_a_choice_draw_whole_dialogues() -> None:
    """One dialogue of two turns: the target is chosen, and is not."""
    rows = [searched(EXAMPLE, GOLD, x.title) for x in (WELL, LOFT)]
    chosen = search_figures(rows, None, 0)["chosen"]
    ends = (chosen["low"], chosen["mean"], chosen["high"])
    assert ends == pytest.approx((0.0125, 0.5, 0.9875))  # of two dialogues 0 to 1


def test_a_binormal_judge_finds_the_hit_as_often_as_its_area_says() -> None:
    """One of each: the area. Chance: hits over films. Sure: always. Never without a hit.

    One hit and two misses at an area of 0.8, d = sqrt(2) * 0.8416 = 1.190: by simulation.
    """
    assert [hit_rate(x, 1, 1) for x in (0.3, 0.5, 0.9)] == pytest.approx([0.3, 0.5, 0.9], abs=1e-3)
    for hits, misses in ((1, 2), (2, 1), (3, 4)):
        assert hit_rate(0.5, hits, misses) == pytest.approx(hits / (hits + misses), abs=2e-3)
    assert hit_rate(1.0, 1, 5) == pytest.approx(1) and hit_rate(0.0, 1, 5) == pytest.approx(0)
    assert (hit_rate(0.9, 0, 3), hit_rate(0.1, 2, 0)) == (0.0, 1.0)
    drawn = np.random.default_rng(0).normal(size=(3, 200_000)) + [[1.190], [0], [0]]
    share = (drawn[0] > drawn[1:].max(0)).mean()
    assert hit_rate(0.8, 1, 2) == pytest.approx(share, abs=5e-3)


# --- the judge within a dialogue ----------------------------------------------------------------


class Ranker(Scripted):
    """Ranks the texts backwards, and keeps the calls."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(*answers)
        self.ranked: list[tuple[list[Request], list[str], int]] = []

    def best_texts(
        self, requests: Sequence[Request], texts: Sequence[str], k: int, tokens: int
    ) -> list[Ranked]:
        self.ranked.append((list(requests), list(texts), k))
        best = [(place, -1.0 * place) for place in reversed(range(len(texts)))]
        return [Ranked(best[:k], k) for _ in requests]


def by_film(request: Request) -> list[float]:
    """Score Dark Well 2, Night Ferry (1990) 1, others 0."""
    said = request.messages[-2].content
    return SURE[2 if WELL.title in said else 1 if NEW.title in said else 0]


def judged(
    *examples: Example, k: int = 4, memory: bool = True
) -> tuple[Ranker, list[dict[str, Any]]]:
    llm = Ranker(lambda request: "Likes: horror, crime. Dislikes: nothing said.", by_film)
    roles = Roles(Side(llm, "rl"), Side(llm, "simulator"), FILMS)
    options = EvaluationOptions(ranked_titles=k)
    return llm, judge_ranked(roles, examples, options, memory)


def test_the_best_films_are_recommended_in_the_same_words_and_scored() -> None:
    llm, (found,) = judged(EXAMPLE)
    ((requests, texts, k),) = llm.ranked
    assert (role_of(requests[0]), requests[0].adapter, k) == ("recommender", "rl", 4)
    assert texts == [announce(item.title) for item in FILMS]
    assert roles_of(llm.generated) == [["summariser"], ["memory"] * 4]
    assert roles_of(llm.scored) == [["internal_judge"] * 4, ["card_judge"] * 4, ["card_judge"] * 4]
    heard = [request.messages[-2].content for request in llm.scored[0]]
    assert heard == [announce(x.title) for x in (NEW, OLD, LOFT, WELL)]
    assert "Likes: horror, crime" in llm.scored[0][0].messages[0].content
    assert [(x["title"], x["found"]) for x in found["films"]] == [
        (NEW.title, False), (OLD.title, False), (LOFT.title, False), (WELL.title, True)
    ]  # fmt: skip
    scores = [x["scores"] for x in found["films"]]
    assert [x["rule"] for x in scores] == [0, 0, 0, 2]
    assert [x["rule on the summary"] for x in scores] == [1, 1, 0, 1]
    values = [x["internal judge"] for x in scores]
    assert values[3] > values[0] > values[1] == values[2]
    assert json.loads(json.dumps(found)) == found


def test_the_judges_with_cards_see_what_is_remembered_and_what_the_catalogue_has() -> None:
    llm, _ = judged(EXAMPLE)
    told = "Likes: horror, crime. Dislikes: nothing said."  # the model remembers the same

    def prompts(known: Callable[[Item], str]) -> list[Messages]:
        return [card_prompt(announce(x.title), known(x), told) for x in (NEW, OLD, LOFT, WELL)]

    found = [[request.messages for request in call] for call in llm.scored[1:]]
    assert found == [prompts(card), prompts(lambda _: told)]


def test_the_judge_from_memory_is_asked_where_a_search_asks_it() -> None:
    llm, (found,) = judged(EXAMPLE, memory=False)
    assert roles_of(llm.generated) == [["summariser"]]
    assert roles_of(llm.scored) == [["internal_judge"] * 4, ["card_judge"] * 4]
    rules = ["rule", "rule on the summary"]
    scorers = [*rules, "internal judge", "judge with cards"]
    assert all(list(x["scores"]) == scorers for x in found["films"])
    _, (remembered,) = judged(EXAMPLE)
    own = [x["scores"].pop("judge from memory") for x in remembered["films"]]
    assert remembered == found and len(own) == 4


def test_films_are_scored_at_the_stated_temperature() -> None:
    llm = Ranker(lambda request: "Likes: horror.", by_film)
    options = EvaluationOptions(ranked_titles=4, vote_temperature=0.0)
    (row,) = judge_ranked(Roles(Side(llm), Side(llm), FILMS), [EXAMPLE], options, memory=True)
    assert [x["scores"]["internal judge"] for x in row["films"]] == [1.0, 0.0, 0.0, 2.0]


def test_areas_are_within_a_dialogue_and_a_target_out_of_reach_does_not_count() -> None:
    """EXAMPLE's target, Dark Well, comes fourth, so three titles do not reach it.

    The judge puts it above all three others: 1. The summary's rule gives 1 to it and to both Night
    Ferries and 0 to Red Loft: (1 / 2 + 1 / 2 + 1) / 3. The other example's target is Night Ferry
    (1990), which the judge puts below Dark Well and above two: 2 / 3.
    """
    other = replace(EXAMPLE, dialog_id="d2", items=(NEW.title,), profile="Likes: crime, 1990s.")
    _, rows = judged(EXAMPLE, other)
    found = within_dialogues(rows, 0)
    judge, rule = found["internal judge"], found["rule on the summary"]
    assert (judge["all"]["mean"], judge["all"]["n"]) == (pytest.approx((1 + 2 / 3) / 2), 2)
    assert rule["all"]["mean"] == pytest.approx(2 / 3)
    assert found["rule"]["all"]["mean"] == 1.0
    _, rows = judged(EXAMPLE, other, k=3)
    found = within_dialogues(rows, 0)
    assert (found["internal judge"]["all"]["mean"], found["internal judge"]["all"]["n"]) == (1.0, 1)


def test_intervals_of_areas_draw_whole_dialogues() -> None:
    """Two turns of one dialogue, with areas of 1 and 2 / 3."""
    other = replace(EXAMPLE, turn_id=4, items=(NEW.title,), profile="Likes: crime, 1990s.")
    _, rows = judged(EXAMPLE, other)
    area = within_dialogues(rows, 0)["internal judge"]["all"]
    assert area["low"] == area["high"] == pytest.approx(5 / 6)


def test_misses_that_break_no_wish_are_left_out_of_the_harder_comparison() -> None:
    """Likes: crime. Night Ferry (1950) fits as well as the target, so Dark Well and Red Loft count.

    The judge puts the target above Night Ferry (1950) and Red Loft and below Dark Well: 2 / 3 of
    all, 1 / 2 of those that break a wish. Without a gold profile none does.
    """
    example = replace(EXAMPLE, items=(NEW.title,), profile="Likes: crime.")
    _, rows = judged(example)
    judge = within_dialogues(rows, 0)["internal judge"]
    assert (judge["all"]["mean"], judge["broken"]["mean"]) == (pytest.approx(2 / 3), 0.5)
    _, rows = judged(replace(example, profile=None))
    found = within_dialogues(rows, 0)
    assert found["internal judge"]["all"]["mean"] == pytest.approx(2 / 3)
    assert found["internal judge"]["broken"]["mean"] is None is found["rule"]["all"]["mean"]


def test_an_unread_score_is_left_out() -> None:
    _, rows = judged(EXAMPLE)
    rows[0]["films"][0]["scores"]["internal judge"] = None
    assert within_dialogues(rows, 0)["internal judge"]["all"]["mean"] == 1.0
    rows[0]["films"][3]["scores"]["internal judge"] = None  # the target
    assert within_dialogues(rows, 0)["internal judge"]["all"]["mean"] is None


def test_a_language_model_that_cannot_rank_has_no_films_and_is_not_asked() -> None:
    llm = Scripted(lambda request: "x")
    roles = Roles(Side(llm), Side(llm), FILMS)
    rows = judge_ranked(roles, [EXAMPLE], EvaluationOptions(), memory=True)
    assert rows[0]["films"] == [] and llm.generated == [] == llm.scored
    assert within_dialogues(rows, 0) == {} == within_dialogues([], 0)
    assert judged()[1] == [] and judged()[0].ranked == []
