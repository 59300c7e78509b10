"""iEval: exact talks and calls, what counts as found, and the baselines by hand."""

import json
import math
from dataclasses import replace

import pytest
from scripted import SURE, Scripted, role_of, roles_of, talk

from usbrec.chat import Request
from usbrec.crs.agents import EXPLAIN, Roles, Side
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import (
    EvaluationOptions,
    evaluate_method,
)
from usbrec.crs.ses import SearchOptions
from usbrec.options import seed_for

WELL = Item("Dark Well (1999)", "Dark Well", 1999, ("horror",), ("Ann Ray",))
LOFT = Item("Red Loft (2001)", "Red Loft", 2001, ("comedy",), ("Bo Lind",))
OLD, NEW = (Item(f"Night Ferry ({y})", "Night Ferry", y, ("crime",)) for y in (1950, 1990))
FILMS = Catalogue([WELL, LOFT, OLD, NEW])
EXAMPLES = [
    Example("d1", 2, talk("Dark, please."), "gold words", (WELL.title,)),
    Example("d2", 4, talk("Seen Red Loft (2001).", "So?", "More."), "gold words", (LOFT.title,)),
]


def cast(llm: Scripted, simulator: Scripted | None = None) -> Roles:
    """Let one model play both sides, or `simulator` the seeker's."""
    return Roles(Side(llm, "rl"), Side(simulator or llm, "simulator"), FILMS)


def speaker(*recommender: str, seeker: str = "No, a Dark Well (1999) one.") -> Scripted:
    """Answer a recommender's n-th turn with the n-th text, always alike in every dialogue."""

    def reply(request: Request) -> str:
        role = role_of(request)
        if role != "recommender":
            return seeker if role == "seeker" else f"{role} line"
        own = [m.content for m in request.messages if m.role == "assistant"]
        return recommender[sum(text in recommender for text in own)]

    return Scripted(reply, lambda request: SURE[2])


def test_a_talk_is_turns_then_an_explanation_then_one_score() -> None:
    llm = speaker("Red Loft (2001)?", "Dark Well (1999)!")
    rows = evaluate_method(cast(llm), EXAMPLES, 0, EvaluationOptions(turns=2))
    roles = roles_of(llm.generated)
    assert roles == [["recommender"] * 2, ["seeker"] * 2, ["recommender"] * 2, ["explainer"] * 2]
    assert roles_of(llm.scored) == [["judge"] * 2]
    assert rows[0]["transcript"] == [
        ["seeker", "Dark, please."],
        ["recommender", "Red Loft (2001)?"],
        ["seeker", "No, a that film one."],
        ["recommender", "Dark Well (1999)!"],
    ]
    assert rows[0]["explanation"] == "explainer line" and rows[0]["label"] == 2
    judged = [message.content for message in llm.scored[0][0].messages]
    assert judged[1:-1] == [text for _, text in rows[0]["transcript"]] + [EXPLAIN, "explainer line"]


def test_a_talk_until_the_first_hit_takes_no_further_turn() -> None:
    """The first dialogue's target is named in the second turn, the other one's in the first."""
    options = EvaluationOptions(turns=3, protocol="until-hit")
    llm = speaker("Red Loft (2001)?", "Dark Well (1999)!", "Later")
    first, second = evaluate_method(cast(llm), EXAMPLES, 0, options)
    assert first["replies"] == ["Red Loft (2001)?", "Dark Well (1999)!"] and first["grade"] == 2
    assert second["replies"] == ["Red Loft (2001)?"] and len(second["transcript"]) == 4
    assert (first["hit"], second["hit"]) == (True, True)
    assert (first["end"], second["end"]) == ("hit", "hit")
    asked = [["recommender"] * 2, ["seeker"], ["recommender"], ["explainer"] * 2]
    assert roles_of(llm.generated) == asked and roles_of(llm.scored) == [["judge"] * 2]
    whole = evaluate_method(cast(speaker("a", "b", "c")), EXAMPLES, 0, options)
    assert [row["end"] for row in whole] == ["turns", "turns"]
    assert whole[0]["adapters"] == {"recommender": "rl", "seeker": "simulator"}
    assert [len(row["replies"]) for row in whole] == [3, 3]


