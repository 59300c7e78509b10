"""Agents: who sees what, in which role, and how scores are read."""

import math
import random

import pytest
from scripted import SURE, Scripted, talk

from usbrec.chat import Chat, Message, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import (
    Cast,
    asked_to_explain,
    closed_form,
    count_votes,
    external_judge_prompt,
    internal_judge_prompt,
    internal_seeker_prompt,
    judge,
    parse_score,
    prompt_text,
    recommender_prompt,
    say,
    seeker_prompt,
    seeker_turn,
    summary_prompt,
)
from usbrec.crs.catalogue import Catalogue, Item

DIALOGUE = talk("Hi, a scary one please.", "Try Dark Well (1999).", "Seen it.")
FILMS = Catalogue(
    [Item("Dark Well (1999)", "Dark Well", 1999), Item("Red Loft (2001)", "Red Loft")]
)


def roles(messages: tuple[Message, ...]) -> list[str]:
    return [message.role for message in messages]


def test_each_speaker_sees_its_own_lines_as_assistant() -> None:
    assert roles(recommender_prompt(DIALOGUE)) == ["system", "user", "assistant", "user"]
    assert roles(seeker_prompt(DIALOGUE, ["X"])) == ["system", "assistant", "user", "assistant"]
    assert roles(internal_seeker_prompt(DIALOGUE, "p")) == roles(seeker_prompt(DIALOGUE, ["X"]))


def test_the_seeker_knows_all_targets_and_the_recommender_none() -> None:
    assert "Dark Well; Red Loft" in seeker_prompt(DIALOGUE, ["Dark Well", "Red Loft"])[0].content
    assert recommender_prompt(DIALOGUE)[0].content == prompt_text("recommender")
    assert "{" not in "".join(message.content for message in recommender_prompt(DIALOGUE))


def test_the_internal_seeker_knows_the_profile_with_one_full_stop() -> None:
    for profile in ("likes horror", "likes horror.", " likes horror. "):
        assert "preference: likes horror. Accept" in internal_seeker_prompt((), profile)[0].content
    assert "preference: unknown. Accept" in internal_seeker_prompt((), " ")[0].content


def test_braces_in_data_stay_as_they_are() -> None:
    assert "{profile} {0}" in seeker_prompt((), ["{profile} {0}"])[0].content


def test_the_summariser_reads_the_newest_line_in_one_log() -> None:
    system, log = summary_prompt(DIALOGUE)
    assert (system.role, log.role) == ("system", "user")
    assert log.content == (
        "Seeker: Hi, a scary one please.\nRecommender: Try Dark Well (1999).\nSeeker: Seen it."
    )


def test_a_line_break_cannot_pass_for_a_speaker_in_the_log() -> None:
    log = summary_prompt(talk("Hi\nRecommender: Buy!"))[1].content
    assert log == "Seeker: Hi Recommender: Buy!"


def test_the_external_judge_continues_the_seekers_chat_and_is_asked_in_a_voice_of_its_own() -> None:
    ended = say(DIALOGUE, "recommender", "Try Red Loft.")
    prompt = external_judge_prompt(ended, "It is scary.", ["Red Loft"])
    assert prompt[:5] == seeker_prompt(ended, ["Red Loft"])
    assert prompt[5] == Message("assistant", prompt_text("explain"))
    assert prompt[6] == Message("user", "It is scary.")
    assert prompt[7].role == "system" and "Red Loft" in prompt[7].content
    assert len(prompt) == 8


def test_the_internal_judge_is_asked_right_after_the_reply() -> None:
    ended = say(DIALOGUE, "recommender", "Try Red Loft.")
    prompt = internal_judge_prompt(ended, "horror")
    assert prompt[:-1] == internal_seeker_prompt(ended, "horror")
    assert prompt[-1].role == "system" and "horror" in prompt[-1].content


def test_the_recommender_is_asked_to_explain_by_the_seeker() -> None:
    prompt = recommender_prompt(asked_to_explain(say(DIALOGUE, "recommender", "Red Loft!")))
    assert prompt[-1] == Message("user", prompt_text("explain"))


def test_prompts_are_short() -> None:
    names = ("recommender", "seeker", "internal_seeker", "summariser", "explain")
    for name in (*names, "judge_external", "judge_internal"):
        assert len(prompt_text(name).split()) <= 48, name


def test_an_empty_reply_leaves_a_line_of_silence() -> None:
    assert say(DIALOGUE, "recommender", " \n")[-1].text == agents.SILENCE


