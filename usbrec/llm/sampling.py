"""Prefill, decode, draw: passes over the shared memory, and one token a row from its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from usbrec.chat import Sampling
from usbrec.llm.cache import Group, Path, PrefixCache, share_groups
from usbrec.llm.lora import Route
from usbrec.llm.model import Decoder
from usbrec.llm.packing import Block, attend, causal_tail

TOKENS_PER_PASS = 4096  # bounds the memory of a prefill's activations


@dataclass(frozen=True)
class Span:
    """Tokens of one row, `start` to its `stop`, to be computed in a prefill."""

    adapter: str | None
    ids: list[int]
    slots: Tensor  # (stop,) of the row up to the span's end
    start: int


class PrefillAttention:
    """Writes the pass's keys and values into the arena, then lets every block read its path."""

    def __init__(self, cache: PrefixCache, spans: Sequence[Span]) -> None:
        device = cache.k.device
        self.cache = cache
        self.written = torch.cat([s.slots[s.start :] for s in spans]).to(device)
        self.blocks: list[Block] = []
        for span in spans:
            start = self.blocks[-1].stop if self.blocks else 0
            self.blocks.append(Block(start, start + len(span.ids), span.slots.to(device)))
        self.masks = [causal_tail(block) for block in self.blocks]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, H_kv, d) -> (T, H, d)."""
        keys, values = self.cache.k[layer], self.cache.v[layer]  # (slots, H_kv, d)
        keys[self.written], values[self.written] = k, v
        out = [
            attend(q[b.start : b.stop], keys[b.path], values[b.path], mask)
            for b, mask in zip(self.blocks, self.masks, strict=True)
        ]
        return torch.cat(out)


def routes_of(adapters: Sequence[str | None], counts: Sequence[int]) -> list[Route]:
    """Return the routes of a row whose stretches of `counts` tokens belong to `adapters`."""
    routes: list[Route] = []
    at = 0
    for adapter, count in zip(adapters, counts, strict=True):
        if adapter is not None:
            if routes and routes[-1].adapter == adapter and routes[-1].stop == at:
                routes[-1] = routes[-1]._replace(stop=at + count)
            else:
                routes.append(Route(adapter, at, at + count))
        at += count
    return routes


@torch.no_grad()
def prefill(
    model: Decoder,
    cache: PrefixCache,
    rows: Sequence[tuple[str | None, list[int]]],
    since: Sequence[int],
) -> tuple[list[Path], list[Tensor], int]:
    """Compute what the memory lacks of the rows (adapter, ids), each beginning once.

    Returns the rows' paths, the hidden states (n - since, D) of each row from position `since` on,
    and the number of tokens computed. A wanted position that is already cached is computed again,
    since only keys and values are kept.
    """
    paths = [cache.insert(adapter, ids) for adapter, ids in rows]
    spans: list[Span] = []
    where: dict[int, int] = {}  # slot -> position in the concatenated hidden states
    order = sorted(range(len(rows)), key=lambda i: rows[i][0] or "")  # adapters lie together
    count = 0
    for i in order:
        adapter, ids = rows[i]
        slots = paths[i].slots
        begin = min(paths[i].known, since[i])
        while begin < len(ids) and int(slots[begin]) in where:
            begin += 1  # an earlier row of this call computes it
        for start in range(begin, len(ids), TOKENS_PER_PASS):
            stop = min(start + TOKENS_PER_PASS, len(ids))
            spans.append(Span(adapter, ids[start:stop], slots[:stop], start))
            for slot in slots[start:stop].tolist():
                where[slot] = count
                count += 1
    hidden = run_spans(model, cache, spans)
    states = [
        hidden[[where[slot] for slot in path.slots[first:].tolist()]]
        for path, first in zip(paths, since, strict=True)
    ]
    return paths, states, count


def run_spans(model: Decoder, cache: PrefixCache, spans: Sequence[Span]) -> Tensor:
    """Run the spans in passes of bounded size; earlier spans may be read by later ones. (N, D)."""
    hidden: list[Tensor] = []
    batch: list[Span] = []
    for span in [*spans, None]:
        size = sum(len(s.ids) for s in batch)
        if batch and (span is None or size + len(span.ids) > TOKENS_PER_PASS):
            hidden.append(run_pass(model, cache, batch))
            batch = []
        if span is not None:
            batch.append(span)
    return torch.cat(hidden)


def run_pass(model: Decoder, cache: PrefixCache, spans: Sequence[Span]) -> Tensor:
    """One forward over the spans' tokens, (T,) -> (T, D)."""
    input_ids = torch.tensor([i for s in spans for i in s.ids], device=model.device)
    position_ids = torch.cat([torch.arange(s.start, len(s.slots)) for s in spans])
    routes = routes_of([s.adapter for s in spans], [len(s.ids) for s in spans])
    attention = PrefillAttention(cache, spans)
    return model(input_ids, position_ids.to(model.device), attention, routes)


