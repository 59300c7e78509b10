"""The package installs with pip, whole, and its programs start on a system like Windows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIKE_WINDOWS = """
import os, runpy, sys
sys.modules |= {"fcntl": None, "resource": None}
del os.sysconf
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_pip_installs_every_file_of_the_package(tmp_path: Path) -> None:
    """Without an index: the build needs setuptools alone, which is here."""
    pytest.importorskip("setuptools")
    command = ["git", "ls-files", "usbrec", "*.toml", "*.txt"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split()
    for name in names:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / "runs").mkdir()  # a second folder beside the package
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *flags, tmp_path / "copy"], check=True
    )
    wanted = {name for name in names if name.startswith("usbrec/")}
    installed = {str(x.relative_to(tmp_path / "site")) for x in tmp_path.glob("site/usbrec/**/*.*")}
    assert {name for name in installed if not name.endswith(".pyc")} == wanted
    assert [x.name for x in tmp_path.glob("site/*") if x.suffix != ".dist-info"] == ["usbrec"]
    [metadata] = tmp_path.glob("site/*.dist-info/METADATA")
    assert "Requires-Dist: torch" in metadata.read_text()


@pytest.mark.parametrize("program", ["train.py", "infer.py"])
def test_the_programs_start_without_fcntl_and_resource(program: str) -> None:
    command = [sys.executable, "-c", LIKE_WINDOWS, str(ROOT / program), "--help-all"]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage")
