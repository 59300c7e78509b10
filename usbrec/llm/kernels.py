"""Pieces of the decoder whose backward pass is written by hand.

The base is frozen and most of a training pass is matrix products that run at the processor's peak;
what autograd adds around them (fp32 copies, gathers, products with a transposed layout) took two
thirds of the time. Here a piece keeps only what its gradient needs, computes in the base's dtype,
and gives the gradients of exactly its trainable inputs. Every function works without gradients, on
any device, and equals its plain formula to rounding.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_ALIGNMENT = 32  # a bf16 softmax over 251 keys takes twice as long as one over 256


def has_order(weight: Tensor) -> bool:
    """Tell whether the processor's kernels have an order of their own for such a weight."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def ordered(weight: Tensor) -> Tensor | None:
    """Return a frozen weight (out, in) as the processor's bf16 kernels read it, or None.

    A product of few rows takes as long as the weight takes to be read, and reads it a third faster
    in this order; one of many rows would order it by itself. None: another device or dtype.
    """
    if not has_order(weight):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def quick_form(weight: Tensor) -> Tensor:
    """Return the weight as `ordered` makes it, or as it is where there is no such order."""
    found = ordered(weight)
    return weight if found is None else found


def quick_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (n, out) for x (n, in) and a weight, plain or as `ordered` has made it."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _AdaptedProduct(torch.autograd.Function):
    """y = x W^T + b + (x A^T) (s B)^T with W and b frozen.

    With g = dL/dy and l = g (s B):  dL/dx = g W + l A,  dL/dA = l^T x,  dL/dB = s g^T (x A^T).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), (lora_B * scaling).to(x.dtype)
        low = F.linear(x, A)  # (T, r)
        ctx.save_for_backward(x, weight, low, A, B)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(low, B.T)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, low, A, B = ctx.saved_tensors
        grad_low = grad @ B  # (T, r)
        grad_x = (grad @ weight).addmm_(grad_low, A) if ctx.needs_input_grad[0] else None
        grad_A = (grad_low.T @ x).float()
        grad_B = (low.T @ grad).T.float() * ctx.scaling
        return grad_x, None, None, grad_A, grad_B, None


def adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return W x + b + scaling * B (A x): x (T, in), A (r, in), B (out, r) -> (T, out).

    A and B are fp32 masters with fp32 gradients; their products are made in the dtype of `x`.
    """
    return _AdaptedProduct.apply(x, weight, bias, lora_A, lora_B, scaling)


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    """A number where it is used: to make it anew takes as long as the operation does."""
    return torch.tensor(value, device=device)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide, size = x.float(), _constant(float(x.shape[-1]), x.device)
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse = torch.addcdiv(_constant(eps, x.device), square, size).rsqrt_()  # (..., 1)
    return torch.mul(wide, inverse, out=torch.empty_like(x)).mul_(weight), inverse


class _RmsNorm(torch.autograd.Function):
    """y = w u with u = x / rms(x) and w frozen; dL/dx = (w g - u mean(w g u)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse
        grad = (grads[0] * weight).float()
        along = (unit * grad).mean(-1, keepdim=True)
        return (grad - unit.mul_(along)).mul_(inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, the mean square in fp32."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)
    return _normed(x, weight, eps)[0]


def rotary_tables(angles: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines, (T, 1, 2 r) each, for the angles (T, 1, r) of `rotate`."""
    if interleaved:
        signed = torch.stack([-angles, angles], -1).flatten(-2)
    else:
        signed = torch.cat([-angles, angles], -1)
    return signed.cos(), signed.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if cos.shape[-1] < x.shape[-1]:
        turning, still = x.tensor_split([cos.shape[-1]], -1)
        return torch.cat([_turn(turning, cos, sin, interleaved), still], -1)
    if interleaved:
        partners = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partners = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, partners, sin)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin, ctx.interleaved), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first 2 r dimensions of each head of x (T, H, d) by the `rotary_tables`' angles.

    Pairs are (0, r), (1, r + 1)..., or (0, 1), (2, 3)... if `interleaved`.
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, interleaved)
    return _turn(x, cos, sin, interleaved)


