"""Agents: who sees what, in which role, and how scores are read."""

import math
import random

import pytest
from scripted import SURE, Scripted, roles_of, talk

from usbrec.chat import Message, Request, Sampling
from usbrec.crs.agents import (
    EXPLAIN,
    JudgeScore,
    Roles,
    Side,
    Votes,
    closed_form,
    count_votes,
    external_judge_prompt,
    internal_judge_prompt,
    parse_score,
    prompt_text,
    recommender_prompt,
    seeker_prompt,
    summary_prompt,
)
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import SILENCE, add_turn

DIALOGUE = talk("Hi, a scary one please.", "Try Dark Well (1999).", "Seen it.")
DIALOGUE_PROMPT = recommender_prompt(DIALOGUE)
FILMS = Catalogue(
    [Item("Dark Well (1999)", "Dark Well", 1999), Item("Red Loft (2001)", "Red Loft")]
)


def cast(llm: Scripted, simulator: Scripted | None = None) -> Roles:
    """Let one model play both sides, or `simulator` the seeker's."""
    return Roles(Side(llm, "rl"), Side(simulator or llm, "simulator"), FILMS)


def roles(messages: tuple[Message, ...]) -> list[str]:
    return [message.role for message in messages]


def test_each_speaker_sees_its_own_lines_as_assistant() -> None:
    assert roles(recommender_prompt(DIALOGUE)) == ["system", "user", "assistant", "user"]
    assert roles(seeker_prompt(DIALOGUE, ["X"])) == ["system", "assistant", "user", "assistant"]
    assert roles(seeker_prompt(DIALOGUE, "p")) == roles(seeker_prompt(DIALOGUE, ["X"]))


def test_the_seeker_knows_all_targets_and_the_recommender_none() -> None:
    assert "Dark Well; Red Loft" in seeker_prompt(DIALOGUE, ["Dark Well", "Red Loft"])[0].content
    assert recommender_prompt(DIALOGUE)[0].content == prompt_text("recommender")
    assert "{" not in "".join(message.content for message in recommender_prompt(DIALOGUE))


def test_the_internal_seeker_knows_the_profile_with_one_full_stop() -> None:
    for profile in ("likes horror", "likes horror.", " likes horror. "):
        assert "preference: likes horror. Accept" in seeker_prompt((), profile)[0].content
    assert "preference: unknown. Accept" in seeker_prompt((), " ")[0].content


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
    ended = add_turn(DIALOGUE, "recommender", "Try Red Loft.")
    prompt = external_judge_prompt(ended, "It is scary.", ["Red Loft"])
    assert prompt[:5] == seeker_prompt(ended, ["Red Loft"])
    assert prompt[5] == Message("assistant", prompt_text("explain"))
    assert prompt[6] == Message("user", "It is scary.")
    assert prompt[7].role == "system" and "Red Loft" in prompt[7].content
    assert len(prompt) == 8


def test_the_internal_judge_is_asked_right_after_the_reply() -> None:
    ended = add_turn(DIALOGUE, "recommender", "Try Red Loft.")
    prompt = internal_judge_prompt(ended, "horror")
    assert prompt[:-1] == seeker_prompt(ended, "horror")
    assert prompt[-1].role == "system" and "horror" in prompt[-1].content


def test_the_recommender_is_asked_to_explain_by_the_seeker() -> None:
    llm = Scripted(lambda request: "")
    ended = add_turn(DIALOGUE, "recommender", "Red Loft!")
    cast(llm).explain_and_judge([ended], [["X"]], [7], Sampling(), Votes())
    prompt = llm.generated[0][0].messages
    assert prompt[:-1] == recommender_prompt(ended)
    assert prompt[-1] == Message("user", EXPLAIN) == Message("user", prompt_text("explain"))


def test_prompts_are_short() -> None:
    names = ("recommender", "seeker", "internal_seeker", "summariser", "explain")
    for name in (*names, "judge_external", "judge_internal"):
        assert len(prompt_text(name).split()) <= 48, name


def test_an_empty_reply_leaves_a_line_of_silence() -> None:
    assert add_turn(DIALOGUE, "recommender", " \n")[-1].text == SILENCE


def test_only_the_cleaned_words_of_the_seeker_enter_the_dialogue() -> None:
    llm = Scripted(lambda request: "I want Red Loft (2001), and no DARK WELL.")
    ended = add_turn(DIALOGUE, "recommender", "What else?")
    (after,) = cast(llm).seek([ended], [["Red Loft (2001)"]], Sampling(), [1])
    assert after[:-1] == ended and after[-1].speaker == "seeker"
    assert "Red Loft" not in after[-1].text and "DARK WELL" in after[-1].text
    assert llm.generated[0][0].adapter == "simulator"


def test_every_target_is_kept_out_of_the_seekers_words() -> None:
    llm = Scripted(lambda request: "Red Loft (2001) or Dark Well (1999)?")
    ended = add_turn(DIALOGUE, "recommender", "What else?")
    targets = ("Red Loft (2001)", "Dark Well (1999)")
    (after,) = cast(llm).seek([ended], [targets], Sampling(), [1])
    assert after[-1].text == "that film or that film?"


def test_no_call_is_made_for_no_prompts() -> None:
    llm = Scripted(lambda request: "")
    both = cast(llm)
    assert both.complete([]) == [] and both.recommend([], Sampling(), []) == []
    assert both.judge([], Votes(3), []) == [] and both.judge([], Votes(), []) == []
    assert llm.generated == [] and llm.scored == []


