"""Chats in, replies out: tokenizer, decoder, shared memory and sampling behind two calls.

Whoever asks for many replies that begin alike pays for the common beginning once, within a call
and across calls; nothing in the callers mentions keys, values or batches.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from usbrec.chat import Chat, Reply, Sampling
from usbrec.llm.cache import Path, PrefixCache
from usbrec.llm.decoding import DecodeAttention, prefill, routes_of
from usbrec.llm.limits import fit_prompt, prompt_room
from usbrec.llm.lora import forget_adapter, prepare_adapter
from usbrec.llm.model import Decoder
from usbrec.llm.sampling import Sampler, uniform_numbers
from usbrec.llm.tokenizer import ChatTokenizer, StreamDecoder
from usbrec.options import UserError
from usbrec.parallel import as_first

MEMORY_BYTES = 1024**3
MAX_ROWS = 256  # rows decoded together; more wait until rows have left
LEAVE_SHARE = 0.75  # rows leave and join once no more than this share of the batch goes on


@dataclass
class Usage:
    """What the engine did since it was made: tokens computed, taken from memory, and decoded."""

    calls: int = 0
    shortened: int = 0  # prompts that lost their oldest turns
    prompt_tokens: int = 0
    computed_tokens: int = 0
    decoded_tokens: int = 0

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose keys and values were there already."""
        return self.prompt_tokens - self.computed_tokens

    def since(self, before: "Usage") -> dict[str, int]:
        """Return what came after a copy of these figures was made."""
        names = ("calls", "prompt_tokens", "reused_tokens", "computed_tokens", "decoded_tokens")
        return {name: getattr(self, name) - getattr(before, name) for name in names}