@dataclass
class Bucket:
    """Groups of about equal size, whose shared beginnings are read as one batched product."""

    k: Tensor  # (layers, G, H_kv, P, d)
    v: Tensor
    bias: Tensor  # (G, 1, 1, P) fp32: 0 where a group's beginning goes, -inf past its end
    rows: Tensor  # (G * n,) the row whose query stands there; padded with any row
    seats: Tensor  # (rows in the bucket,) where each of its rows sits among the G * n
    members: Tensor  # (rows in the bucket,) those rows


class DecodeAttention:
    """One new token a row: a product with the group's beginning, one with the row's own tail.

    Both softmaxes are exact parts of one: with their log-sums a and b, the first part's share is
    sigmoid(a - b). Query heads of one key head, and the siblings of a group, are folded into the
    query length. Tails are right-aligned where decoding starts, so a step writes one column.
    """

    def __init__(self, cache: PrefixCache, paths: Sequence[Path], new_tokens: int) -> None:
        self.cache = cache
        self.scale = cache.k.shape[-1] ** -0.5
        groups = share_groups(paths)
        rests = [0] * len(paths)  # the tokens of each row's prompt beyond its group's beginning
        for group in groups:
            for row in group.rows:
                rests[row] = len(paths[row].slots) - group.length
        self.column = self.first = max(rests)
        L, _, H_kv, d = cache.k.shape
        shape = (L, len(paths), H_kv, self.first + new_tokens, d)
        self.k, self.v = (
            torch.zeros(shape, dtype=x.dtype, device=x.device) for x in (cache.k,) * 2
        )
        self.bias = torch.zeros(len(paths), 1, 1, shape[3], device=cache.k.device)
        for row, rest in enumerate(rests):
            self.bias[row, ..., : self.first - rest] = -torch.inf
            if rest:
                slots = paths[row].slots[-rest:].to(cache.k.device)
                self.k[:, row, :, self.first - rest : self.first] = cache.k[:, slots].transpose(
                    1, 2
                )
                self.v[:, row, :, self.first - rest : self.first] = cache.v[:, slots].transpose(
                    1, 2
                )
        self.groups, self.paths = groups, list(paths)
        self.buckets = self.make_buckets()

    def make_buckets(self) -> list[Bucket]:
        """Gather the beginnings of groups of 1, 2, 3-4, 5-8, ... rows."""
        sizes: dict[int, list[Group]] = {}
        for group in self.groups:
            sizes.setdefault((len(group.rows) - 1).bit_length(), []).append(group)
        return [self.make_bucket(groups) for groups in sizes.values()]

    def make_bucket(self, groups: Sequence[Group]) -> Bucket:
        """Pad the groups' beginnings to the longest and their rows to the largest."""
        device = self.cache.k.device
        P, n = max(g.length for g in groups), max(len(g.rows) for g in groups)
        slots = torch.zeros(len(groups), P, dtype=torch.long)
        bias = torch.zeros(len(groups), 1, 1, P)
        for i, group in enumerate(groups):
            slots[i, : group.length] = self.paths[group.rows[0]].slots[: group.length]
            bias[i, ..., group.length :] = -torch.inf
        flat = slots.flatten().to(device)
        k, v = (
            x[:, flat].unflatten(1, slots.shape).transpose(2, 3).contiguous()
            for x in (self.cache.k, self.cache.v)
        )  # (L, G, H_kv, P, d)
        seats = [i * n + j for i, group in enumerate(groups) for j in range(len(group.rows))]
        rows = torch.zeros(len(groups) * n, dtype=torch.long)
        members = torch.tensor([row for group in groups for row in group.rows])
        rows[seats] = members
        return Bucket(
            k,
            v,
            bias.to(device),
            rows.to(device),
            torch.tensor(seats, device=device),
            members.to(device),
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, d), k and v (B, H_kv, d) of the rows' newest tokens -> (B, H, d)."""
        tail_k, tail_v = self.k[layer], self.v[layer]  # (B, H_kv, C, d)
        tail_k[:, :, self.column], tail_v[:, :, self.column] = k, v
        q = q.unflatten(1, (k.shape[1], -1)) * self.scale  # (B, H_kv, g, d)
        end = self.column + 1
        tail, tail_sum = part(q, tail_k[:, :, :end], tail_v[:, :, :end], self.bias[..., :end])
        head, head_sum = torch.empty_like(tail), torch.empty_like(tail_sum)
        for bucket in self.buckets:
            G, H_kv, _, d = bucket.k[layer].shape
            folded = q[bucket.rows].view(G, -1, H_kv, q.shape[2], d).transpose(1, 2)
            n = folded.shape[2]
            out, log_sum = part(
                folded.flatten(2, 3), bucket.k[layer], bucket.v[layer], bucket.bias
            )  # (G, H_kv, n * g, d)
            out, log_sum = (
                x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)[bucket.seats]
                for x in (out, log_sum)
            )
            head[bucket.members], head_sum[bucket.members] = out, log_sum
        share = torch.sigmoid(head_sum - tail_sum).to(tail.dtype)
        return (tail + (head - tail) * share).flatten(1, 2)

    def keep(self, live: Sequence[int]) -> None:
        """Let only the rows `live` go on; their order is their new number."""
        number = {row: i for i, row in enumerate(live)}
        index = torch.tensor(live, device=self.k.device)
        self.k, self.v, self.bias = self.k[:, index], self.v[:, index], self.bias[index]
        self.paths = [self.paths[row] for row in live]
        remaining = [
            Group([number[r] for r in group.rows if r in number], group.length)
            for group in self.groups
        ]
        self.groups = [group for group in remaining if group.rows]
        self.buckets = self.make_buckets()


