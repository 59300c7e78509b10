"""Long work in fixed chunks whose results are appended as they come and never done twice.

A results file holds one JSON line an item. A chunk is appended in one write; started again, whole
chunks are kept, what a kill left of another is cut off, and that chunk is done again whole, so
that the final bytes are those of an uninterrupted run. Several processes (parallel.py) do as many
chunks at a time and the first appends them in order, so that their number changes no byte either.
Beside FILE.jsonl, FILE.options.json tells with which options it was made; results made with others
are refused, never mixed or overwritten.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from usbrec import parallel
from usbrec.errors import UserError

Item = TypeVar("Item")
Row = dict[str, Any]


def run_chunks(
    path: Path,
    items: Sequence[Item],
    chunk_size: int,
    work: Callable[[Sequence[Item]], Sequence[Row]],
    label: str,
    options: Mapping[str, Any],
    before_chunk: Callable[[], None] | None = None,
    spread: bool = True,
) -> list[Row]:
    """Return one row an item, from `path` as far as it reaches, else from `work`, chunk by chunk.

    `options` (JSON's own types) are all that decides the rows; `before_chunk` runs before each
    chunk that is done (an empty cache). Without `spread` all processes do every chunk together.
    Raises UserError where `path` was made with other options or cannot be written, with the chunks
    so far kept.
    """
    assert chunk_size > 0, "a chunk holds at least one item"
    wanted = {"items": len(items), "chunk_size": chunk_size, **options}
    rows = parallel.from_first(lambda: whole_chunks(path, wanted))
    chunks = [items[i : i + chunk_size] for i in range(len(rows), len(items), chunk_size)]
    width = parallel.world() if spread else 1
    first = parallel.rank() == 0
    bar = tqdm(total=len(items), initial=len(rows), desc=label, unit="row", disable=not first)
    with bar:
        for start in range(0, len(chunks), width):
            own = chunks[start + parallel.rank() % width :][:1]
            if own and before_chunk is not None:
                before_chunk()
            made = [json.loads(json.dumps(row)) for chunk in own for row in work(chunk)]
            asked = sum(map(len, own))
            assert len(made) == asked, f"{label}: {len(made)} rows for {asked} items"
            for part in parallel.gather(made)[:width]:
                if first:
                    append(path, part)
                rows += part
                bar.update(len(part))
    return rows


def whole_chunks(path: Path, wanted: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the chunks that are whole at `path`, and cut off what follows them."""
    rows = claim(path, wanted)
    torn = len(rows) % wanted["chunk_size"] if len(rows) < wanted["items"] else 0
    rows = rows[: len(rows) - torn]
    _cut(path, len(rows))
    return rows


def claim(path: Path, wanted: Mapping[str, Any]) -> list[Row]:
    """Return the complete rows at `path`, having seen or noted that they are made with `wanted`."""
    note = path.with_suffix(".options.json")
    text = json.dumps(dict(wanted), indent=1, sort_keys=True) + "\n"
    if path.exists():
        _compare(path, note, json.loads(text))
        return read_whole_lines(path)
    replace_text(note, text)
    append(path, [])
    return []


def read_whole_lines(path: Path) -> list[Row]:
    """Return the rows of all whole lines; only the last line may be torn, as a kill leaves it.

    Raises UserError with the line's number for any other line that is not a JSON object.
    """
    rows: list[Row] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {row!r:.60}")
        rows.append(row)
    return rows


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append rows in one write and wait for the disk; on a failure leave the file as it was."""
    data = "".join(dump(row) + "\n" for row in rows).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                _write(file.fileno(), data)
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; rows so far are kept"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a whole file so that a reader finds the old text or the new, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb", buffering=0) as file:
            _write(file.fileno(), text.encode())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSONL file whole."""
    replace_text(path, "".join(dump(row) + "\n" for row in rows))


def dump(row: Row) -> str:
    """Return a row as one line of JSON; a number that is not finite is a fault, never written."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _compare(path: Path, note: Path, wanted: dict[str, Any]) -> None:
    if not note.exists():
        raise UserError(f"{path} has results but no {note.name} beside it; move it away to go on")
    try:
        found = json.loads(note.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{note} is not JSON ({error}); move {path.name} away to go on") from error
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} was made with {name} {found.get(name)!r}, got {wanted.get(name)!r}; "
                "use the same options or another place"
            )


def _cut(path: Path, lines: int) -> None:
    whole = b"".join(path.read_bytes().splitlines(keepends=True)[:lines])
    if len(whole) < path.stat().st_size:
        os.truncate(path, len(whole))
