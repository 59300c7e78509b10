"""Files of a model's folder, read within the folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from usbrec.options import UserError


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


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises UserError naming the file."""
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=without_duplicates)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raises ValueError if it names a key twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return content
