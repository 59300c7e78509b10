"""config.json -> ModelConfig. A setting that the decoder does not honour is refused by its name.

Llama 2, 3, 3.1, 3.2, SmolLM2 and TinyLlama (`llama`), Mistral without a sliding window (`mistral`),
Qwen2 and Qwen2.5 (`qwen2`), ChatGLM3 (`chatglm`), told apart by `model_type` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usbrec.llm.files import file_in, read_json
from usbrec.llm.model import ModelConfig
from usbrec.options import UserError

MODEL_TYPES = ("llama", "mistral", "qwen2", "chatglm")
LIMITS = {"num_hidden_layers": 1024, "num_layers": 1024}
SIZE_LIMIT = 1 << 24

# Settings that change what a model computes, with the only values that the decoder computes.
OFF = (None, False, 0)
HONOURED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "quantization_config", "compression_config", "mlp_bias", "use_sliding_window",
        "rope_interleaved", "attn_logit_softcapping", "final_logit_softcapping", "use_qk_norm",
        "num_experts", "num_local_experts", "n_routed_experts", "is_encoder_decoder",
        "add_cross_attention", "no_rope_layers",
    ), OFF),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1.0),
}  # fmt: skip
HONOURED_CHATGLM: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "quantization_config", "quantization_bit", "add_bias_linear", "pre_seq_len",
        "apply_residual_connection_post_layernorm", "fp32_residual_connection", "prefix_projection",
    ), OFF),
    **dict.fromkeys(("original_rope", "post_layer_norm", "rmsnorm"), (None, True)),
    **dict.fromkeys(("add_qkv_bias", "multi_query_attention"), (True,)),
}  # fmt: skip


def load_config(path: Path) -> ModelConfig:
    """Read the settings of a model's folder; raises UserError naming the file."""
    if not path.is_dir():
        raise UserError(f"no such model folder: {path}")
    if not (path / "config.json").exists():
        raise UserError(f"{path} is no model folder: it has no config.json")
    file = file_in(path, "config.json")
    return config_from(read_json(file), file)


def config_from(settings: Mapping[str, Any], source: Path) -> ModelConfig:
    """Return the decoder's settings; `source` is named in errors."""
    model_type = settings.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported, only {', '.join(MODEL_TYPES)}"
        )
    reader = Settings(settings, source)
    return reader.chatglm() if model_type == "chatglm" else reader.llama(model_type)


class Settings:
    """The content of a config.json, read value by value with checks."""

    def __init__(self, settings: Mapping[str, Any], source: Path) -> None:
        self.settings = settings
        self.source = source

    def llama(self, model_type: str) -> ModelConfig:
        """Llama, Mistral and Qwen2."""
        self.refuse_others(HONOURED)
        self.refuse_sliding_window(model_type)
        if model_type != "qwen2" and self.settings.get("attention_bias"):
            # transformers then puts a bias on o_proj too, which Qwen2 does not have
            raise self.unsupported("attention_bias")
        heads = self.size("num_attention_heads")
        hidden_size = self.size("hidden_size")
        rope_theta, rope_scaling = self.rope()
        return ModelConfig(
            model_type=model_type,
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.size("intermediate_size"),
            num_hidden_layers=self.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=self.size("num_key_value_heads", heads),
            head_dim=self.even(self.size("head_dim", hidden_size // heads)),
            rms_norm_eps=self.positive("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=self.size("max_position_embeddings", 2048),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            attention_bias=model_type == "qwen2",
        )

    def chatglm(self) -> ModelConfig:
        """ChatGLM3: half of each head turns, in neighbouring pairs; `rope_ratio` times the base."""
        self.refuse_others(HONOURED_CHATGLM)
        head_dim = self.even(self.size("kv_channels"))
        return ModelConfig(
            model_type="chatglm",
            vocab_size=self.size("padded_vocab_size"),
            hidden_size=self.size("hidden_size"),
            intermediate_size=self.size("ffn_hidden_size"),
            num_hidden_layers=self.size("num_layers"),
            num_attention_heads=self.size("num_attention_heads"),
            num_key_value_heads=self.size("multi_query_group_num"),
            head_dim=head_dim,
            rms_norm_eps=self.positive("layernorm_epsilon"),
            rope_theta=10000.0 * self.positive("rope_ratio", 1.0),
            max_position_embeddings=self.size("seq_length"),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            attention_bias=True,
            rotary_dim=self.even(head_dim // 2),
            rotary_interleaved=True,
            fused_projections=True,
        )

    def rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """Return theta and the scaling, from `rope_theta` + `rope_scaling` or `rope_parameters`."""
        scaling = self.settings.get("rope_parameters") or self.settings.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise self.unsupported("rope_scaling")
        inner = Settings({"rope_theta": self.settings.get("rope_theta"), **scaling}, self.source)
        theta = inner.positive("rope_theta", 10000.0)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if inner.settings.get("partial_rotary_factor") not in (None, 1.0):
            raise inner.unsupported("partial_rotary_factor")
        if kind == "default":
            if "factor" in scaling:  # which no type says how to use
                raise inner.unsupported("factor")
            return theta, None
        if kind != "llama3":
            raise UserError(f"{self.source}: the RoPE type {kind!r} is not supported")
        names = ("factor", "low_freq_factor", "high_freq_factor")
        values = {name: inner.positive(name) for name in names}
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise UserError(f"{self.source}: high_freq_factor must be above low_freq_factor")
        original = "original_max_position_embeddings"
        return theta, {"rope_type": "llama3", **values, original: inner.size(original)}

    def refuse_others(self, honoured: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise UserError for a setting whose value the decoder does not compute."""
        for name, values in honoured.items():
            if not any(self.settings.get(name) == value for value in values):
                raise self.unsupported(name)

    def refuse_sliding_window(self, model_type: str) -> None:
        """Raise UserError if a window narrower than the context is in use."""
        layer_types = self.settings.get("layer_types") or []
        full = isinstance(layer_types, list) and set(map(str, layer_types)) <= {"full_attention"}
        if not full:
            raise self.unsupported("layer_types")
        # Qwen2 states a window and switches it off by use_sliding_window
        window = None if model_type == "qwen2" else self.settings.get("sliding_window")
        if window is not None and self.size("sliding_window") < self.size(
            "max_position_embeddings"
        ):
            raise self.unsupported("sliding_window")

    def size(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0 and of a sane size."""
        value = self.settings.get(name)
        value = default if value is None else value
        limit = LIMITS.get(name, SIZE_LIMIT)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise UserError(
                f"{self.source}: {name} must be a whole number from 1 to {limit}, got {value!r}"
            )
        return value

    def even(self, value: int) -> int:
        """Return the width of a head, which is turned in pairs."""
        if value % 2:
            raise UserError(f"{self.source}: a head's width must be even, got {value}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self.settings.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e18:
            raise UserError(f"{self.source}: {name} must be a number above 0, got {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false; missing means false."""
        value = self.settings.get(name)
        if value not in (None, True, False):
            raise UserError(f"{self.source}: {name} must be true or false, got {value!r}")
        return bool(value)

    def unsupported(self, name: str) -> UserError:
        """Return the error that names a setting."""
        value = self.settings.get(name)
        return UserError(f"{self.source}: the setting {name} = {value!r} is not supported")