def test_a_talk_ends_until_hit_as_it_does_for_its_dialogue_alone() -> None:
    options = EvaluationOptions(turns=3, protocol="until-hit")
    words, searching = ("Red Loft (2001)?", "x", "Dark Well (1999)!"), SearchOptions(turns=1)
    for search in (None, searching):
        both = evaluate_method(cast(speaker(*words)), EXAMPLES, 0, options, search)
        alone = [evaluate_method(cast(speaker(*words)), [x], 0, options, search) for x in EXAMPLES]
        assert both == [row for rows in alone for row in rows]


def test_in_the_protocol_of_profiles_no_prompt_has_a_target() -> None:
    """The seeker and the judge are told the profile, and nothing is explained."""
    own = [replace(x, profile="Likes: horror. Dislikes: nothing said.") for x in EXAMPLES[:1]]
    llm = speaker("Who knows?", "Red Loft (2001)!", seeker="Something scary.")

    def reply(request: Request) -> str:
        role = role_of(request)
        return "Something scary." if role == "internal_seeker" else llm_reply(request)

    llm_reply, llm.reply = llm.reply, reply
    options = EvaluationOptions(turns=2, protocol="profile")
    (row,) = evaluate_method(cast(llm), own, 0, options)
    asked = [["recommender"], ["internal_seeker"], ["recommender"]]
    assert roles_of(llm.generated) == asked and roles_of(llm.scored) == [["internal_judge"]]
    requests = [x for found in llm.generated + llm.scored for x in found]
    texts = [message.content for request in requests for message in request.messages]
    assert not any("Dark Well" in text for text in texts)
    assert any("horror" in text for text in texts)
    assert row["explanation"] == "" and row["label"] == 2 and row["grade"] == 0
    assert row["transcript"][2] == ["seeker", "Something scary."]


def test_each_side_speaks_with_its_adapter_and_temperature() -> None:
    llm = speaker("a", "b")
    options = EvaluationOptions(
        turns=2, temperature=0.0, seeker_temperature=0.3, vote_temperature=0.0
    )
    rows = evaluate_method(cast(llm), EXAMPLES, 0, options)
    assert [requests[0].adapter for requests in llm.generated] == ["rl", "simulator", "rl", "rl"]
    assert [requests[0].sampling.temperature for requests in llm.generated] == [0.0, 0.3, 0.0, 0.0]
    assert llm.scored[0][0].adapter == "simulator"
    assert [row["score"] for row in rows] == [2.0, 2.0]  # above 0 it is a mean with 0 and 1


@pytest.mark.parametrize("protocol", ["targets", "profile"])
def test_another_model_may_be_the_external_judge(protocol: str) -> None:
    llm, outer = speaker("Dark Well (1999)!"), speaker()
    roles = replace(cast(llm), external=Side(outer, "outer"))
    evaluate_method(roles, EXAMPLES, 0, EvaluationOptions(protocol=protocol))
    assert llm.scored == outer.generated == []
    assert [[x.adapter for x in requests] for requests in outer.scored] == [["outer"] * 2]


def test_two_models_talk_as_one_does_and_each_gets_its_own_requests() -> None:
    searching, options = SearchOptions(start_turn=2, turns=1), EvaluationOptions(turns=2)
    words = ("Red Loft (2001)?", "Dark Well (1999)!")
    tuned, plain = speaker(*words), speaker(*words)
    rows = evaluate_method(cast(tuned, plain), EXAMPLES, 0, options, searching)
    recommended = [["recommender"] * 2, ["recommender"] * 6, ["explainer"] * 2]
    assert roles_of(tuned.generated) == recommended and tuned.scored == []
    assert roles_of(plain.generated) == [["seeker"] * 2, ["summariser"] * 2]
    assert roles_of(plain.scored) == [["internal_judge"] * 2, ["judge"] * 2]
    assert rows == evaluate_method(cast(speaker(*words)), EXAMPLES, 0, options, searching)


