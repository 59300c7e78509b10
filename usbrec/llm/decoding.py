"""Prefill and decode: how the tokens of a pass see what the shared memory holds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.llm.cache import Group, Path, PrefixCache, share_groups
from usbrec.llm.kernels import KEY_ALIGNMENT, plain_attention, visibility_bias
from usbrec.llm.lora import Route
from usbrec.llm.model import Decoder
from usbrec.llm.packing import CPU_WINDOW, attend

TOKENS_PER_PASS = 2048  # bounds the memory of a prefill's activations
SDPA_KEYS = 900  # of all rows; for fewer, torch's attention is quicker than plain products
COLUMNS = 4  # added to the rows' tails at a time, and as many more for each 32 columns there are


@dataclass(frozen=True)
class Span:
    """Tokens of one row, `start` to its `stop`, to be computed in a prefill."""

    adapter: str | None
    ids: list[int]
    slots: Tensor  # (stop,) of the row up to the span's end
    start: int


@dataclass(frozen=True)
class Block:
    """Queries `start` to `stop` of a pass see the keys at `path`, of their own what came before."""

    start: int
    stop: int
    path: Tensor  # (S,) slots, the queries' own last; on the CPU padded
    mask: Tensor  # (n, S): what is seen, or on the CPU its bias


class PrefillAttention:
    """Writes the pass's keys and values into the arena, then lets every block read its path."""

    def __init__(self, cache: PrefixCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.on_cpu = cache.k.device.type == "cpu"
        self.written = torch.cat([s.slots[s.start :] for s in spans]).to(cache.k.device)
        self.blocks: list[Block] = []
        most = CPU_WINDOW if self.on_cpu else TOKENS_PER_PASS
        for span in spans:
            start = self.blocks[-1].stop if self.blocks else 0
            for own in range(0, len(span.ids), most):
                n = min(most, len(span.ids) - own)
                path = span.slots[: span.start + own + n]
                self.blocks.append(self.block(start + own, n, path.to(cache.k.device)))

    def block(self, start: int, n: int, path: Tensor) -> Block:
        """Let n queries from `start` on see all of a path, and of its last n what came before."""
        S = len(path)
        mask = torch.ones(n, S, dtype=torch.bool, device=path.device).tril(S - n)
        if self.on_cpu:
            mask = visibility_bias(mask, self.cache.k.dtype)
            path = torch.cat([path, path[:1].expand(mask.shape[1] - S)])
        return Block(start, start + n, path, mask)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, H_kv, d) -> (T, H, d)."""
        keys, values = self.cache.k[layer], self.cache.v[layer]  # (H_kv, slots, d)
        keys[:, self.written], values[:, self.written] = k.transpose(0, 1), v.transpose(0, 1)
        out = []
        for block in self.blocks:
            own = q[block.start : block.stop]
            path_k, path_v = keys[:, block.path], values[:, block.path]
            if self.on_cpu:
                out.append(plain_attention(own, path_k, path_v, block.mask)[0])
            else:
                out.append(attend(own, path_k.transpose(0, 1), path_v.transpose(0, 1), block.mask))
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


@torch.inference_mode()
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
    for adapter, ids in rows:
        cache.find(adapter, ids)  # so that no row drives out what a later one shall use
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


@dataclass(frozen=True)
class Bucket:
    """Neighbouring groups of `n` rows each, whose shared beginnings are one batched product."""

    rows: slice  # G groups of n rows
    n: int
    k: Tensor  # (layers, H_kv, G, P, d)
    v: Tensor

    @property
    def length(self) -> int:
        """The tokens of the longest beginning, P."""
        return self.k.shape[3]

    def product(self, x: Tensor, keys: Tensor) -> Tensor:
        """Multiply its rows by their group's keys: (H_kv, B, g, x), (H_kv, G, x, y) -> (..., y)."""
        own = x[:, self.rows].unflatten(1, (-1, self.n)).flatten(2, 3)  # (H_kv, G, n g, x)
        return (own @ keys).unflatten(2, (self.n, -1)).flatten(1, 2)


