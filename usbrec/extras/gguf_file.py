"""A GGUF file's settings, tokenizer files and weights, as a Hugging Face folder would hold them.

Two architectures: `llama` (whose q and k rows llama.cpp stores permuted: undone here) and `qwen2`.
Quantised tensors are unpacked by the `gguf` package, one at a time, and become bf16. A file of
another architecture, or one with a sentencepiece tokenizer, is refused by name. From one part of a
split file, X-00001-of-00003.gguf and so on, all parts are read.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

from usbrec.llm.model import rotary_frequencies
from usbrec.options import UserError
from usbrec.runs import read_json

# `tensors`: llama.cpp's names -> Hugging Face's, except the factors of RoPE. `settings`: Hugging
# Face's names -> llama.cpp's. `honoured`: settings that change llama.cpp's result -> the only value
# that is honoured here. `llama3_scaling`: all but its factor. `tokenizers`: tokenizer.json without
# a vocabulary, by its pre-tokenizer's name.
GGUF = read_json(Path(__file__).with_name("gguf.json"))
SPECIAL = {3: True, 4: False}  # kind of an added token -> whether decoding leaves it out
ROWS = 1024  # unpacked at a time, so that no fp32 copy of a matrix is held


def parts_of(path: Path) -> list[Path]:
    """Return the paths of a split file's parts in order, `path` alone for another name.

    Raises UserError naming the first part that is missing.
    """
    match = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5}).*)", path.name)
    head, tail, count = match.groups() if match else ("", "", "0")
    parts = [path.with_name(f"{head}{number:05}{tail}") for number in range(1, int(count) + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(f"{path} is by its name one of {len(parts)} parts: {part} is missing")
    return parts or [path]


class GgufFile:
    """An opened GGUF file; raises UserError for an unsupported architecture or setting.

    A damaged file makes the `gguf` package raise exceptions of many classes.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path, readers = path, [GGUFReader(part) for part in parts_of(path)]
        # kept as plain values: the package's own views of a vocabulary take 150 MB
        self.values = {key: field.contents() for key, field in readers[0].fields.items()}
        if self.values.get("split.count", 1) > len(readers):
            raise UserError(f"{path} is one of several parts: name them X-00001-of-00003.gguf, ...")
        self.architecture = self.value("general.architecture")
        if self.architecture not in ("llama", "qwen2"):
            told = f"{path}: GGUF architecture {self.architecture!r} is not supported"
            raise UserError(f"{told}, only llama and qwen2 are")
        for key, honoured in GGUF["honoured"].items():
            if self.value(key, honoured) != honoured:
                raise UserError(f"{path}: the GGUF setting {key[1:]} is not supported")
        self.tensors = {self.hf_name(each.name): each for part in readers for each in part.tensors}
        self.rope_factors = self.tensors.pop("rope_freqs.weight", None)
        # GGUF lists dimensions innermost first
        self.shapes = {name: tuple(map(int, t.shape[::-1])) for name, t in self.tensors.items()}
        if "model.embed_tokens.weight" not in self.shapes:
            raise UserError(f"{path} has no tensor token_embd.weight: is it a vocabulary alone?")

    def value(self, key: str, default: Any = None) -> Any:
        """Return a metadata value; a key that begins with a dot gets the architecture in front."""
        key = f"{self.architecture}{key}" if key.startswith(".") else key
        content = self.values.get(key, default)
        if content is None:
            raise UserError(f"{self.path}: the GGUF field {key} is missing")
        if isinstance(content, float):  # stored as fp32: 9.99999974e-06 is meant as 1e-05
            return float(str(np.float32(content)))
        return content

    def hf_name(self, name: str) -> str:
        """Return Hugging Face's name of a tensor."""
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not match or match[2] not in GGUF["tensors"]:
            raise UserError(f"{self.path}: the GGUF tensor {name} is unknown")
        layer = f"model.layers.{match[1]}." if match[1] else ""
        return f"{layer}{GGUF['tensors'][match[2]]}.{match[3]}"

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its Hugging Face name, in bf16, q and k in Hugging Face's order."""
        from gguf import dequantize

        stored, shape = self.tensors[name], self.shapes[name]
        weight = torch.empty(shape, dtype=torch.bfloat16)
        rows = weight.view(-1, shape[-1])
        data = stored.data.reshape(len(rows), -1)
        for start in range(0, len(rows), ROWS):
            block = dequantize(data[start : start + ROWS], stored.tensor_type)
            rows[start : start + ROWS] = torch.from_numpy(np.array(block))
        if self.architecture == "llama" and re.search(r"self_attn\.[qk]_proj", name):
            count = "head_count" if "q_proj" in name else "head_count_kv"
            return unpermute(weight, self.value(f".attention.{count}"))
        return weight

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        heads, hidden_size = self.value(".attention.head_count"), self.value(".embedding_length")
        usual = {"num_key_value_heads": heads, "head_dim": hidden_size // heads, "rope_theta": 1e4}
        own = {name: self.value(key, usual.get(name)) for name, key in GGUF["settings"].items()}
        if self.value(".rope.dimension_count", own["head_dim"]) != own["head_dim"]:
            raise UserError(f"{self.path}: a GGUF model that turns part of a head is not supported")
        return {
            "architectures": [f"{self.architecture.capitalize()}ForCausalLM"],
            "model_type": self.architecture,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            **own,
            "rope_scaling": self.rope_scaling(),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": self.values.get("tokenizer.ggml.bos_token_id"),  # Qwen2 may have none
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "bfloat16",
        }

    def rope_scaling(self) -> dict[str, Any] | None:
        """Return Llama 3.1's scaling, which the file has as one divisor per frequency, or None."""
        if self.rope_factors is None:
            return None
        stored = np.array(self.rope_factors.data, dtype=np.float64)
        scaling = {**GGUF["llama3_scaling"], "factor": float(stored.max())}
        theta, dim = self.value(".rope.freq_base"), 2 * len(stored)
        plain, scaled = (rotary_frequencies(theta, dim, x) for x in (None, scaling))
        if not np.allclose(stored, (plain / scaled).numpy(), rtol=1e-4):
            raise UserError(f"{self.path}: rope_freqs.weight is not Llama 3.1's RoPE scaling")
        return scaling

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, a byte-level BPE."""
        model, pre = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.pre", "none")
        if model != "gpt2" or pre not in GGUF["tokenizers"]:
            told = f"the GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not supported"
            usual = f"only gpt2 with {', '.join(GGUF['tokenizers'])}; use the model's folder"
            raise UserError(f"{self.path}: {told}, {usual}")
        tokens, kinds = self.value("tokenizer.ggml.tokens"), self.value("tokenizer.ggml.token_type")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in self.value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer.from_str(json.dumps(GGUF["tokenizers"][pre]))
        tokenizer.model = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
        for token, kind in zip(tokens, kinds, strict=True):
            if kind in SPECIAL:
                tokenizer.add_tokens([AddedToken(token, special=SPECIAL[kind], normalized=False)])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json, which transformers reads."""
        tokens, config = self.value("tokenizer.ggml.tokens"), self.config()
        bos, eos = config["bos_token_id"], config["eos_token_id"]
        return {
            # The class that takes tokenizer.json as it is; GPT2Tokenizer may rebuild its parts.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if bos is None else tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[self.value("tokenizer.ggml.padding_token_id", eos)],
            "chat_template": self.value("tokenizer.chat_template", ""),
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        }


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Return a weight with Hugging Face's order of a head's rows, from llama.cpp's.

    Pairs (0, 1), (2, 3).. become (0, d/2), (1, d/2 + 1).. `weight` is (heads * d, in) or a bias
    (heads * d,).
    """
    paired = weight.view(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)