def test_each_model_gets_its_own_requests_and_the_replies_keep_their_order() -> None:
    tuned = Scripted(lambda request: f" tuned {request.seed}\n")
    plain = Scripted(lambda request: f"plain {request.seed} ")
    both = cast(tuned, plain)
    sides = [both.simulator, both.recommender, both.recommender, both.simulator]
    asked = [(x, Request(DIALOGUE_PROMPT, seed=i, adapter=x.adapter)) for i, x in enumerate(sides)]
    assert both.complete(asked) == ["plain 0", "tuned 1", "tuned 2", "plain 3"]
    assert tuned.generated == [[asked[1][1], asked[2][1]]]
    assert plain.generated == [[asked[0][1], asked[3][1]]]
    assert {request.adapter for request in tuned.generated[0]} == {"rl"}
    assert {request.adapter for request in plain.generated[0]} == {"simulator"}


def test_a_model_that_both_sides_share_gets_all_requests_in_one_call() -> None:
    llm = Scripted(lambda request: f"{request.adapter} {request.seed}")
    both = cast(llm)
    sides = [both.simulator, both.recommender, both.simulator]
    asked = [(x, Request(DIALOGUE_PROMPT, seed=i, adapter=x.adapter)) for i, x in enumerate(sides)]
    assert both.complete(asked) == ["simulator 0", "rl 1", "simulator 2"]
    assert llm.generated == [[request for _, request in asked]]


def test_the_recommenders_model_explains_and_the_simulators_judges() -> None:
    tuned, plain = Scripted(lambda request: "It fits."), Scripted(lambda request: "2")
    for votes in (Votes(), Votes(3)):
        ended = add_turn(DIALOGUE, "recommender", "Red Loft!")
        (found,) = cast(tuned, plain).explain_and_judge([ended], [["X"]], [7], Sampling(), votes)
        assert found[0] == "It fits." and found[1].label == (2 if votes.votes else 1)
    assert roles_of(tuned.generated) == [["explainer"]] * 2 and tuned.scored == []
    assert roles_of(plain.scored) == [["judge"]] and roles_of(plain.generated) == [["judge"] * 3]


def test_the_closed_form_renormalises_the_digits_at_the_vote_temperature() -> None:
    """p = .1, .15, .25 of which half lies off the digits; at t = 0.5 weights are p^2."""
    judged = closed_form([math.log(p) for p in (0.1, 0.15, 0.25)], 0.5)
    weights = [0.01, 0.0225, 0.0625]
    assert judged.score == pytest.approx((0.0225 + 2 * 0.0625) / sum(weights))
    assert judged.label == 2 and judged.digit_probability == pytest.approx(0.5)
    assert judged.parse_rate is None
    rounded = closed_form(
        [1e-7, -math.inf, -math.inf], 0.5
    )  # probabilities may add up to a bit more
    assert rounded.digit_probability == 1.0


def test_the_closed_form_is_the_mean_of_many_sampled_votes() -> None:
    logprobs, temperature = [math.log(p) for p in (0.2, 0.3, 0.4)], 0.7
    weights = [math.exp(value / temperature) for value in logprobs]
    drawn = random.Random(0).choices(range(3), weights, k=20_000)
    expected = closed_form(logprobs, temperature)
    sampled = count_votes(drawn)
    assert sampled.score == pytest.approx(expected.score, abs=0.02)
    assert sampled.label == expected.label


def test_ties_go_to_the_lower_class_and_temperature_zero_to_the_class_itself() -> None:
    assert closed_form([-1.0, -0.5, -0.5], 0.7).label == 1
    assert closed_form([-1.0, -0.5, -0.5], 0.0).score == 1.0
    assert count_votes([2, 0, 0, 2, None]).label == 0


def test_digits_without_any_probability_are_unparsed_not_zero() -> None:
    judged = closed_form([-math.inf] * 3, 0.7)
    assert judged.score is None and judged.label is None and judged.digit_probability == 0


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
        ('{"score": 2}', 2),
        ('{"reason": "Toy Story 2", "score": 1}', 1),
        ("[0]", 0),
        ("2.0", 2),
        ("$\\boxed{1}$", 1),
        ("Score：２", 2),
        ("<score>1</score>", 1),
        ("2 (accepts)", 2),
        ("0 - refuses", 0),
        ("Toy Story 2 (1999)", None),
        ("<think>0 or 1</think>", None),
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


def test_sampled_votes_of_all_prompts_are_one_call_with_seeds_of_their_own() -> None:
    replies = iter(["2", "no idea", "1"] * 2)
    llm = Scripted(lambda request: next(replies))
    prompts = [(Message("user", name),) for name in "ab"]
    verdicts = cast(llm).judge(prompts, Votes(3, 0.7), [10, 11])
    assert len(llm.generated) == 1 and len(llm.generated[0]) == 6
    assert len({request.seed for request in llm.generated[0]}) == 6
    assert llm.generated[0][0].sampling == Sampling(16, 0.7)  # room for a short sentence
    assert [judged.score for judged in verdicts] == [1.5, 1.5]
    assert [judged.parse_rate for judged in verdicts] == [pytest.approx(2 / 3)] * 2
    assert [judged.digit_probability for judged in verdicts] == [None] * 2


def test_votes_that_all_fail_to_parse_are_unparsed() -> None:
    llm = Scripted(lambda request: "I'm here to help")
    (judged,) = cast(llm).judge([(Message("user", "x"),)], Votes(4), [1])
    assert judged == JudgeScore(parse_rate=0.0)


def test_the_closed_form_asks_once_for_all_prompts() -> None:
    llm = Scripted(lambda request: "", lambda request: SURE[int(request.messages[0].content)])
    prompts = [(Message("user", str(i)),) for i in (2, 0)]
    assert [judged.label for judged in cast(llm).judge(prompts, Votes(0, 0.7), [1, 2])] == [2, 0]
    assert len(llm.scored) == 1 and llm.generated == []
