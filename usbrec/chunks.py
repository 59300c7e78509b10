"""Long work in fixed chunks whose results are appended as they come and never done twice.

A results file holds one JSON line an item. A chunk is appended in one write; started again, whole
chunks are kept, what a kill left of another is cut off, and that chunk is done again whole, so
that the final bytes are those of an uninterrupted run. Beside FILE.jsonl, FILE.options.json tells
with which options it was made; results made with others are refused, never mixed or overwritten.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from usbrec.errors import UserError
from usbrec.files import append_rows, write_json

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
) -> list[Row]:
    """Return one row an item, from `path` as far as it reaches, else from `work`, chunk by chunk.

    `options` (JSON's own types) are all that decides the rows; `before_chunk` runs before each
    chunk that is done (an empty cache). Raises UserError where `path` was made with other options
    or cannot be written, with the chunks so far kept.
    """
    assert chunk_size > 0, "a chunk holds at least one item"
    wanted = {"items": len(items), "chunk_size": chunk_size, **options}
    rows = claim(path, wanted)
    keep = len(rows) if len(rows) == len(items) else len(rows) - len(rows) % chunk_size
    rows = rows[:keep]
    _cut(path, keep)
    with tqdm(total=len(items), initial=keep, desc=label, unit="row") as bar:
        for start in range(keep, len(items), chunk_size):
            if before_chunk is not None:
                before_chunk()
            chunk = items[start : start + chunk_size]
            made = [json.loads(json.dumps(row)) for row in work(chunk)]
            assert len(made) == len(chunk), f"{label}: {len(made)} rows for {len(chunk)} items"
            append_rows(path, made)
            rows += made
            bar.update(len(chunk))
    return rows


def claim(path: Path, wanted: Mapping[str, Any]) -> list[Row]:
    """Return the complete rows at `path`, having seen or noted that they are made with `wanted`."""
    note = path.with_suffix(".options.json")
    content = json.loads(json.dumps(dict(wanted), sort_keys=True))
    if path.exists():
        _compare(path, note, content)
        return read_whole_lines(path)
    write_json(note, content)
    append_rows(path, [])
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
