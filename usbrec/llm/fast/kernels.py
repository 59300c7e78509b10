"""Operations whose backward pass is written by hand, and attention in windows of plain products.

The base is frozen, and most of a training pass is matrix products at the processor's peak.
Autograd's additions (fp32 copies, gathers, transposed products) took two thirds of the time. Each
operation here keeps only the tensors of its gradient, computes in the dtype of the base, and gives
gradients to its trainable inputs alone.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from usbrec.llm.model import Layers, Spans, Stretches, linear, rms_norm

KEY_ALIGNMENT = 32  # a bf16 softmax over 251 keys takes twice as long as one over 256
# A rectangle's sides are multiples of it, so that few shapes occur. With odd multiples of 64
# cuDNN's gradients can be NaN where a row's scores are all very low (pytorch issue 196678).
SIDE = 128
WINDOW = 128  # queries that attend at once; with 256 a pass of 250-token trees took 10% longer

# The queries `start` to `stop`, the places (S,) of their keys, and what hides these (stop - start,
# S): 0 for a visible key, else -inf. The first place is repeated, hidden, until S is a multiple of
# KEY_ALIGNMENT.
Window = tuple[int, int, Tensor, Tensor]


class _RmsNorm(torch.autograd.Function):
    """y = w u with u = x / rms(x) and w frozen; dL/dx = (w g - u mean(w g u)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse
        grad = (grads[0] * weight).float()
        along = (unit * grad).mean(-1, keepdim=True)
        return (grad - unit.mul_(along)).mul_(inverse).to(x.dtype), None, None


def lean_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `model.rms_norm`; its gradient keeps no fp32 copy of x."""
    return _RmsNorm.apply(x, weight, eps) if torch.is_grad_enabled() else rms_norm(x, weight, eps)


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b, plus (x A_i^T) (s_i B_i)^T in the columns y_i of each adapted layer i.

    W and b hold all layers that read x, and are frozen. W comes in one piece, or a piece per layer
    where the weights are here only while their layer computes. With g = dL/dy, g_i its columns and
    l_i = g_i (s_i B_i):  dL/dx = g W + sum of l_i A_i,  dL/dA_i = l_i^T x,  and
    dL/dB_i = s_i g_i^T (x A_i^T). The l_i stand side by side, (T, R), and so do the rows A_i.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Any, bias: Tensor | None, parts: Any, *adapters: Tensor
    ) -> Tensor:
        A = torch.cat(adapters[::2]).to(x.dtype)  # (R, in)
        pairs = zip(adapters[1::2], parts, strict=True)
        B = [(lora_B * scaling).to(x.dtype) for lora_B, (_, scaling) in pairs]
        ctx.ranks = [x.shape[1] for x in B]
        low = F.linear(x, A)  # (T, R)
        out = F.linear(x, joined(weights), bias)
        for own, b, (columns, _) in zip(low.split(ctx.ranks, -1), B, parts, strict=True):
            out[:, columns].addmm_(own, b.T)
        ctx.save_for_backward(x, low, A, *B, *weights)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, n = grads[0], len(ctx.parts)
        x, low, A, *kept = ctx.saved_tensors
        B, weight = kept[:n], joined(kept[n:])
        own = [grad[:, columns] for columns, _ in ctx.parts]
        grad_low = torch.cat([g @ b for g, b in zip(own, B, strict=True)], -1)  # (T, R)
        grad_x = (grad @ weight).addmm_(grad_low, A) if ctx.needs_input_grad[0] else None
        found: list[Tensor] = []
        grad_A, lows = (grad_low.T @ x).float(), low.split(ctx.ranks, -1)
        pairs = zip(grad_A.split(ctx.ranks), lows, own, ctx.parts, strict=True)
        for own_A, own_low, g, (_, scaling) in pairs:
            found += [own_A, (own_low.T @ g).T.float() * scaling]
        return grad_x, None, None, None, *found


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the rows of all pieces as one tensor, without a copy of a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def adapted_linear(layers: Layers, weights: Sequence[Tensor], x: Tensor, spans: Spans) -> Tensor:
    """Return `model.linear`, (T, in) -> (T, outs), with gradients for x and the adapter.

    `weights` hold the rows of all layers. A training pass has one adapter for all of its rows;
    other passes use the layers' own forward.
    """
    name, start, stop = spans[0] if len(spans) == 1 else ("", 0, 0)
    parts, adapters, at = [], [], 0
    for layer in layers:
        if name in layer.lora_A and (start, stop) == (0, len(x)):
            parts.append((slice(at, at + layer.out_features), layer.configs[name].scaling))
            adapters += [layer.lora_A[name], layer.lora_B[name]]
        at += layer.out_features
    if not parts:
        return linear(layers, x, spans)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return _AdaptedLinear.apply(x, weights, joined(biases) if biases else None, parts, *adapters)


def windows(stretches: Stretches) -> list[Window]:
    """Return the stretches of a pass as windows of at most WINDOW queries.

    A window takes the keys that any of its queries sees, so that other keys cost nothing: in a tree
    of many branches most of them belong to other branches.
    """
    found, first = list[Window](), 0
    for places, visible in stretches:
        n = len(visible)
        parts = math.ceil(n / WINDOW)
        for start, stop in itertools.pairwise([n * i // parts for i in range(parts + 1)]):
            seen = visible[start:stop].any(0).nonzero()[:, 0]
            own, spare = places[seen], -len(seen) % KEY_ALIGNMENT
            hidden = torch.full((stop - start, len(seen) + spare), -torch.inf)
            hidden[:, : len(seen)].masked_fill_(visible[start:stop, seen], 0)
            keys = torch.cat([own, own[:1].expand(spare)])
            found.append((first + start, first + stop, keys, hidden))
        first += n
    return found


class WindowAttention(torch.autograd.Function):
    """`model.attend_all` on the CPU: q (T, H, d), k and v (H_kv, all keys, d) -> (T, H, d).

    softmax(q k^T / sqrt(d)) v is computed window by window, by two plain products, which take half
    to a third of the time of torch's own attention with a mask. The query heads of a key head are
    folded into the query length, so keys are neither copied nor summed per head.

    The probabilities P are kept. With g = dL/dout:  dL/dv = P^T g,  dL/dP = g v^T,
    dL/dS = P (dL/dP - sum over keys of P dL/dP),  dL/dq = dL/dS k,  dL/dk = dL/dS^T q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Window]) -> Tensor:
        out, kept = torch.empty_like(q), []
        for start, stop, keys, hidden in windows:
            scores = torch.bmm(fold(q[start:stop] * q.shape[-1] ** -0.5, len(k)), k[:, keys].mT)
            scores.unflatten(1, (-1, stop - start)).add_(hidden.to(q.dtype))
            probs = scores.softmax(-1)  # in fp32 inside, whatever the dtype
            out[start:stop] = unfold(torch.bmm(probs, v[:, keys]), stop - start)
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.windows = windows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        H_kv, scale = len(k), q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop, keys, _), probs in zip(ctx.windows, kept, strict=True):
            grad = fold(grads[0][start:stop], H_kv)
            grad_v.index_add_(1, keys, torch.bmm(probs.mT, grad))
            grad_probs = torch.bmm(grad, v[:, keys].mT)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_q[start:stop] = unfold(torch.bmm(grad_scores, k[:, keys]), stop - start) * scale
            grad_k.index_add_(1, keys, torch.bmm(grad_scores.mT, fold(q[start:stop] * scale, H_kv)))
        return grad_q, grad_k, grad_v, None


