"""Dialogues, examples and pairs: all that crosses between the files of this package."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from usbrec.chat import Message

Speaker = Literal["seeker", "recommender"]


@dataclass(frozen=True)
class Utterance:
    """One line of a dialogue and who said it."""

    speaker: Speaker
    text: str


Dialogue = tuple[Utterance, ...]


@dataclass(frozen=True)
class Example:
    """A recommender's turn that names at least one item, given every turn before it.

    `history` holds no empty lines and ends with the seeker. `items` are the gold titles. What
    follows exists only where the dataset has it (the sample set): the `profile` of the seeker as
    the history shows it, the recommender's `explanation` of its choice, and what the seeker would
    say if a gold item (`accept`) or another one (`refuse`, with a hint) were recommended.
    """

    dialog_id: str
    turn_id: int
    history: Dialogue
    response: str
    items: tuple[str, ...]
    profile: str | None = None
    explanation: str | None = None
    accept: str | None = None
    refuse: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """Two first responses to one prompt, their scores (None: unscored gold) and their origins."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_score: float | None
    rejected_score: float | None
    chosen_from: str
    rejected_from: str


def from_viewpoint(dialogue: Iterable[Utterance], speaker: Speaker) -> list[Message]:
    """Return the dialogue as chat messages for the one who speaks next: own lines `assistant`.

    Each speaker sees its own turns as `assistant` and the other's as `user` (the authors' release
    gives both the same mapping).
    """
    return [
        Message("assistant" if line.speaker == speaker else "user", line.text) for line in dialogue
    ]
