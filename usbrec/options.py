"""Options: frozen dataclasses whose fields become `--kebab-case` flags, with their help text.

@dataclass(frozen=True)
class SearchOptions:
    samples: int = option(3, "first responses that are tried", low=1)

    def __post_init__(self) -> None:
        check(self)

add_flags(parser, SearchOptions, "ses")            # --ses-samples
options = from_flags(SearchOptions, arguments, "ses")
"""

import argparse
import hashlib
import math
from collections.abc import Container, Mapping
from dataclasses import field, fields
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

Options = TypeVar("Options")


class UserError(ValueError):
    """A fault that the user can mend: what, got, expected, where; `main()` exits with code 2."""


def option(
    default: Any,
    help: str,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """Return a dataclass field with what the option does and where its numbers lie.

    Values are at least `low`, greater than `above` and at most `high`.
    """
    return field(default=default, metadata={"help": help, "bounds": (low, above, high)})


def check(options: Any) -> None:
    """Raise ValueError naming the first field whose value is no choice, or a number out of bounds.

    Numbers must be finite.
    """
    hints = get_type_hints(type(options))
    for item in fields(options):
        value = getattr(options, item.name)
        low, above, high = item.metadata["bounds"]
        if isinstance(value, int | float) and not (
            low <= value <= high and above < value < math.inf
        ):
            said = [f"at least {low}"] * (low > -math.inf) + [f"above {above}"] * (
                above > -math.inf
            )
            said += [f"at most {high}"] * (high < math.inf)
            what = " and ".join(said) or "a finite number"
            raise ValueError(f"{item.name} must be {what}, got {value}")
        choices = get_args(hints[item.name])
        if get_origin(hints[item.name]) is Literal and value not in choices:
            raise ValueError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")


class Parser(argparse.ArgumentParser):
    """A parser for which a wrong flag is a UserError."""

    def error(self, message: str) -> NoReturn:
        """Tell the fault and where help is; argparse would print every flag there is."""
        raise UserError(f"{message} (see {self.prog} --help)")


def add_flags(
    parser: argparse.ArgumentParser,
    options: type,
    prefix: str = "",
    defaults: Mapping[str, Any] | None = None,
    skip: Container[str] = (),
) -> None:
    """Give the parser one flag a field not in `skip`; `defaults` replaces the dataclass's own."""
    group = parser.add_argument_group(f"{prefix or 'run'}", (options.__doc__ or "").split("\n")[0])
    hints = get_type_hints(options)
    for item in fields(options):
        if item.name in skip:
            continue
        flag = "--" + "-".join(filter(None, [prefix, item.name])).replace("_", "-")
        hint = hints[item.name]
        kind: dict[str, Any] = {"type": hint}
        if hint is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hint) is Literal:
            kind = {"choices": get_args(hint)}
        elif get_origin(hint) is tuple:
            kind = {"nargs": "+", "type": get_args(hint)[0]}
        elif get_origin(hint) is not None:  # an optional text or number
            kind = {"type": next(t for t in get_args(hint) if t is not type(None))}
        default = (defaults or {}).get(item.name, item.default)
        shown = "" if default is None else f" (default: {default})".replace("%", "%%")
        group.add_argument(
            flag, default=default, help=item.metadata.get("help", "") + shown, **kind
        )


def from_flags(options: type[Options], arguments: argparse.Namespace, prefix: str = "") -> Options:
    """Build the options from parsed flags; a value that they refuse is a UserError."""
    start = prefix.replace("-", "_") + "_" if prefix else ""
    names = [item.name for item in fields(options)]  # type: ignore[arg-type]
    given = {n: getattr(arguments, start + n) for n in names if hasattr(arguments, start + n)}
    given = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items()}
    try:
        return options(**given)
    except ValueError as error:
        where = f"--{prefix}-...: " if prefix else ""
        raise UserError(f"{where}{error}") from error


def seed_for(*parts: str | int) -> int:
    """Return a 63-bit seed for the named place, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
