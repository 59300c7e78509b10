"""What a run keeps: files that stay whole, work that is this run's, chunks that a kill leaves."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from usbrec.options import UserError
from usbrec.runs import (
    Results,
    append_rows,
    claim,
    locked,
    read_json,
    run_chunks,
    write_json,
    write_rows,
    write_whole,
)

ITEMS = list(range(7))
OPTIONS = {"seed": 1}


class Work:
    """Squares numbers, and keeps the chunks that it was asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.chunks: list[list[int]] = []
        self.fail_at = fail_at

    def __call__(self, chunk: Sequence[int]) -> list[dict[str, Any]]:
        if self.fail_at is not None and self.fail_at in chunk:
            raise KeyboardInterrupt
        self.chunks.append(list(chunk))
        return [{"item": item, "square": item * item, "text": "é \u2028 \r\n"} for item in chunk]


def run(path: Path, work: Work, **changed: Any) -> list[dict[str, Any]]:
    settings = {"chunk_size": 3, "label": "squares", "facts": OPTIONS, **changed}
    items = settings.pop("items", ITEMS)
    return run_chunks(Results(path, **settings), items, work)


def test_work_is_done_in_chunks_and_a_finished_file_is_used_again(tmp_path: Path) -> None:
    path, work = tmp_path / "deep" / "rows.jsonl", Work()
    rows = run(path, work)
    assert work.chunks == [[0, 1, 2], [3, 4, 5], [6]]
    again = Work()
    assert run(path, again) == rows and again.chunks == []
    assert [json.loads(line)["square"] for line in path.open()] == [i * i for i in ITEMS]


@pytest.mark.parametrize("size", [0, 1, 10, 100, -1, -5, -60])
def test_a_kill_at_any_byte_ends_in_the_same_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Work())
    whole = path.read_bytes()
    os.truncate(path, size if size >= 0 else len(whole) + size)
    run(path, Work())
    assert path.read_bytes() == whole


def test_every_cut_redoes_only_the_chunks_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Work())
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:cut])
        done = sum(end <= cut for end in ends)
        work = Work()
        run(path, work)
        kept = 7 if done == 7 else done // 3 * 3
        assert sum(map(len, work.chunks)) == 7 - kept
        assert path.read_bytes() == whole


def test_an_interrupt_keeps_the_chunks_before_it(tmp_path: Path) -> None:
    path, again = tmp_path / "rows.jsonl", Work()
    with pytest.raises(KeyboardInterrupt):
        run(path, Work(fail_at=4))
    assert len(path.read_text("utf-8").split("\n")) == 4
    run(path, again)
    assert again.chunks == [[3, 4, 5], [6]]


def test_the_caches_are_emptied_before_each_chunk(tmp_path: Path) -> None:
    calls: list[int] = []
    work = Work()
    engine = SimpleNamespace(clear_cache=lambda: calls.append(len(work.chunks)))
    run(tmp_path / "rows.jsonl", work, engines=[engine])
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("changed", [{"facts": {"seed": 2}}, {"items": [1]}, {"chunk_size": 2},
                                     {"facts": {"seed": 1, "new": 0}}])  # fmt: skip
def test_results_of_other_options_are_refused_and_kept(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Work())
    before = path.read_bytes()
    with pytest.raises(UserError, match="was made with"):
        run(path, Work(), **changed)
    assert path.read_bytes() == before
    run(path, Work())


def test_results_without_their_options_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Work())
    (tmp_path / "rows.jsonl.options.json").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl\.options\.json"):
        run(path, Work())


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Work())
    lines = path.read_text("utf-8").split("\n")
    for wrong in ("{oops", "[1]"):
        path.write_text("\n".join([lines[0], wrong, *lines[2:]]), "utf-8")
        with pytest.raises(UserError, match="line 2"):
            run(path, Work())


