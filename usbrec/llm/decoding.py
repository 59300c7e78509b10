"""Prefill and decode: the passes that compute rows of tokens over the prefix cache.

A prefill computes the missing tokens of all prompts in few passes. A decoding step computes one
token per row. Rows with the same prompt (siblings) read its keys together, G prompts of n siblings
as one rectangle. Each row also reads its own new tokens:

    prompt A  --+-- the new tokens of row 0          scores of row 0:  A | row 0
                +-- the new tokens of row 1          scores of row 1:  A | row 1
    prompt B  ----- the new tokens of row 2          scores of row 2:  B | row 2
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.llm.cache import PrefixCache
from usbrec.llm.lora import AdapterSpan
from usbrec.llm.model import Decoder, Spans, Stretch

TOKENS_PER_PASS = 2048  # bounds the memory of a prefill's activations; a GPU takes 4 times as many
COPIED_TOKENS = 2000  # of a batch's prompts; up to here a copy costs less than a second product

Rows = Sequence[tuple[str | None, list[int]]]  # (adapter, ids) each


def adapter_spans(adapters: Sequence[str | None], counts: Sequence[int]) -> list[AdapterSpan]:
    """Return the spans of a pass of successive stretches: `counts[i]` tokens of `adapters[i]`."""
    spans, stop = [], 0
    stretches = zip(adapters, counts, strict=True)
    for adapter, neighbours in itertools.groupby(stretches, key=lambda stretch: stretch[0]):
        start, stop = stop, stop + sum(count for _, count in neighbours)
        if adapter is not None:
            spans.append(AdapterSpan(adapter, start, stop))
    return spans


class Piece(NamedTuple):
    """Tokens of one row, from position `start` on, that a prefill computes in one pass."""

    adapter: str | None
    ids: list[int]
    start: int
    slots: Tensor  # (start + n,) of the row up to the piece's end


@torch.inference_mode()
def prefill(
    model: Decoder, cache: PrefixCache, rows: Rows, first_hidden: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], int]:
    """Return the rows' paths, their hidden states, and the number of tokens computed.

    A path holds the slots (n,) of a row's tokens, on the CPU. Missing tokens are computed,
    those of a shared prefix once. The hidden states (n - first_hidden, D) of a row begin at its
    position `first_hidden`. The cache holds keys and values alone, so a cached token is computed
    again if its hidden state is wanted.
    """
    if not cache.complete:
        cache.clear()
    cache.clock += 1  # a new call: no token that it uses is evicted
    for adapter, ids in rows:
        cache.find(adapter, ids)  # marks it as used: an earlier row may not evict it
    found = [cache.insert(adapter, ids) for adapter, ids in rows]
    paths = [path for path, _ in found]
    passes: list[list[Piece]] = [[]]
    place: dict[int, int] = {}  # slot -> its token's place among all tokens computed
    total, most = 0, TOKENS_PER_PASS * (1 if cache.k.device.type == "cpu" else 4)
    for i in sorted(range(len(rows)), key=lambda i: rows[i][0] or ""):  # by adapter, for few spans
        (adapter, ids), (path, num_cached) = rows[i], found[i]
        slots, start = path.tolist(), min(num_cached, first_hidden[i])
        while start < len(ids) and slots[start] in place:
            start += 1  # an earlier row of this call computes it
        place |= {slot: total + n for n, slot in enumerate(slots[start:])}
        total += len(ids) - start
        for at in range(start, len(ids), most):
            piece = Piece(adapter, ids[at : at + most], at, path[: at + most])
            if sum(len(p.ids) for p in [*passes[-1], piece]) > most:
                passes.append([])
            passes[-1].append(piece)
    hidden = torch.cat([run_pieces(model, cache, pieces) for pieces in passes])  # (N, D)
    cache.complete = True
    wanted = [path[n:].tolist() for path, n in zip(paths, first_hidden, strict=True)]
    return paths, [hidden[[place[slot] for slot in slots]] for slots in wanted], total


def run_pieces(model: Decoder, cache: PrefixCache, pieces: Sequence[Piece]) -> Tensor:
    """Return the hidden states (T, D) of the pieces' tokens, computed in one pass."""
    written = torch.cat([piece.slots[piece.start :] for piece in pieces]).to(model.device)
    # each token sees its row up to itself
    seen = (torch.ones(len(x.ids), len(x.slots), dtype=torch.bool).tril(x.start) for x in pieces)
    arranged = model.ops.arrange(list(map(Stretch, [x.slots for x in pieces], seen)))

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.k[layer], cache.v[layer]  # (H_kv, slots, d)
        keys[:, written], values[:, written] = k.transpose(0, 1), v.transpose(0, 1)
        return model.ops.attend(q, keys, values, arranged)

    ids = torch.tensor([token for piece in pieces for token in piece.ids])
    positions = torch.cat([torch.arange(piece.start, len(piece.slots)) for piece in pieces])
    spans = adapter_spans([x.adapter for x in pieces], [len(x.ids) for x in pieces])
    return model(ids.to(model.device), positions.to(model.device), attention, spans)


