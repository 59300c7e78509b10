"""PODCS: the rules of the pair, exact calls, and what reaches which prompt."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from scripted import SURE, Scripted, role_of, roles_of, talk

from usbrec.chat import Request, Row
from usbrec.crs.agents import Roles, Side, recommender_prompt
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Example
from usbrec.crs.podcs import (
    PairOptions,
    build_pairs,
    choose_pairs,
)
from usbrec.extras.measures import count_wins, sample_means
from usbrec.options import seed_for

FILMS = Catalogue(
    [Item("Dark Well (1999)", "Dark Well", 1999), Item("Red Loft (2001)", "Red Loft")]
)
EXAMPLES = [
    Example("d1", 2, talk("Something dark?"), "Try Dark Well (1999)!", ("Dark Well (1999)",)),
    Example("d2", 4, talk("Hi.", "Genre?", "Drama."), "Red Loft (2001)?", ("Red Loft (2001)",)),
]


def cast(llm: Scripted, simulator: Scripted | None = None) -> Roles:
    """Let one model play both sides, or `simulator` the seeker's."""
    return Roles(Side(llm, "sft"), Side(simulator or llm, "simulator"), FILMS)


def sample(text: str, label: int | None, score: float | None = None) -> Row:
    value = float(label) if score is None and label is not None else score
    return {"reply": text, "score": value, "label": label}


def sides(pair: dict[str, Any]) -> tuple[str, str]:
    """Return the texts of both sides of a pair."""
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


G = "Try Dark Well (1999)!"


@pytest.mark.parametrize(
    ("labels", "worst", "chosen", "rejected"),
    [
        ((2, 2, 2), "zero", "a", G),
        ((2, 1, 0), "zero", "a", "c"),
        ((0, 2, 1), "zero", "b", "a"),
        ((2, 1, 1), "zero", "a", G),
        ((1, 1, 0), "zero", G, "c"),
        ((0, 0, 0), "zero", G, "a"),
        ((1, 1, 1), "zero", None, None),
        ((2, 1, 1), "below-two", "a", "b"),
        ((1, 0, 1), "below-two", G, "b"),
        ((2, 2, 2), "below-two", "a", G),
        ((1, 1, 1), "below-two", None, None),
        ((None, 2, 0), "zero", "b", "c"),
        ((None, None, None), "zero", None, None),
        ((1, None, 1), "zero", None, None),
    ],
)
def test_the_rules_decide_both_sides(
    labels: Sequence[int | None], worst: str, chosen: str | None, rejected: str | None
) -> None:
    samples = [sample(text, label) for text, label in zip("abc", labels, strict=True)]
    pairs, reason = choose_pairs(EXAMPLES[0], samples, PairOptions(worst=worst))
    assert reason
    assert [sides(pair) for pair in pairs] == [(chosen, rejected)] * (chosen is not None)


def test_sides_carry_their_scores_and_origins_and_gold_is_unscored() -> None:
    samples = [sample("a", 1), sample("b", 0, 0.4)]
    (pair,), reason = choose_pairs(EXAMPLES[0], samples, PairOptions())
    assert reason == "gold over samples"
    assert (pair["chosen_from"], pair["chosen_score"]) == ("gold", None)
    assert (pair["rejected_from"], pair["rejected_score"]) == ("samples[1]", 0.0)
    said = [(m.role, m.content) for m in recommender_prompt(EXAMPLES[0].history)]
    assert [(m["role"], m["content"]) for m in pair["prompt"]] == said


def test_within_a_class_the_expectation_decides_then_the_order() -> None:
    both = [sample("a", 2, 1.6), sample("b", 2, 1.9), sample("c", 0, 0.3), sample("d", 0, 0.1)]
    (pair,), _ = choose_pairs(EXAMPLES[0], both, PairOptions())
    assert sides(pair) == ("b", "d")
    tied = [sample(text, label) for text, label in (("a", 2), ("b", 2), ("c", 0), ("d", 0))]
    (pair,), _ = choose_pairs(EXAMPLES[0], tied, PairOptions())
    assert sides(pair) == ("a", "c")


def test_the_class_goes_before_the_expectation() -> None:
    """A judge torn between 0 and 2 can call a reply 2 and expect less of it than of a sure 1."""
    torn = [sample("a", 1, 1.3), sample("b", 2, 1.2), sample("c", 0, 0.9), sample("d", 1, 0.8)]
    (pair,), _ = choose_pairs(EXAMPLES[0], torn, PairOptions(worst="below-two"))
    assert sides(pair) == ("b", "c")


