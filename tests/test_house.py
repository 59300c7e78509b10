"""The house keeps its measure: few lines, small pieces, no name twice, a core that stands alone.

A code line holds code: blank lines, comments and docstrings do not count. Pages (.html, .js) count
their lines that are not blank. Tests and benchmarks are not counted.
"""

import ast
import io
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from test_border import imported

import usbrec

ROOT = Path(usbrec.__file__).parents[1]
IN_ALL, PACKAGE, EXTRAS, CORE_IN_ALL = 6500, 5000, 1500, 1750
FILE, CLASS, FUNCTION, PARAMETERS = 300, 150, 50, 6  # the first three: fewer than this
CORE = (
    *(
        f"usbrec/llm/{name}.py"
        for name in (
            "model", "lora", "packing", "loss", "training",
            "cache", "decoding", "sampler", "engine",
        )
    ),
    *(f"usbrec/crs/{name}.py" for name in ("agents", "podcs", "ses")),
)  # fmt: skip
PIECES = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
COUNTED = (".py", ".html", ".js")
IN_BOTH_SCRIPTS = {"main", "build_parser"}
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


# --- counters ---------------------------------------------------------------------------------


def span(node: ast.stmt) -> set[int]:
    """Return the numbers of the lines from a statement's first to its last."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | PIECES) and ast.get_docstring(node) is not None:
            lines -= span(node.body[0])
    return lines


def size(name: str, source: str) -> int:
    """Return a file's code lines, or for a page its lines that are not blank."""
    if name.endswith(".py"):
        return len(code_lines(source))
    return sum(bool(line.strip()) for line in source.splitlines())


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of a function's parameters, self and cls left out."""
    own = function.args
    given = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, [own.vararg, own.kwarg])]
    return sum(item.arg not in ("self", "cls") for item in given)


def too_big(source: str) -> list[str]:
    """Return the functions and classes that are over a limit, each with its counts."""
    lines, found = code_lines(source), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, PIECES):
            count = len(lines & span(node))
            if isinstance(node, ast.ClassDef):
                if count >= CLASS:
                    found.append(f"class {node.name}: {count} lines")
            elif count >= FUNCTION or parameters(node) > PARAMETERS:
                found.append(f"{node.name}: {count} lines, {parameters(node)} parameters")
    return found


def top_names(source: str) -> set[str]:
    """Return the public names that a module defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, PIECES):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = (part for target in targets for part in ast.walk(target))
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for name in names if not name.startswith("_")} - IN_BOTH_SCRIPTS


def twice(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Return each name that several modules define, with those modules."""
    places = defaultdict(list)
    for path, source in sources.items():
        for name in top_names(source):
            places[name].append(path)
    return {name: found for name, found in places.items() if len(found) > 1}


