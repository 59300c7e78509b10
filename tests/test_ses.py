"""SES: exact calls level by level, values, ties, and what must not disturb a search."""

import math

import pytest
from scripted import SURE, Scripted, role_of, talk

from usbrec.chat import Chat, Sampling
from usbrec.crs.agents import Cast, Verdict, closed_form
from usbrec.crs.ses import Candidate, Leaf, SearchOptions, search, select, value_of

CAST = Cast("rl", "simulator")
ROOTS = [talk("Something funny?"), talk("A thriller.", "Which one?", "Any.")]


def by_role(chat: Chat, how: Sampling, seed: int) -> str:
    """Every draw of the recommender differs with its seed; the others repeat what they saw."""
    said = role_of(chat)
    return f"{said} {seed % 1_000_003}" if said == "recommender" else f"{said} line"


def last_two(chat: Chat) -> list[float]:
    return SURE[int(chat.messages[-2].content.split()[-1]) % 3]


@pytest.mark.parametrize(("mode", "branches"), [("chain", 1), ("tree", 3)])
def test_every_level_is_one_call_over_all_dialogues(mode: str, branches: int) -> None:
    llm = Scripted(by_role, last_two)
    results = search(llm, CAST, ROOTS, [1, 2], SearchOptions(samples=3, turns=3, mode=mode))
    counts = [len(chats) for chats in llm.generated]
    level = 2 * 3
    expected = [2 * (1 + 3), level, level * branches, level * branches, level * branches**2]
    assert counts == expected
    assert [len(chats) for chats in llm.scored] == [level * branches**2]
    assert all(len(c.leaves) == branches**2 for r in results for c in r.candidates)


def test_each_role_speaks_with_its_adapter_and_temperature() -> None:
    llm = Scripted(by_role)
    search(llm, CAST, ROOTS[:1], [1], SearchOptions(temperature=0.6))
    seen = [
        [(role_of(chat), chat.adapter, how.temperature) for chat, how in zip(*rows, strict=True)]
        for rows in zip(llm.generated, llm.samplings, strict=True)
    ]
    assert seen == [
        [("summariser", "simulator", 0.0), *[("recommender", "rl", 0.6)] * 3],
        [("internal_seeker", "simulator", 0.1)] * 3,
        [("recommender", "rl", 0.1)] * 3,
    ]
    assert [role_of(chat) for chat in llm.scored[0]] == ["internal_judge"] * 3


def test_the_roll_out_knows_the_profile_and_ends_with_the_recommenders_reply() -> None:
    llm = Scripted(by_role)
    (result,) = search(llm, CAST, ROOTS[:1], [1], SearchOptions())
    assert result.profile == "summariser line" and result.root == ROOTS[0]
    for candidate, chat in zip(result.candidates, llm.scored[0], strict=True):
        (leaf,) = candidate.leaves
        spoken = [line.text for line in leaf.dialogue[len(ROOTS[0]) :]]
        assert spoken[0] == candidate.reply and spoken[1] == "internal_seeker line"
        assert len(spoken) == 3 and leaf.dialogue[-1].speaker == "recommender"
        assert "summariser line" in chat.messages[0].content
        assert chat.messages[-2].content == spoken[2]


def test_with_one_turn_the_candidates_are_judged_at_once() -> None:
    llm = Scripted(by_role)
    search(llm, CAST, ROOTS, [1, 2], SearchOptions(turns=1))
    assert [len(chats) for chats in llm.generated] == [8] and len(llm.scored[0]) == 6


def test_the_best_candidate_is_chosen() -> None:
    drafts = iter(["bad", "good", "fair"])
    values = {"bad": SURE[0], "good": SURE[2], "fair": SURE[1]}

    def reply(chat: Chat, how: Sampling, seed: int) -> str:
        return next(drafts) if role_of(chat) == "recommender" else "likes fun"

    llm = Scripted(reply, lambda chat: values[chat.messages[-2].content])
    (result,) = search(llm, CAST, ROOTS[:1], [1], SearchOptions(turns=1))
    assert (result.best, result.reply) == (1, "good")
    assert [candidate.value for candidate in result.candidates] == [
        closed_form(values[text], 0.7).expectation for text in ("bad", "good", "fair")
    ]