def moved(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


def edited(line: bytes) -> bytes:
    return json.dumps({**json.loads(line), "more": 1}).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: lines[:2] + lines[3:], "line 3: expected the row of item 2 of 7, got that"),
        (lambda lines: lines[:4] + lines, "line 5: expected the row of item 4 of 7, got that of 0"),
        (moved, "line 1: expected the row of item 0 of 7, got that of 1"),
        (lambda lines: [*lines, b'{"place": 7}\n'], "line 8: expected the row of item 7 of 7"),
        (lambda lines: [*lines[:2], b"{}\n"], "line 3: .* got that of None"),
        (lambda lines: [edited(lines[0]), *lines[1:]], "line 1: .* got that of 0, or edited"),
    ],
)
def test_a_line_that_is_missing_doubled_or_moved_is_an_error_and_nothing_is_cut(
    tmp_path: Path, change: Any, told: str
) -> None:
    path, work = tmp_path / "rows.jsonl", Work()
    run(path, work)
    changed = b"".join(change(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(changed)
    with pytest.raises(UserError, match=told):
        run(path, work)
    assert path.read_bytes() == changed and len(work.chunks) == 3


def test_a_results_file_is_one_programs_at_a_time(tmp_path: Path) -> None:
    path, second = tmp_path / "rows.jsonl", Work()

    def work(chunk: Sequence[int]) -> list[dict[str, Any]]:
        with pytest.raises(UserError, match=r"rows\.jsonl is in use by another program"):
            run(path, second)
        return Work()(chunk)

    run_chunks(Results(path, 3, "squares", OPTIONS), ITEMS, work)
    assert run(path, second) == Work()(ITEMS) and second.chunks == []


def test_an_empty_file_holds_nothing_that_other_options_could_spoil(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    assert run(path, Work()) == Work()(ITEMS)


def test_a_path_that_is_not_utf8_is_written_and_read_again(tmp_path: Path) -> None:
    facts = {"model": b"caf\xe9".decode("utf-8", "surrogateescape")}
    for _ in range(2):
        run(tmp_path / "rows.jsonl", Work(), facts=facts)


def test_a_full_disk_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    real, room = os.write, [0]

    def write(descriptor: int, data: bytes) -> int:
        """Let the options and one chunk pass, then half of the next chunk, then nothing."""
        room[0] += 1
        if room[0] <= 2:
            return real(descriptor, data)
        if room[0] == 3:
            return real(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(UserError, match="No space left"):
            run(path, Work())
    assert path.read_bytes().count(b"\n") == 3
    again = Work()
    run(path, again)
    assert again.chunks == [[3, 4, 5], [6]]


def test_a_finished_file_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an unfinished one is refused before any work is done."""
    path, half, again, real = tmp_path / "rows.jsonl", tmp_path / "half.jsonl", Work(), open
    rows = run(path, Work())
    run(half, Work())
    os.truncate(half, half.stat().st_size - 1)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def read_alone(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return real(file, mode, *rest, **named) if mode in ("r", "rb") else refuse()

    monkeypatch.setattr("builtins.open", read_alone)
    monkeypatch.setattr(os, "truncate", refuse)
    assert run(path, again) == rows
    with pytest.raises(UserError, match=r"half\.jsonl cannot be written: Read-only file system"):
        run(half, again)
    assert again.chunks == []


def test_a_wrong_number_of_rows_or_a_number_that_is_none_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="0 rows for 3 items"):
        run_chunks(Results(tmp_path / "a.jsonl", 3, "x"), ITEMS, lambda chunk: [])
    nan = [{"value": float("nan")}] * 3
    with pytest.raises(ValueError):
        run_chunks(Results(tmp_path / "b.jsonl", 3, "x"), ITEMS, lambda chunk: nan[: len(chunk)])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run(tmp_path / "file" / "rows.jsonl", Work())
    with pytest.raises(UserError, match="file"):
        write_rows(tmp_path / "file" / "rows.jsonl", [])


def test_results_whose_names_differ_behind_the_last_dot_share_no_note(tmp_path: Path) -> None:
    for name, seed in (("replies.a", 1), ("replies.b", 2)):
        run(tmp_path / name, Work(), facts={"seed": seed})
    run(tmp_path / "replies.a", Work(), facts={"seed": 1})


# --- whose work it is -------------------------------------------------------------------------


def test_facts_are_noted_until_something_is_made_and_compared_from_then_on(tmp_path: Path) -> None:
    note, made = tmp_path / "options" / "sft.json", [tmp_path / "log", tmp_path / "sft"]
    claim(note, {"seed": 1, "ends": (1, 2)}, made, "add --fresh")
    claim(note, {"seed": 2, "ends": (1, 2)}, made, "add --fresh")
    assert read_json(note) == {"seed": 2, "ends": [1, 2]}
    made[1].mkdir()
    claim(note, {"ends": (1, 2), "seed": 2}, made, "add --fresh")
    with pytest.raises(UserError, match=r"sft was made with seed 2, got 1; add --fresh$"):
        claim(note, {"seed": 1, "ends": (1, 2)}, made, "add --fresh")
    assert read_json(note) == {"seed": 2, "ends": [1, 2]}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"lora": {"r": 4, "use_rslora": False}}, "made with lora-r 8, got 4"),
        ({"lora": {"r": 8, "use_rslora": True}}, "made with lora-use-rslora False, got True"),
        ({"lora": {"r": 8}}, "made with lora-use-rslora False, got None"),
        ({"lora": None}, "made with lora {'r': 8, 'use_rslora': False}, got None"),
        ({"lora": {"r": 8, "use_rslora": False}, "new": 1}, "made with new None, got 1"),
    ],
)
def test_the_first_fact_that_differs_is_named(
    tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    note = tmp_path / "note.json"
    claim(note, {"lora": {"r": 8, "use_rslora": False}}, [], "")
    with pytest.raises(UserError) as raised:
        claim(note, other, [tmp_path], "or not")
    assert told in str(raised.value) and str(raised.value).endswith("; or not")


@pytest.mark.parametrize("content", [None, b"{broken", b"[1]", b"\xff"])
def test_a_note_that_is_missing_or_broken_is_named(tmp_path: Path, content: bytes | None) -> None:
    note = tmp_path / "note.json"
    if content is not None:
        note.write_bytes(content)
    with pytest.raises(UserError, match=r"note\.json"):
        claim(note, {}, [tmp_path], "add --fresh")


# --- run folders ------------------------------------------------------------------------------


def test_a_run_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    def again() -> None:
        with locked(tmp_path / "run"):
            pass

    with locked(tmp_path / "run"), pytest.raises(UserError, match="in use by another"):
        again()
    again()


def test_without_a_way_to_lock_a_run_goes_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("usbrec.runs.fcntl", None)
    with pytest.warns(UserWarning, match="run is not locked here"), locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


# --- files ------------------------------------------------------------------------------------

FULL = r"rows\.jsonl cannot be written: No space left on device; what stood there is kept"


def half_a_disk(descriptor: int, data: bytes, real=os.write) -> int:
    """Take half of what is given, and nothing of the rest."""
    if len(data) < 10:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(descriptor, data[: max(len(data) // 2, 5)])


@pytest.mark.parametrize("write", [write_rows, append_rows])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_content(tmp_path, monkeypatch, write):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])
    monkeypatch.setattr(os, "write", half_a_disk)
    with pytest.raises(UserError, match=FULL):
        write(path, [{"text": "so long that half of it finds room"}])
    assert path.read_bytes() == b'{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_beside_a_file_is_written_over(tmp_path):
    path = tmp_path / "deep" / "options.json"
    write_json(path, {"title": "Amélie"})
    (path.parent / "options.json.part").write_bytes(b"torn" * 100)
    write_json(path, {"title": "Up"})
    assert json.loads(path.read_bytes()) == {"title": "Up"}
    assert list(path.parent.iterdir()) == [path]


def test_rows_are_appended_in_their_order_and_a_text_keeps_every_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [])
    append_rows(path, [{"a": "é \u2028 \r\n"}, {"a": 2}])
    append_rows(path, [{"a": 3}])
    assert [json.loads(line)["a"] for line in path.open(newline="\n")] == ["é \u2028 \r\n", 2, 3]


@pytest.mark.parametrize(
    "write", [write_rows, append_rows, lambda x, rows: write_json(x, rows[-1])]
)
def test_a_number_that_is_not_finite_is_never_written(tmp_path, write):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])
    with pytest.raises(ValueError):
        write(path, [{"a": 2}, {"a": float("nan")}])
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_place_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="options.json cannot be written"):
        write_whole(tmp_path / "file" / "options.json", b"{}")
