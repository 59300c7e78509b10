"""SES: exact calls level by level, values, ties, and what must not disturb a search."""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from scripted import SURE, Scripted, role_of, roles_of, talk

from usbrec.chat import Message, Ranked, Request
from usbrec.crs import ses
from usbrec.crs.agents import JudgeScore, Roles, Side, card_prompt, closed_form, memory_prompt
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, add_turn
from usbrec.crs.ses import Candidate, Node, SearchOptions, plan, search, select, value_of
from usbrec.crs.wishes import card
from usbrec.options import UserError, seed_for

ROOTS = [talk("Something funny?"), talk("A thriller.", "Which one?", "Any.")]


def cast(llm: Scripted, simulator: Scripted | None = None) -> Roles:
    """Let one model play both sides, or `simulator` the seeker's."""
    return Roles(Side(llm, "rl"), Side(simulator or llm, "simulator"), Catalogue([]))


def by_role(request: Request) -> str:
    """Every draw of the recommender differs with its seed; the others repeat what they saw."""
    said = role_of(request)
    return f"{said} {request.seed % 1_000_003}" if said == "recommender" else f"{said} line"


def last_two(request: Request) -> list[float]:
    said = request.messages[1 if role_of(request) == "card_judge" else -2]
    return SURE[int(said.content.split()[-1]) % 3]


@pytest.mark.parametrize(("mode", "branches"), [("chain", 1), ("tree", 3)])
def test_every_level_is_one_call_over_all_dialogues(mode: str, branches: int) -> None:
    llm = Scripted(by_role, last_two)
    results = search(cast(llm), ROOTS, [1, 2], SearchOptions(samples=3, turns=3, mode=mode))
    counts = [len(requests) for requests in llm.generated]
    level = 2 * 3
    expected = [2 * (1 + 3), level, level * branches, level * branches, level * branches**2]
    assert counts == expected
    assert [len(requests) for requests in llm.scored] == [level * branches**2]
    assert all(len(c.leaves) == branches**2 for r in results for c in r.candidates)


def test_each_role_speaks_with_its_adapter_and_temperature() -> None:
    llm = Scripted(by_role)
    search(cast(llm), ROOTS[:1], [1], SearchOptions(temperature=0.6))
    seen = [
        [(role_of(x), x.adapter, x.sampling.temperature) for x in requests]
        for requests in llm.generated
    ]
    assert seen == [
        [("summariser", "simulator", 0.0), *[("recommender", "rl", 0.6)] * 3],
        [("internal_seeker", "simulator", 0.1)] * 3,
        [("recommender", "rl", 0.1)] * 3,
    ]
    assert [role_of(request) for request in llm.scored[0]] == ["internal_judge"] * 3


def test_a_shared_model_gets_summary_and_candidates_in_one_call() -> None:
    llm = Scripted(by_role)
    search(cast(llm), ROOTS, [1, 2], SearchOptions(turns=1))
    assert roles_of(llm.generated) == [["summariser"] * 2 + ["recommender"] * 6]


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_two_models_search_as_one_does_and_each_gets_its_own_requests(mode: str) -> None:
    options = SearchOptions(mode=mode)
    tuned, plain = Scripted(by_role), Scripted(by_role, last_two)
    found = search(cast(tuned, plain), ROOTS, [1, 2], options)
    branches = 3 if mode == "tree" else 1
    assert roles_of(tuned.generated) == [["recommender"] * 6, ["recommender"] * 6 * branches]
    assert roles_of(plain.generated) == [["summariser"] * 2, ["internal_seeker"] * 6]
    assert tuned.scored == [] and roles_of(plain.scored) == [["internal_judge"] * 6 * branches]
    assert {x.adapter for requests in tuned.generated for x in requests} == {"rl"}
    assert {x.adapter for requests in plain.generated for x in requests} == {"simulator"}
    assert found == search(cast(Scripted(by_role, last_two)), ROOTS, [1, 2], options)


def test_the_roll_out_knows_the_profile_and_ends_with_the_recommenders_reply() -> None:
    llm = Scripted(by_role)
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions())
    assert result.profile == "summariser line" and result.root == ROOTS[0]
    for candidate, request in zip(result.candidates, llm.scored[0], strict=True):
        (leaf,) = candidate.leaves
        spoken = [line.text for line in leaf.dialogue[len(ROOTS[0]) :]]
        assert spoken[0] == candidate.reply and spoken[1] == "internal_seeker line"
        assert len(spoken) == 3 and leaf.dialogue[-1].speaker == "recommender"
        assert "summariser line" in request.messages[0].content
        assert request.messages[-2].content == spoken[2]


def test_with_one_turn_the_candidates_are_judged_at_once() -> None:
    llm = Scripted(by_role)
    search(cast(llm), ROOTS, [1, 2], SearchOptions(turns=1))
    assert [len(requests) for requests in llm.generated] == [8] and len(llm.scored[0]) == 6


def test_the_best_candidate_is_chosen() -> None:
    drafts = iter(["bad", "good", "fair"])
    values = {"bad": SURE[0], "good": SURE[2], "fair": SURE[1]}

    def reply(request: Request) -> str:
        return next(drafts) if role_of(request) == "recommender" else "likes fun"

    llm = Scripted(reply, lambda request: values[request.messages[-2].content])
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions(turns=1))
    assert (result.best, result.reply) == (1, "good")
    assert [candidate.value for candidate in result.candidates] == [
        closed_form(values[text], 0.7).score for text in ("bad", "good", "fair")
    ]


