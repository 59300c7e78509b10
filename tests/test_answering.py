"""The answers of a scripted model as rows: who is searched, by which seeds, what a row tells."""

from dataclasses import replace
from typing import Any

import pytest
from scripted import role_of, roles_of, talk
from test_chatting import PROFILE, Model
from test_ses import FILMS

from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Request, Sampling
from usbrec.crs.agents import Roles, Side
from usbrec.crs.dialogue import Example, format_dialogue
from usbrec.crs.ses import SearchOptions
from usbrec.options import seed_for

SHORT, LONG = talk("A crime film?"), talk("Hi.", "Which films do you like?", "Heat (1995).")
EXAMPLES = [Example("", 0, SHORT, "", ()), Example("d", 3, LONG, "", ("Up (2009)",))]


class Counting(Model):
    """A scripted model that counts a hundred decoded tokens a call, and keeps its rankings."""

    def __init__(self) -> None:
        super().__init__(lambda x: f"Heat (1995), {x.seed}." if drawn(x) else PROFILE)
        self.ranked: list[tuple[int, int, int]] = []

    def generate(self, requests: Any) -> Any:
        self.usage.decoded_tokens += 100
        return super().generate(requests)

    def best_texts(self, requests: Any, texts: Any, k: int, tokens: int) -> Any:
        self.ranked.append((len(requests), k, tokens))
        return super().best_texts(requests, texts, k, tokens)


def drawn(request: Request) -> bool:
    return role_of(request) == "recommender"


def recommender(
    start_turn: int = 1, turns: int = 1, **options: Any
) -> tuple[Recommender, Counting]:
    model = Counting()
    searching = SearchOptions(samples=2, turns=turns, start_turn=start_turn)
    roles, how = Roles(Side(model), Side(model), FILMS), Sampling(temperature=0.5)
    return Recommender(roles, [model], ReplyOptions(**options), how, searching, False), model


def test_a_plain_reply_is_drawn_by_the_seed_and_its_own_dialogue() -> None:
    made, _ = recommender(seed=5)
    texts = [format_dialogue(x.history) for x in EXAMPLES]
    said = [f"Heat (1995), {seed_for(5, 'reply', text)}." for text in texts]
    assert [row["reply"] for row in made.answer(EXAMPLES)] == said
    assert [row["reply"] for row in made.answer(EXAMPLES[::-1])] == said[::-1]


def test_a_row_tells_its_ids_if_it_has_titles_and_the_titles_of_its_reply() -> None:
    made, _ = recommender()
    own, row = made.answer(EXAMPLES)
    assert set(own) == {"reply", "items", "seconds", "tokens"} and own["items"] == ["Heat (1995)"]
    assert [row[x] for x in ("dialog_id", "turn_id", "gold")] == ["d", 3, ("Up (2009)",)]


def test_the_search_begins_at_its_turn_and_the_others_are_answered_plainly() -> None:
    """The recommender speaks for the first time in the short dialogue, the second in the long."""
    for start, searched in ((1, [True, True]), (2, [True, False]), (3, [False, False])):
        made, model = recommender(start, ses=True)
        rows = made.answer(EXAMPLES[::-1])
        assert [row["search"] is not None for row in rows] == searched
        roles = [x for call in roles_of(model.generated) for x in call]
        count = sum(searched)
        assert (roles.count("summariser"), roles.count("recommender")) == (count, 2 + count)
        for example, row in zip(EXAMPLES[::-1], rows, strict=True):
            seed = seed_for(0, "reply", format_dialogue(example.history))
            found = row["search"] or {"candidates": [{"reply": f"Heat (1995), {seed}."}], "best": 0}
            assert row["reply"] == found["candidates"][found["best"]]["reply"]
    made, model = recommender(ses=True)
    row = made.answer_one(SHORT, "Likes: war.")
    assert (
        row["search"]["profile"] == "Likes: war."
        and roles_of(model.generated)[0] == ["recommender"] * 2
    )


def test_seconds_and_tokens_are_shares_of_the_call_alone() -> None:
    made, _ = recommender()
    for _ in range(2):
        rows = made.answer(EXAMPLES)
        assert [row["tokens"]["decoded_tokens"] for row in rows] == [50, 50]
        assert rows[0]["seconds"] == rows[1]["seconds"]


def test_a_calls_seconds_are_divided_among_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((10.0, 13.0))
    monkeypatch.setattr("usbrec.answering.time.perf_counter", lambda: next(ticks))
    assert [row["seconds"] for row in recommender()[0].answer(EXAMPLES)] == [1.5, 1.5]


def test_no_dialogues_are_no_rows() -> None:
    assert recommender()[0].answer([]) == []


def test_more_titles_than_there_are_cost_no_memory() -> None:
    made, model = recommender(2, rank=10**12, rank_tokens=7)
    made.answer(EXAMPLES)
    assert model.ranked == [(2, len(FILMS.items), 7)]


def test_every_dialogue_is_ranked_within_the_given_tokens() -> None:
    made, model = recommender(2, ses=True, rank=2, rank_tokens=7)
    for row in made.answer(EXAMPLES):
        assert [x["title"] for x in row["ranked"]] == ["Up (2009)", "Alien (1979)"]
        assert (row["ranked"][0]["logprob"], row["proven"]) == (-1.0, 2)
    assert model.ranked == [(2, 2, 7)]


def test_options_without_an_effect_are_told_with_what_they_need() -> None:
    def told(*given: str, judging: bool = False, **options: Any) -> list[str]:
        return recommender(**options)[0].unread(given, judging)

    shapes = ("temperature", "top_p")
    assert told(*shapes) == told(*shapes, ses=True, start_turn=2) == []
    need = "has no effect without --ses-start-turn above 1"
    assert told(*shapes, ses=True) == [f"--temperature {need}", f"--top-p {need}"]
    assert told("ses_mode", ses=True, turns=2) == told("judge", judging=True) == []
    assert told("judge") == ["--judge has no effect without --validate-simulator"]
    assert told("ses_veto", "ses_mode") == [
        f"--ses-{x} has no effect without --ses, or /ses on in a chat" for x in ("mode", "veto")
    ]
    assert told("ses_veto", ses=True) == ["--ses-veto has no effect without --ses-cards"]
    assert told("ses_mode", ses=True) == ["--ses-mode has no effect without --ses-turns above 1"]
    assert told("simulator", judging=True) == []


def test_only_distinct_candidates_need_a_limit_of_draws() -> None:
    need = "--ses-draws has no effect without --ses-candidates distinct"
    for kind, expected in (("sampled", [need]), ("ranked", [need]), ("distinct", [])):
        made, _ = recommender(ses=True)
        made.searching = replace(made.searching, candidates=kind)
        assert made.unread(["ses_draws"], False) == expected
