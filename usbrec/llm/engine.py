"""The inference engine: tokenizer, decoder, prefix cache and sampling behind three calls.

A prefix that requests share is computed once, within a call and across calls. Callers handle no
keys, values or batches.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from usbrec.chat import Ranked, Reply, Request, Requests, Texts
from usbrec.llm.cache import PrefixCache, token_bytes
from usbrec.llm.decoding import DecodeAttention, Rows, adapter_spans, prefill
from usbrec.llm.model import Decoder
from usbrec.llm.ranking import Ranking
from usbrec.llm.sampler import NOT_FINITE, Sampler, finite, uniform_numbers
from usbrec.llm.tokenizer import ChatTokenizer, fit_prompt, prompt_room
from usbrec.options import UserError
from usbrec.parallel import as_first, world

MAX_ROWS = 256  # rows decoded together

Ids = tuple[int, ...]
Listener = Callable[[str], object]


@dataclass
class Usage:
    """Token counts of an engine since it was made: computed, reused and decoded."""

    calls: int = 0
    shortened: int = 0  # prompts that lost their oldest turns
    reused_tokens: int = 0  # of prompts: their keys and values were cached
    computed_tokens: int = 0
    decoded_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All tokens of prompts."""
        return self.reused_tokens + self.computed_tokens

    def since(self, before: "Usage") -> dict[str, int]:
        """Return the increase of each count, by name, since the copy `before` was made."""
        names = ("calls", "prompt_tokens", "reused_tokens", "computed_tokens", "decoded_tokens")
        return {name: getattr(self, name) - getattr(before, name) for name in names}


@dataclass
class BatchRow:
    """A request, its prompt, and its reply, whose tokens arrive one by one.

    The prompt ends with the given beginning of the reply, if there is one, and `ids` begin with it.
    A `listener` hears the whole text as it grows, without the beginning of a possible stop string.
    """

    tokenizer: ChatTokenizer
    request: Request
    prompt: list[int]
    ids: list[int]  # of the reply, without the end token
    listener: Listener | None
    tokens: list[int] = field(default_factory=list)  # all that were drawn
    text: str = ""
    ended: bool = False  # by itself, not by a limit

    @property
    def done(self) -> bool:
        """Whether the reply is complete."""
        return self.ended or len(self.tokens) >= self.request.sampling.max_new_tokens

    def append(self, token: int) -> None:
        """Add a drawn token to the reply, up to an end token or a stop string."""
        self.tokens.append(token)
        self.ended = token in self.tokenizer.stop_ids
        if not self.ended:
            self.ids.append(token)
        stops = self.request.sampling.stop
        if not (self.done or stops or self.listener):
            return  # no text is needed before the end
        text = self.tokenizer.decode(self.ids)
        if self.done or not text.endswith("\ufffd"):  # else bytes of a letter are missing
            self.text = text
        if places := [self.text.find(stop) for stop in stops if stop in self.text]:
            self.text, self.ended = self.text[: min(places)], True
        if self.listener is not None:
            held = (n for x in stops for n in range(1, len(x)) if self.text.endswith(x[:n]))
            self.listener(self.text[: len(self.text) - (not self.done) * max(held, default=0)])


