"""Passes of fixed shapes on a GPU, recorded once as CUDA graphs and then replayed.

A token of an 8B model takes an H200 5 ms, and Python 16 to tell it what to do; of a training pass
of the default model Python is nine tenths. A replay is one launch. Its tensors must lie where they
lay, with the shapes they had, so the rows that are decoded together have memory of their own here,
and lengths are rounded up. No row sees what the rounding adds.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usbrec.llm.cache import PrefixCache
from usbrec.llm.fast.kernels import Rectangle, attend_in_rectangles, padded_places
from usbrec.llm.lora import AdapterSpan
from usbrec.llm.model import Decoder, Ops, Spans, Stretch

COLUMNS = 128  # lengths of rows and of training passes are multiples of it
MOST_STEPS = 64  # recorded at a time: each takes some MB of the host
WORTH = 4  # tokens from which on recording a step pays
LARGE = 2**21  # tokens times width of a training pass that takes the card longer than Python


def rounded(count: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return count + -count % step


def write(keys: Tensor, values: Tensor, places: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Write k and v (B, H_kv, d) to a row and a column each of keys and values."""
    rows, columns = places
    keys[rows, :, columns], values[rows, :, columns] = k, v


class RecordedDecoding:
    """`decoding.DecodeAttention` with memory for each row, one batch after the other.

    A token stands in the column of its position. So a step is the same work for any lengths: it
    writes a column of each row, and the row sees those up to this one. Rows leave when all have
    ended. In a step, small operations are one kernel each (torch.compile).
    """

    leave_share = 1.0

    def __init__(self, ops: Ops) -> None:
        self.on_gpu = self.works = torch.cuda.is_available()
        compiled: Callable[..., Any] = partial(torch.compile, dynamic=True, disable=not self.on_gpu)
        small = {name: compiled(getattr(ops, name)) for name in ("rms_norm", "rotate", "swiglu")}
        self.ops, self.write = replace(ops, **small), compiled(write)
        # what a recorded step reads: keys and values; ids and positions of the newest tokens
        self.memory, self.inputs = torch.empty(0), torch.empty(2, 0)
        self.clear()

    def clear(self) -> None:
        """Forget the recorded steps: an adapter or the rows lie elsewhere from now on."""
        self.steps: dict[Any, tuple[Any, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def begin(self, cache: PrefixCache, prompts: Sequence[Tensor], new_tokens: int) -> Any:
        """Copy the keys and values of a batch's prompts, whose slots are given; return itself."""
        if self.on_gpu:  # settings of a thread, and the server's is not the main one
            torch.cuda.set_device(cache.k.device)
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        (L, H_kv, _, d), B = cache.k.shape, len(prompts)
        self.cache, self.recording = cache, new_tokens >= WORTH
        self.lengths = torch.tensor([len(path) for path in prompts])
        P, rows = int(self.lengths.max()), rounded(B, 8) if B > 4 else B
        shape = (2, L, rows, H_kv, rounded(P + new_tokens, COLUMNS), d)
        size, most = torch.Size(shape).numel(), self.inputs.shape[1]
        if size > len(self.memory) or rows > most or self.memory.device != cache.k.device:
            self.clear()
            self.k = self.v = self.memory = torch.empty(0)  # goes before its successor comes
            self.memory = cache.k.new_empty(size)
            self.inputs = torch.empty(2, max(rows, most), dtype=torch.long, device=cache.k.device)
        self.inputs.zero_()  # rows that only fill up stay at position 0
        # columns that no row sees as yet may hold anything but NaN, which no mask hides
        self.k, self.v = self.memory[:size].zero_().view(shape)
        slots = padded_places(prompts, 1).to(cache.k.device)  # (B, P)
        for mine, arena in ((self.k, cache.k), (self.v, cache.v)):
            for own, layers in zip(mine.split(8), arena.split(8), strict=True):  # copies of 8
                own[:, :B, :, :P] = layers[:, :, slots].transpose(1, 2)
        return self

    def step(self, model: Decoder, ids: Tensor, positions: Tensor, spans: Spans) -> Tensor:
        """Return the hidden states (B, D) of the rows' newest tokens, ids and positions (B,)."""
        # -1, which the sampler gives for NaN, is told after this step
        self.inputs[:, : len(ids)] = torch.stack([ids.clamp_min(0), positions])
        key = (*self.k.shape[1:4:2], *spans)
        if key in self.steps:
            graph, states = self.steps[key]
            graph.replay()
            return states[: len(ids)]
        done = self.compute(model, spans)
        if self.recording and self.works:
            if len(self.steps) >= MOST_STEPS:
                self.clear()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    states = self.compute(model, spans)
                self.steps[key] = graph, states
            except RuntimeError as error:
                self.works = False
                warnings.warn(f"replies are decoded without CUDA graphs: {error}", stacklevel=2)
        return done[: len(ids)]

    def compute(self, model: Decoder, spans: Spans) -> Tensor:
        """Return the hidden states (rows, D) of `inputs`, with the small operations compiled."""
        _, rows, _, columns, _ = self.k.shape
        ids, positions = self.inputs[:, :rows]
        self.places = torch.arange(rows, device=ids.device), positions
        hidden = torch.arange(columns, device=ids.device) > positions[:, None]
        bias = torch.zeros_like(hidden, dtype=self.k.dtype).masked_fill_(hidden, -torch.inf)
        self.bias, own = bias[:, None, None], model.ops  # (rows, 1, 1, columns)
        model.ops = self.ops
        try:
            return model(ids, positions, self, spans)
        finally:
            model.ops = own

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, d), k and v (B, H_kv, d) of the rows' newest tokens -> (B, H, d)."""
        keys, values = self.k[layer], self.v[layer]  # (rows, H_kv, columns, d)
        self.write(keys, values, self.places, k, v)
        q = q.unflatten(1, (keys.shape[1], -1))  # (B, H_kv, g, d)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias).flatten(1, 2)

    def read(self, drawn: Tensor) -> Callable[[], list[int]]:
        """Return what gives the drawn tokens (B,) as numbers, without waiting for later work."""
        if not self.on_gpu:
            return drawn.tolist
        numbers = torch.empty(len(drawn), dtype=torch.long, pin_memory=True)
        numbers.copy_(drawn, non_blocking=True)
        copied = torch.cuda.current_stream().record_event()

        def wait() -> list[int]:
            copied.synchronize()
            return numbers.tolist()

        return wait

    def compact(self, live: Sequence[int], places: Tensor, slots: Tensor) -> None:
        """Write the new tokens at `places` to the arena's `slots`; all rows have ended."""
        assert not live, "rows leave when all have ended"
        rows, columns = places.long().reshape(-1, 2).unbind(1)
        columns = columns + self.lengths[rows]
        rows, columns, slots = (x.to(self.k.device) for x in (rows, columns, slots))
        for own, arena in ((self.k, self.cache.k), (self.v, self.cache.v)):
            arena[:, :, slots] = own[:, rows, :, columns].permute(1, 2, 0, 3)
        self.cache.complete = True


class TrainingBody(nn.Module):
    """The decoder on one row of `room` tokens, whose attention is a bias alone."""

    def __init__(self, model: Decoder, adapter: str, room: int) -> None:
        super().__init__()
        self.model, self.spans = model, [AdapterSpan(adapter, 0, room)]
        self.keys = torch.arange(room, device=model.device)[None]

    def forward(self, ids: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """(room,), (room,), (H_kv, 1, room, room) -> (room, D)."""
        arranged = [Rectangle(None, self.keys, bias, None)]

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_in_rectangles(q, k.transpose(0, 1), v.transpose(0, 1), arranged)

        return self.model(ids, positions, attention, self.spans)


class RecordedLearning:
    """`Decoder.forward` of training passes with one adapter: short ones are recorded."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.works = model, torch.cuda.is_available()
        self.learning: list[nn.Parameter] = []

    def __call__(self, ids: Tensor, positions: Tensor, attention: Any, spans: Spans) -> Tensor:
        """Return the hidden states, (T,) and (T,) -> (T, D)."""
        model, T = self.model, len(ids)
        small = self.works and T * model.config.hidden_size <= LARGE
        if not small or model.checkpointing or not torch.is_grad_enabled():
            return model(ids, positions, attention, spans)
        learning = [x for x in model.parameters() if x.requires_grad]
        if list(map(id, learning)) != list(map(id, self.learning)):
            self.learning, self.passes = learning, dict[int, Any]()
            self.grads = [torch.zeros_like(x) for x in learning]
            self.pool = torch.cuda.graph_pool_handle()
        room = rounded(T, COLUMNS)
        # spare tokens see themselves: one that sees nothing would be no number
        trees = [*(x.visible for x in attention.stretches), torch.eye(room - T)]
        [whole] = model.ops.arrange([Stretch(torch.arange(room), torch.block_diag(*trees).bool())])
        inputs = (*(F.pad(x, (0, room - T)) for x in (ids, positions)), whole.bias.contiguous())
        if room not in self.passes:
            body = TrainingBody(model, spans[0].adapter, room)
            record = torch.cuda.make_graphed_callables
            try:
                self.passes[room] = record(body, inputs, num_warmup_iters=1, pool=self.pool)
            except RuntimeError as error:
                self.works = False
                warnings.warn(f"passes are learned without CUDA graphs: {error}", stacklevel=2)
                return model(ids, positions, attention, spans)
        if learning[0].grad is None:  # else autograd keeps a replay's gradient, not a copy
            torch._foreach_zero_(self.grads)
            for parameter, grad in zip(learning, self.grads, strict=True):
                parameter.grad = grad
        return self.passes[room](*inputs)[:T]