def test_equal_texts_and_empty_ones_make_no_pair_and_say_why() -> None:
    assert choose_pairs(EXAMPLES[0], [sample(G, 2)], PairOptions()) == (
        [],
        "chosen and rejected are equal",
    )
    empty = [sample("", None), sample("", None)]
    assert choose_pairs(EXAMPLES[0], empty, PairOptions()) == ([], "all samples empty")
    (pair,), _ = choose_pairs(EXAMPLES[0], [sample("", 0), sample("a", 2)], PairOptions())
    assert sides(pair) == ("a", G)
    unread = choose_pairs(EXAMPLES[0], [sample("a", None)], PairOptions())
    assert unread == ([], "no sample's score could be read")


def distinct(request: Request) -> str:
    said = role_of(request)
    return (
        f"{said} {request.seed % 1_000_003}"
        if said == "recommender"
        else f"{said} says Dark Well (1999)"
    )


def first_draft(request: Request) -> list[float]:
    """Score by the roll-out's first reply, so that the three samples differ."""
    said = next(m.content for m in request.messages if m.content.startswith("recommender "))
    return SURE[int(said.split()[-1]) % 3]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_step_is_one_call_over_all_examples_and_samples(turns: int) -> None:
    llm = Scripted(distinct, first_draft)
    build_pairs(cast(llm), EXAMPLES, 0, PairOptions(samples=3, turns=turns))
    seen = roles_of(llm.generated)
    rollout = [["seeker"] * 6, ["recommender"] * 6] * (turns - 1)
    assert seen == [["recommender"] * 6, *rollout, ["explainer"] * 6]
    assert roles_of(llm.scored) == [["judge"] * 6]


def test_two_models_build_the_pairs_that_one_does_and_each_gets_its_own_requests() -> None:
    tuned, plain = Scripted(distinct), Scripted(distinct, first_draft)
    found = build_pairs(cast(tuned, plain), EXAMPLES, 0, PairOptions())
    assert roles_of(tuned.generated) == [
        ["recommender"] * 6,
        ["recommender"] * 6,
        ["explainer"] * 6,
    ]
    assert roles_of(plain.generated) == [["seeker"] * 6] and tuned.scored == []
    assert roles_of(plain.scored) == [["judge"] * 6]
    one = cast(Scripted(distinct, first_draft))
    assert found == build_pairs(one, EXAMPLES, 0, PairOptions())


def test_all_samples_are_used_at_the_stated_temperature() -> None:
    llm = Scripted(distinct, first_draft)
    rows = build_pairs(cast(llm), EXAMPLES, 0, PairOptions(samples=4, temperature=0.9))
    assert {request.sampling.temperature for request in llm.generated[0]} == {0.9}
    assert {request.sampling.temperature for request in llm.generated[1]} == {0.1}
    assert len({request.seed for request in llm.generated[0]}) == 8
    for row in rows:
        assert len({s["reply"] for s in row["samples"]}) == 4
        assert all(s["label"] is not None for s in row["samples"])


def test_equal_samples_are_rolled_out_once() -> None:
    llm = Scripted(role_of)
    (row,) = build_pairs(cast(llm), EXAMPLES[:1], 0, PairOptions(turns=2))
    assert [len(requests) for requests in llm.generated] == [3, 1, 1, 1]
    assert len(row["samples"]) == 3 and row["samples"][0] == row["samples"][2]


def test_an_empty_sample_is_neither_rolled_out_nor_scored() -> None:
    drawn = iter(["", "Try it.", " "])
    llm = Scripted(lambda x: next(drawn, "More.") if role_of(x) == "recommender" else "x")
    (row,) = build_pairs(cast(llm), EXAMPLES[:1], 0, PairOptions())
    assert [len(requests) for requests in llm.generated] == [3, 1, 1, 1] and len(llm.scored[0]) == 1
    assert [bool(x["lines"]) for x in row["samples"]] == [False, True, False]


def test_no_two_draws_of_a_run_share_a_seed() -> None:
    llm = Scripted(distinct, first_draft)
    build_pairs(cast(llm), EXAMPLES, 0, PairOptions(turns=3))
    seeds = [request.seed for requests in llm.generated for request in requests]
    assert len(set(seeds)) == len(seeds) == 6 * 6


def test_scores_are_read_at_the_stated_temperature() -> None:
    """At 0 a score is the likeliest digit, above it the mean of all three."""
    for temperature in (0.0, 0.7):
        options = PairOptions(vote_temperature=temperature)
        (row,) = build_pairs(cast(Scripted(distinct, first_draft)), EXAMPLES[:1], 0, options)
        surely = [x["score"] == x["label"] for x in row["samples"] if x["label"] != 1]
        assert surely and set(surely) == {temperature == 0}


