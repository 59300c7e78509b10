"""One decoder for Llama, Qwen2 and ChatGLM3, and one `forward` for training and inference.

A pass takes a flat row of tokens: no batch dimension and no padding. Which token sees which is not
the decoder's business: `attention` decides, be it a packed training row (packing.py) or
conversations that continue a memory (cache.py). Modules carry Hugging Face's names, so that Llama
and Qwen2 weights load with no map. Left out: mixtures of experts, sliding windows, dropout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from usbrec.llm.kernels import rms_norm, rotary_tables, rotate
from usbrec.llm.lora import FrozenLinear, LoraLinear, Route, Siblings, siblings
from usbrec.llm.quantised import GROUP, INT4_OUTPUTS, Kind, fits_int4
from usbrec.options import UserError


class Attention(Protocol):
    """Who sees whom: called by every layer with the pass's queries, keys and values."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q (T, H, d), k and v (T, H_kv, d) of layer number `layer` to (T, H, d)."""
        ...


@dataclass(frozen=True)
class ModelConfig:
    """The settings of config.json that the decoder honours, in Hugging Face's names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    rotary_dim: int = 0  # how many of a head's dimensions turn; 0 means all
    rotary_interleaved: bool = False  # pairs (0, 1), (2, 3)... instead of (0, d/2), (1, d/2 + 1)...
    fused_projections: bool = False  # one product for q, k, v and one for gate, up (ChatGLM3)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return the angle a position turns each pair by, (rotary_dim / 2,) in fp32 (RoPE)."""
    dim = config.rotary_dim or config.head_dim
    inv_freq = 1 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, those between are blended
    old = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq


class SelfAttention(nn.Module):
    """Projections and rotation; the attention itself is handed in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, H_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.interleaved = d, config.rotary_interleaved
        self.turning, self.asking = [H + H_kv, H_kv], [H, H_kv]  # heads of q, k | v and of q | k
        widths, bias = [H * d, H_kv * d, H_kv * d], config.attention_bias
        if config.fused_projections:
            self.qkv_proj = LoraLinear(D, sum(widths), bias=bias)
            self.inputs = Siblings([self.qkv_proj])
        else:
            self.q_proj, self.k_proj, self.v_proj = (LoraLinear(D, w, bias=bias) for w in widths)
            self.inputs = Siblings([self.q_proj, self.k_proj, self.v_proj])
        self.o_proj = LoraLinear(H * d, D)
        self.output = Siblings([self.o_proj])

    def forward(
        self,
        x: Tensor,
        layer: int,
        turn: tuple[Tensor, Tensor],
        attention: Attention,
        routes: Sequence[Route],
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        heads = self.inputs(x, routes).view(len(x), -1, self.head_dim)  # (T, H + 2 H_kv, d)
        q_and_k, v = heads.split_with_sizes(self.turning, 1)
        q, k = rotate(q_and_k, *turn, self.interleaved).split_with_sizes(self.asking, 1)
        return self.output(attention(layer, q, k, v).flatten(1), routes)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        if config.fused_projections:
            self.gate_up_proj = LoraLinear(D, 2 * inner)
            self.inputs = Siblings([self.gate_up_proj], [inner, inner])
        else:
            self.gate_proj, self.up_proj = LoraLinear(D, inner), LoraLinear(D, inner)
            self.inputs = Siblings([self.gate_proj, self.up_proj])
        self.down_proj = LoraLinear(inner, D)
        self.output = Siblings([self.down_proj])

    def forward(self, x: Tensor, routes: Sequence[Route]) -> Tensor:
        """(T, D) -> (T, D)."""
        gate, up = self.inputs.apart(x, routes)
        return self.output(F.silu(gate) * up, routes)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and beside the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        layer: int,
        turn: tuple[Tensor, Tensor],
        attention: Attention,
        routes: Sequence[Route],
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), layer, turn, attention, routes)
        return x + self.mlp(self.post_attention_layernorm(x), routes)


class Trunk(nn.Module):
    """Embeddings, layers and last norm: what Hugging Face's checkpoints call `model`."""

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
        self.checkpointing = False  # in training: keep no activations inside layers, recompute them
        self.sharded = False  # each process holds a part of every layer: they compute together
        self.inv_freq: Tensor | None = None  # where positions are, from the first pass on
        self.model = Trunk(config)
        self.lm_head = FrozenLinear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return self.lm_head.weight.dtype

    def quantise_weights(self, kind: Kind) -> None:
        """Round the layers' matrices to 8 or 4 bits: quicker decoding of few rows, on the CPU.

        The head, and embeddings tied to it, stay as they are: the default model's in int4 costs 2%
        of perplexity, and in int8 is no quicker than in the processor's order. Raises UserError,
        with nothing rounded, where the kernels do not work.
        """
        if self.device.type != "cpu":
            raise UserError(f"{kind} weights work on the CPU only, the model is on {self.device}")
        layers = {path: m for path, m in self.named_modules() if isinstance(m, LoraLinear)}
        for path, layer in layers.items():
            if kind == "int4" and not fits_int4(layer.weight):
                raise UserError(
                    f"int4 weights need inputs in groups of {GROUP} and outputs in groups of "
                    f"{INT4_OUTPUTS}, and {path} has {layer.in_features} and {layer.out_features}: "
                    "take int8"
                )
        for together in siblings(self):
            together.quantise(kind)

    def order_weights(self) -> None:
        """Keep the weights once more as the processor's kernels read them: quicker decoding.

        Sharded ones stay as they are: they are not here but while their layer computes.
        """
        if self.sharded:
            return
        self.lm_head.order()
        for together in siblings(self):
            together.order()

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines for these positions, (T, 1, rotary_dim) each."""
        if self.inv_freq is None or self.inv_freq.device != position_ids.device:
            self.inv_freq = rotary_frequencies(self.config).to(position_ids.device)
        angles = position_ids.float()[:, None, None] * self.inv_freq
        cos, sin = rotary_tables(angles, self.config.rotary_interleaved)
        return cos.to(self.dtype), sin.to(self.dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention: Attention,
        routes: Sequence[Route] = (),
    ) -> Tensor:
        """Return the hidden states after the last norm: two (T,) rows of ids -> (T, D)."""
        x = self.model.embed_tokens(input_ids)
        turn = self.rotary(position_ids)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for number, layer in enumerate(self.model.layers):
            inputs = (x, number, turn, attention, routes)
            if recompute:  # nothing in a layer is drawn, so no generator's state need be kept
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*inputs)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in fp32."""
        return self.lm_head(hidden).float()