def part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys, and the log of its softmax's denominator.

    q (N, H_kv, m, d) scaled, k and v (N, H_kv, S, d), bias (N, 1, 1, S) -> (N, H_kv, m, d) and
    (N, H_kv, m, 1) in fp32.
    """
    scores = (q @ k.transpose(-1, -2)).float() + bias
    log_sum = scores.logsumexp(-1, keepdim=True)
    return (scores - log_sum).exp().to(v.dtype) @ v, log_sum


def draw(logits: Tensor, samplings: Sequence[Sampling], uniforms: Tensor) -> Tensor:
    """Draw one token a row: logits (B, V) in fp32, uniforms (B,) in [0, 1) -> (B,).

    One uniform number a row against the cumulative sum of its probabilities; temperature 0 takes
    the most probable token, the lowest id on a tie.
    """
    tokens = logits.argmax(-1)
    hot = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if not hot:
        return tokens
    rows = torch.tensor(hot, device=logits.device)
    chosen = [samplings[i] for i in hot]
    temperatures = torch.tensor([s.temperature for s in chosen], device=logits.device)
    probs = torch.softmax(logits[rows] / temperatures[:, None], dim=-1)
    if any(s.top_k or s.top_p < 1 for s in chosen):
        probs = truncate(probs, chosen)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    targets = uniforms.to(total)[rows, None] * total
    # rounding must not step past the last token that has a probability
    targets = torch.minimum(targets, torch.nextafter(total, torch.zeros_like(total)))
    tokens[rows] = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return tokens


def truncate(probs: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Zero what top_k and top_p leave out, (B, V) -> (B, V); top_p keeps the token that crosses."""
    V = probs.shape[-1]
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([s.top_k or V for s in samplings], device=probs.device)
    top_p = torch.tensor([s.top_p for s in samplings], device=probs.device)
    before = ordered.cumsum(-1) - ordered
    keep = torch.arange(V, device=probs.device) < top_k[:, None]
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    return torch.zeros_like(probs).scatter(1, index, ordered * keep)


def uniform_numbers(seed: int, count: int) -> np.ndarray:
    """Return the `count` uniform numbers of one row, by its own seed."""
    return np.random.Generator(np.random.Philox(seed)).random(count)
