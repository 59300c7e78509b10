"""Ranking against brute force: every text scored by a full pass of its own."""

from dataclasses import replace

import pytest
import torch
from test_engine import CHATS, LetterTokenizer, engine, plain_logits

from usbrec.chat import Ranks, Request
from usbrec.llm import ranking
from usbrec.llm.engine import Engine
from usbrec.llm.ranking import Ranking

TITLES = [
    "Heat", "Heat (1995)", "Heat (1986)", "The Heat", "It", "It (1990)", "It Follows", "Up",
    "Up in the Air", "Her", "Hero", "Heroes", "Léon", "Amélie", "Amelia", "七人の侍", "七人",
    "Heat (1995)", "2012", "2001: A Space Odyssey", "Zodiac", "Z", "", "What?", "What? No",
]  # fmt: skip
LED = [f"Try {title}." for title in TITLES]  # one beginning for all


def brute_force(e: Engine, chat: Request, texts: list[str]) -> list[tuple[int, float]]:
    """All texts by their scores, equals in their order."""
    prompt = e.tokenizer.prompt(chat.messages)
    scores = []
    for text in texts:
        ids = LetterTokenizer().encode(text)
        logps = plain_logits(e.model, prompt + ids, chat.adapter).log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) - 1 + len(ids))
        scores.append(float(logps[rows, ids].double().sum()))
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


def assert_equal(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-4)


@pytest.mark.parametrize("texts", [TITLES, LED], ids=["bare", "with a lead"])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_the_best_texts_are_those_of_brute_force(texts: list[str], k: int) -> None:
    """Six unequal prompts and three adapters in one call; prefixes, equals, an empty text."""
    e = engine()
    found = Ranking(e, texts).best(CHATS, k, 0)
    for chat, ranked in zip(CHATS, found, strict=True):
        assert_equal(ranked.texts, brute_force(e, chat, texts)[:k])
        assert ranked.proven == len(ranked.texts)


@pytest.mark.parametrize("tokens", [10, 20, 40])
def test_a_search_cut_short_has_exact_scores_and_proves_what_it_claims(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "PASS_TOKENS", 8)
    e = engine()
    proven = []
    for chat, ranked in zip(CHATS, Ranking(e, LED).best(CHATS, 6, tokens), strict=True):
        expected = brute_force(e, chat, LED)
        scores = dict(expected)
        assert ranked.texts and all(
            s == pytest.approx(scores[i], abs=1e-4) for i, s in ranked.texts
        )
        assert_equal(ranked.texts[: ranked.proven], expected[: ranked.proven])
        proven.append(ranked.proven)
    assert min(proven) < 6  # so few tokens miss some


def test_the_engine_ranks_and_keeps_the_trie_of_the_last_texts() -> None:
    e, few = engine(), LED[:4]
    assert isinstance(e, Ranks)
    for texts in (LED, few, few, LED):
        kept = e.ranking
        found = e.best_texts(CHATS, texts, 3, 0)
        expected = Ranking(engine(), texts).best(CHATS, 3, 0)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one.texts, other.texts)
        assert (e.ranking is kept) == (kept is not None and kept.texts == texts)


def test_a_chats_ranking_does_not_depend_on_the_others() -> None:
    together = Ranking(engine(), LED).best(CHATS, 5, 60)
    alone = [Ranking(engine(), LED).best([chat], 5, 60)[0] for chat in reversed(CHATS)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert_equal(one.texts, other.texts)
        assert one.proven == other.proven


def test_a_memory_that_holds_one_prompt_at_a_time_changes_nothing() -> None:
    small = Ranking(engine(capacity=90), LED).best(CHATS, 5)
    large = Ranking(engine(), LED).best(CHATS, 5)
    for one, other in zip(small, large, strict=True):
        assert_equal(one.texts, other.texts)


def test_the_exact_search_opens_only_what_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run a pass: exactly the runs whose first token alone beats the best text are opened."""
    monkeypatch.setattr(ranking, "PASS_TOKENS", 1)
    e = engine()
    e.model.lm_head.weight *= 10  # some letters are surer now than a whole text of others
    asked = Request(CHATS[1].messages)
    texts = [f"{chr(40 + i)}{chr(45 + i)}" for i in range(60)]
    [ranked] = Ranking(e, texts).best([asked], 1, 0)
    assert_equal(ranked.texts, brute_force(e, asked, texts)[:1])
    prompt = e.tokenizer.prompt(asked.messages)
    firsts = plain_logits(e.model, prompt, None)[-1].log_softmax(-1)[40:100]
    may_win = int((firsts > ranked.texts[0][1]).sum())
    assert 1 < may_win < len(texts)
    assert e.usage.computed_tokens == len(prompt) + may_win


def test_a_search_runs_no_more_tokens_than_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is opened whole, so the last one may go beyond by a token."""
    monkeypatch.setattr(ranking, "PASS_TOKENS", 8)
    e = engine()
    Ranking(e, LED).best(CHATS[:1], 10, 30)
    used = e.usage.computed_tokens - len(e.tokenizer.prompt(CHATS[0].messages))
    assert 30 <= used <= 30 + len("Try ") + ranking.RUN_TOKENS


def test_a_search_without_tokens_enough_still_finds_a_text() -> None:
    e, texts = engine(), [x for x in LED if x != "Try ."]  # which one token would find
    for ranked, chat in zip(Ranking(e, texts).best(CHATS, 3, 1), CHATS, strict=True):
        scores = dict(brute_force(e, chat, texts))
        assert ranked.texts and ranked.proven < 3
        assert [s for _, s in ranked.texts] == pytest.approx(
            [scores[i] for i, _ in ranked.texts], abs=1e-4
        )


def test_texts_are_ranked_and_begun_as_replies_begin() -> None:
    """The layout puts a space before each reply, as Mistral's does."""
    e, spaced = engine(), engine()
    spaced.tokenizer.beginning = lambda text: e.tokenizer.encode(f" {text}")
    [found] = Ranking(spaced, LED).best(CHATS[:1], 5, 0)
    [expected] = Ranking(e, [f" {text}" for text in LED]).best(CHATS[:1], 5, 0)
    assert_equal(found.texts, expected.texts)
    assert spaced.generate([replace(CHATS[0], begin="Up")])[0].text.startswith(" Up")


def test_one_text_and_equal_texts_are_ranked_too() -> None:
    e = engine()
    assert_equal(Ranking(e, ["Up."]).best(CHATS[:1], 3)[0].texts, brute_force(e, CHATS[0], ["Up."]))
    ranked = Ranking(e, ["Up.", "Up."]).best(CHATS[:1], 1)[0]
    assert [i for i, _ in ranked.texts] == [0]
    assert torch.isfinite(torch.tensor(ranked.texts[0][1]))
