"""Agreement of the judges with the truth: contrasts, calls, and the area under the curve."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from scripted import SURE, Scripted, role_of, roles_of, talk

from usbrec.chat import Request
from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import EvaluationOptions
from usbrec.crs.wishes import card
from usbrec.extras.measures import agreement, contrast, judge_agreement

WELL = Item("Dark Well (1999)", "Dark Well", 1999, ("horror",), ("Ann Ray",))
LOFT = Item("Red Loft (2001)", "Red Loft", 2001, ("comedy",), ("Bo Lind",))
PINE = Item("Pine Road (1985)", "Pine Road", 1985, ("drama",), ("Cy Moss",))
FILMS = Catalogue([WELL, LOFT, PINE])
COUNTS = {WELL.title: 100, LOFT.title: 3, PINE.title: 1, "Not Ours (1900)": 50}
EXAMPLE = Example(
    "d1", 2, talk("Dark, please."), "Try Dark Well (1999), a horror film.", (WELL.title,),
    explanation="Dark Well is horror by Ann Ray.",
)  # fmt: skip
BARE = replace(EXAMPLE, dialog_id="d2", explanation=None)


def cast(llm: Scripted, simulator: Scripted | None = None) -> Roles:
    """Let one model play both sides, or `simulator` the seeker's."""
    return Roles(Side(llm, "rl"), Side(simulator or llm, "simulator"), FILMS)


def line(request: Request) -> str:
    return f"{role_of(request)} line"


def by_title(request: Request) -> list[float]:
    return SURE[2 if "Dark Well" in request.messages[-2].content else 0]


def run(llm: Scripted, *examples: Example) -> list[dict[str, object]]:
    return judge_agreement(cast(llm), examples, COUNTS, 0, EvaluationOptions())


def test_the_other_reply_names_a_film_that_is_no_target_with_its_own_attributes() -> None:
    made = contrast(FILMS, EXAMPLE, COUNTS, 1)
    assert made["skipped"] is None and len(made["explanations"]) == 2
    assert (made["gold"], made["explanations"][0]) == (EXAMPLE.response, EXAMPLE.explanation)
    (title,) = made["titles"]
    other = FILMS.get(title)
    assert other in (LOFT, PINE)
    assert title in made["other"] and other.genres[0] in made["other"]
    for text in (made["other"], made["explanations"][1]):
        assert "Dark Well" not in text and "horror" not in text and "Ann Ray" not in text


def test_others_are_drawn_by_their_training_counts_and_are_never_targets() -> None:
    made = [contrast(FILMS, EXAMPLE, COUNTS, seed) for seed in range(400)]
    drawn = Counter(x["titles"][0] for x in made)
    assert set(drawn) == {LOFT.title, PINE.title}
    assert drawn[LOFT.title] / 400 == pytest.approx(0.75, abs=0.06)


def test_several_gold_titles_are_replaced_by_as_many_different_films() -> None:
    both = replace(EXAMPLE, items=(WELL.title, LOFT.title), response="Dark Well and Red Loft.")
    counts = {**COUNTS, "Pine Road (1985)": 1}
    assert contrast(FILMS, both, counts, 0)["skipped"] == "too few other titles to draw from"
    more = Catalogue([*FILMS, Item("Blue Barn (1970)", "Blue Barn", 1970)])
    for seed in range(8):
        made = contrast(more, both, {**counts, "Blue Barn (1970)": 1}, seed)
        assert made["skipped"] is None and len(set(made["titles"])) == 2


def test_what_cannot_be_contrasted_is_skipped_and_says_why() -> None:
    absent = replace(EXAMPLE, items=("Not Ours (1900)",))
    reason = "a gold title is not in the catalogue, or ambiguous"
    assert contrast(FILMS, absent, COUNTS, 0)["skipped"] == reason
    unnamed = replace(EXAMPLE, response="Try that one.")
    reason = "a gold title in the reply could not be replaced"
    assert contrast(FILMS, unnamed, COUNTS, 0)["skipped"] == reason
    llm = Scripted(line, by_title)
    rows = run(llm, absent, EXAMPLE)
    assert rows[0]["skipped"] and rows[1]["skipped"] is None
    assert agreement(rows, 0)["skipped"] == 1 and agreement(rows, 0)["external"]["n"] == 1


def test_one_call_generates_and_each_judge_has_one_call() -> None:
    llm = Scripted(line, by_title)
    run(llm, EXAMPLE, BARE)
    (requests,) = llm.generated
    assert [role_of(request) for request in requests] == ["summariser"] * 2 + ["explainer"] * 2
    assert roles_of(llm.scored) == [["judge"] * 4, ["internal_judge"] * 4, ["card_judge"] * 4]