class DecodeAttention:
    """One new token a row: a product with its group's beginning, one with the row's own tail.

    One exact softmax runs over both. Query heads of one key head, and the siblings of a group, are
    folded into the query length. Tails are right-aligned where decoding starts, so a step writes
    one column; columns are added some at a time, because a product with a part of the columns would
    copy it first. Tails are moved layer by layer, so that they never exist twice. `order` tells
    which of the paths each row has become: see `arrange`.
    """

    def __init__(self, cache: PrefixCache, paths: Sequence[Path]) -> None:
        self.cache = cache
        self.scale = cache.k.shape[-1] ** -0.5
        self.order, self.groups = arrange(share_groups(paths))
        self.paths = [paths[i] for i in self.order]
        lengths = [len(path.slots) for path in self.paths]
        # the most tokens that a row's prompt has beyond its group's beginning
        self.column = self.first = max(
            lengths[row] - group.length for group in self.groups for row in group.rows
        )
        self.positions = torch.tensor(lengths, device=cache.k.device)  # (B,) of the next tokens
        # the rows' rests, right-aligned; what lies before a rest is read and masked
        back = torch.arange(-self.first, 0)
        places = torch.stack([p.slots[(len(p.slots) + back).clamp(min=0)] for p in self.paths])
        places = places.to(cache.k.device)
        self.k, self.v = (
            [layer[:, places] for layer in arena]  # (H_kv, B, C, d)
            for arena in (cache.k, cache.v)
        )
        self.group_rows()

    def group_rows(self) -> None:
        """Gather the beginnings of neighbouring groups of one size, and mask what no row has."""
        self.buckets: list[Bucket] = []
        for n, run in itertools.groupby(self.groups, key=lambda group: len(group.rows)):
            self.buckets.append(self.make_bucket(n, list(run)))
        self.P = max(bucket.length for bucket in self.buckets)
        bias = torch.zeros(len(self.paths), 1, self.P + self.first)
        for group in self.groups:
            for row in group.rows:
                rest = len(self.paths[row].slots) - group.length
                bias[row, :, group.length : self.P + self.first - rest] = -torch.inf
        # None: every row has all that is read
        self.bias = bias.to(self.cache.k) if bias.any() else None
        self.hidden: Tensor | None = None  # the same for few rows
        self.scores: Tensor | None = None

    def make_bucket(self, n: int, groups: Sequence[Group]) -> Bucket:
        """Pad the groups' beginnings to the longest; that of one group is read where it lies."""
        rows = slice(groups[0].rows[0], groups[-1].rows[-1] + 1)
        P = max(group.length for group in groups)
        slots = torch.zeros(len(groups), P, dtype=torch.long)
        for i, group in enumerate(groups):
            slots[i, : group.length] = self.paths[group.rows[0]].slots[: group.length]
        flat = slots.flatten()
        if len(groups) == 1 and P and bool((flat.diff() == 1).all()):
            where: Tensor | slice = slice(int(flat[0]), int(flat[0]) + P)  # a view, no copy
        else:
            where = flat.to(self.cache.k.device)
        k, v = (x[:, :, where].unflatten(2, slots.shape) for x in (self.cache.k, self.cache.v))
        return Bucket(rows, n, k, v)

    def open_column(self) -> None:
        """Make room for the next column."""
        if self.column == self.k[0].shape[2]:
            more = COLUMNS * (1 + self.column // 32)
            for tails in (self.k, self.v):
                for layer, tail in enumerate(tails):
                    tails[layer] = F.pad(tail, (0, 0, 0, more))
            self.scores = None
        if self.bias is not None:  # as wide as what is written
            self.hidden = F.pad(self.bias, (0, self.column + 1 - self.first))[:, None]

    def close_column(self) -> None:
        """Go on to the next column, now that every layer has written this one."""
        self.column += 1
        self.positions += 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, d), k and v (B, H_kv, d) of the rows' newest tokens -> (B, H, d)."""
        keys, values = self.k[layer], self.v[layer]  # (H_kv, B, C, d)
        keys[:, :, self.column], values[:, :, self.column] = k.transpose(0, 1), v.transpose(0, 1)
        q = q.unflatten(1, (len(keys), -1))  # (B, H_kv, g, d)
        if not self.P and len(q) * (self.column + 1) <= SDPA_KEYS:
            return self.read_singly(q, keys, values).flatten(1, 2)
        return self.read(layer, q.transpose(0, 1), keys, values).transpose(0, 1).flatten(1, 2)

    def read_singly(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Let few rows read their tails, q (B, H_kv, g, d), 2 x (H_kv, B, C, d) -> as q."""
        k, v = (x[:, :, : self.column + 1].transpose(0, 1) for x in (keys, values))
        return F.scaled_dot_product_attention(q, k, v, self.hidden, scale=self.scale)

    def read(self, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Let all rows read their beginnings and tails, (H_kv, B, g, d) -> the same.

        The rows' key heads are one batch dimension of plain products, which take their operands as
        they lie. Scores of what a row does not have are -inf from the start.
        """
        P, C, written = self.P, keys.shape[2], self.column + 1
        if self.scores is None:
            S = -(-(P + C) // KEY_ALIGNMENT) * KEY_ALIGNMENT
            self.scores = q.new_full((*q.shape[:3], S), -torch.inf)
        q = torch.mul(q, self.scale, out=torch.empty_like(q, memory_format=torch.contiguous_format))
        own = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT)  # (H_kv B, g, C)
        self.scores[..., P : P + written] = own.view(*q.shape[:3], C)[..., :written]
        shared = [bucket for bucket in self.buckets if bucket.length]
        for bucket in shared:
            of_group = bucket.product(q, bucket.k[layer].mT)
            self.scores[:, bucket.rows, :, : bucket.length] = of_group
        if self.bias is not None:
            self.scores[..., : P + self.first] += self.bias
        probs = self.scores.softmax(-1)  # in fp32 inside, whatever the dtype
        out = torch.bmm(probs[..., P : P + C].flatten(0, 1), values.flatten(0, 1)).view(q.shape)
        for bucket in shared:
            out[:, bucket.rows] += bucket.product(probs[..., : bucket.length], bucket.v[layer])
        return out

    def keep(self, live: Sequence[int], seats: Tensor, columns: Tensor, slots: Tensor) -> list[int]:
        """Let only the rows `live` go on; return them in their new order.

        What the tails of `seats` hold in `columns` goes to the memory's `slots`.
        """
        wanted = set(live)
        groups = [
            Group([row for row in group.rows if row in wanted], group.length)
            for group in self.groups
        ]
        order, self.groups = arrange([group for group in groups if group.rows])
        index = torch.tensor(order, dtype=torch.long, device=self.positions.device)
        self.buckets = []  # frees their copies before the tails are moved
        for tails, arena in ((self.k, self.cache.k), (self.v, self.cache.v)):
            for layer, tail in enumerate(tails):
                arena[layer][:, slots] = tail[:, seats, columns]
                tails[layer] = tail[:, index]
        self.positions = self.positions[index]
        self.paths = [self.paths[row] for row in order]
        if order:
            self.group_rows()
        return order


def arrange(groups: Sequence[Group]) -> tuple[list[int], list[Group]]:
    """Let groups, and groups of one size, lie together: the rows' order, the groups in it."""
    order: list[int] = []
    arranged: list[Group] = []
    for group in sorted(groups, key=lambda group: len(group.rows)):
        start = len(order)
        order += group.rows
        arranged.append(Group(list(range(start, len(order))), group.length))
    return order, arranged
