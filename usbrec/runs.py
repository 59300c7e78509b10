"""A run folder: files that a kill leaves whole, rows that are appended and resumed, and notes.

runs/sample/
    options/STAGE.json     the facts that decided a stage's result: see `claim`
    simulator/ sft/ rl/    adapters under peft's file names; training/ inside holds the state
                           and metrics.jsonl, a line per step
    samples.jsonl    PODCS's samples, a line per example      pairs.jsonl    the pairs
    rows.jsonl       the evaluation, a line per dialogue      report.json, .txt, .html
    timings.jsonl    times, memory, tokens

New content is written to NAME.part beside its place, synced to the disk, and renamed over the old
file. The name is fixed, so the next start overwrites a part that a kill has left.

A results file holds one JSON line per item. A chunk is appended in one write. A restart keeps whole
chunks, cuts off a torn one and computes it again, so the final bytes are those of an uninterrupted
run. N processes (parallel.py) compute N chunks at a time and the first process appends them in
order, so the bytes do not depend on N. FILE.options.json beside FILE holds the facts that decided
its rows. Results of other facts are refused, never mixed or overwritten. Each line bears its item's
place and a checksum, so that a line that is missing, doubled, moved or edited is noticed. The file
is locked while rows are made.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from tqdm import tqdm

from usbrec import parallel
from usbrec.chat import Row
from usbrec.options import UserError, read_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_Item = TypeVar("_Item")
RUNS = Path(__file__).resolve().parents[1] / "runs"


# --- files ------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    part = path.with_name(path.name + ".part")
    with _writing(path):
        try:
            with open(part, "wb", buffering=0) as file:
                _write(file.fileno(), content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object whole, as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, (text + "\n").encode(errors="backslashreplace"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file whole."""
    write_whole(path, _lines(rows))


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append to a JSONL file in one write; on a failure leave it as it was."""
    with _writing(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            _write(file.fileno(), _lines(rows))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def dump(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON; raises ValueError for a number that is not finite."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as lines; a lone surrogate, as in a path that is not UTF-8, as JSON's escape."""
    return "".join(dump(row) + "\n" for row in rows).encode(errors="backslashreplace")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Create the folder of `path`; raise an error of the system as a UserError of one sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        told = f"{path} cannot be written: {error.strerror}; what stood there is kept"
        raise UserError(told) from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL file, without a torn last line, which a kill may leave.

    Raises UserError with the line's number for any other line that is not a JSON object.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_read_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises UserError naming the file."""
    return _read_object(read_text(path), str(path))


def _read_object(text: str | bytes, place: str) -> dict[str, Any]:
    """Return the object in a JSON text; raises UserError naming its place."""
    try:
        content = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{place}: expected a JSON object, got {content!r:.60}")
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dict; raises ValueError if a key comes twice."""
    content, names = dict(pairs), [name for name, _ in pairs]
    if len(content) < len(names):
        raise ValueError(f"duplicate key {next(x for x in names if names.count(x) > 1)!r:.60}")
    return content


# --- notes of facts ---------------------------------------------------------------------------


def claim(note: Path, facts: Mapping[str, Any], made: Sequence[Path], remedy: str) -> None:
    """Write the facts that decide a result to the file `note`, or compare them with its content.

    They are written if no path in `made` exists. Otherwise UserError names the first fact that
    differs from the note, and `remedy`. The first process alone writes.
    """
    new = json.loads(json.dumps(facts))
    there = [path for path in made if path.exists()]
    if not there:
        if parallel.rank() == 0:
            write_json(note, new)
        return
    if not note.exists():
        raise UserError(f"{there[0]} was made, but {note}, which tells how, is missing; {remedy}")
    old: Any = read_json(note)
    if old == new:
        return
    name = ""
    while isinstance(old, dict) and isinstance(new, dict):
        key = next(x for x in [*new, *old] if old.get(x, ...) != new.get(x, ...))
        name, old, new = f"{name}-{key}", old.get(key), new.get(key)
    name = " ".join(name.strip("-").replace("_", "-").split())
    raise UserError(f"{there[0]} was made with {name:.60} {old!r:.200}, got {new!r:.200}; {remedy}")


# --- results files ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A results file: its path, chunk size, label, and the facts that decide its rows.

    The caches of `engines` are emptied before each chunk. With `spread` each process computes
    chunks of its own; without it all processes compute every chunk together.
    """

    path: Path
    chunk_size: int
    label: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    engines: Sequence[Any] = ()
    spread: bool = True


