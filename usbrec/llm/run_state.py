"""What a killed training run goes on from: one safetensors file, replaced as a whole.

The file holds tensors, and in its header one JSON text. It is written beside its place, forced to
the disk and then moved over the old one, so that at every moment a whole state stands there.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from usbrec.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file as a whole; a disk that is full leaves the old file and says so."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        kept = "; what was saved there before is kept" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror}{kept}") from error


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSONL file; it is on the disk when this returns, or a UserError tells."""
    try:
        with path.open("ab") as file:
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts as the new state."""
    header = {"facts": json.dumps(facts, sort_keys=True)}
    write_atomically(path, save(dict(tensors), header))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what `save_state` wrote, or None where nothing was; a broken file is a UserError."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no whole training state ({error}); delete it to train from the beginning"
        ) from error
