"""A model's name or path -> a folder (or GGUF file) on this machine.

What is no path here but looks like a hub name (`Qwen/Qwen2.5-7B-Instruct`) is fetched with
`huggingface_hub` into its usual cache: only the files that are read here, interrupted downloads
continued, nothing fetched twice. `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they
always mean.
"""

from __future__ import annotations

import re
from pathlib import Path

from usbrec.options import UserError

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)


def find_model(name: str | Path) -> Path:
    """Return the folder or GGUF file that `name` means, fetched from the hub if need be.

    Raises UserError if it is neither here nor to be had.
    """
    path = Path(name)
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.exists():
        raise UserError(f"--model {name}: neither a model's folder nor a GGUF file")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UserError(f"--model {name}: no such folder or GGUF file")
    return fetch(str(name))


def fetch(name: str) -> Path:
    """Return the cache's folder of a hub name, complete."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # offline, unknown, gated, interrupted: many classes, one way out
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{name} is no folder here and cannot be fetched from the hub ({reason}): give the "
            "folder that holds its config.json and safetensors with --model FOLDER"
        ) from error