def test_the_judge_with_cards_sees_the_card_of_the_title_in_the_reply() -> None:
    llm = Scripted(line, by_title)
    (row,) = run(llm, EXAMPLE)
    [gold, other] = (request.messages for request in llm.scored[2])
    (film,) = (FILMS.get(title) for title in row["titles"])
    assert film is not None
    for asked, reply, item in ((gold, row["gold"], WELL), (other, row["other"], film)):
        assert [x.content for x in asked[1:3]] == [reply, card(item)]
        assert "summariser line" in asked[3].content


def test_no_two_draws_share_a_seed() -> None:
    """Two summaries, explanations of four replies, and two votes each of twelve."""
    llm = Scripted(line)
    examples = [BARE, replace(BARE, turn_id=4)]
    judge_agreement(cast(llm), examples, COUNTS, 0, EvaluationOptions(votes=2))
    seeds = [request.seed for requests in llm.generated for request in requests]
    assert len(set(seeds)) == len(seeds) == 2 + 4 + 2 * 12


def test_two_models_give_the_rows_that_one_does_and_each_gets_its_own_requests() -> None:
    tuned, plain = Scripted(line), Scripted(line, by_title)
    rows = judge_agreement(cast(tuned, plain), [EXAMPLE, BARE], COUNTS, 0, EvaluationOptions())
    assert roles_of(tuned.generated) == [["explainer"] * 2] and tuned.scored == []
    assert roles_of(plain.generated) == [["summariser"] * 2]
    assert roles_of(plain.scored) == [["judge"] * 4, ["internal_judge"] * 4, ["card_judge"] * 4]
    assert rows == run(Scripted(line, by_title), EXAMPLE, BARE)


def test_another_external_judge_gets_its_own_requests_and_no_others() -> None:
    llm, outer = Scripted(line, lambda request: SURE[0]), Scripted(line, by_title)
    roles = replace(cast(llm), external=Side(outer, "outer"))
    rows = judge_agreement(roles, [EXAMPLE, BARE], COUNTS, 0, EvaluationOptions())
    assert roles_of(outer.scored) == [["judge"] * 4] and outer.generated == []
    assert roles_of(llm.scored) == [["internal_judge"] * 4, ["card_judge"] * 4]
    assert {request.adapter for request in outer.scored[0]} == {"outer"}
    expected = run(Scripted(line, by_title), EXAMPLE, BARE)
    assert [row["external"] for row in rows] == [row["external"] for row in expected]
    assert all(len(set(row["internal"])) == 1 for row in rows)


def test_the_rows_own_explanation_is_used_where_there_is_one() -> None:
    llm = Scripted(line, by_title)
    run(llm, EXAMPLE, BARE)
    told = [
        request.messages[-2].content for request in llm.scored[0] if role_of(request) == "judge"
    ]
    assert told[0] == EXAMPLE.explanation and "Dark Well" not in told[1]
    assert told[2:] == ["explainer line"] * 2


def test_the_summary_and_the_internal_judge_know_no_target() -> None:
    llm = Scripted(line, by_title)
    run(llm, EXAMPLE)
    assert "Dark Well" not in " ".join(m.content for m in llm.generated[0][0].messages)
    for request in llm.scored[1]:
        assert "summariser line" in request.messages[0].content
        assert not any("Dark Well" in m.content for m in request.messages[:-2])


def test_the_area_tells_a_good_judge_from_a_blind_one_and_counts_the_unread() -> None:
    llm = Scripted(
        line, lambda request: by_title(request) if role_of(request) == "judge" else SURE[1]
    )
    rows = [json.loads(json.dumps(row)) for row in run(llm, *[EXAMPLE] * 3)]
    found = agreement(rows, 0)
    low = pytest.approx(0.025 ** (2 / 3))
    area = {"auc": 1.0, "low": low, "high": 1.0, "n": 3}
    gold, other = ([row["external"][i] for row in rows] for i in range(2))
    means = [pytest.approx(sum(x) / 3) for x in (gold, other)]
    assert gold > other and found["external"] == {**area, "means": means, "unparsed": 0}
    same = found["internal"]["means"]
    assert found["internal"]["auc"] == 0.5 and same[0] == same[1] > 0
    blind = Scripted(line, lambda request: [-math.inf] * 3)
    assert agreement(run(blind, EXAMPLE), 0)["external"] == {
        "auc": None, "low": None, "high": None, "n": 0, "means": [None, None], "unparsed": 1,
    }  # fmt: skip
