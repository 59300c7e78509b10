"""benchmarks/trouble.py: what it calls a fault, on scripts that end well and badly."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import usbrec

sys.path.append(str(Path(usbrec.__file__).parents[1] / "benchmarks"))
import trouble
from trouble import Ended, Job

# writes 64 KB as its last argument, which stands there whole or not at all
GOOD = """
import os, sys
path, part = sys.argv[1], f"{sys.argv[1]}.{os.getpid()}"
try:
    if not os.path.exists(path) or os.path.getsize(path) < 1 << 16:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "wb") as file:
            file.write(bytes(1 << 16))
        os.replace(part, path)
except OSError as error:
    if os.path.exists(part):
        os.remove(part)
    sys.exit("infer.py: " + error.strerror)
"""
# writes to the place itself, and takes whatever stands there for the whole
TORN = """
import os, sys
try:
    if not os.path.exists(sys.argv[1]):
        os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
        with open(sys.argv[1], "wb") as file:
            file.write(bytes(1 << 16))
except OSError as error:
    sys.exit("infer.py: " + error.strerror)
"""
NO_HOME = "import os\nos.environ['HOME']\n" + GOOD


def job_of(script: str, tmp_path: Path) -> Job:
    """Return the job of a script, run once; its faults exit with 2, as the program's do."""
    script = script.replace("sys.exit(", "sys.stderr.write(") + "    sys.exit(2)\n"
    job = Job("infer.py", (sys.executable, "-c", script), "r.jsonl", tmp_path / "whole")
    subprocess.run(job.words(job.whole), check=True)
    return job


def disks(work: Path) -> None:
    """Skip where no disk can be mounted."""
    if subprocess.run([*trouble.SPACE, "mount", "-t", "tmpfs", "none", str(work)]).returncode:
        pytest.skip("no disk can be mounted here")


@pytest.mark.parametrize("name", ["full", "read-only", "closed", "twice", "homeless", "locale"])
def test_a_program_that_ends_well_has_no_fault(name: str, tmp_path: Path) -> None:
    if name in ("full", "read-only"):
        disks(tmp_path)
    ends = list(trouble.TROUBLES[name](job_of(GOOD, tmp_path), tmp_path / "work"))
    assert ends and not any(end.wrong for end in ends), ends
    if name == "full":
        assert ends[0] == Ended(2, "infer.py: No space left on device", True)
    if name == "read-only":
        assert [end.code for end in ends] == [2, 2, 0]


def test_a_file_that_is_torn_is_a_fault(tmp_path: Path) -> None:
    disks(tmp_path)
    ends = list(trouble.full(job_of(TORN, tmp_path), tmp_path / "work"))
    assert [end.wrong for end in ends[:8]] == [True] * 8, ends


def test_a_traceback_is_a_fault(tmp_path: Path) -> None:
    without, *others = trouble.TROUBLES["homeless"](job_of(NO_HOME, tmp_path), tmp_path / "work")
    assert without.wrong and without.code == 1 and without.told.startswith("Traceback")
    assert not any(end.wrong for end in others)


@pytest.mark.parametrize(
    ("wrong", "changed"),
    [
        (False, {}),
        (False, {"code": 130}),
        (False, {"code": -signal.SIGKILL}),
        (True, {"code": 1}),
        (True, {"same": False}),
        (True, {"told": "infer.py: a\ninfer.py: b"}),
    ],
)
def test_what_counts_as_a_fault(wrong: bool, changed: dict[str, Any]) -> None:
    assert Ended(**{"code": 2, "told": "infer.py: a", "same": True, **changed}).wrong == wrong


def test_last_words_leave_bars_and_notes_out() -> None:
    errors = "note: x\n  0%|  |\r 50%|  |\r100%|##|\ntrain.py: a is wrong\n"
    assert trouble.last_words(errors) == "train.py: a is wrong"


def test_a_row_counts_codes_and_hides_the_folder(tmp_path: Path) -> None:
    ends = [Ended(2, f"infer.py: {tmp_path}/a: no", True), Ended(0, "", False)]
    job = Job("infer.py", (), "r", tmp_path)
    row = trouble.line("full", job, ends, tmp_path)
    assert row == "| full | infer.py | 0: 1, 2: 1 | 1 of 2 | infer.py: a: no |"