def test_equal_candidates_are_searched_once_and_stay_listed() -> None:
    llm = Scripted(role_of)
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions(mode="tree"))
    assert [len(requests) for requests in llm.generated] == [4, 1, 3]
    assert [len(requests) for requests in llm.scored] == [1]
    assert [candidate.reply for candidate in result.candidates] == ["recommender"] * 3
    assert all(candidate.leaves[0].draws == 3 for candidate in result.candidates)
    assert result.best == 0
    (deeper,) = search(cast(llm), ROOTS[:1], [1], SearchOptions(mode="tree", turns=3))
    assert [leaf.draws for leaf in deeper.candidates[0].leaves] == [3 * 3]


def test_no_two_draws_of_a_search_share_a_seed() -> None:
    """A summary draws nothing."""
    llm = Scripted(by_role)
    search(cast(llm), ROOTS, [1, 2], SearchOptions(turns=3, mode="tree", votes=2))
    seeds = [x.seed for call in llm.generated for x in call if role_of(x) != "summariser"]
    assert len(set(seeds)) == len(seeds) > 100


def test_an_empty_candidate_is_not_searched_and_not_chosen() -> None:
    drafts = iter(["", "  ", "Try it"])

    def reply(request: Request) -> str:
        return next(drafts) if role_of(request) == "recommender" else "x"

    llm = Scripted(reply, lambda request: SURE[0])
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions(turns=1))
    assert result.reply == "Try it" and len(llm.scored[0]) == 1
    assert [candidate.value is None for candidate in result.candidates] == [True, True, False]


def test_a_search_of_empty_replies_ends_with_an_empty_reply() -> None:
    llm = Scripted(lambda request: "")
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions())
    assert result.reply == "" and result.best == 0
    assert len(llm.generated) == 1 and llm.scored == []


def test_unread_votes_leave_no_value_and_the_first_reply() -> None:
    llm = Scripted(by_role, lambda request: [-math.inf] * 3)
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions())
    assert all(candidate.value is None for candidate in result.candidates) and result.best == 0


def test_a_search_does_not_depend_on_its_neighbours() -> None:
    options = SearchOptions(mode="tree", turns=2)
    together = search(cast(Scripted(by_role, last_two)), ROOTS, [1, 2], options)
    alone = search(cast(Scripted(by_role, last_two)), ROOTS[1:], [2], options)
    assert together[1] == alone[0]
    assert together[1] != search(cast(Scripted(by_role, last_two)), ROOTS[1:], [3], options)[0]


def test_a_search_holds_its_tree_and_its_record_the_leaves_in_order() -> None:
    (result,) = search(
        cast(Scripted(by_role, last_two)), ROOTS[:1], [1], SearchOptions(mode="tree", turns=3)
    )
    for candidate in result.candidates:
        assert candidate.node is not None and len(candidate.node.children) == 3
        assert candidate.node.dialogue == add_turn(ROOTS[0], "recommender", candidate.reply)
        below = [leaf for child in candidate.node.children for leaf in child.children]
        assert candidate.leaves == below and len(below) == 9
        assert all(leaf.score.score is not None and leaf.children == [] for leaf in below)
        assert candidate.node.score == JudgeScore()  # only leaves are judged
    record = json.loads(json.dumps(result.record()))
    assert set(record) == {"profile", "best", "candidates"}
    leaf, kept = result.candidates[1].leaves[4], record["candidates"][1]["leaves"][4]
    assert kept == {
        "lines": [[line.speaker, line.text] for line in leaf.dialogue[1:]],
        "value": leaf.score.score,
        "label": leaf.score.label,
        "digit_probability": pytest.approx(1.0),
        "parse_rate": None,
        "weight": 1,
    }


def test_a_given_profile_takes_the_place_of_all_summaries() -> None:
    llm = Scripted(by_role)
    results = search(cast(llm), ROOTS, [1, 2], SearchOptions(), "Likes: war.")
    assert [result.profile for result in results] == ["Likes: war."] * 2
    assert "summariser" not in {role_of(x) for call in llm.generated for x in call}
    assert all("Likes: war" in request.messages[0].content for request in llm.scored[0])


