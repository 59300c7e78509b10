"""Dialogues and examples: the types that the modules of crs share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from usbrec.chat import Message

Speaker = Literal["seeker", "recommender"]
SILENCE = "..."  # written for an empty reply, so that the speakers keep alternating


@dataclass(frozen=True)
class Utterance:
    """One line of a dialogue and its speaker."""

    speaker: Speaker
    text: str


Dialogue = tuple[Utterance, ...]
Dialogues = Sequence[Dialogue]
Popularity = Mapping[str, int]  # title -> its count among the training labels


@dataclass(frozen=True)
class Example:
    """One recommender turn that names at least one item, with every turn before it.

    `history` holds no empty lines and ends with the seeker. `items` are the gold titles. The other
    fields exist only where the dataset has them (the sample set). `profile` is the seeker's taste
    as the history shows it. `explanation` is the recommender's reason for its choice. `accept` is
    the seeker's answer to a gold item; `refuse` is the answer, with a hint, to another item.
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


Examples = Sequence[Example]


def add_turn(dialogue: Dialogue, speaker: Speaker, text: str) -> Dialogue:
    """Return the dialogue with one more line; an empty line is written as SILENCE."""
    return (*dialogue, Utterance(speaker, text.strip() or SILENCE))


def from_viewpoint(dialogue: Dialogue, speaker: Speaker) -> list[Message]:
    """Return the dialogue as chat messages for `speaker`, who speaks next.

    The lines of `speaker` are `assistant`, the other speaker's lines `user`. The authors' release
    gives both speakers the same mapping.
    """
    return [Message("assistant" if x.speaker == speaker else "user", x.text) for x in dialogue]


def format_dialogue(dialogue: Dialogue) -> str:
    """Return the dialogue as text, one line per utterance with its speaker."""
    return "\n".join(f"{x.speaker.capitalize()}: {' '.join(x.text.split())}" for x in dialogue)