# for prompts, whose lengths vary: cuDNN's kernel is quicker, but a new shape costs it 0.1 s
PROMPTS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Rectangle(NamedTuple):
    """N neighbouring stretches, laid out for one call of torch's attention."""

    queries: Tensor | None  # (N n,) places among the pass's queries; None: a single stretch
    keys: Tensor  # (N, S) places among the keys
    bias: Tensor  # (H_kv N, 1, n, S): 0 for a visible key, else -inf
    rows: Tensor | None  # (T,) those of the (N n,) that are queries; the others fill up


def rectangles(
    stretches: Stretches, H_kv: int, dtype: torch.dtype, device: torch.device
) -> list[Rectangle]:
    """Return the stretches of a pass in one rectangle, or in many where one doubles the work."""
    found, first = list[Rectangle](), 0
    n, S = (max(x.visible.shape[axis] for x in stretches) for axis in (0, 1))
    doubles = len(stretches) * n * S > 2 * sum(x.visible.numel() for x in stretches)
    for group in [[x] for x in stretches] if doubles else [stretches]:
        sizes = [len(x.visible) for x in group]
        places = torch.arange(first, first := first + sum(sizes)).split(sizes)
        queries = padded_places(places, SIDE if len(group) > 1 else 1)  # (N, n)
        keys = padded_places([x.places for x in group], SIDE)  # (N, S)
        hidden = torch.zeros(*queries.shape, keys.shape[1], dtype=torch.bool)
        for box, x in zip(hidden, group, strict=True):  # what fills up sees all, to be a number
            box[: len(x.visible)] = F.pad(~x.visible, (0, len(box[0]) - len(x.places)), value=True)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        bias = bias.masked_fill_(hidden.to(device), -torch.inf).expand(H_kv, -1, -1, -1)
        rows = torch.cat([torch.arange(size) + i * len(queries[0]) for i, size in enumerate(sizes)])
        own = [x.to(device) if len(stretches) > 1 else None for x in (queries.flatten(), rows)]
        found.append(Rectangle(own[0], keys.to(device), bias.flatten(0, 1)[:, None], own[1]))
    return found


