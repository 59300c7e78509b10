"""What a run keeps on disk: files that a kill leaves whole, and rows that are appended and resumed.

New content goes to NAME.part beside its place, is forced to the disk, and takes the place of the
old one. That name is always the same: what a kill has left there is written over by the next start.

A results file holds one JSON line per item. A chunk is appended in one write; started again, whole
chunks are kept, a torn one is cut off and done again whole, so that the final bytes are those of an
uninterrupted run. Several processes (parallel.py) do as many chunks at a time and the first appends
them in order, so that their number changes no byte either. FILE.options.json beside FILE.jsonl
tells the options that made it; results of other options are refused, never mixed or overwritten.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from usbrec import parallel
from usbrec.options import UserError

Item = TypeVar("Item")
Row = dict[str, Any]


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
                    append_rows(path, part)
                rows += part
                bar.update(len(part))
    return rows


def whole_chunks(path: Path, wanted: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the chunks that are whole at `path`, and cut off what follows them.

    They must be made with the options `wanted`, which are noted beside a new file.
    """
    note = path.with_suffix(".options.json")
    content = json.loads(json.dumps(wanted, sort_keys=True))
    if not path.exists():
        write_json(note, content)
        append_rows(path, [])
        return []
    _compare(path, note, content)
    rows = read_whole_lines(path)
    torn = len(rows) % wanted["chunk_size"] if len(rows) < wanted["items"] else 0
    rows = rows[: len(rows) - torn]
    whole = b"".join(path.read_bytes().splitlines(keepends=True)[: len(rows)])
    if len(whole) < path.stat().st_size:
        os.truncate(path, len(whole))
    return rows


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