class DecodeAttention:
    """Attention of a decoding step: one new token per row sees the row's prompt and new tokens.

    One exact softmax runs over both. The G distinct prompts, with n seats each, are a rectangle:
    one product of (n g, d) queries with a prompt's keys serves all its siblings and the g query
    heads of a key head. If all prompts are short, each row has its own copy of the prompt's keys
    instead.
    """

    # finished rows leave once they are this share of a batch, since the keys of others are copied;
    # at 1 the next step begins before the last tokens are read
    leave_share = 0.25

    def __init__(self, cache: PrefixCache, prompts: Sequence[Tensor], new_tokens: int) -> None:
        """Take the prompts' slots; the room for new tokens grows, whatever `new_tokens` will be.

        What takes this class's place on a GPU (`Ops.decoding`) needs it beforehand.
        """
        self.cache, self.paths = cache, list(prompts)
        lengths = torch.tensor([len(path) for path in self.paths])
        self.P = int(lengths.max())
        self.copied = int(lengths.sum()) <= COPIED_TOKENS
        # keys of new tokens per layer, (H_kv, B, C, d), after those of the prompt if it is copied
        if self.copied:
            k, v = self.gather(range(len(prompts)))
        else:
            k = v = cache.k[:, :, None, :0].expand(-1, -1, len(prompts), -1, -1)  # none as yet
            self.seat()
        self.k, self.v = list(k), list(v)
        hidden = torch.arange(self.P) >= lengths[:, None]  # (B, P): beyond a row's own prompt
        bias = torch.where(hidden, -torch.inf, 0.0)[:, None]
        self.bias = bias.to(cache.k) if hidden.any() else None  # (B, 1, P)

    def seat(self) -> None:
        """Assign siblings to neighbouring seats, and gather the keys of the distinct prompts."""
        siblings: dict[int, list[int]] = {}
        for row, path in enumerate(self.paths):
            siblings.setdefault(int(path[-1]), []).append(row)
        self.n = max(map(len, siblings.values()))
        # a spare seat repeats a sibling
        rows = [row for s in siblings.values() for row in s + s[:1] * (self.n - len(s))]
        seats = [rows.index(row) for row in range(len(self.paths))]
        self.seats: list[Tensor] | None = None  # None: each row is its own seat
        if rows != list(range(len(self.paths))):
            self.seats = [torch.tensor(x, device=self.cache.k.device) for x in (rows, seats)]
        self.prompt_k = self.prompt_v = self.cache.k[:0]  # the former ones go before others come
        self.prompt_k, self.prompt_v = self.gather([s[0] for s in siblings.values()])

    def gather(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the rows' prompts, (layers, H_kv, rows, P, d) each."""
        paths = [self.paths[row] for row in rows]
        slots = torch.stack([F.pad(x, (0, self.P - len(x))) for x in paths])  # 0 is always written
        first, device = int(slots[0, 0]), self.cache.k.device
        where: slice | Tensor = slots.flatten().to(device)
        if torch.equal(slots, torch.arange(first, first + self.P)[None]):
            where = slice(first, first + self.P)  # adjacent slots: a view
        k, v = (x[:, :, where].unflatten(2, slots.shape) for x in (self.cache.k, self.cache.v))
        return k, v

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """Return rows times their prompts': (H_kv, B, g, x), (H_kv, G, x, y) -> (H_kv, B, g, y)."""
        x = x if self.seats is None else x[:, self.seats[0]]
        x = x.unflatten(1, (-1, self.n)).flatten(2, 3)  # (H_kv, G, n g, x)
        out = (x @ y).unflatten(2, (self.n, -1)).flatten(1, 2)
        return out if self.seats is None else out[:, self.seats[1]]

    def step(self, model: Decoder, ids: Tensor, positions: Tensor, spans: Spans) -> Tensor:
        """Return the hidden states (B, D) of the rows' newest tokens, ids and positions (B,)."""
        return model(ids, positions, self, spans)

    def read(self, drawn: Tensor) -> Callable[[], list[int]]:
        """Return a function that returns the drawn tokens (B,) as numbers."""
        return drawn.tolist

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, d), k and v (B, H_kv, d) of the rows' newest tokens -> (B, H, d)."""
        keys = self.k[layer] = torch.cat([self.k[layer], k.transpose(0, 1)[:, :, None]], 2)
        values = self.v[layer] = torch.cat([self.v[layer], v.transpose(0, 1)[:, :, None]], 2)
        q = q.unflatten(1, (len(keys), -1))  # (B, H_kv, g, d)
        if self.copied and len(q) == 1 and self.bias is None:  # the quickest for one row alone
            k, v = keys.transpose(0, 1), values.transpose(0, 1)
            return F.scaled_dot_product_attention(q, k, v).flatten(1, 2)
        q = q.transpose(0, 1) * q.shape[-1] ** -0.5
        scores = q @ keys.mT  # (H_kv, B, g, C)
        if not self.copied:
            scores = torch.cat([self.product(q, self.prompt_k[layer].mT), scores], -1)
        if self.bias is not None:
            scores[..., : self.P] += self.bias
        probs = scores.softmax(-1)  # in fp32 inside, whatever the dtype
        if self.copied:
            return (probs @ values).transpose(0, 1).flatten(1, 2)
        of_prompt, of_own = probs.tensor_split([self.P], -1)
        out = self.product(of_prompt, self.prompt_v[layer]) + of_own @ values
        return out.transpose(0, 1).flatten(1, 2)

    def compact(self, live: Sequence[int], places: Tensor, slots: Tensor) -> None:
        """Write the new tokens at `places` to the arena's `slots`, then keep the rows `live` alone.

        places (n, 2) holds the row and the column of each slot (n,). Keys move layer by layer, so
        that those of at most one layer exist twice.
        """
        device = self.cache.k.device
        index, slots = torch.tensor(live, dtype=torch.long, device=device), slots.to(device)
        rows, columns = places.to(device, torch.long).reshape(-1, 2).unbind(1)
        columns = columns + (self.P if self.copied else 0)
        for own, arena in ((self.k, self.cache.k), (self.v, self.cache.v)):
            for layer, x in enumerate(own):
                arena[layer][:, slots] = x[:, rows, columns]
                own[layer] = x[:, index]
        self.bias = None if self.bias is None else self.bias[index]
        self.cache.complete = True
        self.paths = [self.paths[row] for row in live]
        if live and not self.copied:
            self.seat()
