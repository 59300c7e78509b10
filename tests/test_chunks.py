"""Chunks: the same bytes after a kill at any moment, and nothing lost or mixed."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from usbrec.options import UserError
from usbrec.runs import run_chunks, write_rows

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
    settings = {"items": ITEMS, "chunk_size": 3, "label": "squares", "options": OPTIONS, **changed}
    return run_chunks(path, work=work, **settings)


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


def test_each_chunk_is_preceded_by_its_call(tmp_path: Path) -> None:
    calls: list[int] = []
    work = Work()
    run(tmp_path / "rows.jsonl", work, before_chunk=lambda: calls.append(len(work.chunks)))
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("changed", [{"options": {"seed": 2}}, {"items": [1]}, {"chunk_size": 2},
                                     {"options": {"seed": 1, "new": 0}}])  # fmt: skip
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
    (tmp_path / "rows.options.json").unlink()
    with pytest.raises(UserError, match=r"rows\.options\.json"):
        run(path, Work())


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(path, Work())
    lines = path.read_text("utf-8").split("\n")
    for wrong in ("{oops", "[1]"):
        path.write_text("\n".join([lines[0], wrong, *lines[2:]]), "utf-8")
        with pytest.raises(UserError, match="line 2"):
            run(path, Work())


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


def test_a_wrong_number_of_rows_or_a_number_that_is_none_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="0 rows for 3 items"):
        run_chunks(tmp_path / "a.jsonl", ITEMS, 3, lambda chunk: [], "x", {})
    nan = [{"value": float("nan")}] * 3
    with pytest.raises(ValueError):
        run_chunks(tmp_path / "b.jsonl", ITEMS, 3, lambda chunk: nan[: len(chunk)], "x", {})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run(tmp_path / "file" / "rows.jsonl", Work())
    with pytest.raises(UserError, match="file"):
        write_rows(tmp_path / "file" / "rows.jsonl", [])