class Batch:
    """Rows that are decoded together, all with the same number of drawn tokens.

    A row that has ended stays until enough rows have: it is still computed, and its draws are
    ignored.
    """

    def __init__(self, rows: list[BatchRow], prompts: list[Tensor], engine: "Engine") -> None:
        self.rows, self.cache, self.model = rows, engine.cache, engine.model
        longest = max(row.request.sampling.max_new_tokens for row in rows)
        self.attention = (self.model.ops.decoding or DecodeAttention)(self.cache, prompts, longest)
        self.lay_out()

    def lay_out(self) -> None:
        """Put the rows' samplings, last ids, positions and adapter spans on the device."""
        device, drawn = self.cache.k.device, len(self.rows[0].tokens)
        samplings = [row.request.sampling for row in self.rows]
        steps = max(sampling.max_new_tokens for sampling in samplings)
        numbers = torch.stack([uniform_numbers(row.request.seed, steps) for row in self.rows])
        texts = [row.prompt + row.tokens for row in self.rows]
        self.sampler = Sampler(samplings, numbers[:, drawn:].to(device))
        self.last_ids = torch.tensor([ids[-1] for ids in texts], device=device)  # (B,)
        self.positions = torch.tensor([len(ids) - 1 for ids in texts], device=device)  # of last_ids
        self.spans = adapter_spans([row.request.adapter for row in self.rows], [1] * len(texts))

    def advance(self, drawn: Tensor) -> Tensor:
        """Add the drawn tokens (B,) to their rows; return the hidden states (B', D) after them.

        B' rows are left. A GPU computes on while Python reads the tokens: if none is left, in vain.
        """
        self.last_ids = drawn
        self.positions += 1
        sizes = [row.request.sampling.max_new_tokens - len(row.tokens) for row in self.rows]
        early = self.attention.leave_share == 1 and max(sizes) > 1
        numbers = self.attention.read(drawn)
        hidden = self.step() if early else torch.empty(0)
        for row, token in zip(self.rows, numbers(), strict=True):
            if not row.done and token < 0:
                raise UserError(NOT_FINITE)
            if not row.done:
                row.append(token)
        self.drop_finished()
        return self.step() if self.rows and not early else hidden

    def step(self) -> Tensor:
        """Return the hidden states (B, D) after the rows' last tokens."""
        return self.attention.step(self.model, self.last_ids, self.positions, self.spans)

    def drop_finished(self) -> None:
        """Drop the rows that have ended once they are many.

        The keys and values of their tokens go to the cache, for later turns.
        """
        going = [i for i, row in enumerate(self.rows) if not row.done]
        if len(going) > (1 - self.attention.leave_share) * len(self.rows):
            return
        known = max(len(row.tokens) for row in self.rows) - 1  # the newest have no keys yet
        slots, places = list[Tensor](), list[tuple[int, int]]()  # row and column of each slot
        for i, row in enumerate(self.rows):
            if row.done:
                # a row that is longer than the memory can be drawn, but not kept
                computed = (row.prompt + row.tokens[:known])[: self.cache.capacity]
                path, num_cached = self.cache.insert(row.request.adapter, computed)
                slots.append(path[num_cached:])
                places += [(i, at - len(row.prompt)) for at in range(num_cached, len(computed))]
        self.attention.compact(going, torch.tensor(places), torch.cat(slots))
        self.rows = [self.rows[i] for i in going]
        if self.rows:
            self.lay_out()