def test_recall_reads_the_first_title_of_the_first_reply_and_hit_any_of_any_reply() -> None:
    llm = speaker("Red Loft (2001) or Dark Well (1999)?", "Night Ferry (1950)")
    first, second = evaluate_method(cast(llm), EXAMPLES, 0, EvaluationOptions(turns=2))
    assert first["labels"] == [{"title": WELL.title, "repeated": False, "found": False}]
    assert second["labels"] == [{"title": LOFT.title, "repeated": True, "found": True}]
    assert (first["hit"], second["hit"]) == (True, True)
    assert (first["end"], second["end"]) == ("turns", "turns")  # no hit ends this protocol
    assert first["items"] == [[LOFT.title, WELL.title], [OLD.title]]
    late = speaker("Who knows?", "Dark Well (1999)")
    row = evaluate_method(cast(late), EXAMPLES[:1], 0, EvaluationOptions(turns=2))[0]
    assert row["hit"] and row["grade"] == 2 and not row["labels"][0]["found"]


def test_an_open_year_counts_only_if_no_reading_is_another_film() -> None:
    example = Example("d", 1, talk("Hi"), "x", (OLD.title,))
    llm = speaker("Night Ferry!", "x")
    (row,) = evaluate_method(cast(llm), [example], 0, EvaluationOptions(turns=1))
    assert not row["labels"][0]["found"] and not row["hit"] and row["grade"] == 1
    assert row["items"] == [[OLD.title, NEW.title]]


def test_a_gold_title_without_a_year_is_found_by_each_of_its_films() -> None:
    example = Example("d", 1, talk("Hi"), "x", ("Night Ferry",))
    for title in ("Night Ferry (1990)", "Night Ferry"):
        (row,) = evaluate_method(cast(speaker(title)), [example], 0, EvaluationOptions())
        assert row["labels"][0]["found"] and row["hit"] and row["grade"] == 2


def test_a_title_that_the_recommender_has_named_is_repeated_too() -> None:
    example = Example("d", 3, talk("Hi", "Dark Well (1999)?", "No."), "x", (WELL.title,))
    (row,) = evaluate_method(cast(speaker("Hm.")), [example], 0, EvaluationOptions())
    assert row["labels"] == [{"title": WELL.title, "repeated": True, "found": False}]


def test_search_takes_over_from_its_start_turn() -> None:
    llm = speaker("Red Loft (2001)", "Dark Well (1999)", "Later")
    searching = SearchOptions(start_turn=2, samples=2, turns=1)
    rows = evaluate_method(cast(llm), EXAMPLES, 0, EvaluationOptions(turns=2), searching)
    assert [len(requests) for requests in llm.generated] == [2, 2, 2 * 3, 2]
    assert [len(requests) for requests in llm.scored] == [2, 2]
    for row in rows:
        (found,) = row["searches"]
        assert found["turn"] == 2 and found["profile"] == "summariser line"
        chosen = found["candidates"][found["best"]]["reply"]
        assert chosen == row["replies"][1] == "Dark Well (1999)"


def test_gold_words_and_targets_reach_no_prompt_of_the_recommender_or_the_inner_agents() -> None:
    llm = speaker("a", "b", "c")
    evaluate_method(cast(llm), EXAMPLES[:1], 0, EvaluationOptions(turns=2), SearchOptions())
    for request in [request for requests in llm.generated + llm.scored for request in requests]:
        text = " ".join(message.content for message in request.messages)
        assert "gold words" not in text
        if role_of(request) not in ("seeker", "judge"):
            assert "Dark Well" not in text, role_of(request)


def test_a_score_that_cannot_be_read_is_none() -> None:
    llm = speaker("a", "b")
    llm.logprobs = lambda request: [-math.inf] * 3
    rows = evaluate_method(cast(llm), EXAMPLES, 0, EvaluationOptions(turns=2))
    assert [row["score"] for row in rows] == [None, None]


