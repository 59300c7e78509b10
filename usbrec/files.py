"""Files that a kill or a full disk leaves whole: replaced in one step, or added to in one write.

New content goes to NAME.part beside its place, is forced to the disk, and takes the place of the
old. That name is always the same: what a kill has left there is written over by the next start.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from usbrec.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb", buffering=0) as file:
                _write(file.fileno(), content)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritten(path, error) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object whole, as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, (text + "\n").encode())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file whole."""
    write_whole(path, _lines(rows))


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append to a JSONL file in one write; on a failure leave it as it was."""
    data = _lines(rows)
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                _write(file.fileno(), data)
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise _unwritten(path, error) from error


def dump(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON; a number that is not finite is a fault, never written."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(dump(row) + "\n" for row in rows).encode()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror}; what stood there is kept")