class Engine:
    """`usbrec.chat.LanguageModel` and `Ranks` over a decoder in this process."""

    def __init__(
        self, model: Decoder, tokenizer: ChatTokenizer, kv_bytes: int = 1 << 28, max_length: int = 0
    ) -> None:
        """Allocate `kv_bytes` for keys and values.

        `max_length` limits a prompt and its reply together (0: the model's positions).
        """
        positions = model.config.max_position_embeddings
        if not 0 <= max_length <= positions:
            raise UserError(f"--max-length must lie in 0 (all) to {positions}, got {max_length}")
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length or positions
        self.cache = PrefixCache(model.config, model.dtype, model.device, kv_bytes)
        self.usage = Usage()
        self.ranking: Ranking | None = None  # of the texts that were ranked last
        # of the next call, by the places of its requests: each hears its reply's text so far
        self.listeners: Mapping[int, Listener] = {}

    def clear_cache(self) -> None:
        """Drop all cached keys and values.

        A change of an adapter's weights calls for this, and for `model.ops.clear`.
        """
        self.cache.clear()

    def generate(self, requests: Requests) -> list[Reply]:
        """Return one reply per request, which depends on its own request alone.

        In bf16 and fp16 the rounding of a row depends on the batch: where two tokens are almost
        equally likely, even a greedy reply may differ between batches. An over-long prompt loses
        its oldest turns, then the beginning of its last line. Raises UserError if its system prompt
        and the reply alone exceed the limit.
        """
        self.usage.calls += 1
        listeners, self.listeners = self.listeners, {}
        rows = []
        for place, request in enumerate(requests):
            begun = self.tokenizer.beginning(request.begin) if request.begin else []
            prompt = self.prompt(request, request.sampling.max_new_tokens + len(begun)) + begun
            rows.append(BatchRow(self.tokenizer, request, prompt, begun, listeners.get(place)))
        sizes = [len(row.prompt) + row.request.sampling.max_new_tokens for row in rows]
        for batch in self.batches(sizes):
            self.decode(rows[batch])
        return [Reply(x.text, tuple(x.ids), x.ended, len(x.prompt)) for x in rows]

    @torch.inference_mode()
    def decode(self, rows: list[BatchRow]) -> None:
        """Draw the replies of rows that fit the cache together."""
        prompts = [(row.request.adapter, row.prompt) for row in rows]
        paths, states = self.prefill(prompts, [len(row.prompt) - 1 for row in rows])
        batch, hidden = Batch(rows, paths, self), torch.cat(states)  # (B, D)
        while batch.rows:
            self.usage.decoded_tokens += sum(not row.done for row in batch.rows)
            hidden = batch.advance(self.agreed(batch.sampler.draw(self.model.logits(hidden))))

    @torch.inference_mode()
    def choice_logprobs(self, requests: Requests, choices: Sequence[str]) -> list[list[float]]:
        """Return per request the unnormalised log-probability of each choice as its reply.

        A choice is scored as the token sequences that can render it, with and without a leading
        space; their probabilities add up.
        """
        self.usage.calls += 1
        variants = [self.variants(choice) for choice in choices]
        longest = max(len(ids) for group in variants for ids in group)
        prompts = [self.prompt(request, longest) for request in requests]
        # the choices without their last tokens, once each: () for single tokens
        begun = list(dict.fromkeys(ids[:-1] for group in variants for ids in group))
        scores: list[Tensor] = []
        for batch in self.batches([len(begun) * (len(ids) + longest) for ids in prompts]):
            pairs = list(zip(requests[batch], prompts[batch], strict=True))
            rows = [(asked.adapter, [*ids, *said]) for asked, ids in pairs for said in begun]
            _, states = self.prefill(rows, [len(ids) - 1 for _, ids in pairs for _ in begun])
            logits = iter(self.model.logits(torch.cat(states)).split([len(x) for x in states]))
            for _ in pairs:
                logps = {said: next(logits).float().log_softmax(-1) for said in begun}
                scores.append(torch.stack([choice_logprob(logps, group) for group in variants]))
        return self.agreed(finite(torch.stack(scores))).tolist() if scores else []

    def best_texts(self, requests: Requests, texts: Texts, k: int, tokens: int) -> list[Ranked]:
        """Return per request the k most probable texts as its reply's beginning.

        `tokens` are spent on a request, so later places may miss better texts; 0: until its result
        is exact.
        """
        self.usage.calls += 1
        if self.ranking is None or self.ranking.texts != list(texts):
            self.ranking = Ranking(self, texts)
        return self.ranking.best(requests, k, tokens)

    def variants(self, choice: str) -> list[Ids]:
        """Return the distinct token sequences that render a choice at the start of a reply."""
        found = [self.tokenizer.encode(text, continued=True) for text in (choice, " " + choice)]
        return list(dict.fromkeys(map(tuple, found)))

    def prompt(self, request: Request, new_tokens: int) -> list[int]:
        """Return the ids of a request's prompt, shortened if it is too long.

        Raises UserError if the system prompt alone leaves no room for `new_tokens`.
        """
        room = min(prompt_room(self.max_length), self.max_length - new_tokens)
        ids, was_shortened = fit_prompt(self.tokenizer, request.messages, room)
        if len(ids) + new_tokens > self.max_length:
            told = f"a prompt of {len(ids)} tokens, which cannot be shortened, and a reply of up to"
            told += f" {new_tokens} exceed the limit of {self.max_length} (--max-length, or the"
            raise UserError(f"{told} model's positions): raise it, or lower --max-new-tokens")
        self.usage.shortened += was_shortened
        return ids

    def batches(self, sizes: Sequence[int]) -> Iterator[slice]:
        """Yield slices of rows, in order, that fit the cache together; `sizes` are in tokens.

        Each counts as the longest does: while they are decoded they lie side by side.
        """
        stop = 0
        while (start := stop) < len(sizes):
            longest = itertools.accumulate(sizes[start : start + MAX_ROWS], max)
            totals = (n * size for n, size in enumerate(longest, 1))
            stop += max(1, sum(total <= self.cache.capacity for total in totals))
            yield slice(start, stop)

    def prefill(self, rows: Rows, firsts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the paths and hidden states of `decoding.prefill`; count its tokens."""
        paths, states, computed = prefill(self.model, self.cache, rows, firsts)
        self.usage.reused_tokens += sum(len(ids) for _, ids in rows) - computed
        self.usage.computed_tokens += computed
        return paths, states

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return the numbers of the first process if weights are sharded, else `numbers`.

        Processes that round differently could draw different tokens, and one would wait for the
        others for ever.
        """
        return as_first(numbers) if self.model.sharded else numbers


def default_kv_bytes(model: Decoder) -> int:
    """Return the default bytes for keys and values: a share of the device's memory.

    The share is of the whole memory, not of the free part: batches, and with them the last bits of
    the results, must not depend on other programs.
    """
    if model.device.type == "cuda":
        own = sum(x.nbytes for x in model.parameters()) // (world() if model.sharded else 1)
        size = (torch.cuda.get_device_properties(model.device).total_memory - own) // 3
    else:
        sysconf = getattr(os, "sysconf", lambda name: 0)  # Windows has none: the least is taken
        size = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE") // 32
    most = MAX_ROWS * model.config.max_position_embeddings * token_bytes(model.config, model.dtype)
    return min(max(size, 1 << 28), most)


def choice_logprob(logps: Mapping[Ids, Tensor], variants: Sequence[Ids]) -> Tensor:
    """Return the log of the variants' summed probability, a scalar.

    `logps` maps the first n - 1 tokens of a variant to the log-probabilities (n, V) of its n
    tokens.
    """
    return torch.stack([logps[x[:-1]][range(len(x)), x].sum() for x in variants]).logsumexp(0)
