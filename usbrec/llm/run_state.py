"""What a killed training run goes on from: one safetensors file, replaced as a whole.

The file holds tensors, and in its header one JSON text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from usbrec.options import UserError
from usbrec.runs import write_whole


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts as the new state."""
    header = {"facts": json.dumps(facts, sort_keys=True)}
    write_whole(path, save({name: tensor.cpu() for name, tensor in tensors.items()}, header))


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
