"""The engine against a plain pass: sharing, batching, forking and eviction change nothing.

All tests run over the plain formulas and over their quicker equals (fast/), and in decoding with
the prompts of siblings read together and with a copy for each row.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_decoder
from torch import Tensor

from usbrec.chat import Message, Request, Sampling
from usbrec.llm import decoding
from usbrec.llm import engine as engine_module
from usbrec.llm.adapter_files import load_adapter, save_adapter
from usbrec.llm.cache import token_bytes
from usbrec.llm.decoding import DecodeAttention
from usbrec.llm.engine import Batch, BatchRow, Engine
from usbrec.llm.fast import accelerate
from usbrec.llm.lora import AdapterSpan, LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.model import Decoder, Ops, attend
from usbrec.llm.sampler import Sampler, uniform_numbers
from usbrec.llm.tokenizer import prompt_room
from usbrec.options import UserError

STOP = 7


def prepare(model: Decoder) -> None:
    """Leave the model's operations plain, unless `ways` puts `accelerate` here."""


@pytest.fixture(autouse=True, params=["plain", "fast", "fast, copied"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in each way that a token can be computed, in one way with prompts in pieces."""
    monkeypatch.setattr(decoding, "COPIED_TOKENS", 10**9 if "copied" in request.param else 0)
    monkeypatch.setattr(decoding, "TOKENS_PER_PASS", 37 if request.param == "fast" else 2048)
    if "fast" in request.param:
        monkeypatch.setitem(globals(), "prepare", accelerate)


class LetterTokenizer:
    """One id a letter; a message ends with id 1 and the assistant's turn opens with id 2."""

    stop_ids = frozenset({STOP})

    def encode(self, text: str, continued: bool = False) -> list[int]:
        return [ord(c) % 128 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def beginning(self, text: str) -> list[int]:
        return self.encode(text)

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
    model = model_with_adapters()
    prepare(model)
    return Engine(model, LetterTokenizer(), capacity * token_bytes(TINY, torch.float32))


def chat(text: str, adapter: str | None = None) -> Request:
    return Request((Message("user", text),), adapter=adapter)


def drawing(
    requests: Sequence[Request], how: Sampling | Sequence[Sampling], seeds: Sequence[int]
) -> list[Request]:
    """The same requests with samplings, one for all or one each, and seeds."""
    hows = [how] * len(requests) if isinstance(how, Sampling) else how
    asked = zip(requests, hows, seeds, strict=True)
    return [replace(request, sampling=how, seed=seed) for request, how, seed in asked]


def plain_logits(model: Decoder, ids: list[int], adapter: str | None) -> torch.Tensor:
    """The whole row in one pass of the plain formulas, with no memory: (T, V)."""
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k.transpose(0, 1), v.transpose(0, 1), visible)

    spans = [AdapterSpan(adapter, 0, len(ids))] if adapter else []
    own, model.ops = model.ops, Ops()
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(ids), torch.arange(len(ids)), attention, spans))
    model.ops = own
    return logits


