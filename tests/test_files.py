"""Files that stay whole: a full disk, a kill or a wrong number leaves what stood there before."""

import errno
import json
import os

import pytest

from usbrec.options import UserError
from usbrec.runs import append_rows, write_json, write_rows, write_whole

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


@pytest.mark.parametrize("write", [write_rows, append_rows])
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