def test_an_empty_reply_is_kept_empty_and_spoken_as_silence() -> None:
    llm = speaker("", "")
    (row,) = evaluate_method(cast(llm), EXAMPLES[:1], 0, EvaluationOptions(turns=1))
    assert row["replies"] == [""] and row["items"] == [[]] and row["grade"] == 0 and not row["hit"]
    assert row["transcript"][-1] == ["recommender", "..."]


def test_a_row_depends_on_its_own_example_and_seed_and_on_no_method_name() -> None:
    def noisy(request: Request) -> str:
        return str(request.seed)

    run = [
        evaluate_method(cast(Scripted(noisy)), part, seed, EvaluationOptions(turns=2))
        for part, seed in ((EXAMPLES, 1), (EXAMPLES[1:], 1), (EXAMPLES[1:], 2))
    ]
    assert run[0][1] == run[1][0] != run[2][0]


def test_no_two_draws_of_a_talk_share_a_seed() -> None:
    llm = speaker("a", "b", "c")
    examples = [*EXAMPLES, replace(EXAMPLES[0], turn_id=4)]
    evaluate_method(cast(llm), examples, 0, EvaluationOptions(turns=3))
    seeds = [request.seed for requests in llm.generated for request in requests]
    assert len(set(seeds)) == len(seeds) == 3 * 6
    assert not set(seeds) & {seed_for(0, "ieval", x.dialog_id, x.turn_id) for x in examples}


@pytest.mark.parametrize("protocol", ["targets", "profile"])
def test_no_two_votes_share_a_seed(protocol: str) -> None:
    llm = Scripted(lambda request: "1")
    options = EvaluationOptions(protocol=protocol, votes=3)
    evaluate_method(cast(llm), EXAMPLES, 0, options)
    seeds = [request.seed for request in llm.generated[-1]]
    assert len(set(seeds)) == len(seeds) == 2 * 3


def test_rows_survive_json() -> None:
    llm = speaker("Red Loft (2001)", "b", "c")
    rows = evaluate_method(cast(llm), EXAMPLES, 0, EvaluationOptions(turns=2), SearchOptions())
    for row in rows:
        assert json.loads(json.dumps(row)) == row


def test_the_defaults_are_those_of_the_results() -> None:
    o = EvaluationOptions()
    assert (o.protocol, o.turns, o.votes, o.vote_temperature) == ("targets", 1, 0, 0.7)
    assert (o.temperature, o.seeker_temperature) == (0.0, 0.1)


@pytest.mark.parametrize("wrong", [{"turns": 0}, {"ranked_titles": 1}, {"votes": -1}])
def test_wrong_options_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        EvaluationOptions(**wrong)


def test_nothing_that_a_row_knows_of_its_target_reaches_reply_profile_or_value() -> None:
    """Gold fields are exchanged between two rows; only what the external judge says may change."""

    def draw(request: Request) -> int:
        return seed_for(request.seed, request.adapter, *(m.content for m in request.messages))

    def reply(request: Request) -> str:
        return f"{FILMS.items[draw(request) % 4].title} {draw(request)}"

    def played(examples: list[Example], options: SearchOptions) -> list[object]:
        llm = Scripted(reply, lambda request: SURE[draw(request) % 3])
        rows = evaluate_method(cast(llm), examples, 0, EvaluationOptions(), options)
        candidates = [x for row in rows for x in row["searches"][0]["candidates"]]
        tried = [(x["reply"], x["value"], x["leaves"]) for x in candidates]
        return [[(row["replies"], row["searches"][0]["profile"]) for row in rows], tried]

    gold = ("response", "items", "profile", "explanation", "accept", "refuse")
    first, second = (
        replace(x, profile=f"Likes: {name}.", explanation=name, accept=name, refuse=name)
        for x, name in zip(EXAMPLES, ("crime", "horror"), strict=True)
    )
    one, other = ({name: getattr(x, name) for name in gold} for x in (first, second))
    for options in (SearchOptions(mode="tree"), SearchOptions(candidates="distinct", cards=True)):
        exchanged = [replace(first, **other), replace(second, **one)]
        assert played([first, second], options) == played(exchanged, options)