def test_equal_candidates_are_searched_once_and_stay_listed() -> None:
    llm = Scripted(lambda chat, how, seed: role_of(chat))
    (result,) = search(llm, CAST, ROOTS[:1], [1], SearchOptions(mode="tree"))
    assert [len(chats) for chats in llm.generated] == [4, 1, 3]
    assert [len(chats) for chats in llm.scored] == [1]
    assert [candidate.reply for candidate in result.candidates] == ["recommender"] * 3
    assert all(candidate.leaves[0].weight == 3 for candidate in result.candidates)
    assert result.best == 0


def test_an_empty_candidate_is_not_searched_and_not_chosen() -> None:
    drafts = iter(["", "  ", "Try it"])

    def reply(chat: Chat, how: Sampling, seed: int) -> str:
        return next(drafts) if role_of(chat) == "recommender" else "x"

    llm = Scripted(reply, lambda chat: SURE[0])
    (result,) = search(llm, CAST, ROOTS[:1], [1], SearchOptions(turns=1))
    assert result.reply == "Try it" and len(llm.scored[0]) == 1
    assert [candidate.value is None for candidate in result.candidates] == [True, True, False]


def test_a_search_of_empty_replies_ends_with_an_empty_reply() -> None:
    llm = Scripted(lambda chat, how, seed: "")
    (result,) = search(llm, CAST, ROOTS[:1], [1], SearchOptions())
    assert result.reply == "" and result.best == 0
    assert len(llm.generated) == 1 and llm.scored == []


def test_unread_votes_leave_no_value_and_the_first_reply() -> None:
    llm = Scripted(by_role, lambda chat: [-math.inf] * 3)
    (result,) = search(llm, CAST, ROOTS[:1], [1], SearchOptions())
    assert all(candidate.value is None for candidate in result.candidates) and result.best == 0


def test_a_search_does_not_depend_on_its_neighbours() -> None:
    options = SearchOptions(mode="tree", turns=2)
    together = search(Scripted(by_role, last_two), CAST, ROOTS, [1, 2], options)
    alone = search(Scripted(by_role, last_two), CAST, ROOTS[1:], [2], options)
    assert together[1] == alone[0]
    assert together[1] != search(Scripted(by_role, last_two), CAST, ROOTS[1:], [3], options)[0]


def test_no_dialogues_need_no_calls() -> None:
    llm = Scripted(by_role)
    assert search(llm, CAST, [], [], SearchOptions()) == []
    assert llm.generated == []


def leaf(expectation: float | None, label: int | None, weight: int = 1) -> Leaf:
    return Leaf((), Verdict(expectation, label, 1.0), weight)


def test_a_value_is_the_weighted_mean_or_the_majority_of_the_leaves_that_were_read() -> None:
    leaves = [leaf(0.5, 0, 2), leaf(2.0, 2), leaf(None, None, 5)]
    assert value_of(leaves, "mean") == pytest.approx(1.0)
    assert value_of(leaves, "majority") == 0.0
    assert value_of([leaf(1.9, 2), leaf(0.1, 0)], "majority") == 0.0
    assert value_of([leaf(None, None)], "mean") is None
    assert value_of([], "majority") is None


def test_ties_go_to_the_first_and_no_value_never_wins() -> None:
    a, b, none = Candidate("a", 1.0, ()), Candidate("b", 1.0, ()), Candidate("c", None, ())
    assert select([none, a, b]) == 1
    assert select([none, Candidate("z", 0.0, ())]) == 1
    assert select([Candidate("", None, ()), none]) == 1


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"turns": 0}, {"start_turn": 0}, {"votes": -1}, {"mode": "x"},
              {"value": "x"}],
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SearchOptions(**wrong)
