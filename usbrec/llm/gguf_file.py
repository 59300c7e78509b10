"""Read a GGUF file as if it were a Hugging Face folder: settings, tokenizer files and weights.

Two architectures: `llama` (whose q and k rows llama.cpp stores permuted: undone here) and `qwen2`.
Quantised tensors are unpacked to fp32 by the `gguf` package, one at a time. A file of another
architecture, or one with a sentencepiece tokenizer, is refused by name.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from usbrec.options import UserError

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split_by(pattern: str) -> list[dict[str, Any]]:
    """Return the steps that cut a text by a pattern, then into bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, {**BYTE_LEVEL, "use_regex": False}]


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    "llama-bpe": split_by(LLAMA3_SPLIT),
    "qwen2": split_by(LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
}
# What llama.cpp would compute otherwise: the only values that are honoured here.
HONOURED = {"expert_count": 0, "attention.sliding_window": 0, "rope.scaling.type": "none"}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
ROWS = 1024  # unpacked at a time


class GgufFile:
    """An opened GGUF file; raises UserError where it is no readable file of a known kind."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
            # kept as plain values: the package's own views of a vocabulary take 150 MB
            self._values = {key: field.contents() for key, field in reader.fields.items()}
            tensors = list(reader.tensors)
            reader.fields.clear()
        except FileNotFoundError as error:
            raise UserError(f"no such GGUF file: {path}") from error
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
            raise UserError(f"{path} is damaged or no GGUF file: {error}") from error
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ("llama", "qwen2"):
            raise UserError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported, "
                "only llama and qwen2 are"
            )
        for key, honoured in HONOURED.items():
            if self.value(f"{{arch}}.{key}", honoured) != honoured:
                raise UserError(
                    f"{path}: the GGUF setting {self.architecture}.{key} is not supported"
                )
        self._tensors = {self._hf_name(t.name): t for t in tensors}
        self._rope_factors = self._tensors.pop("rope_freqs.weight", None)
        # by the names of Hugging Face; GGUF lists dimensions innermost first
        self.shapes = {x: tuple(map(int, t.shape[::-1])) for x, t in self._tensors.items()}
        self.dtypes = dict.fromkeys(self.shapes, torch.bfloat16)  # what torch has nearest to them

    def value(self, key: str, default: Any = None) -> Any:
        """Return one metadata value; `{arch}` in the key stands for the architecture's name."""
        if "{arch}" in key:
            key = key.replace("{arch}", self.architecture)
        content = self._values.get(key, default)
        if content is None:
            raise UserError(f"{self.path}: the GGUF field {key} is missing")
        if isinstance(content, float):  # stored as fp32: 9.99999974e-06 is meant as 1e-05
            return float(str(np.float32(content)))
        return content

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Unpack one tensor into `target`, whatever its dtype and device, q and k in HF's order.

        A block of rows is unpacked to fp32 at a time, so that no fp32 copy of a matrix is held.
        """
        from gguf import dequantize

        stored = self._tensors[name]
        turned = self._is_llama and re.search(r"self_attn\.[qk]_proj", name)
        unpacked = torch.empty_like(target) if turned else target
        rows = unpacked.view(-1, target.shape[-1])
        data = stored.data.reshape(len(rows), -1)
        try:
            for start in range(0, len(rows), ROWS):
                block = dequantize(data[start : start + ROWS], stored.tensor_type)
                rows[start : start + ROWS].copy_(torch.from_numpy(np.array(block)))
        except NotImplementedError as error:
            kind = stored.tensor_type.name
            raise UserError(
                f"{self.path}: {kind} tensors such as {name} cannot be unpacked"
            ) from error
        if turned:
            count = "head_count" if "q_proj" in name else "head_count_kv"
            target.copy_(unpermute(unpacked, int(self.value(f"{{arch}}.attention.{count}"))))

    def config(self) -> dict[str, Any]:
        """Return what config.json would hold."""
        tied = "lm_head.weight" not in self._tensors
        heads = int(self.value("{arch}.attention.head_count"))
        hidden_size = int(self.value("{arch}.embedding_length"))
        head_dim = int(self.value("{arch}.attention.key_length", hidden_size // heads))
        if self.value("{arch}.rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self.path}: a GGUF model that turns part of a head is not supported")
        config = {
            "architectures": ["LlamaForCausalLM" if self._is_llama else "Qwen2ForCausalLM"],
            "model_type": self.architecture,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": hidden_size,
            "intermediate_size": int(self.value("{arch}.feed_forward_length")),
            "num_hidden_layers": int(self.value("{arch}.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self.value("{arch}.attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": int(self.value("{arch}.context_length")),
            "rms_norm_eps": self.value("{arch}.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.value("{arch}.rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": tied,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": int(self.value("tokenizer.ggml.eos_token_id")),
            "torch_dtype": "bfloat16",
        }
        if self._is_llama:
            config |= {"attention_bias": False, "mlp_bias": False}
        return config

    def tokenizer_files(self) -> dict[str, dict[str, Any]]:
        """Return the contents of tokenizer.json and tokenizer_config.json."""
        model, pre = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.pre", "none")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise UserError(
                f"{self.path}: the GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not "
                f"supported, only gpt2 with {', '.join(PRE_TOKENIZERS)}; use the model's folder"
            )
        tokens = self.value("tokenizer.ggml.tokens")
        kinds = self.value("tokenizer.ggml.token_type")
        eos = self.value("tokenizer.ggml.eos_token_id")
        special = {CONTROL_TOKEN: True, USER_DEFINED_TOKEN: False}
        added = {i: special[kind] for i, kind in enumerate(kinds) if kind in special}
        content = tokenizer_json(tokens, self.value("tokenizer.ggml.merges"), added)
        content["pre_tokenizer"]["pretokenizers"] = PRE_TOKENIZERS[pre]
        content["model"]["ignore_merges"] = pre == "llama-bpe"
        if pre == "qwen2":
            content["normalizer"] = {"type": "NFC"}
        return {
            "tokenizer.json": content,
            "tokenizer_config.json": {
                # The class that takes tokenizer.json as it is; GPT2Tokenizer may rebuild its parts.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_prefix_space": False,
                "bos_token": None if self.bos_token_id is None else tokens[self.bos_token_id],
                "eos_token": tokens[eos],
                "pad_token": tokens[self.value("tokenizer.ggml.padding_token_id", eos)],
                "chat_template": self.value("tokenizer.chat_template", ""),
                "clean_up_tokenization_spaces": False,
                "model_max_length": int(self.value("{arch}.context_length")),
            },
        }

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text; Qwen2 may have none."""
        found = self.value("tokenizer.ggml.bos_token_id", -1)
        return None if found == -1 else int(found)

    @property
    def _is_llama(self) -> bool:
        return self.architecture == "llama"

    def _hf_name(self, name: str) -> str:
        if name == "rope_freqs.weight":
            return name
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not match or match[2] not in TENSOR_NAMES:
            raise UserError(f"{self.path}: the GGUF tensor {name} is unknown")
        layer = f"model.layers.{match[1]}." if match[1] else ""
        return f"{layer}{TENSOR_NAMES[match[2]]}.{match[3]}"

    def _rope_scaling(self) -> dict[str, Any] | None:
        """Llama 3.1's scaling stands in the file as divisors a frequency: find its `factor`."""
        if self._rope_factors is None:
            return None
        stored = np.array(self._rope_factors.data, dtype=np.float64)
        scaling = {
            "rope_type": "llama3",
            "factor": float(stored.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = llama3_divisors(self.value("{arch}.rope.freq_base"), 2 * len(stored), scaling)
        if not np.allclose(stored, expected, rtol=1e-4):
            raise UserError(f"{self.path}: rope_freqs.weight is not Llama 3.1's RoPE scaling")
        return scaling


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Return the (head_dim / 2,) divisors of RoPE frequencies (`llama3` in transformers)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1 - smooth) / scaling["factor"] + smooth)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows: pairs (0, 1), (2, 3).. become (0, d/2), (1, d/2+1)..

    `weight` is (heads * d, in) or a bias (heads * d,).
    """
    rows = weight.shape[0]
    paired = weight.view(heads, rows // heads // 2, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)


def tokenizer_json(tokens: list[str], merges: list[str], added: dict[int, bool]) -> dict[str, Any]:
    """Return a `tokenizers` file of a byte-level BPE whose ids are the places in `tokens`.

    `added` tells of the tokens that no merge makes: id -> whether decoding leaves it out.
    """
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **plain, "special": special}
            for i, special in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": []},
        "post_processor": None,
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(unused),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
