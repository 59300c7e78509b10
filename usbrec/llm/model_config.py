"""config.json -> ModelConfig. A setting that the decoder does not honour is refused by its name.

Llama 2, 3, 3.1, 3.2, SmolLM2 and TinyLlama (`llama`), Mistral without a sliding window (`mistral`),
Qwen2 and Qwen2.5 (`qwen2`), ChatGLM3 (`chatglm`), told apart by `model_type` alone. Only files
inside a model's folder are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from usbrec.options import UserError
from usbrec.runs import read_json

MODEL_TYPES = ("llama", "mistral", "qwen2", "chatglm")
MERGED_BASE = "merged_adapter_base"  # the key in config.json of ModelConfig.merged_base
LAYER_LIMIT, SIZE_LIMIT = 1024, 1 << 24
OFF = (None, False, 0)
# Settings that change a model's result -> the only values that the decoder honours, in all models
# and in those of one type. With `attention_bias` transformers' Llama has a bias on o_proj too.
HONOURED = read_json(Path(__file__).with_name("honoured.json"))
# ChatGLM3's own names of settings and modules, by those of Hugging Face's Llama, and its tokens.
CHATGLM3 = read_json(Path(__file__).with_name("chatglm3.json"))


@dataclass(frozen=True)
class ModelConfig:
    """The settings of config.json that the decoder honours, in Hugging Face's names."""

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
    # q, k, v and gate, up as one product; half a head is rotated, in pairs (0, 1), (2, 3)...
    chatglm: bool = False
    merged_base: str | None = None  # the base of the adapter that is merged into the weights


def file_in(folder: Path, name: str) -> Path:
    """Return the path of the existing file `name` directly in `folder`.

    Raises UserError if the name or a link leads out of the folder. The hub's cache is the one
    exception: its `snapshots/REVISION/` holds links into `blobs/` beside it.
    """
    path = folder / name
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name or "\\" in name:
        raise UserError(f"{folder}: the file name {name!r} leads out of the folder")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    real, home = path.resolve(), folder.resolve()
    in_hub_cache = home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs"
    if real.parent != home and not in_hub_cache:
        raise UserError(f"{path} is a link that leads out of the folder, to {real}")
    return path


def load_config(folder: Path) -> ModelConfig:
    """Return the settings of a model's folder; raises UserError naming the file."""
    file = file_in(folder, "config.json")
    return config_from(read_json(file), file)


def config_from(values: Mapping[str, Any], source: Path) -> ModelConfig:
    """Return the ModelConfig of config.json's values; `source` is named in errors."""
    if (model_type := values.get("model_type")) not in MODEL_TYPES:
        raise UserError(f"{source}: model_type {model_type!r:.60}, not {', '.join(MODEL_TYPES)}")
    is_chatglm = model_type == "chatglm"
    settings = CheckedSettings(values, source, CHATGLM3["settings"] if is_chatglm else {})
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    sizes: dict[str, Any] = {name: settings.size(name) for name in names}
    sizes["num_hidden_layers"] = layers = settings.size("num_hidden_layers", limit=LAYER_LIMIT)
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = kv_heads = settings.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"{source}: num_key_value_heads must divide {heads} heads, got {kv_heads}")
    sizes["head_dim"] = head_dim = settings.size("head_dim", sizes["hidden_size"] // heads)
    context = sizes["max_position_embeddings"] = settings.size("max_position_embeddings", 2048)
    layer_types: tuple[Any, ...] = (None, [], ["full_attention"] * layers)
    settings.refuse_others({**HONOURED["all"], "layer_types": layer_types, **HONOURED[model_type]})
    if model_type in ("llama", "mistral") and settings.size("sliding_window", SIZE_LIMIT) < context:
        settings.refuse_others({"sliding_window": (None,)})  # Qwen2 has a switch beside it
    if head_dim % (4 if is_chatglm else 2):  # dimensions are rotated in pairs
        raise UserError(f"{source}: a head's width must be even, got {head_dim}")
    return ModelConfig(
        **sizes,
        rms_norm_eps=settings.number("rms_norm_eps"),
        **rope_of(settings),
        tie_word_embeddings=bool(values.get("tie_word_embeddings")),
        attention_bias=model_type in ("qwen2", "chatglm"),
        chatglm=is_chatglm,
        merged_base=values.get(MERGED_BASE),
    )


def rope_of(settings: "CheckedSettings") -> dict[str, Any]:
    """Return rope_theta and rope_scaling, from settings of those names or `rope_parameters`.

    Of both, `rope_scaling` counts, as in transformers: model cards tell people to add it.
    """
    values = settings.values
    if values["model_type"] == "chatglm":
        return {"rope_theta": 10000.0 * settings.number("rope_ratio", 1.0)}
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise UserError(f"{settings.source}: rope_scaling must be an object, got {found!r:.60}")
    kind = found.get("rope_type", found.get("type", "default"))
    merged = {"rope_theta": values.get("rope_theta"), **found, "rope_type": kind}
    rope = CheckedSettings(merged, settings.source)
    rope.refuse_others({"rope_type": ("default", "llama3"), "partial_rotary_factor": (None, 1.0)})
    theta = rope.number("rope_theta", 10000.0)
    if kind == "default":
        rope.refuse_others({"factor": (None,)})  # no type says how to use it
        return {"rope_theta": theta}
    scaling = {x: rope.number(x) for x in ("factor", "low_freq_factor", "high_freq_factor")}
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError(f"{settings.source}: high_freq_factor must be above low_freq_factor")
    scaling["original_max_position_embeddings"] = rope.size("original_max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": scaling}


class CheckedSettings(NamedTuple):
    """Settings of a JSON file, each checked as it is read; `source` is named in errors."""

    values: Mapping[str, Any]
    source: Path
    names: Mapping[str, str] = {}  # the file's own name of a setting, where it has another

    def refuse_others(self, honoured: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise UserError naming the first setting whose value is none of those honoured."""
        for name, choices in honoured.items():
            if (value := self.values.get(name)) not in choices:
                raise UserError(f"{self.source}: {name!r:.60} = {value!r:.60} is not supported")

    def number(self, name: str, default: Any = None, limit: float = 1e18, kind: Any = float) -> Any:
        """Return a finite number above 0, at most `limit`."""
        if name in self.names:  # ChatGLM3 states every setting
            name, default = self.names[name], None
        value = default if self.values.get(name) is None else self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value <= limit:
            what = f"a whole number from 1 to {limit}" if kind is int else "a number above 0"
            raise UserError(f"{self.source}: {name} must be {what}, got {value!r:.60}")
        return kind(value)

    def size(self, name: str, default: int | None = None, limit: int = SIZE_LIMIT) -> int:
        """Return a whole number from 1 to `limit`."""
        return int(self.number(name, default, limit, int))