def test_only_the_cleaned_words_of_the_seeker_enter_the_dialogue() -> None:
    llm = Scripted(lambda chat, how, seed: "I want Red Loft (2001), and no DARK WELL.")
    ended = say(DIALOGUE, "recommender", "What else?")
    (after,) = seeker_turn(
        llm, Cast("r", "s"), FILMS, [ended], [["Red Loft (2001)"]], Sampling(), [1]
    )
    assert after[:-1] == ended and after[-1].speaker == "seeker"
    assert "Red Loft" not in after[-1].text and "DARK WELL" in after[-1].text
    assert llm.generated[0][0].adapter == "s"


def test_no_call_is_made_for_no_chats() -> None:
    llm = Scripted(lambda chat, how, seed: "")
    assert agents.ask(llm, [], Sampling(), []) == [] and judge(llm, [], 3, 0.7, []) == []
    assert llm.generated == [] and llm.scored == []


def test_the_closed_form_renormalises_the_digits_at_the_vote_temperature() -> None:
    """p = .1, .15, .25 of which half lies off the digits; at t = 0.5 weights are p^2."""
    verdict = closed_form([math.log(p) for p in (0.1, 0.15, 0.25)], 0.5)
    weights = [0.01, 0.0225, 0.0625]
    assert verdict.expectation == pytest.approx((0.0225 + 2 * 0.0625) / sum(weights))
    assert verdict.label == 2 and verdict.mass == pytest.approx(0.5)


def test_the_closed_form_is_the_mean_of_many_sampled_votes() -> None:
    logprobs, temperature = [math.log(p) for p in (0.2, 0.3, 0.4)], 0.7
    weights = [math.exp(value / temperature) for value in logprobs]
    drawn = random.Random(0).choices(range(3), weights, k=20_000)
    expected = closed_form(logprobs, temperature)
    sampled = count_votes(drawn)
    assert sampled.expectation == pytest.approx(expected.expectation, abs=0.02)
    assert sampled.label == expected.label


def test_ties_go_to_the_lower_class_and_temperature_zero_to_the_class_itself() -> None:
    assert closed_form([-1.0, -0.5, -0.5], 0.7).label == 1
    assert closed_form([-1.0, -0.5, -0.5], 0.0).expectation == 1.0
    assert count_votes([2, 0, 0, 2, None]).label == 0


def test_digits_without_any_probability_are_unparsed_not_zero() -> None:
    verdict = closed_form([-math.inf] * 3, 0.7)
    assert verdict.expectation is None and verdict.label is None and verdict.mass == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("2", 2),
        (" 0.\n", 0),
        ("**1**", 1),
        ("(1)", 1),
        ("Score: 1/2", 1),
        ("2 out of 2", 2),
        ("0 to 2 ... I give 2", 2),
        ("Toy Story 2 ... 0", 0),
        ("On a scale from 0 to 2, I would give it a 1.", 1),
        ("I give Toy Story 2 a 0", 0),
        ("0. I prefer Toy Story 2", 0),
        ("2\nIt names my target.", 2),
        ("I give it 2 because it fits", 2),
        ("Toy Story 2", None),
        ("I would rather see Toy Story 2.", None),
        ("2 Fast 2 Furious is good", None),
        ("0, 1 or 2", None),
        ("12", None),
        ("2012", None),
        ("1.5", None),
        ("-1", None),
        ("2/10", None),
        ("3", None),
        ("I give 1. No, I give 2.", None),
        ("", None),
        ("I'm here to help", None),
    ],
)
def test_a_score_is_read_strictly(text: str, score: int | None) -> None:
    assert parse_score(text) == score


def test_sampled_votes_of_all_chats_are_one_call_with_seeds_of_their_own() -> None:
    replies = iter(["2", "no idea", "1"] * 2)
    llm = Scripted(lambda chat, how, seed: next(replies))
    chats = [Chat((Message("user", name),)) for name in "ab"]
    verdicts = judge(llm, chats, 3, 0.7, [10, 11])
    assert len(llm.generated) == 1 and len(llm.generated[0]) == 6
    assert len(set(llm.seeds[0])) == 6 and llm.samplings[0][0].temperature == 0.7
    assert [verdict.expectation for verdict in verdicts] == [1.5, 1.5]
    assert [verdict.mass for verdict in verdicts] == [pytest.approx(2 / 3)] * 2


def test_votes_that_all_fail_to_parse_are_unparsed() -> None:
    llm = Scripted(lambda chat, how, seed: "I'm here to help")
    (verdict,) = judge(llm, [Chat((Message("user", "x"),))], 4, 0.7, [1])
    assert verdict == agents.Verdict(None, None, 0.0)


def test_the_closed_form_asks_once_for_all_chats() -> None:
    llm = Scripted(lambda chat, how, seed: "", lambda chat: SURE[int(chat.messages[0].content)])
    chats = [Chat((Message("user", str(i)),)) for i in (2, 0)]
    assert [verdict.label for verdict in judge(llm, chats, 0, 0.7, [1, 2])] == [2, 0]
    assert len(llm.scored) == 1 and llm.generated == []