def test_a_terminal_sees_how_far_a_long_search_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step per later turn; `disable` None means that a file or a pipe gets no bar."""
    shown = []

    def bar(turns: range, *words: str, **settings: object) -> range:
        shown.append((len(turns), settings["disable"]))
        return turns

    monkeypatch.setattr(ses, "tqdm", bar)
    search(cast(Scripted(by_role)), ROOTS, [1, 2], SearchOptions(turns=4))
    assert shown == [(3, None)]


def test_the_defaults_are_those_of_the_results() -> None:
    o = SearchOptions()
    assert (o.samples, o.turns, o.mode, o.value, o.scored) == (3, 2, "chain", "mean", "leaf")
    assert (o.temperature, o.rollout_temperature, o.vote_temperature) == (0.5, 0.1, 0.7)
    assert (o.candidates, o.votes, o.start_turn, o.draws, o.veto) == ("sampled", 0, 1, 24, True)
    assert not (o.cards or o.memory or o.budget_tokens or o.budget_seconds)


def test_no_dialogues_need_no_calls() -> None:
    llm = Scripted(by_role)
    assert search(cast(llm), [], [], SearchOptions()) == []
    assert llm.generated == []


def leaf(score: float | None, label: int | None, draws: int = 1) -> Node:
    return Node((), "", 0, draws, score=JudgeScore(score, label, 1.0))


def test_a_value_is_the_weighted_mean_or_the_majority_of_the_leaves_that_were_read() -> None:
    leaves = [leaf(0.5, 0, 2), leaf(2.0, 2), leaf(None, None, 5)]
    mean, majority = SearchOptions(prior=0.25), SearchOptions(value="majority", prior=0.5)
    assert value_of([[x] for x in leaves], mean) == pytest.approx(1.0)
    assert value_of([[x] for x in leaves], majority) == 0.0
    assert value_of([[leaf(1.9, 2)], [leaf(0.1, 0)]], majority) == 0.0
    assert value_of([[leaf(None, None)]], mean) is None
    # an inner node counts as often as its leaf was drawn
    assert value_of([[leaf(2.0, 2), leaf(1.0, 1, 3)], [leaf(2.0, 2), leaf(0.0, 0)]], mean) == (
        pytest.approx((3 * 2 + 3 * 1 + 2 + 0) / 8)
    )
    assert value_of([], majority) is None
    # of a title that is a quarter as likely as the likeliest
    assert value_of([[leaf(1.9, 2)]], majority, 0.25) == 2 * 0.5
    assert value_of([[leaf(1.6, 2)]], mean, 1 / 16) == pytest.approx(1.6 / 2)


def test_ties_go_to_the_first_and_no_value_never_wins() -> None:
    a, b, none = Candidate("a", None, 1.0), Candidate("b", None, 1.0), Candidate("c", None)
    assert select([none, a, b]) == 1
    assert select([none, Candidate("z", None, 0.0)]) == 1
    assert select([Candidate("", None), none]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0}, {"turns": 0}, {"start_turn": 0}, {"votes": -1}, {"mode": "x"},
        {"value": "x"}, {"samples": 10**4, "turns": 100, "mode": "tree"}, {"votes": 10**4},
    ],
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SearchOptions(**wrong)


# --- beyond the paper ---------------------------------------------------------------------------

FILMS = Catalogue([
    Item("Heat (1995)", "Heat", 1995, ("crime",), stars=("Al Pacino",)),
    Item("Alien (1979)", "Alien", 1979, ("horror",)),
    Item("Up (2009)", "Up", 2009, ("family",)),
])  # fmt: skip
PROFILE = "Likes: crime. Dislikes: Alien (1979)."


class Ranking(Scripted):
    """A scripted model that ranks the texts from the last to the first."""

    granted: int | None = None  # the tokens of its last ranking

    def best_texts(
        self, requests: Sequence[Request], texts: Sequence[str], k: int, tokens: int
    ) -> list[Ranked]:
        self.granted = tokens
        best = [(i, -1.0) for i in reversed(range(len(texts)))]
        return [Ranked(best[:k], k) for _ in requests]


def of_films(llm: Scripted) -> Roles:
    return Roles(Side(llm), Side(llm), FILMS)


def test_a_likely_title_may_win_over_one_that_the_judge_likes_a_little_better() -> None:
    """Up is e times as likely as Alien, which is e times as likely as Heat."""

    class Unsure(Ranking):
        def best_texts(
            self, requests: Sequence[Request], texts: Sequence[str], k: int, tokens: int
        ) -> list[Ranked]:
            rows = super().best_texts(requests, texts, k, tokens)
            return [Ranked([(i, -5.0 - n) for n, (i, _) in enumerate(x.texts)], 3) for x in rows]

    def votes(request: Request) -> list[float]:
        reply = request.messages[1].content
        shares = {"Up": (0.5, 0.5), "Alien": (1.0, 0.0), "Heat": (0.4, 0.6)}
        low, high = next(x for name, x in shares.items() if name in reply)
        return [math.log(low), -math.inf, math.log(high) if high else -math.inf]

    options = SearchOptions(samples=3, turns=1, candidates="ranked", cards=True, vote_temperature=1)
    for prior, chosen, values in ((0.0, 2, [1.0, 0.0, 1.2]), (0.1, 0, [1.0, 0.0, 0.98])):
        llm = Unsure(lambda x: " Good." if role_of(x) == "recommender" else "Likes: crime.", votes)
        (result,) = search(of_films(llm), ROOTS[:1], [1], replace(options, prior=prior))
        assert result.best == chosen
        assert [x.value for x in result.candidates] == pytest.approx(values, abs=0.01)
        for x in result.record()["candidates"]:  # tells all that its value is made of
            assert x["value"] == pytest.approx(x["leaves"][0]["value"] * x["chance"] ** prior)


def drawing(*replies: str) -> Callable[[Request], str]:
    """Let the recommender say these replies one after another, the others the profile."""
    drawn = iter(replies)
    return lambda x: next(drawn) if role_of(x) == "recommender" else PROFILE


def test_drawing_goes_on_until_there_are_enough_titles_and_stops_at_the_limit() -> None:
    said = ["Try Heat (1995).", "Heat (1995)!", "Try Up (2009).", "What else?", "Up (2009)?", "Hm."]
    options = SearchOptions(samples=2, turns=1, candidates="distinct", draws=6)
    llm = Scripted(drawing(*said))
    (result,) = search(of_films(llm), ROOTS[:1], [1], options)
    assert [x.reply for x in result.candidates] == [said[0], said[2]]
    assert [len(requests) for requests in llm.generated] == [3, 2]
    llm = Scripted(drawing(*said[:2], *said[:2]))
    options = replace(options, draws=3)
    (result,) = search(of_films(llm), ROOTS[:1], [1], options)
    assert [x.reply for x in result.candidates] == [said[0]]
    assert [len(requests) for requests in llm.generated] == [3, 1]


def test_an_empty_draw_does_not_stand_for_a_question() -> None:
    """Both are without a title, and only the question can be said."""
    options = SearchOptions(samples=2, turns=1, candidates="distinct", draws=2)
    llm = Scripted(drawing(" ", "Which genre?"))
    (result,) = search(of_films(llm), ROOTS[:1], [1], options)
    assert [x.reply for x in result.candidates] == ["Which genre?"]


def test_draws_that_are_all_empty_end_with_an_empty_reply() -> None:
    llm = Scripted(lambda request: "")
    options = SearchOptions(samples=2, candidates="distinct", draws=6)
    (result,) = search(of_films(llm), ROOTS[:1], [1], options)
    assert result.reply == "" and [x.value for x in result.candidates] == [None]
    assert sum(map(len, llm.generated)) == 1 + 6 and not any(llm.scored)


def test_more_draws_for_one_dialogue_change_nothing_for_another() -> None:
    def reply(request: Request) -> str:
        film = FILMS.items[request.seed % 3].title if role_of(request) == "recommender" else "x"
        return f"Try {film}."

    options = SearchOptions(samples=3, turns=1, candidates="distinct")
    together = search(of_films(Scripted(reply)), ROOTS, [1, 2], options)
    assert together[1:] == search(of_films(Scripted(reply)), ROOTS[1:], [2], options)


def test_ranked_candidates_are_announced_and_the_chosen_one_is_written_out() -> None:
    """The judge prefers the second; only it costs a reply, and both were judged as announced."""
    llm = Ranking(lambda x: " Good." if role_of(x) == "recommender" else PROFILE)
    llm.logprobs = lambda x: SURE[2 if "Alien" in x.messages[1].content else 0]
    options = SearchOptions(samples=2, turns=1, candidates="ranked", cards=True, veto=False)
    (result,) = search(of_films(llm), ROOTS[:1], [1], options)
    expected = ["I recommend Up (2009).", "I recommend Alien (1979). Good."]
    assert [x.reply for x in result.candidates] == expected and result.reply == expected[1]
    assert [role_of(x) for call in llm.generated for x in call] == ["summariser", "recommender"]
    assert llm.generated[-1][0].seed == seed_for(1, "candidate", 1)  # of the chosen one's number
    judged = [x.messages[1].content.splitlines()[0] for x in llm.scored[0]]
    assert judged == ["I recommend Up (2009).", "I recommend Alien (1979)."]
    with pytest.raises(UserError, match="cannot rank"):
        search(of_films(Scripted(drawing("x"))), ROOTS[:1], [1], options)


def test_a_ranked_film_is_judged_by_its_own_card_where_text_alone_does_not_tell_it() -> None:
    """ "300" reads as a number and "Frozen" as either of two films."""
    films = Catalogue([
        Item("Frozen (2007)", "Frozen", 2007, ("drama",)),
        Item("Frozen", "Frozen", None, ("animation",)),
        Item("300", "300", None, ("war",)),
    ])  # fmt: skip
    assert films.first("I recommend 300.") == ()
    llm = Ranking(lambda x: " Good." if role_of(x) == "recommender" else "Likes: war.")
    for turns in (1, 2):
        options = SearchOptions(samples=3, turns=turns, candidates="ranked", cards=True)
        search(Roles(Side(llm), Side(llm), films), ROOTS[:1], [1], replace(options, scored="path"))
        told = [x.messages[2].content for x in llm.scored[-1][:3]]
        assert told == [card(item) for item in reversed(films.items)]
    budget = with_tokens(replace(options, turns=1), 1)
    (result,) = search(Roles(Side(llm), Side(llm), films), ROOTS[:1], [1], budget)
    assert result.reply == "I recommend 300. Good."  # by rule
    llm = Ranking(lambda x: " Good." if role_of(x) == "recommender" else "Dislikes: 300.")
    on_the_way = replace(options, scored="path")
    (result,) = search(Roles(Side(llm), Side(llm), films), ROOTS[:1], [1], on_the_way)
    assert result.candidates[0].paths[0][0].score.score == 0  # refused, and no question


def test_with_cards_the_judge_sees_profile_reply_and_facts_alone() -> None:
    llm = Scripted(drawing("Try Heat (1995)."))
    search(of_films(llm), ROOTS[:1], [1], SearchOptions(samples=1, turns=1, cards=True))
    (request,) = llm.scored[0]
    expected = card_prompt("Try Heat (1995).", card(FILMS.items[0]), PROFILE)
    assert request.messages == expected and request.messages[-1] == Message("system", PROFILE)


def from_memory(memory: dict[str, str], *said: str) -> Scripted:
    """Return a model that draws these replies and knows these cards by its replies."""
    draw = drawing(*said)

    def reply(request: Request) -> str:
        known = role_of(request) == "memory"
        return memory[request.messages[-1].content] if known else draw(request)

    return Scripted(reply, lambda x: SURE[2 if "crime" in x.messages[-2].content else 0])


def test_from_memory_the_judge_scores_by_what_it_has_written_of_each_reply() -> None:
    """The card is the model's own, right or wrong; a film that it does not know is scored too."""
    memory = {"Try Heat (1995).": "war, 1990s", "Try Up (2009).": "crime", "Well?": "nothing known"}
    llm = from_memory(memory, *memory, *memory)
    options = SearchOptions(samples=6, turns=1, memory=True, vote_temperature=0)
    roles = Roles(Side(llm, "rl"), Side(llm, "simulator"), FILMS)
    (result,) = search(roles, ROOTS[:1], [1], options)
    expected = dict(zip(memory, (0, 2, 0), strict=True))
    assert {x.reply: x.value for x in result.candidates} == expected
    (asked,) = ([x.messages for x in call] for call in llm.generated[1:])
    assert asked == list(map(memory_prompt, memory))  # equal replies once
    prompts = [card_prompt(reply, text, PROFILE) for reply, text in memory.items()]
    assert [x.messages for x in llm.scored[0]] == prompts
    assert {x.adapter for x in llm.generated[1]} == {"simulator"}
    assert {x.sampling.temperature for x in llm.generated[1]} == {0.0}
    leaves = [leaf for x in result.record()["candidates"] for leaf in x["leaves"]]
    assert [leaf["known"] for leaf in leaves] == [*memory.values()] * 2