def test_the_recommender_sees_neither_the_gold_response_nor_a_target_from_the_seeker() -> None:
    llm = Scripted(distinct, first_draft)
    build_pairs(cast(llm), EXAMPLES[:1], 0, PairOptions(turns=3))
    for requests in llm.generated:
        for request in requests:
            if request.adapter == "sft":
                text = " ".join(message.content for message in request.messages)
                assert "Dark Well" not in text and "Try " not in text


def test_an_unread_score_is_no_zero() -> None:
    llm = Scripted(distinct, lambda request: [-math.inf] * 3)
    (row,) = build_pairs(cast(llm), EXAMPLES[:1], 0, PairOptions())
    assert row["pairs"] == [] and row["reason"] == "no sample's score could be read"
    assert {s["label"] for s in row["samples"]} == {None}


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    both = build_pairs(cast(Scripted(distinct, first_draft)), EXAMPLES, 5, PairOptions())
    alone = build_pairs(cast(Scripted(distinct, first_draft)), EXAMPLES[1:], 5, PairOptions())
    assert both[1] == alone[0]


def test_records_are_json_and_a_pair_is_a_conversational_preference_row() -> None:
    llm = Scripted(distinct, first_draft)
    rows = build_pairs(cast(llm), EXAMPLES, 0, PairOptions())
    assert rows == json.loads(json.dumps(rows))
    assert all(len(row["samples"]) == 3 for row in rows)
    seed = seed_for(seed_for(0, "pairs", "d1", 2), "sample", 0)
    first = f"recommender {seed % 1_000_003}"
    label = int(first.split()[-1]) % 3
    kept = rows[0]["samples"][0]
    speakers = [speaker for speaker, _ in kept.pop("lines")]
    assert speakers == ["recommender", "seeker", "recommender"]
    assert kept == {
        "reply": first,
        "score": pytest.approx(label, abs=0.2),
        "label": label,
        "digit_probability": pytest.approx(1.0),
        "parse_rate": None,
        "explanation": "explainer says Dark Well (1999)",
    }
    assert rows[0]["adapters"] == {"recommender": "sft", "seeker": "simulator"}
    (pair,), _ = choose_pairs(EXAMPLES[0], [sample("a", 0)], PairOptions())
    assert pair == {
        "prompt": [
            {"role": "system", "content": recommender_prompt(())[0].content},
            {"role": "user", "content": "Something dark?"},
        ],
        "chosen": [{"role": "assistant", "content": G}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "chosen_score": None,
        "rejected_score": 0.0,
        "chosen_from": "gold",
        "rejected_from": "samples[0]",
    }


def test_the_defaults_are_those_of_the_results() -> None:
    o = PairOptions()
    assert (o.samples, o.turns, o.worst, o.votes) == (3, 2, "zero", 0)
    assert (o.temperature, o.rollout_temperature, o.vote_temperature) == (0.8, 0.1, 0.7)


def test_no_examples_need_no_calls() -> None:
    llm = Scripted(distinct)
    assert build_pairs(cast(llm), [], 0, PairOptions()) == [] and llm.generated == []


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"turns": 0}, {"votes": -1}, {"worst": "x"}])
def test_wrong_options_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PairOptions(**wrong)


def test_pairs_are_counted_by_the_grades_of_their_titles() -> None:
    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return {"chosen": [{"content": chosen}], "rejected": [{"content": rejected}]}

    hit, miss, none = "Dark Well (1999)!", "Red Loft (2001)?", "What else?"
    pairs = [[pair(hit, miss), pair(miss, none)], [pair(none, hit)], []]
    found = count_wins(FILMS, [EXAMPLES[0]] * 3, [{"pairs": own} for own in pairs])
    assert found == {"better": 1, "equal": 1, "worse": 1}


def test_a_rule_stands_beside_the_judges_score_of_the_samples() -> None:
    """An empty sample has no score and names nothing; intervals draw whole dialogues."""
    first, second = (
        [sample(G, 2, 1.5), sample("Red Loft?", 1, 1.25)],
        [sample(G, 0), sample("", None)],
    )
    records = [{"samples": first}, {"samples": second}]
    score, hit = sample_means(FILMS, EXAMPLES, records, 0)
    assert (score["mean"], score["n"]) == (pytest.approx(2.75 / 3), 3)
    assert (hit["mean"], hit["n"]) == (0.25, 4)
    room = (1 - 0.025 ** (1 / 2)) * 0.75  # what two dialogues do not exclude: all hits
    assert (score["high"], hit["low"], hit["high"]) == (1.375, 0.0, pytest.approx(0.25 + room))