def drawn_token(logits: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """The token that a row draws from its logits (1, V) by its uniform number."""
    uniforms = torch.tensor([[uniform]], dtype=torch.float64)
    return int(Sampler([sampling], uniforms).draw(logits))


def plain_reply(model: Decoder, asked: Request) -> tuple[int, ...]:
    """The reference: every token from a full pass, by the row's own uniform numbers."""
    sampling = asked.sampling
    uniforms = uniform_numbers(asked.seed, sampling.max_new_tokens)
    ids = LetterTokenizer().prompt(asked.messages)
    drawn: list[int] = []
    for i in range(sampling.max_new_tokens):
        logits = plain_logits(model, ids + drawn, asked.adapter)[-1:]
        drawn.append(drawn_token(logits, sampling, uniforms[i]))
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
VARIED = Sampling(12, temperature=1.6, min_p=0.02)


@pytest.mark.parametrize(
    "samplings",
    [[COLD] * 6, [WARM] * 6, [VARIED] * 6, [COLD, WARM, SHORT, VARIED, SHORT, COLD]],
    ids=["greedy", "warm", "truncated", "mixed"],
)
def test_a_mixed_batch_equals_plain_rows_one_by_one(samplings: list[Sampling]) -> None:
    """Unequal prompts, three adapters, rows that end early: the tokens are those of full passes."""
    e = engine()
    asked = drawing(CHATS, samplings, range(len(CHATS)))
    replies = e.generate(asked)
    assert [ids_of(r) for r in replies] == [plain_reply(e.model, request) for request in asked]


def test_siblings_differ_and_their_seeds_reproduce_them() -> None:
    e = engine()
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    asked = drawing([CHATS[1]] * 20, sampling, range(20))
    many, again = e.generate(asked), engine().generate(asked)
    assert len({r.token_ids for r in many}) > 10
    assert many == again
    assert ids_of(many[3]) == plain_reply(e.model, asked[3])


def test_a_continued_conversation_pays_for_its_new_tokens_only() -> None:
    """Turn 2 repeats turn 1's prompt and reply; only what follows them is computed."""
    e = engine()
    sampling = Sampling(max_new_tokens=9, temperature=0.9)
    first = e.generate(drawing([CHATS[5]], sampling, [4]))[0]
    before = e.usage.computed_tokens
    messages = (*CHATS[5].messages, Message("assistant", "?"), Message("user", "more"))
    longer = Request(messages, sampling, 5, "two")
    prompt = LetterTokenizer().prompt(CHATS[5].messages) + list(first.token_ids) + [1, 3, 40, 1, 2]
    e.tokenizer.prompt = lambda messages: prompt  # type: ignore[method-assign]
    second = e.generate([longer])[0]
    # the last drawn token was never fed where the limit ended the reply
    assert e.usage.computed_tokens - before <= 5 + 1
    logits = plain_logits(e.model, prompt + list(second.token_ids), "two")
    uniforms = uniform_numbers(5, 9)
    for i, token in enumerate(second.token_ids):
        at = logits[len(prompt) - 1 + i : len(prompt) + i]
        assert drawn_token(at, sampling, uniforms[i]) == token


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
    plain, adapted = (replace(CHATS[0], sampling=sampling, adapter=x) for x in (None, "one"))
    base = e.generate([plain])[0]
    other = e.generate([adapted])[0]
    assert e.usage.reused_tokens == 0
    assert ids_of(other) == plain_reply(e.model, adapted)
    for parameter in adapter_parameters(e.model, "one").values():
        parameter.data.mul_(-2)
    e.model.ops.clear()
    e.clear_cache()
    newer = e.generate([adapted])[0]
    assert ids_of(newer) == plain_reply(e.model, adapted)
    assert e.generate([plain])[0] == base


def test_an_adapter_that_is_loaded_over_another_is_read(tmp_path: Path) -> None:
    e = engine()
    save_adapter(e.model, "two", tmp_path, "base")
    asked = drawing([CHATS[0]], COLD, [0])
    one, two = (e.generate([replace(asked[0], adapter=x)])[0] for x in ("one", "two"))
    load_adapter(e.model, tmp_path, "one")
    e.clear_cache()
    assert e.generate([replace(asked[0], adapter="one")])[0] == two != one


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
        asked = drawing(asked, sampling, [rng.randint(0, 99) for _ in asked])
        for request, reply in zip(asked, e.generate(asked), strict=True):
            assert ids_of(reply) == plain_reply(e.model, request)
        texts.append(rng.choice(texts)[:40] + rng.choice(["abc", "d", "efghij"]))


@pytest.mark.parametrize("capacity", [4000, 130])
def test_batches_that_fit_the_memory_change_nothing(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 rows of 1 to 12 tokens at four places, or in a memory of about two rows."""
    monkeypatch.setattr(engine_module, "MAX_ROWS", 4)
    e, sizes = engine(capacity), []
    plain = Batch.__init__

    def noted(self: Batch, rows: Sequence[object], *others: object) -> None:
        sizes.append(len(rows))
        plain(self, rows, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "__init__", noted)
    samplings = [Sampling(max_new_tokens=1 + i % 12, temperature=0.9) for i in range(18)]
    asked = drawing(CHATS * 3, samplings, range(18))
    replies = e.generate(asked)
    for request, reply in zip(asked, replies, strict=True):
        assert ids_of(reply) == plain_reply(e.model, request)
    assert sum(sizes) == 18 and max(sizes) <= 4
    assert (len(sizes) == 5) == (capacity == 4000)
    assert e.usage.calls == 1 and e.usage.decoded_tokens == sum(len(ids_of(r)) for r in replies)


def test_rows_that_have_ended_leave_in_bulk_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """12 siblings of two prompts and limits of 1 to 12 tokens: five layouts, not twelve."""
    e, live = engine(), []
    plain = DecodeAttention.compact

    def noted(self: DecodeAttention, going: Sequence[int], *others: torch.Tensor) -> None:
        live.append(len(going))
        plain(self, going, *others)

    monkeypatch.setattr(DecodeAttention, "compact", noted)
    how = [Sampling(max_new_tokens=1 + i, temperature=0) for i in range(12)]
    asked = drawing([CHATS[0], CHATS[3]] * 6, how, range(12))
    e.tokenizer.stop_ids = frozenset()
    for request, reply in zip(asked, e.generate(asked), strict=True):
        assert len(reply.token_ids) == request.sampling.max_new_tokens
        for i, token in enumerate(reply.token_ids):
            ids = LetterTokenizer().prompt(request.messages) + list(reply.token_ids[:i])
            assert token == int(plain_logits(e.model, ids, request.adapter)[-1].argmax())
    assert live == [9, 6, 4, 3, 2, 1, 0]


def test_a_listener_hears_the_reply_and_no_part_of_a_stop_string() -> None:
    """Whatever the stop string's length, the text that is heard grows up to the reply's."""
    e = engine()
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    text = e.generate(drawing([CHATS[0]], sampling, [1]))[0].text
    for end in range(5, 9):
        heard: list[str] = []
        e.listeners = {0: heard.append}
        how = Sampling(max_new_tokens=12, temperature=1.0, stop=(text[4:end], "never"))
        reply = e.generate(drawing([CHATS[0]], how, [1]))[0]
        assert heard[-1] == reply.text == text[: text.index(text[4:end])]
        assert all(later.startswith(one) for one, later in itertools.pairwise(heard))
        assert len(set(heard)) > 2


class ByteTokenizer(LetterTokenizer):
    """One id a byte, so that a letter may take several tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_no_half_of_a_letter_is_heard_and_the_first_of_two_stop_strings_ends_the_text() -> None:
    heard: list[str] = []
    sampling = Sampling(20, stop=("c", "bc"))
    row = BatchRow(ByteTokenizer(), Request((), sampling), [], [], heard.append)
    for token in "é bc and more".encode():
        if not row.done:
            row.append(token)
    assert heard[-1] == row.text == "é " and row.ended
    assert set(heard) <= {"", "é", "é "}


def test_a_reply_with_a_given_beginning_goes_on_from_it() -> None:
    """The beginning is no drawn token; the greedy tokens after it are those of full passes."""
    e = engine()
    e.tokenizer.stop_ids = frozenset()
    sampling = Sampling(6, temperature=0)
    asked = [replace(x, sampling=sampling, begin="I say") for x in (CHATS[0], CHATS[3])]
    begun = LetterTokenizer().encode("I say")
    for request, reply in zip(asked, e.generate(asked), strict=True):
        ids = LetterTokenizer().prompt(request.messages) + begun
        for _ in range(6):
            ids.append(int(plain_logits(e.model, ids, request.adapter)[-1].argmax()))
        assert list(reply.token_ids) == begun + ids[-6:]
        assert reply.text == LetterTokenizer().decode(reply.token_ids)


def test_each_row_of_a_batch_has_its_own_listener_in_the_next_call_alone() -> None:
    """Rows 0 and 2 of three are heard; their texts do not depend on it."""
    e = engine()
    asked = drawing([CHATS[0], CHATS[3], CHATS[1]], Sampling(12, 1.0), [1, 2, 3])
    texts = [reply.text for reply in e.generate(asked)]
    heard: dict[int, list[str]] = {0: [], 2: []}
    e.listeners = {place: own.append for place, own in heard.items()}
    assert [reply.text for reply in e.generate(asked)] == texts
    assert [own[-1] for own in heard.values()] == [texts[0], texts[2]]
    assert all(len(set(own)) > 2 for own in heard.values())
    counts = {place: len(own) for place, own in heard.items()}
    e.generate(asked)
    assert {place: len(own) for place, own in heard.items()} == counts


@pytest.mark.parametrize(("owner", "name"), [(Decoder, "forward"), (DecodeAttention, "compact")])
def test_a_call_that_is_broken_off_leaves_nothing_to_the_next_one(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a prefill, or while a reply's keys move; then the reply's beginning is given."""

    def broken(*args: object) -> None:
        raise KeyboardInterrupt

    [asked], e, fresh = drawing([CHATS[0]], COLD, [0]), engine(), engine()
    begun = replace(asked, begin=fresh.generate([asked])[0].text[:6])
    fresh.clear_cache()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, broken)
        e.generate([asked])
    assert len(begun.begin) == 6 and e.generate([begun]) == fresh.generate([begun])
    before = e.usage.reused_tokens
    assert e.generate([begun]) and e.usage.reused_tokens > before


def test_a_reply_that_outgrows_the_memory_is_given_all_the_same() -> None:
    asked = drawing([CHATS[1]], COLD, [0])
    expected = engine().generate(asked)
    prompt = len(LetterTokenizer().prompt(CHATS[1].messages))
    for capacity in range(prompt, prompt + len(ids_of(expected[0])) + 1):
        assert engine(capacity).generate(asked) == expected


def test_a_call_that_cannot_fit_says_so() -> None:
    with pytest.raises(UserError, match=r"memory holds 20 tokens.*--kv-memory"):
        engine(capacity=20).generate([CHATS[5]])


def test_a_last_line_beyond_the_limit_loses_its_beginning_and_a_reply_beyond_it_says_so() -> None:
    e, short = engine(), Sampling(max_new_tokens=4)
    long = Request((Message("user", "x" * 2050 + "abc"),), short)
    kept = e.prompt(long, 4)
    assert kept[-5:] == e.prompt(chat("abc"), 4)[-5:] and len(kept) == prompt_room(2048)
    assert len(e.generate([long, chat("abc")])) == 2 and e.usage.shortened == 2
    with pytest.raises(UserError, match=r"which cannot be shortened.*exceed the limit of 2048"):
        e.generate([Request(long.messages, Sampling(max_new_tokens=2048))])
    assert len(e.prompt(long, 1000)) == 2048 - 1000  # a longer reply leaves less room


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_logits_that_are_no_numbers_are_an_error_and_no_reply(factor: float) -> None:
    """In a greedy, a warm and a scored request; finite weights may overflow."""
    model = model_with_adapters()
    for weight in (model.model.norm.weight, model.lm_head.weight):
        weight.data *= factor
    prepare(model)
    e = Engine(model, LetterTokenizer(), 4000 * token_bytes(TINY, torch.float32))
    [asked] = drawing([CHATS[0]], Sampling(max_new_tokens=2, temperature=1.0), [1])
    for call in (
        lambda: e.generate([CHATS[0]]),
        lambda: e.generate([asked]),
        lambda: e.choice_logprobs([CHATS[0]], ("a", "b")),
    ):
        with pytest.raises(UserError, match="logits are not finite numbers"):
            call()


def test_what_a_finished_row_computes_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays until enough rows have ended, and its draws are ignored whatever they are."""
    e = engine()
    requests = drawing(CHATS[:3], Sampling(max_new_tokens=6), [1, 2, 3])
    requests[0] = replace(requests[0], sampling=Sampling(max_new_tokens=2))
    expected, plain = e.generate(requests), DecodeAttention.read

    def read(self: DecodeAttention, drawn: Tensor) -> Callable[[], list[int]]:
        numbers = plain(self, drawn)()
        calls.append(len(numbers))
        return lambda: [-1 if len(calls) > 2 and len(numbers) == 3 else numbers[0], *numbers[1:]]

    calls: list[int] = []
    monkeypatch.setattr(DecodeAttention, "read", read)
    monkeypatch.setattr(DecodeAttention, "leave_share", 0.5)
    assert e.generate(requests) == expected and calls.count(3) > 2


def test_an_over_long_chat_is_answered_as_its_newest_turns_would_be_and_counted() -> None:
    """40 positions, 30 for a prompt: a turn of 14 letters takes 17, two take 33."""
    turns = [Message("user", letter * 14) for letter in "ab"]
    e = Engine(model_with_adapters(), LetterTokenizer(), max_length=40)
    sampling = Sampling(max_new_tokens=4)
    long, short = e.generate([Request(tuple(turns), sampling), Request((turns[1],), sampling)])
    assert long == short
    assert e.usage.shortened == 1
    for wrong in (-1, 2049):
        with pytest.raises(UserError, match="--max-length must lie in"):
            Engine(model_with_adapters(), LetterTokenizer(), max_length=wrong)


def test_stop_strings_end_a_row_wherever_tokens_split_them() -> None:
    e = engine()
    free = e.generate(drawing([CHATS[0]], Sampling(max_new_tokens=12, temperature=1.0), [1]))[0]
    text = LetterTokenizer().decode(free.token_ids)
    stop = text[4:6]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, stop=(stop,))
    stopped = e.generate(drawing([CHATS[0]], sampling, [1]))[0]
    assert stopped.finished and stopped.text == text[: text.index(stop)]


def test_the_memory_is_as_large_as_asked() -> None:
    bytes_per_token = token_bytes(TINY, torch.float32)
    assert bytes_per_token == 2 * 3 * 2 * 8 * 4
    assert Engine(random_decoder(TINY), LetterTokenizer(), 1000).cache.capacity == (
        1000 // bytes_per_token
    )


def test_forked_memory_grows_by_the_new_part_only() -> None:
    """16 siblings over a 60-token prompt: the prompt once, and each reply's own fed tokens."""
    e = engine()
    asked = chat("y" * 57)
    how = Sampling(max_new_tokens=4, temperature=1.5)
    replies = e.generate(drawing([asked] * 16, how, range(16)))
    branches = {r.token_ids[:i] for r in replies for i in range(1, len(r.token_ids) + 1)}
    assert e.cache.capacity - len(e.cache.free) <= 60 + len(branches) + 16