def test_with_cards_nothing_is_remembered() -> None:
    llm = Scripted(drawing("Try Heat (1995)."))
    options = SearchOptions(samples=1, turns=1, cards=True, memory=True)
    search(of_films(llm), ROOTS[:1], [1], options)
    assert "memory" not in {role_of(x) for call in llm.generated for x in call}
    assert llm.scored[0][0].messages[2].content == card(FILMS.items[0])


def test_with_cards_no_title_and_refused_titles_are_worth_nothing_unjudged() -> None:
    said = ["Which genre?", "Try Alien (1979).", "Try Up (2009)."]
    for veto, values in ((True, [0.0, 0.0, 1.0]), (False, [0.0, 1.0, 1.0])):
        llm = Scripted(drawing(*said))
        options = SearchOptions(turns=1, cards=True, veto=veto)
        (result,) = search(of_films(llm), ROOTS[:1], [1], options)
        assert [x.value for x in result.candidates] == pytest.approx(values)
    llm, options = Scripted(drawing(*said)), SearchOptions(turns=1, cards=True)
    (result,) = search(of_films(llm), ROOTS[:1], [1], options, "Likes: war. Seen: Alien (1979).")
    assert [x.value for x in result.candidates] == pytest.approx([0.0, 0.0, 1.0])
    llm = Scripted(drawing(*said))  # a person of that name is no film
    (result,) = search(of_films(llm), ROOTS[:1], [1], options, "Dislikes: with Up (2009).")
    assert [x.value for x in result.candidates] == pytest.approx([0.0, 1.0, 1.0])


