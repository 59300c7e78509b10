"""PODCS: the rules of the pair, exact calls, and what reaches which prompt."""

import json
import math
from collections.abc import Sequence

import pytest
from scripted import SURE, Scripted, role_of, talk

from usbrec.chat import Chat, Sampling
from usbrec.crs.agents import Cast, recommender_prompt
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Example
from usbrec.crs.podcs import (
    PairOptions,
    Sample,
    build_pairs,
    choose_pair,
    count_reasons,
    outcome_record,
    pair_record,
)

CAST = Cast("sft", "simulator")
FILMS = Catalogue(
    [Item("Dark Well (1999)", "Dark Well", 1999), Item("Red Loft (2001)", "Red Loft")]
)
EXAMPLES = [
    Example("d1", 2, talk("Something dark?"), "Try Dark Well (1999)!", ("Dark Well (1999)",)),
    Example("d2", 4, talk("Hi.", "Genre?", "Drama."), "Red Loft (2001)?", ("Red Loft (2001)",)),
]


def sample(text: str, label: int | None, expectation: float | None = None) -> Sample:
    value = float(label) if expectation is None and label is not None else expectation
    return Sample(text, label, value, 1.0, "", ())


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
    pair, reason = choose_pair(EXAMPLES[0], samples, worst)
    assert reason
    assert (pair and pair.chosen, pair and pair.rejected) == (chosen, rejected)


def test_sides_carry_their_scores_and_origins_and_gold_is_unscored() -> None:
    pair, reason = choose_pair(EXAMPLES[0], [sample("a", 1), sample("b", 0, 0.4)], "zero")
    assert pair is not None and reason == "gold over samples"
    assert (pair.chosen_from, pair.chosen_score) == ("gold", None)
    assert (pair.rejected_from, pair.rejected_score) == ("samples[1]", 0.0)
    assert pair.prompt == recommender_prompt(EXAMPLES[0].history)


def test_within_a_class_the_expectation_decides_then_the_order() -> None:
    both = [sample("a", 2, 1.6), sample("b", 2, 1.9), sample("c", 0, 0.3), sample("d", 0, 0.1)]
    pair, _ = choose_pair(EXAMPLES[0], both, "zero")
    assert pair is not None and (pair.chosen, pair.rejected) == ("b", "d")
    tied = [sample(text, label) for text, label in (("a", 2), ("b", 2), ("c", 0), ("d", 0))]
    pair, _ = choose_pair(EXAMPLES[0], tied, "zero")
    assert pair is not None and (pair.chosen, pair.rejected) == ("a", "c")


def test_equal_texts_and_empty_ones_make_no_pair_and_say_why() -> None:
    assert choose_pair(EXAMPLES[0], [sample(G, 2)], "zero") == (
        None,
        "chosen and rejected are equal",
    )
    empty = [sample("", None), sample("", None)]
    assert choose_pair(EXAMPLES[0], empty, "zero") == (None, "all samples empty")
    pair, _ = choose_pair(EXAMPLES[0], [sample("", 0), sample("a", 2)], "zero")
    assert pair is not None and pair.rejected == G
    unread = choose_pair(EXAMPLES[0], [sample("a", None)], "zero")
    assert unread == (None, "no sample's score could be read")
    silent = Example("d", 1, talk("Hi"), " ", ("X",))
    assert choose_pair(silent, [sample("a", 0)], "zero") == (None, "gold response empty")


def distinct(chat: Chat, how: Sampling, seed: int) -> str:
    said = role_of(chat)
    return (
        f"{said} {seed % 1_000_003}" if said == "recommender" else f"{said} says Dark Well (1999)"
    )


def first_draft(chat: Chat) -> list[float]:
    """Score by the roll-out's first reply, so that the three samples differ."""
    said = next(m.content for m in chat.messages if m.content.startswith("recommender "))
    return SURE[int(said.split()[-1]) % 3]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_step_is_one_call_over_all_examples_and_samples(turns: int) -> None:
    llm = Scripted(distinct, first_draft)
    build_pairs(llm, CAST, FILMS, EXAMPLES, 0, PairOptions(samples=3, turns=turns))
    seen = [[role_of(chat) for chat in chats] for chats in llm.generated]
    rollout = [["seeker"] * 6, ["recommender"] * 6] * (turns - 1)
    assert seen == [["recommender"] * 6, *rollout, ["explainer"] * 6]
    assert [[role_of(chat) for chat in chats] for chats in llm.scored] == [["judge"] * 6]


def test_all_samples_are_used_at_the_stated_temperature() -> None:
    llm = Scripted(distinct, first_draft)
    outcomes = build_pairs(llm, CAST, FILMS, EXAMPLES, 0, PairOptions(samples=4, temperature=0.9))
    assert {how.temperature for how in llm.samplings[0]} == {0.9}
    assert {how.temperature for how in llm.samplings[1]} == {0.1}
    assert len(set(llm.seeds[0])) == 8
    for outcome in outcomes:
        assert len({s.reply for s in outcome.samples}) == 4
        assert all(s.label is not None for s in outcome.samples)


def test_equal_samples_are_rolled_out_once() -> None:
    llm = Scripted(lambda chat, how, seed: role_of(chat))
    (outcome,) = build_pairs(llm, CAST, FILMS, EXAMPLES[:1], 0, PairOptions(turns=2))
    assert [len(chats) for chats in llm.generated] == [3, 1, 1, 1]
    assert len(outcome.samples) == 3 and outcome.samples[0] == outcome.samples[2]


def test_the_recommender_sees_neither_the_gold_response_nor_a_target_from_the_seeker() -> None:
    llm = Scripted(distinct, first_draft)
    build_pairs(llm, CAST, FILMS, EXAMPLES[:1], 0, PairOptions(turns=3))
    for chats in llm.generated:
        for chat in chats:
            if chat.adapter == "sft":
                text = " ".join(message.content for message in chat.messages)
                assert "Dark Well" not in text and "Try " not in text


def test_an_unread_score_is_no_zero() -> None:
    llm = Scripted(distinct, lambda chat: [-math.inf] * 3)
    (outcome,) = build_pairs(llm, CAST, FILMS, EXAMPLES[:1], 0, PairOptions())
    assert outcome.pair is None and outcome.reason == "no sample's score could be read"
    assert {s.label for s in outcome.samples} == {None}


def test_an_outcome_does_not_depend_on_its_neighbours() -> None:
    both = build_pairs(Scripted(distinct, first_draft), CAST, FILMS, EXAMPLES, 5, PairOptions())
    alone = build_pairs(
        Scripted(distinct, first_draft), CAST, FILMS, EXAMPLES[1:], 5, PairOptions()
    )
    assert both[1] == alone[0]


def test_records_are_json_and_a_pair_is_a_conversational_preference_row() -> None:
    outcomes = build_pairs(Scripted(distinct, first_draft), CAST, FILMS, EXAMPLES, 0, PairOptions())
    records = [json.loads(json.dumps(outcome_record(outcome))) for outcome in outcomes]
    assert sum(count_reasons(records).values()) == 2
    assert all(len(record["samples"]) == 3 for record in records)
    pair, _ = choose_pair(EXAMPLES[0], [sample("a", 0)], "zero")
    assert pair is not None
    assert pair_record(pair) == {
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


def test_no_examples_need_no_calls() -> None:
    llm = Scripted(distinct)
    assert build_pairs(llm, CAST, FILMS, [], 0, PairOptions()) == [] and llm.generated == []


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"turns": 0}, {"votes": -1}, {"worst": "x"}])
def test_wrong_options_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PairOptions(**wrong)
