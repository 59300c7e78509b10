"""One decoder for Llama, Qwen2 and ChatGLM3, and one `forward` for training and inference.

A pass takes a flat row of T tokens, with no batch dimension and no padding. Its `attention`
argument decides which token sees which: that of a packed training row (packing.py), or of
conversations that continue a cache (decoding.py). Modules have Hugging Face's names, so that
weights of Llama and Qwen2 load with no map. The formulas are those of the papers; `Ops` is the one
place where faster equivalents (fast/) replace them. Left out: mixtures of experts, sliding windows,
dropout.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from usbrec.llm.lora import AdapterSpan, LoraLinear
from usbrec.llm.model_config import ModelConfig

Spans = Sequence[AdapterSpan]
Layers = tuple[LoraLinear, ...]  # that read the same input
# The attention of a pass, for each layer: its number, q (T, H, d), k, v (T, H_kv, d) -> (T, H, d).
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, in fp32 inside (arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x (T, heads, d) with each pair (a, b) turned to (a cos - b sin, b cos + a sin).

    The tables (T, 1, r) hold an entry per dimension and the sign of each sine (`rotary_tables`).
    Pairs are (0, r/2), (1, r/2 + 1)..., or (0, 1), (2, 3)... if `interleaved` (arXiv 2104.09864).
    Dimensions from r on stay as they are.
    """
    turning, rest = x.tensor_split([cos.shape[-1]], -1)
    if interleaved:
        partners = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partners = turning.roll(turning.shape[-1] // 2, -1)
    turned = torch.addcmul(turning * cos, partners, sin)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of both side by side, (T, 2 n) -> (T, n) (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate) * up


def linear(layers: Layers, x: Tensor, spans: Spans) -> Tensor:
    """Return the outputs, side by side, of layers that read one input: (T, in) -> (T, outs)."""
    outs = [layer(x, spans) for layer in layers]
    return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v over the visible keys, the softmax in fp32.

    q (n, H, d), k and v (H_kv, S, d), visible (n, S) -> (n, H, d). A key head serves H / H_kv query
    heads (arXiv 2305.13245).
    """
    q = q.unflatten(1, (len(k), -1))  # (n, H_kv, g, d)
    scores = torch.einsum("nhgd,hsd->nhgs", q / math.sqrt(q.shape[-1]), k).float()
    probs = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("nhgs,hsd->nhgd", probs, v).flatten(1, 2)


class Stretch(NamedTuple):
    """Successive queries of a pass that see keys of one place; both tensors are on the CPU."""

    places: Tensor  # (S,) of its keys, among all keys of the layer
    visible: Tensor  # (n, S) bool: the keys that each of the n queries sees


Stretches = Sequence[Stretch]


def attend_all(q: Tensor, k: Tensor, v: Tensor, stretches: Stretches) -> Tensor:
    """Return `attend` of all stretches, q (T, H, d), k and v (H_kv, all keys, d) -> (T, H, d)."""
    parts = zip(q.split([len(x.visible) for x in stretches]), stretches, strict=True)
    outs = [attend(own, k[:, x.places], v[:, x.places], x.visible.to(q.device)) for own, x in parts]
    return torch.cat(outs)


@dataclass
class Ops:
    """The operations that faster equivalents may replace; these defaults are the definitions.

    `arrange` prepares the stretches of a pass once for the `attend` of all layers. `clear` is
    called after any change of an adapter's weights. `decoding` takes the place of
    `decoding.DecodeAttention`, and `learn` that of a training pass's `forward`.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rotate: Callable[..., Tensor] = rotate
    swiglu: Callable[[Tensor], Tensor] = swiglu
    linear: Callable[[Layers, Tensor, Spans], Tensor] = linear
    arrange: Callable[[Stretches], Any] = lambda stretches: stretches
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor] = attend_all
    clear: Callable[[], None] = lambda: None
    decoding: Callable[..., Any] | None = None
    learn: Callable[..., Tensor] | None = None


def rotary_frequencies(theta: float, dim: int, scaling: Mapping[str, Any] | None) -> Tensor:
    """Return the angle of each pair per position, (dim / 2,) in fp32 (RoPE)."""
    inv_freq = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling is None:
        return inv_freq
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, those between are blended
    old = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq


