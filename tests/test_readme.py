"""The pages tell the truth: the file tree, the commands and their flags, the links between them."""

import re
import shlex
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

import infer
import train

sys.path.append(str(Path(train.__file__).parent / "benchmarks"))
import sweep  # noqa: E402

ROOT = Path(train.__file__).parent
NAMES = ("README.md", "CONTRIBUTING.md", "data/README.md")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md")))
}
TEXT = PAGES["README.md"]
SCRIPTS = {"train.py": train, "infer.py": infer, "benchmarks/sweep.py": sweep}
# in a block of four spaces, or between backticks
COMMAND = re.compile(
    r"(?:^    (?:.* && )?|`)(?:python|torchrun --nproc-per-node \d+) +"
    r"(?P<job>-m [\w.]+|[\w/]+\.py)(?P<words>[^#\n`]*)",
    re.MULTILINE,
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
TREE = re.compile(r"^ {6,}(\w+\.py) ", re.MULTILINE)
DATA_COMMANDS = (ROOT / "usbrec" / "crs" / "conversion.json").read_text("utf-8")
LONG = ("python train.py", "torchrun", "python benchmarks", "python -m pytest")
TIME = re.compile(r"# .*\b(?:\d+|an?|half an) (?:s|min|h|minutes?|hours?)\b")


def commands() -> list[tuple[str, str, str]]:
    """Return the page, the job (a script, or -m and a module) and the words of every command."""
    return [
        (page, found["job"], found["words"].strip())
        for page, text in PAGES.items()
        for found in COMMAND.finditer(text)
    ]


def source_of(job: str) -> str:
    """Return the text of what a command runs."""
    if not job.startswith("-m "):
        return (ROOT / job).read_text("utf-8")
    spec = find_spec(job.removeprefix("-m "))
    assert spec is not None and spec.origin is not None, f"there is no module {job}"
    return Path(spec.origin).read_text("utf-8")


def test_the_file_tree_names_every_module_once() -> None:
    told = TREE.findall(TEXT.split("## The files")[1].split("\n## ")[0])
    there = [path.name for path in (ROOT / "usbrec").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(told) == sorted(there)


def test_the_readme_stays_short() -> None:
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize(("page", "job", "words"), commands())
def test_every_command_has_the_flags_that_it_is_given(page: str, job: str, words: str) -> None:
    if job in SCRIPTS:
        with suppress(SystemExit):  # --help ends so; a wrong flag is a UserError
            SCRIPTS[job].build_parser().parse_args(shlex.split(words))
    elif job != "-m pytest":
        source = DATA_COMMANDS if job == "-m usbrec.crs.datasets" else source_of(job)
        assert [flag for flag in FLAG.findall(words) if f'"{flag}"' not in source] == []


def test_both_of_the_two_commands_are_among_them() -> None:
    found = commands()
    assert ("README.md", "train.py", "") in found and ("README.md", "infer.py", "--ses") in found


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_exists(page: str) -> None:
    known = {"--nproc-per-node", "--cov", "--cov-branch"}  # torchrun's and pytest-cov's
    known |= {"--generation-config", "--enable-lora", "--max-lora-rank", "--lora-modules"}  # vLLM's
    known |= {"--no-enable-chunked-prefill", "--max-num-batched-tokens"}  # vLLM's too
    known |= {"--sampling-defaults"}  # SGLang's
    known |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', DATA_COMMANDS))
    for script in SCRIPTS.values():
        known |= {f for action in script.build_parser()._actions for f in action.option_strings}
    for path in (*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "usbrec" / "extras").glob("*.py")):
        known |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', path.read_text("utf-8")))
    assert set(FLAG.findall(PAGES[page])) - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_a_command_of_more_than_a_minute_has_its_time_beside_it(page: str) -> None:
    lines = [line for line in PAGES[page].splitlines() if line.startswith("    ")]
    slow = [line for line in lines if any(job in line for job in LONG) and "--help" not in line]
    assert [line for line in slow if not TIME.search(line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page])
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / page).parent / link).exists()] == []


HOP = re.compile(r"^\| \d+ \| `([\w/]+\.py)`: (.+?) \|", re.MULTILINE)


@pytest.mark.parametrize("number", [1, 2])
def test_a_call_path_is_short_and_names_what_is_there(number: int) -> None:
    hops = HOP.findall(PAGES["docs/CALLS.md"].split("\n## ")[number])
    assert 5 < len(hops) <= 15
    files = [file for file, _ in hops]
    assert max(map(files.count, files)) <= 2
    for file, names in hops:
        place = ROOT / file if (ROOT / file).exists() else ROOT / "usbrec" / file
        source = place.read_text("utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^ *(?:def|class) {part}\b", source, re.MULTILINE), name


def test_the_patterns_find_what_they_look_for() -> None:
    text = "    pip install x && python train.py --full  # 75 min\nor `python -m a.b --c d`\n"
    found = [(each["job"], each["words"].strip()) for each in COMMAND.finditer(text)]
    assert found == [("train.py", "--full"), ("-m a.b", "--c d")]
    assert FLAG.findall("--kv-memory of x--y and --STAGE-epochs") == ["--kv-memory"]
    assert TIME.search("# some 11 min") and not TIME.search("# all rows")