def test_a_scored_path_counts_the_candidate_and_leaves_out_a_question_on_the_way() -> None:
    def reply(request: Request) -> str:
        if role_of(request) != "recommender":
            return PROFILE
        first = len(request.messages) == 2
        return (
            ("Which genre?" if request.seed % 2 else "Try Heat (1995).") if first else "Up (2009)."
        )

    def logprobs(request: Request) -> list[float]:
        return SURE[2 if "Heat" in request.messages[1].content else 1]

    options = SearchOptions(samples=8, cards=True, scored="path", vote_temperature=0)
    (result,) = search(of_films(Scripted(reply, logprobs)), ROOTS[:1], [1], options)
    values = {x.reply: x.value for x in result.candidates}
    assert values == {"Which genre?": 1.0, "Try Heat (1995).": 1.5}


def test_a_refused_film_on_the_way_is_worth_nothing_too() -> None:
    def reply(request: Request) -> str:
        if role_of(request) != "recommender":
            return PROFILE
        return "Try Alien (1979)." if len(request.messages) == 2 else "Up (2009)."

    for veto, value in ((True, 1.0), (False, 2.0)):
        options = SearchOptions(samples=1, cards=True, scored="path", veto=veto, vote_temperature=0)
        (result,) = search(of_films(Scripted(reply, lambda x: SURE[2])), ROOTS[:1], [1], options)
        assert result.candidates[0].value == value


# --- budgets ------------------------------------------------------------------------------------