def rotary_tables(angles: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines, (T, 1, 2 n) each, for the angles (T, 1, n) of `rotate`."""
    signed = torch.stack([-angles, angles], -1 if interleaved else -2).flatten(-2)
    return signed.cos(), signed.sin()


class Pass(NamedTuple):
    """The part of a forward that all layers share."""

    ops: Ops
    rotary: tuple[Tensor, Tensor, bool]
    attention: Attention
    spans: Spans


class RMSNorm(nn.Module):
    """The weight of a norm; the formula is `Ops.rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """(T, D) -> (T, D)."""
        return ops.rms_norm(x, self.weight, self.eps)


def projections(owner: nn.Module, D: int, widths: Mapping[str, int], bias: bool = False) -> Layers:
    """Return layers of these names and widths over one input (T, D), which `owner` gets."""
    layers = {name: LoraLinear(D, width, bias) for name, width in widths.items()}
    for name, layer in layers.items():
        owner.add_module(name, layer)
    return tuple(layers.values())


class SelfAttention(nn.Module):
    """Projections and rotation around the attention of the pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, H_kv = config.num_attention_heads, config.num_key_value_heads
        self.H, self.H_kv, self.d = H, H_kv, d
        joint = {"qkv_proj": (H + 2 * H_kv) * d}
        split = {"q_proj": H * d, "k_proj": H_kv * d, "v_proj": H_kv * d}
        self.qkv = projections(self, D, joint if config.chatglm else split, bias)
        self.o_proj = LoraLinear(H * d, D)

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """(T, D) -> (T, D)."""
        ops, rotary, attention, spans = shared
        heads = ops.linear(self.qkv, x, spans).unflatten(-1, (-1, self.d))  # (T, H + 2 H_kv, d)
        qk, v = heads.split_with_sizes([self.H + self.H_kv, self.H_kv], 1)
        q, k = ops.rotate(qk, *rotary).split_with_sizes([self.H, self.H_kv], 1)
        return ops.linear((self.o_proj,), attention(layer, q, k, v).flatten(1), spans)


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        joint, split = {"gate_up_proj": 2 * inner}, {"gate_proj": inner, "up_proj": inner}
        self.gate_up = projections(self, D, joint if config.chatglm else split)
        self.down_proj = LoraLinear(inner, D)

    def forward(self, x: Tensor, shared: Pass) -> Tensor:
        """(T, D) -> (T, D)."""
        gate_up = shared.ops.linear(self.gate_up, x, shared.spans)
        return shared.ops.linear((self.down_proj,), shared.ops.swiglu(gate_up), shared.spans)


class DecoderLayer(nn.Module):
    """Attention and MLP, each over a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """(T, D) -> (T, D)."""
        x = x + self.self_attn(self.input_layernorm(x, shared.ops), layer, shared)
        return x + self.mlp(self.post_attention_layernorm(x, shared.ops), shared)


class Transformer(nn.Module):
    """Embeddings, layers and last norm: `model` in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model over flat rows of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.ops = Ops()
        self.checkpointing = False  # in training: recompute the activations inside layers
        self.sharded = False  # each process holds a part of every layer: they compute together
        rotary_dim = config.head_dim // 2 if config.chatglm else config.head_dim
        self.inv_freq = rotary_frequencies(config.rope_theta, rotary_dim, config.rope_scaling)
        self.model = Transformer(config)
        self.lm_head = LoraLinear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weights, in which they compute."""
        return self.lm_head.weight.dtype

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Return the tables of `rotate`, (T, 1, rotary_dim) each, and its `interleaved`."""
        self.inv_freq = self.inv_freq.to(position_ids.device)  # copied by the first pass alone
        angles = position_ids.float()[:, None, None] * self.inv_freq
        cos, sin = rotary_tables(angles, self.config.chatglm)
        return cos.to(self.dtype), sin.to(self.dtype), self.config.chatglm

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention: Attention, spans: Spans = ()
    ) -> Tensor:
        """Return the hidden states after the last norm: ids and positions (T,) -> (T, D)."""
        x = self.model.embed_tokens(input_ids)
        shared = Pass(self.ops, self.rotary(position_ids), attention, spans)
        for i, layer in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                # a layer draws no random numbers: there is no generator's state to keep
                x = checkpoint(layer, x, i, shared, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, i, shared)
        return self.model.norm(x, self.ops)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, V), in the dtype of the base."""
        return self.ops.linear((self.lm_head,), hidden, ())