def run_chunks(
    results: Results, items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[Row]]
) -> list[Row]:
    """Return one row per item: the rows already in the file, then those of `work`, chunk by chunk.

    Raises UserError if the file was made with other facts, is in use or cannot be written; whole
    chunks stay in it.
    """
    size, label, first = results.chunk_size, results.label, parallel.rank() == 0
    width = parallel.world() if results.spread else 1
    if first and not results.path.exists():
        append_rows(results.path, [])
    with _alone(results.path, "another program: wait for it, or name another file"):
        rows = parallel.from_first(lambda: _whole_chunks(results, len(items)))
        with tqdm(None, label, len(items), initial=len(rows), unit="row", disable=not first) as bar:
            while len(rows) < len(items):
                start = len(rows) + parallel.rank() % width * size
                chunk = items[start : start + size]  # at the end some processes have none
                for engine in results.engines:
                    engine.clear_cache()
                made = [json.loads(json.dumps(row)) for row in (work(chunk) if chunk else ())]
                assert len(made) == len(chunk), f"{label}: {len(made)} rows for {len(chunk)} items"
                for part in parallel.gather(made)[:width]:
                    if first:
                        marked = enumerate(part, len(rows))
                        lines = [{"place": n, "check": _check(row), **row} for n, row in marked]
                        append_rows(results.path, lines)
                    rows += part
                    bar.update(len(part))
    return rows


def _whole_chunks(results: Results, items: int) -> list[Row]:
    """Return the rows of the file's whole chunks; the rest of an unfinished file is cut off.

    Raises UserError if a line is not that of its place.
    """
    path, size = results.path, results.chunk_size
    note = path.with_name(path.name + ".options.json")
    facts = {"items": items, "chunk-size": size, **results.facts}
    made = [path] if path.stat().st_size else []
    claim(note, facts, made, "use the same options, another place, or move it away")
    rows = read_rows(path)
    for number, row in enumerate(rows):
        place, check = repr(row.pop("place", None))[:60], row.pop("check", None)
        if place != str(number) or check != _check(row) or number >= items:
            told = f"expected the row of item {number} of {items}, got that of {place}, or edited"
            raise UserError(f"{path}, line {number + 1}: {told}; restore it, or move it away")
    if len(rows) < items:
        rows = rows[: len(rows) // size * size]
        lines = path.read_bytes().split(b"\n")[: len(rows)]
        with _writing(path):  # a finished file may lie where nothing can be written
            os.truncate(path, sum(len(line) + 1 for line in lines))
    return rows


def _check(row: Row) -> str:
    """Return a checksum of a row, by which an edited one is noticed."""
    line = json.dumps(row, ensure_ascii=False) + "\n"  # NaN, which `dump` refuses, is an edit
    return f"{crc32(line.encode(errors='backslashreplace')):08x}"


# --- run folders ------------------------------------------------------------------------------


def locked(folder: Path) -> AbstractContextManager[None]:
    """Create a run folder and lock it against other runs; a kill releases the lock."""
    with _writing(folder):
        folder.mkdir(exist_ok=True)
    return _alone(folder, "another train.py: wait for it, or give --run-dir")


@contextmanager
def _alone(path: Path, told: str) -> Iterator[None]:
    """Lock an existing file or folder against other programs; the first process alone does.

    Windows has no lock of a folder; a warning says so.
    """
    with ExitStack() as held:
        if fcntl is None:
            warnings.warn(f"{path} is not locked here: let no other program use it", stacklevel=2)
        elif parallel.rank() == 0:
            place = os.open(path, os.O_RDONLY)
            held.callback(os.close, place)  # which unlocks it
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{path} is in use by {told} ({error.strerror})") from error
        yield


def need(path: Path, stage: str) -> Path:
    """Return `path`; raises UserError naming the stage that makes it if it is missing."""
    if not path.exists():
        raise UserError(f"{path} is missing: run the stage {stage} first (--stages {stage})")
    return path
