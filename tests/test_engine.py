"""The engine against a plain pass: sharing, batching, forking and eviction change nothing."""

import random
from collections.abc import Sequence

import pytest
import torch
from conftest import TINY, random_decoder
from scripted import talk

from usbrec.chat import Chat, Message, Sampling
from usbrec.crs.agents import Cast
from usbrec.crs.ses import SearchOptions, search
from usbrec.llm import cache as cache_module
from usbrec.llm import engine as engine_module
from usbrec.llm.cache import Path, PrefixCache, share_groups
from usbrec.llm.engine import Engine, Row
from usbrec.llm.lora import LoraConfig, Route, adapter_parameters, add_adapter
from usbrec.llm.model import Decoder
from usbrec.llm.packing import Branch, Tree, pack
from usbrec.llm.sampling import Sampler, uniform_numbers
from usbrec.llm.tokenizer import StreamDecoder
from usbrec.options import UserError

STOP = 7


@pytest.fixture(autouse=True, params=[True, False], ids=["shared", "apart"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test with all that rows share read together, and with each row by itself."""
    monkeypatch.setattr(cache_module, "SHARING_COSTS", 0 if request.param else 10**9)
    monkeypatch.setattr(cache_module, "SHARING_COSTS_A_ROW", 0)
    return bool(request.param)


class LetterTokenizer:
    """One id a letter; a message ends with id 1 and the assistant's turn opens with id 2."""

    stop_ids = frozenset({STOP})

    def encode(self, text: str, continued: bool = False) -> list[int]:
        return [ord(c) % 128 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self)  # type: ignore[arg-type]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [i for m in messages for i in [3, *self.encode(m.content), 1]] + [2]


def model_with_adapters() -> Decoder:
    """A tiny model with two adapters that matter."""
    model = random_decoder(TINY)
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, name, LoraConfig(r=4), seed=seed)
        for parameter in adapter_parameters(model, name).values():
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return model


def engine(capacity: int = 4000) -> Engine:
    """An engine whose memory holds `capacity` tokens of the tiny model."""
    bytes_per_token = 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * TINY.head_dim * 4
    return Engine(model_with_adapters(), LetterTokenizer(), capacity * bytes_per_token)


def chat(text: str, adapter: str | None = None) -> Chat:
    return Chat((Message("user", text),), adapter)


def plain_logits(model: Decoder, ids: list[int], adapter: str | None) -> torch.Tensor:
    """The whole row in one pass, with no memory: (T, V)."""
    row = pack([Tree([Branch(ids, [0] * len(ids))])])
    routes = [Route(adapter, 0, len(ids))] if adapter else []
    with torch.no_grad():
        return model.logits(model(row.input_ids, row.position_ids, row.attention, routes))


def drawn_token(logits: torch.Tensor, sampling: Sampling, uniform: float, text: list[int]) -> int:
    """The token that a row draws after a text, from its logits (1, V) by its uniform number."""
    uniforms = torch.tensor([[uniform]], dtype=torch.float64)
    return int(Sampler([sampling], uniforms, [text], logits.shape[-1]).draw(logits))


def plain_reply(model: Decoder, asked: Chat, sampling: Sampling, seed: int) -> tuple[int, ...]:
    """The reference: every token from a full pass, by the row's own uniform numbers."""
    uniforms = uniform_numbers(seed, sampling.max_new_tokens)
    ids = LetterTokenizer().prompt(asked.messages)
    drawn: list[int] = []
    for i in range(sampling.max_new_tokens):
        logits = plain_logits(model, ids + drawn, asked.adapter)[-1:]
        drawn.append(drawn_token(logits, sampling, uniforms[i], ids + drawn))
        if drawn[-1] == STOP:
            break
    return tuple(drawn)


def ids_of(reply: object) -> tuple[int, ...]:
    return reply.token_ids + ((STOP,) if reply.finished else ())  # type: ignore[attr-defined]


CHATS = [
    chat("a common beginning, then one"),
    chat("a common beginning, then another end", "one"),
    chat("a common beginning, then another"),
    chat("x", "two"),
    chat("a common beginning, then one", "one"),
    chat("something quite different and rather longer than all the other rows are", "two"),
]


COLD, WARM = Sampling(12, temperature=0), Sampling(12, temperature=0.8)
SHORT = Sampling(5, temperature=0.8, top_k=30, top_p=0.9, min_p=0.01)
VARIED = Sampling(12, temperature=1.0, repetition_penalty=1.6)


@pytest.mark.parametrize(
    "samplings",
    [[COLD] * 6, [WARM] * 6, [VARIED] * 6, [COLD, WARM, SHORT, VARIED, SHORT, COLD]],
    ids=["greedy", "warm", "penalised", "mixed"],
)
def test_a_mixed_batch_equals_plain_rows_one_by_one(samplings: list[Sampling]) -> None:
    """Unequal prompts, three adapters, rows that end early: the tokens are those of full passes."""
    e = engine()
    replies = e.generate(CHATS, samplings, range(len(CHATS)))
    asked = zip(CHATS, samplings, strict=True)
    expected = [plain_reply(e.model, c, how, seed) for seed, (c, how) in enumerate(asked)]
    assert [ids_of(r) for r in replies] == expected


def test_siblings_differ_and_their_seeds_reproduce_them() -> None:
    e = engine()
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    many = e.generate([CHATS[1]] * 20, sampling, range(20))
    again = engine().generate([CHATS[1]] * 20, sampling, range(20))
    assert len({r.token_ids for r in many}) > 10
    assert many == again
    assert ids_of(many[3]) == plain_reply(e.model, CHATS[1], sampling, 3)


def test_a_continued_conversation_pays_for_its_new_tokens_only() -> None:
    """Turn 2 repeats turn 1's prompt and reply; only what follows them is computed."""
    e = engine()
    sampling = Sampling(max_new_tokens=9, temperature=0.9)
    first = e.generate([CHATS[5]], sampling, [4])[0]
    before = e.usage.computed_tokens
    longer = Chat((*CHATS[5].messages, Message("assistant", "?"), Message("user", "more")), "two")
    prompt = LetterTokenizer().prompt(CHATS[5].messages) + list(first.token_ids) + [1, 3, 40, 1, 2]
    e.tokenizer.prompt = lambda messages: prompt  # type: ignore[method-assign]
    second = e.generate([longer], sampling, [5])[0]
    # the last drawn token was never fed where the limit ended the reply
    assert e.usage.computed_tokens - before <= 5 + 1
    logits = plain_logits(e.model, prompt + list(second.token_ids), "two")
    uniforms = uniform_numbers(5, 9)
    for i, token in enumerate(second.token_ids):
        at = logits[len(prompt) - 1 + i : len(prompt) + i]
        assert drawn_token(at, sampling, uniforms[i], []) == token


def test_choice_logprobs_add_up_the_renderings_of_a_choice() -> None:
    """log(p("ab") + p(" ab")), each the product of its tokens' probabilities in a full pass."""
    e = engine()
    found = e.choice_logprobs(CHATS, ["ab", "c"])
    for asked, scores in zip(CHATS, found, strict=True):
        prompt = LetterTokenizer().prompt(asked.messages)
        for choice, score in zip(["ab", "c"], scores, strict=True):
            totals = []
            for text in (choice, " " + choice):
                ids = LetterTokenizer().encode(text)
                logps = plain_logits(e.model, prompt + ids, asked.adapter).log_softmax(-1)
                totals.append(sum(logps[len(prompt) - 1 + i, t] for i, t in enumerate(ids)))
            assert score == pytest.approx(float(torch.logsumexp(torch.stack(totals), 0)), abs=1e-4)


def test_the_same_prompt_of_another_adapter_or_of_newer_weights_reuses_nothing() -> None:
    e = engine()
    sampling = Sampling(max_new_tokens=6, temperature=0)
    base = e.generate([CHATS[0]], sampling, [0])[0]
    other = e.generate([Chat(CHATS[0].messages, "one")], sampling, [0])[0]
    assert e.usage.reused_tokens == 0
    assert ids_of(other) == plain_reply(e.model, Chat(CHATS[0].messages, "one"), sampling, 0)
    for parameter in adapter_parameters(e.model, "one").values():
        parameter.data.mul_(-2)
    e.forget()
    newer = e.generate([Chat(CHATS[0].messages, "one")], sampling, [0])[0]
    assert ids_of(newer) == plain_reply(e.model, Chat(CHATS[0].messages, "one"), sampling, 0)
    assert e.generate([CHATS[0]], sampling, [0])[0] == base


def test_a_soak_of_forks_evictions_and_adapters_equals_the_plain_reference(
    request: pytest.FixtureRequest,
) -> None:
    """A memory of 260 tokens evicts in nearly every call; no result changes (more: --soak 500)."""
    rng, e, texts = random.Random(0), engine(capacity=260), ["start"]
    for call in range(request.config.getoption("--soak")):
        if call % 12 == 0:
            texts = ["start"]
        asked = [
            chat(rng.choice(texts), rng.choice([None, "one", "two"]))
            for _ in range(rng.randint(1, 6))
        ]
        sampling = Sampling(max_new_tokens=rng.randint(1, 6), temperature=rng.choice([0.0, 1.0]))
        seeds = [rng.randint(0, 99) for _ in asked]
        replies = e.generate(asked, sampling, seeds)
        for c, s, reply in zip(asked, seeds, replies, strict=True):
            assert ids_of(reply) == plain_reply(e.model, c, sampling, s)
        texts.append(rng.choice(texts)[:40] + rng.choice(["abc", "d", "efghij"]))


@pytest.mark.parametrize("capacity", [4000, 130])
def test_waiting_rows_join_and_nothing_changes(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 rows of 1 to 12 tokens at four places, or in a memory of about two rows."""
    monkeypatch.setattr(engine_module, "MAX_ROWS", 4)
    e, joined = engine(capacity), []
    plain = Engine.join

    def noted(self: Engine, rows: list[Row], joining: list[Row]) -> object:
        joined.append((len(rows), len(joining)))
        return plain(self, rows, joining)

    monkeypatch.setattr(Engine, "join", noted)
    samplings = [Sampling(max_new_tokens=1 + i % 12, temperature=0.9) for i in range(18)]
    replies = e.generate(CHATS * 3, samplings, range(18))
    for i, reply in enumerate(replies):
        assert ids_of(reply) == plain_reply(e.model, (CHATS * 3)[i], samplings[i], i)
    assert sum(new for _, new in joined) == 18 and any(old for old, _ in joined)
    assert all(old <= 3 and old + new <= 4 for old, new in joined)  # at least one had left
    assert e.usage.calls == 1 and e.usage.decoded_tokens == sum(len(ids_of(r)) for r in replies)


def test_an_eviction_in_the_middle_of_a_search_changes_no_result() -> None:
    """A large memory holds the whole search, a small one not: the same texts, values to 1e-4."""

    def found(capacity: int) -> tuple[list[object], list[float], int]:
        e, evicted = engine(capacity), []
        plain = e.cache.evict
        e.cache.evict = lambda n: (evicted.append(n), plain(n))  # type: ignore[assignment]
        options = SearchOptions(mode="tree", max_new_tokens=6, summary_tokens=6)
        roots = [talk("A comedy."), talk("War!")]
        results = search(e, Cast("one", "two"), roots, [1, 2], options)
        candidates = [c for result in results for c in result.candidates]
        leaves = [leaf for c in candidates for leaf in c.leaves]
        texts = [(r.root, r.profile) for r in results] + [c.reply for c in candidates]
        texts += [(leaf.dialogue, leaf.weight, leaf.verdict.label) for leaf in leaves]
        return texts, [leaf.verdict.expectation for leaf in leaves], len(evicted)

    texts, values, none = found(40000)
    same_texts, same_values, some = found(1300)
    assert same_texts == texts and same_values == pytest.approx(values, abs=1e-4)
    assert none == 0 and some > 0


def test_log_probabilities_are_the_models_own_before_any_warping() -> None:
    e = engine()
    how = Sampling(max_new_tokens=8, temperature=0.5, top_k=9, repetition_penalty=1.3,
                   logprobs=True)  # fmt: skip
    for c, reply in zip(CHATS, e.generate(CHATS, how, range(len(CHATS))), strict=True):
        prompt = LetterTokenizer().prompt(c.messages)
        logps = plain_logits(e.model, prompt + list(reply.token_ids), c.adapter).log_softmax(-1)
        expected = [float(logps[len(prompt) - 1 + i, t]) for i, t in enumerate(reply.token_ids)]
        assert reply.logprobs == pytest.approx(expected, abs=1e-4)
    assert e.generate(CHATS[:1], Sampling(max_new_tokens=2), [0])[0].logprobs is None


def test_stop_ids_are_a_rows_own() -> None:
    e = engine()
    free = e.generate([CHATS[0]], Sampling(max_new_tokens=12, temperature=1.0), [1])[0]
    how = Sampling(max_new_tokens=12, temperature=1.0, stop_ids=(free.token_ids[3],))
    plain = Sampling(max_new_tokens=12, temperature=1.0)
    stopped, other = e.generate([CHATS[0]] * 2, [how, plain], [1, 1])
    assert stopped.finished and other == free
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3])]


def test_a_listener_hears_the_reply_and_no_part_of_a_stop_string() -> None:
    """Whatever the stop string's length, what is heard is the reply's text, in several pieces."""
    e = engine()
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    text = e.generate([CHATS[0]], sampling, [1])[0].text
    for end in range(5, 9):
        heard: list[str] = []
        e.listener = heard.append
        how = Sampling(max_new_tokens=12, temperature=1.0, stop=(text[4:end], "never"))
        reply = e.generate([CHATS[0]], how, [1])[0]
        assert "".join(heard) == reply.text == text[: text.index(text[4:end])]
        assert len([piece for piece in heard if piece]) > 1
    heard.clear()
    e.generate([CHATS[0]] * 2, sampling, [1, 2])
    assert heard == []  # two rows would be mixed up


def test_a_call_that_cannot_fit_says_so() -> None:
    with pytest.raises(UserError, match="memory holds 20 tokens"):
        engine(capacity=20).generate([CHATS[5]], Sampling(max_new_tokens=4), [0])


def test_a_last_line_beyond_the_limit_says_so() -> None:
    with pytest.raises(UserError, match="exceed the limit of 2048"):
        engine().generate([chat("x" * 2050)], Sampling(max_new_tokens=4), [0])


def test_an_over_long_chat_is_answered_as_its_newest_turns_would_be_and_counted() -> None:
    """40 positions, 30 for a prompt: a turn of 14 letters takes 17, two take 33."""
    turns = [Message("user", letter * 14) for letter in "ab"]
    e = Engine(model_with_adapters(), LetterTokenizer(), max_length=40)
    sampling = Sampling(max_new_tokens=4)
    long, short = e.generate([Chat(tuple(turns)), Chat((turns[1],))], sampling, [0, 0])
    assert long == short
    assert e.usage.shortened == 1
    for wrong in (-1, 2049):
        with pytest.raises(UserError, match="--max-length must lie in"):
            Engine(model_with_adapters(), LetterTokenizer(), max_length=wrong)


def test_stop_strings_end_a_row_wherever_tokens_split_them() -> None:
    e = engine()
    free = e.generate([CHATS[0]], Sampling(max_new_tokens=12, temperature=1.0), [1])[0]
    text = LetterTokenizer().decode(free.token_ids)
    stop = text[4:6]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, stop=(stop,))
    stopped = e.generate([CHATS[0]], sampling, [1])[0]
    assert stopped.finished and stopped.text == text[: text.index(stop)]


def test_groups_read_the_fewest_tokens(sharing: bool) -> None:
    """Three rows share 100 tokens, two of them 104; a fourth shares nothing with them."""
    beginning = list(range(100))
    rows = [
        beginning + [200, 201, 202, 203, 204],
        beginning + [200, 201, 202, 203, 205],
        beginning + [300],
        [400, 401],
    ]
    groups = share_groups([Path(torch.tensor(row), 0) for row in rows])
    found = sorted((sorted(g.rows), g.length) for g in groups)
    assert found == ([([0, 1, 2], 100), ([3], 2)] if sharing else [([0, 1, 2, 3], 0)])


def test_forked_memory_grows_by_the_new_part_only() -> None:
    """16 siblings over a 60-token prompt: the prompt once, and each reply's own fed tokens."""
    e = engine()
    asked = chat("y" * 57)
    replies = e.generate([asked] * 16, Sampling(max_new_tokens=4, temperature=1.5), range(16))
    branches = {r.token_ids[:i] for r in replies for i in range(1, len(r.token_ids) + 1)}
    assert e.cache.used <= 60 + len(branches) + 16
    assert isinstance(e.cache, PrefixCache)