def counted(llm: Scripted) -> int:
    """Return the tokens of all calls by the search's estimate, replies at their longest."""
    drawn = [x for call in llm.generated for x in call]
    prompts = [x.messages for x in drawn] + [x.messages for call in llm.scored for x in call]
    sizes = [6 + len(x.content.encode()) // 4 for messages in prompts for x in messages]
    return sum(sizes) + sum(x.sampling.max_new_tokens for x in drawn) + sum(map(len, llm.scored))


def least_whole(root: Dialogue, options: SearchOptions, titles: int = 0) -> int:
    """Return the least budget with which nothing is dropped."""
    budgets = range(1, 10**6)
    return 1 + bisect_left(
        budgets, True, key=lambda n: not plan(root, with_tokens(options, n), titles)
    )


def with_tokens(options: SearchOptions, tokens: int) -> SearchOptions:
    return replace(options, budget_tokens=tokens)


SHAPES = [
    SearchOptions(samples=8),
    SearchOptions(samples=4, turns=3, mode="tree"),
    SearchOptions(samples=6, turns=3, scored="path"),
    SearchOptions(samples=6, turns=2, votes=3, value="majority"),
    SearchOptions(samples=5, turns=1),
    SearchOptions(samples=5, turns=1, memory=True),
]


@pytest.mark.parametrize("options", SHAPES)
def test_a_budget_that_pays_for_the_whole_search_changes_nothing(options: SearchOptions) -> None:
    root = ROOTS[1]
    enough = least_whole(root, options)
    whole, same = Scripted(by_role, last_two), Scripted(by_role, last_two)
    expected = search(cast(whole), [root], [2], options)
    found = search(cast(same), [root], [2], with_tokens(options, enough))
    assert found == expected and same.generated == whole.generated and same.scored == whole.scored
    assert found[0].record() == expected[0].record() and "budget" not in found[0].record()
    (less,) = search(
        cast(Scripted(by_role, last_two)), [root], [2], with_tokens(options, enough - 1)
    )
    assert less.widths and less.record() != expected[0].record()


def test_a_budget_counts_bytes_since_other_scripts_take_more_tokens() -> None:
    options = SearchOptions(samples=3)
    roots = (talk(letter * 200) for letter in ("\u00e9", "xx", "x"))
    accented, doubled, plain = (least_whole(root, options) for root in roots)
    assert accented == doubled > plain


def test_each_way_to_get_candidates_pays_for_its_prompts() -> None:
    """Ranked titles: the ranking's and that of the reply written out, as many as of two samples.

    Eight first draws of different titles cost as much as eight samples, though `draws` is three.
    """

    def least(root: Dialogue, kind: str, samples: int) -> int:
        options = SearchOptions(samples=samples, turns=1, candidates=kind, draws=3)
        return least_whole(root, options)

    long = talk("A comedy. " * 60)
    sampled, ranked = (
        least(long, kind, 2) - least(ROOTS[0], kind, 2) for kind in ("sampled", "ranked")
    )
    assert ranked == sampled
    assert least(ROOTS[0], "distinct", 8) == least(ROOTS[0], "sampled", 8)


def test_a_judge_that_does_not_see_the_dialogue_is_not_paid_for_it() -> None:
    def growth(**options: bool) -> int:
        own = SearchOptions(turns=1, **options)
        return least_whole(talk("A comedy. " * 60), own) - least_whole(ROOTS[0], own)

    assert growth(memory=True) == growth(cards=True) < growth()


def test_half_of_an_odd_number_is_rounded_up() -> None:
    assert plan(ROOTS[0], SearchOptions(samples=5, turns=4, budget_seconds=9.0)) == [5, 3, 2]


@pytest.mark.parametrize("options", SHAPES)
def test_a_search_spends_no_more_than_its_budget_and_most_of_it(options: SearchOptions) -> None:
    """All texts are as long as they may be, 48 tokens of four bytes."""

    def at_length(request: Request) -> str:
        said = by_role(request)
        return f"{'x' * (191 - len(said))} {said}"

    root, spent = ROOTS[0], []
    whole = least_whole(root, options)
    for share in range(3, 11):
        llm = Scripted(at_length, last_two)
        search(cast(llm), [root], [1], with_tokens(options, whole * share // 10))
        spent.append(counted(llm))
        assert spent[-1] <= whole * share // 10
    assert spent[0] < spent[-1] and spent[-1] > 0.7 * whole


def test_the_first_responses_are_judged_at_once_and_the_better_half_is_rolled_out() -> None:
    """The first has value 0, the second 1, the third 2: the last two of four are rolled out."""
    first = iter(["a 0", "b 1", "c 2", "d 2"])

    def reply(request: Request) -> str:
        if role_of(request) != "recommender":
            return "x"
        return next(first) if len(request.messages) == 2 else f"{request.messages[2].content[0]} 1"

    options, root = SearchOptions(samples=4, vote_temperature=0), ROOTS[0]
    budget = least_whole(root, options) - 1
    llm = Scripted(reply, last_two)
    (result,) = search(cast(llm), [root], [1], with_tokens(options, budget))
    assert result.widths == [4, 2]
    assert [x.dropped for x in result.candidates] == [2, 2, None, None]
    # those that are dropped keep the value of their only judgement; the others' is the path's mean
    assert [x.value for x in result.candidates] == [0.0, 1.0, 1.5, 1.5] and result.best == 2
    assert roles_of(llm.generated)[1:] == [["internal_seeker"] * 2, ["recommender"] * 2]
    assert [len(x) for x in llm.scored] == [4, 2]
    record = json.loads(json.dumps(result.record()))
    assert record["budget"] == {"widths": [4, 2], "late": None}
    assert [x.get("dropped") for x in record["candidates"]] == [2, 2, None, None]


def test_a_dropped_candidate_is_not_chosen_whatever_its_value() -> None:
    best, kept = Candidate("a", None, 2.0, dropped=2), Candidate("b", None, 0.5)
    assert select([best, kept]) == 1


def test_in_a_tree_no_branch_of_a_dropped_candidate_is_drawn() -> None:
    options = SearchOptions(samples=4, mode="tree")
    budget = least_whole(ROOTS[0], options) - 1
    llm = Scripted(by_role, last_two)
    (result,) = search(cast(llm), ROOTS[:1], [1], with_tokens(options, budget))
    assert result.widths == [4, 2] and [len(x) for x in llm.generated] == [5, 2, 8]
    assert [len(x.leaves) for x in result.candidates if not x.dropped] == [4, 4]
    assert [x.node.children for x in result.candidates if x.node and x.dropped] == [[], []]


def test_what_a_budget_drops_depends_on_no_neighbour_and_repeats() -> None:
    """The dialogues are of different lengths, so that their plans differ."""
    options = SearchOptions(samples=6, mode="tree")
    roots = [*ROOTS, talk("A comedy. " * 60)]
    options = with_tokens(options, least_whole(ROOTS[1], options))
    together = search(cast(Scripted(by_role, last_two)), roots, [1, 2, 3], options)
    assert len({tuple(x.widths) for x in together}) > 1
    for i, root in enumerate(roots):
        (alone,) = search(cast(Scripted(by_role, last_two)), [root], [i + 1], options)
        assert alone == together[i]


def test_the_least_budget_buys_one_candidate_that_is_not_judged() -> None:
    llm = Scripted(by_role)
    (result,) = search(cast(llm), ROOTS[:1], [1], SearchOptions(samples=3, budget_tokens=1))
    assert roles_of(llm.generated) == [["summariser", "recommender"]] and llm.scored == []
    assert result.widths == [1] and result.reply.startswith("recommender")


def test_a_budget_draws_no_more_titles_than_it_judges() -> None:
    """The plan is for two titles: the two first draws suffice, or the second round of three."""
    options = SearchOptions(samples=3, turns=1, candidates="distinct", draws=6)
    budget = next(n for n in range(1, 10**5) if plan(ROOTS[0], with_tokens(options, n)) == [2])
    for said, calls, kept in (
        (["Try Heat (1995).", "Try Up (2009)."], [3], [None, None]),
        (["Heat (1995)!", "Heat (1995).", "Up (2009)!", "Hm.", "Oh."], [3, 3], [None, None, 1]),
    ):
        llm = Scripted(drawing(*said))
        (result,) = search(of_films(llm), ROOTS[:1], [1], with_tokens(options, budget))
        assert [len(requests) for requests in llm.generated] == calls
        assert [x.dropped for x in result.candidates] == kept and counted(llm) <= budget


def test_with_cards_the_rule_says_which_candidates_are_judged() -> None:
    """Ranked: Up, Alien (disliked), Heat (a crime film as wished); two of them can be judged."""
    options = SearchOptions(samples=3, turns=1, candidates="ranked", cards=True, veto=False)
    budget = next(n for n in range(1, 10**5) if plan(ROOTS[0], with_tokens(options, n)) == [2])
    llm = Ranking(lambda x: " Good." if role_of(x) == "recommender" else PROFILE)
    (result,) = search(of_films(llm), ROOTS[:1], [1], with_tokens(options, budget))
    judged = [x.messages[1].content.splitlines()[0] for x in llm.scored[0]]
    assert judged == ["I recommend Up (2009).", "I recommend Heat (1995)."]
    assert [x.dropped for x in result.candidates] == [None, 1, None]
    assert llm.granted == 480 and counted(llm) + 480 <= budget
    llm = Ranking(lambda x: " Good." if role_of(x) == "recommender" else PROFILE)
    (result,) = search(of_films(llm), ROOTS[:1], [1], with_tokens(options, 1))
    assert result.reply == "I recommend Heat (1995). Good." and llm.scored == []
    search(of_films(llm), ROOTS[:1], [1], options)
    assert llm.granted == 480  # the same titles are found with a budget and without


def test_a_large_catalogue_gets_more_tokens_and_a_budget_counts_them() -> None:
    many = Catalogue([Item(f"Film {n}", f"Film {n}") for n in range(501)])
    llm = Ranking(lambda x: " Good." if role_of(x) == "recommender" else PROFILE)
    roles = Roles(Side(llm), Side(llm), many)
    roles.likeliest(ROOTS[:1], 8)
    assert llm.granted == 900
    options = SearchOptions(samples=3, turns=1, candidates="ranked")
    few, more = (least_whole(ROOTS[0], options, titles) for titles in (500, 501))
    assert more - few == 900 - 480
    (result,) = search(roles, ROOTS[:1], [1], with_tokens(options, more - 1))
    assert result.widths and not search(roles, ROOTS[:1], [1], with_tokens(options, more))[0].widths


@pytest.mark.parametrize(("titles", "tokens"), [(1, 480), (8, 480), (20, 1200)])
def test_few_titles_get_tokens_enough_to_be_found(titles: int, tokens: int) -> None:
    """A share per title alone would end the search for one before its first full title."""
    llm = Ranking(by_role)
    of_films(llm).likeliest(ROOTS[:1], titles)
    assert llm.granted == tokens


def test_a_model_that_cannot_rank_is_not_asked_to_where_nothing_is_searched() -> None:
    assert search(of_films(Scripted(by_role)), [], [], SearchOptions(candidates="ranked")) == []


def test_after_the_first_judgement_the_judge_chooses_and_not_the_rule() -> None:
    """By rule both replies about Heat would be rolled out; the judge prefers those about Up."""
    first = iter(["Try Heat (1995).", "Heat (1995)!", "Try Up (2009).", "Up (2009)!"])

    def reply(request: Request) -> str:
        if role_of(request) != "recommender":
            return PROFILE
        return next(first, "Up (2009)?")

    llm = Scripted(reply, lambda x: SURE[2 if "Up" in x.messages[1].content else 0])
    options = SearchOptions(samples=4, cards=True)
    budget = least_whole(ROOTS[0], options) - 1
    (result,) = search(of_films(llm), ROOTS[:1], [1], with_tokens(options, budget))
    assert result.widths == [4, 2] and [x.dropped for x in result.candidates] == [2, 2, None, None]


def test_before_it_is_judged_an_open_title_promises_what_its_worst_reading_does() -> None:
    """Night Ferry of 1990 is a crime film, that of 1950 a war film: less than a sure half fit."""
    ferries = [
        Item(f"Night Ferry ({y})", "Night Ferry", y, (x,))
        for y, x in ((1950, "war"), (1990, "crime"))
    ]
    draws = ("Night Ferry!", "Night Ferry.", "Up (2009)!", "Heat (1995)!", "Hm.")
    roles = Roles(*[Side(Scripted(drawing(*draws)))] * 2, Catalogue([*FILMS, *ferries]))
    options = SearchOptions(samples=3, turns=1, candidates="distinct", draws=5, cards=True)
    budget = next(n for n in range(1, 10**5) if plan(ROOTS[0], with_tokens(options, n)) == [2])
    told = "Likes: crime, family. Dislikes: nothing said."
    (result,) = search(roles, ROOTS[:1], [1], with_tokens(options, budget), told)
    assert [x.dropped for x in result.candidates] == [1, None, None]


def test_a_reply_without_a_title_gives_way_to_a_film_that_does_not_fit() -> None:
    """Two of three can be judged; Alien is disliked."""
    options = SearchOptions(samples=3, turns=1, candidates="distinct", draws=5, cards=True)
    budget = next(n for n in range(1, 10**5) if plan(ROOTS[0], with_tokens(options, n)) == [2])
    llm = Scripted(drawing("Hm?", "Hm!", "Try Alien (1979).", "Try Heat (1995).", "Oh."))
    (result,) = search(of_films(llm), ROOTS[:1], [1], with_tokens(options, budget), PROFILE)
    assert [x.reply for x in result.candidates] == ["Hm?", "Try Alien (1979).", "Try Heat (1995)."]
    assert [x.dropped for x in result.candidates] == [1, None, None]


@pytest.mark.parametrize(("ends", "calls", "late"), [(0, 1, 1), (1, 1, 2), (2, 3, None)])
def test_after_the_seconds_no_turn_begins_and_the_best_so_far_is_said(
    monkeypatch: pytest.MonkeyPatch, ends: int, calls: int, late: int | None
) -> None:
    """Each look at the clock, at the start and before either turn, is a second after the last."""
    ticks = iter(range(10))
    monkeypatch.setattr("usbrec.crs.ses.time.monotonic", lambda: next(ticks))
    llm = Scripted(by_role, last_two)
    options = SearchOptions(samples=4, budget_seconds=ends + 0.5)
    (result,) = search(cast(llm), ROOTS[:1], [1], options)
    assert result.record()["budget"]["late"] == late and len(llm.generated) == calls
    values = [x.value for x in result.candidates]
    assert len(llm.scored) == min(ends, 2) and (None in values) == (ends == 0)
    judged = {x.value for x in result.candidates} - {None}
    assert len(judged) > 1 or ends != 1
    assert result.candidates[result.best].value == max(judged, default=None)


def test_a_search_that_ends_unjudged_says_the_film_that_fits_by_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up is the likeliest title, Alien is refused, Heat alone is a crime film."""
    ticks = iter(range(10))
    monkeypatch.setattr("usbrec.crs.ses.time.monotonic", lambda: next(ticks))
    options = SearchOptions(samples=3, turns=1, cards=True, candidates="ranked")
    llm = Ranking(lambda request: "" if request.begin else PROFILE)
    (result,) = search(of_films(llm), ROOTS[:1], [1], replace(options, budget_seconds=0.5))
    assert result.late == 1 and not llm.scored
    assert [x.dropped for x in result.candidates] == [1, 1, None]
    assert result.reply == "I recommend Heat (1995)."


@pytest.mark.parametrize("late", [None, 2])
def test_a_reply_that_could_not_be_read_gives_way_to_one_that_is_worth_nothing(
    late: int | None,
) -> None:
    """After the first judgement, whether the plan or the clock leaves one."""
    said = [Candidate(x, Node(talk("Hi", x), "Likes: crime.", 1)) for x in ("Unread.", "Bad.")]
    assert said[1].node
    said[1].node.score = JudgeScore(0.0, 0)
    result = ses.SearchResult(talk("Hi"), 1, "Likes: crime.", said, widths=[2, 1], late=late)
    ses.keep(result, 1, FILMS, SearchOptions())
    assert [x.dropped for x in said] == [2, None]