def padded_places(rows: Sequence[Tensor], step: int) -> Tensor:
    """Return rows (n,) as one tensor whose length is a multiple of `step`, filled with a place."""
    first = int(rows[0][0])
    table = pad_sequence(list(rows), True, first)
    return F.pad(table, (0, -table.shape[1] % step), value=first)


def attend_in_rectangles(q: Tensor, k: Tensor, v: Tensor, arranged: Sequence[Rectangle]) -> Tensor:
    """Return `model.attend_all` by torch's kernels, with no copy of the keys per query head."""
    outs = []
    for queries, keys, bias, rows in arranged:
        own = q if queries is None else q.index_select(0, queries)
        own = own.unflatten(0, (len(keys), -1)).unflatten(2, (len(k), -1))  # (N, n, H_kv, g, d)
        own = own.permute(2, 0, 3, 1, 4).flatten(0, 1)  # (H_kv N, g, n, d)
        both = (x.index_select(1, keys.flatten()).unflatten(1, keys.shape) for x in (k, v))
        own_k, own_v = (x.flatten(0, 1)[:, None].expand(-1, own.shape[1], -1, -1) for x in both)
        seen = bias.expand(-1, own.shape[1], -1, -1)
        with nullcontext() if torch.is_grad_enabled() else sdpa_kernel(PROMPTS):
            out = F.scaled_dot_product_attention(own, own_k, own_v, attn_mask=seen)
        out = out.unflatten(0, (-1, len(keys))).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1, 2)
        outs.append(out if rows is None else out.index_select(0, rows))
    return outs[0] if len(outs) == 1 else torch.cat(outs)  # (T, H, d)


def fold(x: Tensor, H_kv: int) -> Tensor:
    """Return x with the query heads of a key head in a row: (n, H_kv g, d) -> (H_kv, g n, d)."""
    return x.unflatten(1, (H_kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def unfold(x: Tensor, n: int) -> Tensor:
    """Return x with `fold` undone: (H_kv, g n, d) -> (n, H_kv g, d)."""
    return x.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)
