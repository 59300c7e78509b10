"""The hand-picked faults of mutate.py still have their places in the code."""

import ast

import pytest
from mutate import MUTATIONS, ROOT, Mutation


def test_there_are_twenty_and_no_two_alike() -> None:
    assert len({(each.file, each.code) for each in MUTATIONS}) == len(MUTATIONS) >= 20


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.what)
def test_a_fault_has_one_place_and_tests_to_notice_it(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text("utf-8")
    assert source.count(mutation.code) == 1
    ast.parse(source.replace(mutation.code, mutation.fault))
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in mutation.tests.split())
