"""The README tells the truth: its file tree, and flags that the commands have."""

import re
import shlex
from pathlib import Path

import pytest

import infer
import train

ROOT = Path(train.__file__).parent
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^    (?:.* && )?python (train|infer)\.py *([^#\n]*)", TEXT, re.MULTILINE)


def test_the_file_tree_names_every_module_once() -> None:
    tree = TEXT.split("## The files")[1].split("## ")[0]
    told = re.findall(r"^ {6,}(\w+\.py) ", tree, re.MULTILINE)
    there = [path.name for path in (ROOT / "usbrec").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(told) == sorted(there)


@pytest.mark.parametrize(("name", "words"), COMMANDS)
def test_every_command_has_the_flags_that_it_is_given(name: str, words: str) -> None:
    parser = {"train": train, "infer": infer}[name].build_parser()
    parser.parse_args(shlex.split(words))


def test_both_of_the_two_commands_are_among_them() -> None:
    assert ("train", "") in COMMANDS and ("infer", "--ses") in COMMANDS


def test_every_flag_in_the_text_exists() -> None:
    # of torchrun and of benchmarks
    others = {"--nproc-per-node", "--millions", "--kills", "--quick", "--dialogues"}
    known = others | {
        flag
        for command in (train, infer)
        for action in command.build_parser()._actions
        for flag in action.option_strings
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= known
