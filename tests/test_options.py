"""Options as flags: what is not given falls back step by step, and help shows what matters."""

import shlex
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from usbrec.options import Options, Parser, UserError, add_flags, from_flags, option, seed_for


@dataclass(frozen=True)
class Speed(Options):
    """How fast a thing is."""

    rate: float = option(0.5, "of the wheels, in %", above=0, high=9)
    steps: int = option(3, "how many", low=1)
    mode: Literal["run", "walk"] = option("run", "which way")
    loud: bool = option(False, "with a horn")
    name: str | None = option(None, "what it is called")
    sizes: tuple[int, ...] = option((1, 2), "of its parts")


def parser() -> Parser:
    made = Parser(shown="rate loud", prog="thing", description="A thing.")
    add_flags(made, Speed)
    add_flags(made, Speed, "hare", hidden=True)
    add_flags(made, Speed, "snail", {"rate": 0.1}, skip=["mode"])
    return made


def test_a_fault_is_told_in_one_line_whatever_the_name_of_a_folder() -> None:
    assert (
        str(UserError("no folder one\ntwo\u2028three: name it"))
        == "no folder one two three: name it"
    )


def test_a_seed_has_63_bits_and_its_parts_their_own_places() -> None:
    assert seed_for("pairs", 1) == seed_for("pairs", "1")
    paths = [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("a", "b", "c")]
    assert len({seed_for(*path) for path in paths}) == len(paths)
    assert 2**62 < max(seed_for(n) for n in range(50)) < 2**63


def test_every_type_of_field_is_read_from_its_flag() -> None:
    line = "--rate 2 --steps 4 --mode walk --loud --name x --sizes 5 6"
    flags = parser().parse_args(line.split())
    assert from_flags(Speed, flags) == Speed(2.0, 4, "walk", True, "x", (5, 6))
    assert from_flags(Speed, parser().parse_args([])) == Speed()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--rate -1", "rate must be"),
        ("--hare-rate -1", "--hare-...: rate must be"),
        ("--rate 1 --hare-steps -1 --no-loud", "--hare-...: steps must be"),
        ("--rate -1 --hare-steps 2", "rate must be"),
    ],
)
def test_a_refused_value_is_told_with_the_prefix_that_was_given(line: str, told: str) -> None:
    with pytest.raises(UserError) as fault:
        from_flags(Speed, parser().parse_args(line.split()), "", "hare")
    assert str(fault.value).startswith(told)


def test_a_flag_goes_before_the_shared_one_then_the_callers_default_then_the_fields() -> None:
    def hare(*words: str) -> Speed:
        flags = parser().parse_args(words)
        return from_flags(Speed, flags, "", "hare", defaults={"rate": 1.0, "steps": 2})

    assert hare() == Speed(rate=1.0, steps=2)
    assert hare("--rate", "3") == Speed(rate=3.0, steps=2)
    assert hare("--rate", "3", "--hare-rate", "4", "--loud") == Speed(4.0, 2, loud=True)
    assert hare("--loud", "--no-hare-loud") == Speed(rate=1.0, steps=2)


def test_help_tells_of_the_chosen_flags_and_help_all_of_every_one_that_is_not_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(flag: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parser().parse_args([flag])
        assert stop.value.code == 0
        return capsys.readouterr().out

    short, whole = told("--help"), told("--help-all")
    assert "--rate" in short and "--no-loud" in short and "--help-all" in short
    assert "--steps" not in short and "--mode" not in short and "--snail-mode" not in whole
    assert all(name in whole for name in ("--rate", "--steps", "--mode", "--sizes", "A thing."))
    assert "hare" not in short + whole
    assert "--snail-rate" in whole and "in % (default: 0.1)" in whole
    assert "how many (default: 3)" in whole


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--mode fly", "invalid choice: 'fly'"),
        ("--pace 3", "unrecognized arguments: --pace 3 (see thing --help-all)"),
        ("--rate 0", "rate must be above 0 and at most 9, got 0.0"),
        ("--rate nan", "rate must be 0, or of a size from 1e-15 to 9.22337e+18, got nan"),
        ("--rate 1e-320", "rate must be 0, or of a size from 1e-15"),
        ("--steps 99999999999999999999999", "steps must be 0, or of a size from 1e-15"),
        ("--name= --loud", "argument --name: must not be empty, got ''"),
        ("--sizes 1 ' '", "argument --sizes: must not be empty"),
        ("--hare-steps 0", "--hare-...: steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_one_sentence(words: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        flags = parser().parse_args(shlex.split(words))
        from_flags(Speed, flags)
        from_flags(Speed, flags, "hare")
    assert told in str(raised.value)


def test_a_number_without_bounds_is_of_a_size_that_can_be_computed_with() -> None:
    @dataclass
    class Free(Options):
        x: float = option(0.0, "")

    for wrong in (float("inf"), float("-inf"), float("nan"), 1e19, -1e300, 1e-16, 5e-324):
        with pytest.raises(ValueError, match="x must be 0, or of a size"):
            Free(wrong)
    assert [Free(x).x for x in (0, -0.0, 1e-15, -1e15, 3)] == [0, 0, 1e-15, -1e15, 3]
    with pytest.raises(ValueError, match="mode must be one of run, walk, got 'fly'"):
        Speed(mode="fly")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rate", "2"), ("rate", None), ("steps", 1.5), ("steps", []), ("mode", 3), ("loud", None)]
    + [("name", 5), ("name", ["x"]), ("sizes", 3), ("sizes", None)],
)
def test_a_value_of_another_type_of_a_file_made_by_hand_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be "):
        Speed(**{name: value})
    assert Speed(name=None, rate=1) == Speed(name=None, rate=1.0)
