"""Options: frozen dataclasses whose fields become `--kebab-case` flags, with their help text.

    @dataclass(frozen=True)
    class SearchOptions(Options):
        samples: int = option(3, "first responses that are tried", low=1)

    add_flags(parser, SearchOptions, "ses")            # --ses-samples
    options = from_flags(SearchOptions, arguments, "ses")

Flags that belong to no dataclass are in tables of JSON (`add_table`). Beside the options stand what
all modules share: errors that a user can cause, seeds, text files, lines on stderr.

A flag that is not given sets no value: `from_flags` takes the caller's default, else the
dataclass's. So a stage's flag can override the flag that all stages share.
"""

import argparse
import hashlib
import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Collection, Mapping
from dataclasses import field, fields
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

_Made = TypeVar("_Made")
LEAST, MOST = 1e-15, 2.0**63  # sizes of numbers that float32 and int64 hold


class UserError(ValueError):
    """A fault that the user can mend: what, got, expected, where; `main()` exits with code 2.

    It is told in one line, whatever the names and values in it.
    """

    def __init__(self, told: str) -> None:
        super().__init__(" ".join(told.splitlines()))


def option(value: Any, help: str, low: float = -inf, above: float = -inf, high: float = inf) -> Any:
    """Return a dataclass field with a default value, a help text and the bounds of its numbers.

    Values are at least `low`, greater than `above` and at most `high`.
    """
    bounds = {"at least": low, "above": above, "at most": high}
    return field(default=value, metadata={"help": help, "bounds": bounds})


def place(help: str) -> Any:
    """Return a field for a path, the same from any folder, or for a name that is no path here."""
    return field(default=None, metadata={**option(0, help).metadata, "place": True})


class Options:
    """Base class of options, which checks values when they are set."""

    def __post_init__(self) -> None:
        """Raise ValueError naming the first field of a wrong type, choice or size.

        Numbers must be 0, or of a size from LEAST to MOST.
        """
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, item.name), hints[item.name]
            if "place" in item.metadata and os.path.exists(value or ""):
                object.__setattr__(self, item.name, os.path.abspath(value))
            kind, choices = get_origin(hint) or hint, get_args(hint)
            kinds = choices if kind is UnionType else (kind,)
            kinds += (int,) * (float in kinds)
            low, above, high = item.metadata["bounds"].values()
            if kind is Literal and value not in choices:
                wanted = f"one of {', '.join(choices)}"
            elif kind is not Literal and not isinstance(value, kinds):
                wanted = getattr(hint, "__name__", str(hint))
            elif not isinstance(value, int | float):
                continue
            elif value and not LEAST <= abs(value) <= MOST:
                wanted = f"0, or of a size from {LEAST} to {MOST:g}"
            elif not (low <= value <= high and above < value):
                bounds = [f"{x} {y}" for x, y in item.metadata["bounds"].items() if abs(y) < inf]
                wanted = " and ".join(bounds)
            else:
                continue
            raise ValueError(f"{item.name} must be {wanted}, got {value!r}")


class _HelpAll(argparse._HelpAction):
    """`--help-all`: the help of every flag."""

    def __call__(self, parser: Any, *arguments: Any) -> None:
        parser.shown = set()
        super().__call__(parser, *arguments)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for a wrong flag and hides rare flags.

    `shown` names the flags in --help, without their dashes; --help-all lists every flag. Without
    `shown`, --help lists all.
    """

    def __init__(self, shown: str = "", **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.shown = {f"--{name}" for name in f"help help-all {shown}".split()} if shown else set()
        if shown:
            self.add_argument("--help-all", action=_HelpAll, help="show every flag")

    def format_help(self) -> str:
        """Return the help of the shown flags; later calls hide the other flags too."""
        for group in self._action_groups if self.shown else ():
            group.description = None
            for action in group._group_actions:
                if not self.shown.intersection(action.option_strings):
                    action.help = SUPPRESS
        return super().format_help()

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not arg_string.strip():  # as a path it would be the current folder
            raise argparse.ArgumentError(action, f"must not be empty, got {arg_string!r}")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the fault and the flag for help."""
        raise UserError(f"{message} (see {self.prog} --help{'-all' if self.shown else ''})")


def add_table(parser: Any, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the arguments of a table to a parser or a group: name -> argparse's keywords.

    Their `type` is "path" or "int", where it is not text.
    """
    for name, keywords in table.items():
        kind = {"type": {"path": Path, "int": int}[keywords["type"]]} if "type" in keywords else {}
        parser.add_argument(name, **{**keywords, **kind})


def add_flags(
    parser: Parser,
    options: type,
    prefix: str = "",
    defaults: Mapping[str, Any] = {},
    skip: Collection[str] = (),
    hidden: bool = False,
) -> None:
    """Add one flag to the parser per field that is not in `skip`.

    The help shows `defaults` instead of the dataclass's own. `hidden` flags appear in no help.
    """
    title = prefix.replace("_", "-") or options.__name__.removesuffix("Options").lower()
    about = None if hidden else (options.__doc__ or "").split("\n")[0]
    group = parser.add_argument_group(title, about)
    hints = get_type_hints(options)
    for item in fields(options):
        if item.name not in skip:
            default = defaults.get(item.name, item.default)
            text = item.metadata["help"].replace("%", "%%")
            if default is not None and default is not False:
                text += f" (default: {default})"
            flag, kind = _flag(prefix, item.name), _kind(hints[item.name])
            group.add_argument(flag, default=SUPPRESS, help=SUPPRESS if hidden else text, **kind)


def _kind(hint: Any) -> dict[str, Any]:
    """Return the keywords by which argparse reads a value of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    inner = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if get_origin(hint) is Literal:
        return {"choices": inner}
    # an optional text or number, a plain one, or several
    kind = {"type": inner[0], "metavar": {int: "N", float: "X", str: "NAME"}[inner[0]]}
    return kind | ({"nargs": "+"} if get_origin(hint) is tuple else {})


def from_flags(
    options: type[_Made], flags: Namespace, *prefixes: str, defaults: Mapping[str, Any] = {}
) -> _Made:
    """Return an instance of `options`, each field from its flag, else `defaults`, else the class.

    A flag of a later prefix overrides one of an earlier prefix. Raises UserError for a value that
    the options refuse, with the prefix of its flag.
    """
    values, given = dict(defaults), dict[str, str]()  # each field's value, and its flag's prefix
    for prefix in prefixes or ("",):
        for item in fields(options):  # type: ignore[arg-type]
            value = getattr(flags, _flag(prefix, item.name)[2:].replace("-", "_"), None)
            if value is not None:
                values[item.name] = tuple(value) if isinstance(value, list) else value
                given[item.name] = prefix
    try:
        return options(**values)
    except ValueError as error:  # begins with a field's name
        own = given.get(str(error).split()[0], "".join(prefixes[:1]))
        raise UserError(f"{_flag(own, '...')}: {error}" if own else str(error)) from error


def _flag(prefix: str, name: str) -> str:
    # no prefix twice: --lora-alpha
    return "--" + f"{prefix}-{name.removeprefix(prefix + '_')}".strip("-").replace("_", "-")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raises UserError naming the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or not UTF-8 text: {error}") from error


def tell(text: str) -> None:
    """Print a line on stderr, apart from the results."""
    print(text, file=sys.stderr)


def seed_for(*parts: str | int) -> int:
    """Return a 63-bit seed for a path of names, equal on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