def fold(x: Tensor, H_kv: int) -> Tensor:
    """Lay the g query heads of each key head in a row: (n, H_kv g, d) -> (H_kv, g n, d)."""
    return x.unflatten(1, (H_kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def unfold(x: Tensor, n: int) -> Tensor:
    """Undo `fold`: (H_kv, g n, d) -> (n, H_kv g, d)."""
    return x.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)


def visibility_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a key is seen and -inf elsewhere, (n, keys) -> (n, S) with S aligned."""
    n, keys = visible.shape
    S = -(-keys // KEY_ALIGNMENT) * KEY_ALIGNMENT
    bias = torch.full((n, S), -torch.inf, dtype=dtype, device=visible.device)
    bias[:, :keys].masked_fill_(visible, 0)
    return bias


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(d) + bias) v (n, H, d) and the probabilities (H_kv, g n, S).

    q (n, H, d), k and v (H_kv, S, d), bias (n, S). Query heads are folded into the query length, so
    keys are neither copied nor summed per head. On the CPU two plain products take half to a third
    of the time of torch's own attention with a mask.
    """
    n, H_kv = len(q), len(k)
    scores = torch.bmm(fold(q * q.shape[-1] ** -0.5, H_kv), k.mT)
    scores.unflatten(1, (-1, n)).add_(bias)
    probs = scores.softmax(-1)  # in fp32 inside, whatever the dtype
    return unfold(torch.bmm(probs, v), n), probs


def heads_first(x: Tensor, S: int) -> Tensor:
    """(n, H_kv, d) -> (H_kv, S, d) with zeros after the first n keys."""
    out = x.new_zeros(x.shape[1], S, x.shape[2])
    out[:, : len(x)] = x.transpose(0, 1)
    return out


class Window:
    """Queries `start` to `stop` of a row see, of the keys `first` to `stop`, those in `visible`.

    `visible` is (stop - start, stop - first). No query may see keys beyond `stop`.
    """

    def __init__(self, first: int, start: int, stop: int, visible: Tensor) -> None:
        assert visible.shape == (stop - start, stop - first), "a row a query, a column a key"
        self.first, self.start, self.stop, self.visible = first, start, stop, visible
        self.hidden: Tensor | None = None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return 0 where a key is seen and -inf elsewhere, (n, S) with S aligned."""
        if self.hidden is None or self.hidden.dtype != dtype:
            self.hidden = visibility_bias(self.visible, dtype)
        return self.hidden


class _WindowAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v, window by window, the probabilities kept for the gradient.

    With P the probabilities and g = dL/dout:  dL/dv = P^T g,  dL/dP = g v^T,
    dL/dS = P (dL/dP - sum over keys of P dL/dP),  dL/dq = dL/dS k,  dL/dk = dL/dS^T q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Window]) -> Tensor:
        out, kept = torch.empty_like(q), []
        for window in windows:
            queries, keys = slice(window.start, window.stop), slice(window.first, window.stop)
            bias = window.bias(q.dtype)
            seen_k, seen_v = (heads_first(x[keys], bias.shape[1]) for x in (k, v))
            out[queries], probs = plain_attention(q[queries], seen_k, seen_v, bias)
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.windows = windows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        H_kv, scale = k.shape[1], q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for window, probs in zip(ctx.windows, kept, strict=True):
            queries, keys = slice(window.start, window.stop), slice(window.first, window.stop)
            n, S, seen = window.stop - window.start, probs.shape[-1], window.stop - window.first
            grad = fold(grads[0][queries], H_kv)
            grad_v[keys] += torch.bmm(probs.transpose(1, 2), grad)[:, :seen].transpose(0, 1)
            grad_probs = torch.bmm(grad, heads_first(v[keys], S).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_q[queries] = unfold(torch.bmm(grad_scores, heads_first(k[keys], S)), n) * scale
            folded = fold(q[queries] * scale, H_kv)
            grad_k[keys] += torch.bmm(grad_scores.transpose(1, 2), folded)[:, :seen].transpose(0, 1)
        return grad_q, grad_k, grad_v, None


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Window]) -> Tensor:
    """Attention of q (T, H, d) over k and v (T, H_kv, d) -> (T, H, d), window by window."""
    return _WindowAttention.apply(q, k, v, windows)