def imports_of(path: str, source: str, package: str) -> Iterator[str]:
    """Yield each import statement, wherever it stands, that reaches into `package`."""
    parts = tuple(path.removesuffix(".py").split("/"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            statement = ast.unparse(node)
            if any(f"{name}.".startswith(package + ".") for name in imported(statement, parts)):
                yield f"{path}: {statement}"


# --- the house --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house() -> dict[str, str]:
    """Return the text of every counted file that git tracks, by its path."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository: nothing tells which files are the project's")
    names = [name for name in listed.stdout.splitlines() if name.endswith(COUNTED)]
    names = [name for name in names if not name.startswith(("tests/", "benchmarks/"))]
    return {name: (ROOT / name).read_text("utf-8") for name in names if (ROOT / name).exists()}


def lines_in(house: Mapping[str, str], names: Iterable[str]) -> int:
    return sum(size(name, house[name]) for name in names)


def package(house: Mapping[str, str]) -> list[str]:
    return [name for name in house if name.startswith("usbrec/") and name.endswith(".py")]


def test_the_whole_is_small(house: dict[str, str]) -> None:
    extras = [name for name in house if name.startswith("usbrec/extras/")]
    inner = [name for name in house if name.startswith("usbrec/") and name not in extras]
    assert len(inner) > 20, "the test looks in the wrong place"
    assert lines_in(house, house) <= IN_ALL
    assert lines_in(house, inner) <= PACKAGE
    assert lines_in(house, extras) <= EXTRAS


def test_every_file_is_small(house: dict[str, str]) -> None:
    sizes = {name: size(name, source) for name, source in house.items()}
    assert {name: count for name, count in sizes.items() if count >= FILE} == {}


def test_every_function_and_class_is_small(house: dict[str, str]) -> None:
    found = {name: too_big(text) for name, text in house.items() if name.endswith(".py")}
    assert {name: pieces for name, pieces in found.items() if pieces} == {}


def test_no_name_is_defined_twice(house: dict[str, str]) -> None:
    modules = [*package(house), "train.py", "infer.py"]
    assert twice({name: house[name] for name in modules}) == {}


def test_the_core_is_there_and_small(house: dict[str, str]) -> None:
    assert len(CORE) == 12 and set(CORE) <= set(house)
    assert lines_in(house, CORE) <= CORE_IN_ALL


def test_the_core_needs_neither_extras_nor_fast(house: dict[str, str]) -> None:
    for name in CORE:
        for other in ("usbrec.extras", "usbrec.llm.fast"):
            assert list(imports_of(name, house[name], other)) == []


def test_nothing_else_needs_the_extras(house: dict[str, str]) -> None:
    others = [name for name in package(house) if not name.startswith("usbrec/extras/")]
    found = [line for name in others for line in imports_of(name, house[name], "usbrec.extras")]
    assert found == []


def test_fast_hangs_on_one_line(house: dict[str, str]) -> None:
    modules = [*package(house), "train.py", "infer.py"]
    others = [name for name in modules if not name.startswith("usbrec/llm/fast")]
    found = [line for name in others for line in imports_of(name, house[name], "usbrec.llm.fast")]
    assert len(found) == 1, found


# --- the counters can fail --------------------------------------------------------------------

SOURCE = '''"""A module.

Two lines of docstring.
"""

import os  # code with a comment

# a comment alone
TEXT = """not a docstring:
three lines of code
"""


class Thing:
    """A docstring."""

    def act(self, first: int, *rest: int, last: bool = False) -> int:
        """Another."""

        return (
            first
        )
'''


def test_code_lines_leave_out_docstrings_comments_and_blanks() -> None:
    assert sorted(code_lines(SOURCE)) == [6, 9, 10, 11, 14, 17, 20, 21, 22]
    assert code_lines("def f(): ...\n") == {1}
    assert size("page.html", "<p>\n\n  one\n</p>\n") == 3


def test_parameters_leave_out_self_and_count_stars() -> None:
    [act] = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert parameters(act) == 3


def function(lines: int, arguments: str = "") -> str:
    return f"def long({arguments}):\n" + "    x = 1\n" * (lines - 1)


def test_too_big_finds_what_is_over_a_limit_and_nothing_else() -> None:
    assert too_big(function(49, "a, b, c, d, e, f")) == []
    assert too_big(function(50)) == ["long: 50 lines, 0 parameters"]
    assert too_big(function(2, "a, b, c, d, e, f, g")) == ["long: 2 lines, 7 parameters"]
    assert too_big("class Long:\n" + "    x = 1\n" * 148) == []
    assert too_big("class Long:\n" + "    x = 1\n" * 149) == ["class Long: 150 lines"]


def test_twice_finds_functions_classes_and_constants() -> None:
    first = (
        "def run(): ...\nclass Row: ...\nA, B = 1, 2\nLIMIT: int = 3\n_own = 1\ndef main(): ...\n"
    )
    second = "def run(): ...\nclass Row: ...\nB = 1\nLIMIT = 3\n_own = 2\ndef main(): ...\n"
    assert set(twice({"a.py": first, "b.py": second})) == {"run", "Row", "B", "LIMIT"}
    assert twice({"a.py": "from b import run\n", "b.py": "def run():\n    x = 1\n"}) == {}


def test_imports_are_found_however_they_are_written() -> None:
    source = (
        "import usbrec.llm.fast\n"
        "from usbrec.llm import fast\n"
        "from usbrec.llm.faster import x\n"
        "def f():\n    from .fast.cpu import y\n"
    )
    found = list(imports_of("usbrec/llm/engine.py", source, "usbrec.llm.fast"))
    assert len(found) == 3 and not any("faster" in line for line in found)
