"""The border of the house: llm and crs never meet, and the recommender's side has no tensors."""

import ast
from pathlib import Path

import usbrec

HOUSE = Path(usbrec.__file__).parent
SHARED = {"usbrec.chat", "usbrec.options"}


def imported(source: str, parts: tuple[str, ...]) -> set[str]:
    """Return every module that a file at `parts` imports, relative ones resolved, wherever."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def reaches(path: Path, package: str) -> bool:
    parts = path.relative_to(HOUSE.parent).with_suffix("").parts
    names = imported(path.read_text("utf-8"), parts)
    return any(name == package or name.startswith(package + ".") for name in names)


def sources(folder: str) -> list[Path]:
    found = sorted((HOUSE / folder).rglob("*.py"))
    assert found, f"{folder} has no files: the test looks in the wrong place"
    return found


def test_the_recommenders_side_imports_neither_the_model_nor_torch() -> None:
    for path in sources("crs"):
        for package in ("usbrec.llm", "torch", "transformers", "safetensors"):
            assert not reaches(path, package), f"{path.name} imports {package}"


def test_the_model_knows_nothing_of_recommendation() -> None:
    for path in sources("llm"):
        assert not reaches(path, "usbrec.crs"), f"{path.name} imports usbrec.crs"


def test_what_both_sides_share_imports_neither() -> None:
    for name in SHARED:
        path = HOUSE / f"{name.split('.')[1]}.py"
        for package in ("usbrec.llm", "usbrec.crs", "torch"):
            assert not reaches(path, package), f"{path.name} imports {package}"


def test_the_check_sees_relative_and_inner_imports() -> None:
    source = "def f():\n    from ..llm import model\n    from .. import llm\n    import torch.nn\n"
    found = imported(source, ("usbrec", "crs", "ses"))
    assert {"usbrec.llm.model", "usbrec.llm", "torch.nn"} <= found
