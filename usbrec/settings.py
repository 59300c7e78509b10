"""One field of a frozen options dataclass: its default and the help text of its flag."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """Return a dataclass field whose `metadata["help"]` says what the option does."""
    return field(default=default, metadata={"help": help})