@dataclass
class Row:
    """One reply in the making."""

    adapter: str | None
    prompt: list[int]
    sampling: Sampling
    uniforms: Tensor  # (max_new_tokens,)
    ends: frozenset[int]  # the token ids that end it
    stream: StreamDecoder | None  # follows the text where stop strings or a listener ask for it
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # ended by itself
    text: str = ""
    heard: int = 0  # how much of the text the listener has

    @property
    def done(self) -> bool:
        """Whether nothing more is to be drawn."""
        return self.finished or len(self.tokens) >= self.sampling.max_new_tokens

    @property
    def size(self) -> int:
        """The most tokens it may come to."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def spoken(self) -> list[int]:
        """What was drawn, without the end token."""
        return self.tokens[:-1] if self.tokens and self.tokens[-1] in self.ends else self.tokens

    def reply(self) -> Reply:
        """Return the reply, now that it is done."""
        ids = tuple(self.spoken)
        logprobs = tuple(self.logprobs[: len(ids)]) if self.sampling.logprobs else None
        return Reply(self.text, ids, self.finished, logprobs)


class Engine:
    """`usbrec.chat.LanguageModel` over a decoder in this process."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: ChatTokenizer,
        memory_bytes: int = MEMORY_BYTES,
        max_length: int = 0,
    ) -> None:
        """`max_length` is of a prompt and its reply; 0: the model's positions."""
        positions = model.config.max_position_embeddings
        if not 0 <= max_length <= positions:
            raise UserError(
                f"--max-length must lie in 0 (all) to the model's {positions}, got {max_length}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_length = max_length or positions
        self.cache = PrefixCache(model.config, model.dtype, model.device, memory_bytes)
        self.usage = Usage()
        self.prepared: set[str] = set()  # adapters laid out for inference
        # hears a reply's text as it is drawn, where a call asks for one alone
        self.listener: Callable[[str], None] | None = None

    def forget(self) -> None:
        """Drop all cached states: to be called whenever an adapter's weights change."""
        self.cache.forget()
        for name in self.prepared:
            forget_adapter(self.model, name)
        self.prepared.clear()

    def generate(
        self,
        chats: Sequence[Chat],
        sampling: Sampling | Sequence[Sampling],
        seeds: Sequence[int],
    ) -> list[Reply]:
        """Return one reply a chat; a row depends on its own chat, sampling and seed alone.

        An over-long chat loses its oldest turns. Raises UserError where its last one and the reply
        find no room.
        """
        samplings = [sampling] * len(chats) if isinstance(sampling, Sampling) else list(sampling)
        assert len(chats) == len(samplings) == len(seeds), "one sampling and one seed a chat"
        self.usage.calls += 1
        listened = self.listener is not None and len(chats) == 1
        rows = []
        for chat, how, seed in zip(chats, samplings, seeds, strict=True):
            prompt = self.prompt(chat, how.max_new_tokens)
            uniforms = torch.from_numpy(uniform_numbers(seed, how.max_new_tokens))
            ends = self.tokenizer.stop_ids | set(how.stop_ids)
            stream = self.tokenizer.stream() if how.stop or listened else None
            rows.append(Row(chat.adapter, prompt, how, uniforms, ends, stream))
        self.decode(rows)
        return [row.reply() for row in rows]

    @torch.inference_mode()
    def choice_logprobs(self, chats: Sequence[Chat], choices: Sequence[str]) -> list[list[float]]:
        """Return for each chat the unnormalised log-probability of each choice as its reply.

        A choice is scored as the token sequences that can render it, with and without a leading
        space; their probabilities add up.
        """
        self.usage.calls += 1
        variants = [self.variants(choice) for choice in choices]
        flat = [ids for group in variants for ids in group]
        beginnings = list(dict.fromkeys(tuple(ids[:-1]) for ids in flat))  # () for single tokens
        # among the states of one chat, those after each beginning follow those after the one before
        ends = itertools.accumulate((1 + len(said) for said in beginnings), initial=0)
        first = dict(zip(beginnings, ends, strict=False))
        places = [first[tuple(ids[:-1])] + i for ids in flat for i in range(len(ids))]
        tokens = [token for ids in flat for token in ids]
        prompts = [self.prompt(chat, max(map(len, flat))) for chat in chats]
        picked: list[Tensor] = []  # of each chat, the log-probabilities of `tokens`
        for wave in self.waves([sum(len(p) + len(ids) for ids in flat) for p in prompts]):
            self.cache.tick()
            rows = [(chats[i].adapter, [*prompts[i], *said]) for i in wave for said in beginnings]
            since = [len(prompts[i]) - 1 for i in wave for _ in beginnings]
            _, states = self.prefill(rows, since)
            logits = self.model.lm_head(torch.cat(states)).unflatten(0, (len(wave), -1))
            picked += [own.float().log_softmax(-1)[places, tokens] for own in logits]
        if not picked:
            return []
        pieces = torch.stack(picked).split([len(ids) for ids in flat], -1)
        totals = torch.stack([piece.sum(-1) for piece in pieces], -1)
        groups = totals.split([len(group) for group in variants], -1)
        scores = torch.stack([group.logsumexp(-1) for group in groups], -1)
        return self.agreed(scores).tolist()

    def agreed(self, numbers: Tensor) -> Tensor:
        """Over sharded weights, return the first process's numbers, so that all go on alike.

        Rounding that differs between processes would otherwise let one wait for ever for the rest.
        """
        return as_first(numbers) if self.model.sharded else numbers

    def variants(self, choice: str) -> list[list[int]]:
        """The distinct token sequences that render a choice at the start of a reply."""
        found: list[list[int]] = []
        for text in (choice, " " + choice):
            ids = self.tokenizer.encode(text, continued=True)
            if ids not in found:
                found.append(ids)
        return found

    def prompt(self, chat: Chat, new_tokens: int) -> list[int]:
        """Return a chat's token ids up to where its reply begins, without what finds no room."""
        room = min(prompt_room(self.max_length), self.max_length - new_tokens)
        ids, was_shortened = fit_prompt(self.tokenizer, chat.messages, room)
        if len(ids) + new_tokens > self.max_length:
            raise UserError(
                f"a prompt whose last turn alone has {len(ids)} tokens and a reply of up to "
                f"{new_tokens} exceed the limit of {self.max_length} (--max-length, or the "
                "model's positions): shorten the last line or --max-new-tokens"
            )
        self.usage.shortened += was_shortened
        return ids

    def waves(self, sizes: Sequence[int]) -> Iterator[range]:
        """Cut rows of these token counts into waves that fit the memory, in their order."""
        start = 0
        while start < len(sizes):
            stop = start + max(1, fitting(sizes[start:], self.cache.capacity, MAX_ROWS))
            yield range(start, stop)
            start = stop

    def room(self, rows: Sequence[Row], waiting: Sequence[Row]) -> int:
        """Return how many of the waiting rows may join; a batch without rows takes one at least."""
        tokens = self.cache.capacity - sum(row.size for row in rows)
        count = fitting([row.size for row in waiting], tokens, MAX_ROWS - len(rows))
        return count if rows else max(1, count)

    def prefill(
        self, rows: Sequence[tuple[str | None, list[int]]], since: Sequence[int]
    ) -> tuple[list[Path], list[Tensor]]:
        """Run `decoding.prefill`, and count; its adapters are ready for decoding, too."""
        for name in {name for name, _ in rows if name is not None} - self.prepared:
            prepare_adapter(self.model, name)
            self.prepared.add(name)
        paths, states, computed = prefill(self.model, self.cache, rows, since)
        self.usage.prompt_tokens += sum(len(ids) for _, ids in rows)
        self.usage.computed_tokens += computed
        return paths, states

    @torch.inference_mode()
    def decode(self, waiting: Sequence[Row]) -> None:
        """Draw all replies; rows that wait for a place join when enough others have ended."""
        rows: list[Row] = []
        while rows or waiting:
            count = self.room(rows, waiting)
            rows, attention = self.join(rows, waiting[:count])
            waiting = waiting[count:]
            rows = self.advance(rows, attention, waiting)

    def join(
        self, rows: Sequence[Row], joining: Sequence[Row]
    ) -> tuple[list[Row], DecodeAttention]:
        """Make one batch of rows on their way, whose fed tokens are all cached, and of new ones.

        Every row of it has drawn a token that is yet to be fed.
        """
        self.cache.tick()
        paths = [self.cache.insert(row.adapter, row.prompt + row.tokens[:-1]) for row in rows]
        prompts = [(row.adapter, row.prompt) for row in joining]
        new, states = self.prefill(prompts, [len(row.prompt) - 1 for row in joining])
        self.draw(joining, self.sampler(joining), torch.cat(states))
        attention = DecodeAttention(self.cache, paths + new)
        rows = [*rows, *joining]
        return [rows[i] for i in attention.order], attention

    def advance(
        self, rows: list[Row], attention: DecodeAttention, waiting: Sequence[Row]
    ) -> list[Row]:
        """Draw until all are done or waiting rows can join; return those that go on.

        A batch is built anew only where a quarter of it has ended, so seldom.
        """
        while True:
            going = [i for i, row in enumerate(rows) if not row.done]
            if len(going) <= LEAVE_SHARE * len(rows):
                if not going or (waiting and self.room([rows[i] for i in going], waiting)):
                    break
                ended = [i for i, row in enumerate(rows) if row.done]
                rows = self.remember(rows, attention, ended, going)
                going = list(range(len(rows)))
            self.proceed(rows, going, attention)
        self.remember(rows, attention, range(len(rows)), [])
        return [rows[i] for i in going]

    def proceed(
        self, rows: Sequence[Row], going: Sequence[int], attention: DecodeAttention
    ) -> None:
        """Draw for the rows at `going` until one of them is done; the others feed their last again.

        On a GPU a step sends nothing there, and waits once, for the tokens it has drawn.
        """
        live, device = [rows[i] for i in going], self.model.device
        sampler = self.sampler(live)
        places = torch.tensor(going, device=device) if len(live) < len(rows) else None
        routes = routes_of([row.adapter for row in rows], [1] * len(rows))
        ids = torch.tensor([row.tokens[-1] for row in rows], device=device)
        while not any(row.done for row in live):
            attention.open_column()
            hidden = self.model(ids, attention.positions, attention, routes)
            attention.close_column()
            drawn = self.draw(live, sampler, hidden if places is None else hidden[places])
            ids = drawn if places is None else ids.index_copy(0, places, drawn)

    def sampler(self, rows: Sequence[Row]) -> Sampler:
        """Return what draws for these rows until the first of them comes to its limit."""
        steps = min(row.sampling.max_new_tokens - len(row.tokens) for row in rows)
        uniforms = torch.stack([row.uniforms[len(row.tokens) :][:steps] for row in rows])
        texts = (row.prompt + row.tokens for row in rows)
        vocab_size, device = self.model.config.vocab_size, self.model.device
        return Sampler([row.sampling for row in rows], uniforms, texts, vocab_size, device)

    def draw(self, rows: Sequence[Row], sampler: Sampler, hidden: Tensor) -> Tensor:
        """Add one token to each row, from its hidden state; (B, D) -> the tokens (B,)."""
        logits = self.model.lm_head(hidden)
        drawn = self.agreed(sampler.draw(logits))
        if any(row.sampling.logprobs for row in rows):
            logps = logits.float().log_softmax(-1).gather(1, drawn[:, None])[:, 0]
            for row, logp in zip(rows, logps.tolist(), strict=True):
                row.logprobs.append(logp)
        self.usage.decoded_tokens += len(rows)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            row.tokens.append(token)
            self.read(row)
        return drawn

    def read(self, row: Row) -> None:
        """Notice an end token or a stop string in what the row has drawn, and set its text."""
        row.finished = row.tokens[-1] in row.ends
        if row.stream is None:
            if row.done:
                row.text = self.tokenizer.decode(row.spoken)
            return
        before = len(row.text)
        if not row.finished:
            row.text += row.stream.push(row.tokens[-1:])
        if row.done:
            row.text += row.stream.finish()
        # a stop string ends in the new text and may begin before it
        found = [row.text.find(x, max(0, before - len(x) + 1)) for x in row.sampling.stop]
        if any(at >= 0 for at in found):
            row.text = row.text[: min(at for at in found if at >= 0)]
            row.finished = True
        if self.listener is not None:
            end = len(row.text) if row.done else unstopped(row.text, row.sampling.stop)
            self.listener(row.text[row.heard : end])
            row.heard = end

    def remember(
        self,
        rows: Sequence[Row],
        attention: DecodeAttention,
        seats: Sequence[int],
        going: Sequence[int],
    ) -> list[Row]:
        """Keep the keys and values that the rows at `seats` have fed, so that others find them.

        Only the rows at `going` stay in the batch; they are returned in their new order.
        """
        slots = [torch.empty(0, dtype=torch.long)]
        places: list[tuple[int, int]] = []  # seat and column of each slot
        for seat in seats:
            row, start = rows[seat], len(attention.paths[seat].slots)
            ids = row.prompt + row.tokens
            fed = min(start + attention.column - attention.first, len(ids))
            path = self.cache.insert(row.adapter, ids[:fed])
            slots.append(path.slots[path.known :])
            places += [(seat, attention.first + i - start) for i in range(path.known, fed)]
        seated, columns = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
        return [rows[i] for i in attention.keep(going, seated, columns, torch.cat(slots))]


def fitting(sizes: Sequence[int], tokens: int, places: int) -> int:
    """Return how many rows of these sizes, from the first on, fit into tokens and places."""
    return sum(total <= tokens for total in itertools.accumulate(sizes[:places]))


def unstopped(text: str, stops: Sequence[str]) -> int:
    """Return where the longest end of the text begins that a stop string may begin with."""
    held = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return len(text) - max(held, default=0)
