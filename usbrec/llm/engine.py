"""Chats in, replies out: tokenizer, decoder, shared memory and sampling behind two calls.

Whoever asks for many replies that begin alike pays for the common beginning once, within a call
and across calls; nothing in the callers mentions keys, values or batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from usbrec.chat import Chat, Reply, Sampling
from usbrec.errors import UserError
from usbrec.llm.cache import Path, PrefixCache
from usbrec.llm.model import Decoder
from usbrec.llm.sampling import (
    DecodeAttention,
    draw,
    neighbours,
    prefill,
    routes_of,
    uniform_numbers,
)
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.parallel import as_first

MEMORY_BYTES = 1024**3
MAX_ROWS = 256  # rows decoded together; more wait for the next wave
LEAVE_SHARE = 0.75  # done rows leave the batch once no more than this share of it goes on


@dataclass
class Usage:
    """What the engine did since it was made: tokens computed, taken from memory, and decoded."""

    calls: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    decoded_tokens: int = 0

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose keys and values were there already."""
        return self.prompt_tokens - self.computed_tokens


@dataclass
class Row:
    """One reply in the making."""

    adapter: str | None
    prompt: list[int]
    sampling: Sampling
    uniforms: Tensor  # (max_new_tokens,)
    tokens: list[int] = field(default_factory=list)
    finished: bool = False  # ended by itself
    text: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing more is to be drawn."""
        return self.finished or len(self.tokens) >= self.sampling.max_new_tokens


class Engine:
    """`usbrec.chat.LanguageModel` over a decoder in this process."""

    def __init__(
        self, model: Decoder, tokenizer: ChatTokenizer, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = PrefixCache(model.config, model.dtype, model.device, memory_bytes)
        self.usage = Usage()
        model.order_weights()

    def forget(self) -> None:
        """Drop all cached states: to be called whenever an adapter's weights change."""
        self.cache.forget()

    def generate(
        self,
        chats: Sequence[Chat],
        sampling: Sampling | Sequence[Sampling],
        seeds: Sequence[int],
    ) -> list[Reply]:
        """Return one reply a chat; a row depends on its own chat, sampling and seed alone.

        Raises UserError where a prompt and its reply exceed the model's positions.
        """
        samplings = [sampling] * len(chats) if isinstance(sampling, Sampling) else list(sampling)
        assert len(chats) == len(samplings) == len(seeds), "one sampling and one seed a chat"
        rows = []
        for chat, how, seed in zip(chats, samplings, seeds, strict=True):
            uniforms = torch.from_numpy(uniform_numbers(seed, how.max_new_tokens))
            rows.append(Row(chat.adapter, self.prompt(chat, how.max_new_tokens), how, uniforms))
        for wave in self.waves([len(r.prompt) + r.sampling.max_new_tokens for r in rows]):
            self.decode([rows[i] for i in wave])
        return [Reply(row.text, tuple(self.spoken(row)), row.finished) for row in rows]

    @torch.no_grad()
    def choice_logprobs(self, chats: Sequence[Chat], choices: Sequence[str]) -> list[list[float]]:
        """Return for each chat the unnormalised log-probability of each choice as its reply.

        A choice is scored as the token sequences that can render it, with and without a leading
        space; their probabilities add up.
        """
        variants = [self.variants(choice) for choice in choices]
        flat = [ids for group in variants for ids in group]
        beginnings = list(dict.fromkeys(tuple(ids[:-1]) for ids in flat))  # () for single tokens
        scores: list[list[float]] = [[] for _ in chats]
        prompts = [self.prompt(chat, max(map(len, flat))) for chat in chats]
        for wave in self.waves([sum(len(p) + len(ids) for ids in flat) for p in prompts]):
            rows = [(chats[i].adapter, [*prompts[i], *said]) for i in wave for said in beginnings]
            since = [len(prompts[i]) - 1 for i in wave for _ in beginnings]
            _, states = self.prefill(rows, since)
            logits = self.model.lm_head(torch.cat(states)).split([len(rows) for rows in states])
            for at, i in enumerate(wave):
                own = logits[at * len(beginnings) : (at + 1) * len(beginnings)]
                logps = {
                    said: rows.float().log_softmax(-1).cpu()
                    for said, rows in zip(beginnings, own, strict=True)
                }
                scores[i] = [
                    float(torch.logsumexp(torch.stack([total(logps, ids) for ids in group]), 0))
                    for group in variants
                ]
        return self.agreed(torch.tensor(scores, dtype=torch.float64)).tolist()

    def agreed(self, numbers: Tensor) -> Tensor:
        """Over sharded weights, return the first process's numbers, so that all go on alike.

        Rounding that differs between processes would otherwise let one wait for ever for the rest.
        """
        return as_first(numbers) if self.model.sharded else numbers

    def variants(self, choice: str) -> list[list[int]]:
        """The distinct token sequences that render a choice at the start of a reply."""
        found: list[list[int]] = []
        for text in (choice, " " + choice):
            ids = self.tokenizer.encode(text)
            if ids not in found:
                found.append(ids)
        return found

    def prompt(self, chat: Chat, new_tokens: int) -> list[int]:
        """Return a chat's token ids up to where its reply begins."""
        ids = self.tokenizer.prompt(chat.messages)
        limit = self.model.config.max_position_embeddings
        if len(ids) + new_tokens > limit:
            raise UserError(
                f"a prompt of {len(ids)} tokens and a reply of up to {new_tokens} exceed the "
                f"model's {limit} positions: shorten the dialogue or --max-new-tokens"
            )
        return ids

    def waves(self, sizes: Sequence[int]) -> list[list[int]]:
        """Cut rows of these token counts into waves that fit the memory, in their order."""
        waves: list[list[int]] = []
        room = 0
        for i, size in enumerate(sizes):
            if not waves or len(waves[-1]) == MAX_ROWS or size > room:
                waves.append([])
                room = self.cache.capacity
            waves[-1].append(i)
            room -= size
        return waves

    def prefill(
        self, rows: Sequence[tuple[str | None, list[int]]], since: Sequence[int]
    ) -> tuple[list[Path], list[Tensor]]:
        """Run `sampling.prefill` as one call of the cache, and count."""
        self.cache.tick()
        paths, states, computed = prefill(self.model, self.cache, rows, since)
        self.usage.calls += 1
        self.usage.prompt_tokens += sum(len(ids) for _, ids in rows)
        self.usage.computed_tokens += computed
        return paths, states

    @torch.no_grad()
    def decode(self, rows: list[Row]) -> None:
        """Draw the replies of one wave."""
        prompts = [(row.adapter, row.prompt) for row in rows]
        paths, states = self.prefill(prompts, [len(row.prompt) - 1 for row in rows])
        order = neighbours(paths)
        rows = [rows[i] for i in order]
        attention = DecodeAttention(self.cache, [paths[i] for i in order])
        hidden = torch.cat([states[i] for i in order])  # (B, D)
        while True:
            self.draw(rows, hidden)
            going = [i for i, row in enumerate(rows) if not row.done]
            if not going:
                break
            if len(going) <= LEAVE_SHARE * len(rows):
                self.remember(rows, attention)
                rows = [rows[i] for i in attention.keep(going)]
            hidden = self.step(rows, attention)
        self.remember(rows, attention)

    def draw(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Add one token to each row that is not done, from its hidden state; hidden (B, D)."""
        going = [i for i, row in enumerate(rows) if not row.done]
        live = [rows[i] for i in going]
        uniforms = torch.stack([row.uniforms[len(row.tokens)] for row in live])
        logits = self.model.lm_head(hidden[going])
        tokens = self.agreed(draw(logits, [row.sampling for row in live], uniforms))
        for row, token in zip(live, tokens.tolist(), strict=True):
            row.tokens.append(token)
            self.usage.decoded_tokens += 1
            self.read(row)

    def read(self, row: Row) -> None:
        """Notice an end token or a stop string in what the row has drawn, and set its text."""
        row.finished = row.tokens[-1] in self.tokenizer.stop_ids
        if row.done or row.sampling.stop:
            row.text = self.tokenizer.decode(self.spoken(row))
            ends = [row.text.find(stop) for stop in row.sampling.stop]
            if any(end >= 0 for end in ends):
                row.text = row.text[: min(end for end in ends if end >= 0)]
                row.finished = True

    def spoken(self, row: Row) -> list[int]:
        """What the row has drawn, without the end token."""
        ended = bool(row.tokens) and row.tokens[-1] in self.tokenizer.stop_ids
        return row.tokens[:-1] if ended else row.tokens

    def step(self, rows: Sequence[Row], attention: DecodeAttention) -> Tensor:
        """Feed every row's newest token; a row that is done feeds its last again. -> (B, D)."""
        attention.open_column()
        at = attention.column - attention.first
        ids = torch.tensor([row.tokens[-1] for row in rows], device=self.model.device)
        positions = torch.tensor([len(row.prompt) + at for row in rows], device=self.model.device)
        routes = routes_of([row.adapter for row in rows], [1] * len(rows))
        hidden = self.model(ids, positions, attention, routes)
        attention.column += 1
        return hidden

    def remember(self, rows: Sequence[Row], attention: DecodeAttention) -> None:
        """Keep the keys and values of what done rows have drawn, so that a next turn finds them."""
        slots: list[Tensor] = []
        seats: list[int] = []
        columns: list[int] = []
        for seat, row in enumerate(rows):
            if row.done:
                fed = min(attention.column - attention.first, len(row.tokens))
                path = self.cache.insert(row.adapter, row.prompt + row.tokens[:fed])
                slots.append(path.slots[path.known :])
                new = range(path.known - len(row.prompt), fed)
                seats.extend([seat] * len(new))
                columns.extend(attention.first + i for i in new)
        if seats:
            self.cache.k[:, torch.cat(slots)] = attention.k[:, seats, :, columns].transpose(0, 1)
            self.cache.v[:, torch.cat(slots)] = attention.v[:, seats, :, columns].transpose(0, 1)


def total(logps: Mapping[tuple[int, ...], Tensor], ids: Sequence[int]) -> Tensor:
    """Sum the log-probabilities of `ids`; `logps` holds the rows after each beginning's states."""
    rows = logps[tuple(ids[:-1])]
    return torch.stack([rows[i, token] for i, token in enumerate(ids)]).sum()
