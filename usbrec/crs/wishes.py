"""What a seeker wants, as facts; a film's card in the same words; and the fit of both by rule.

A profile is text: "Likes: crime, tense mood, 1990s, with Al Pacino. Dislikes: war. Seen: Heat
(1995)." Its facts are (attitude, kind, value), such as ("like", "lead", "Al Pacino"). The gold
profile and a language model's summary are read by the same rules, and nothing is mended: an entry
that no rule knows counts as a genre, so a misspelt name is a wrong fact.

    card    "crime, thriller, tense mood, 1990s, by Michael Mann, with Al Pacino"
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from usbrec.crs.catalogue import Catalogue, Item

FORMS = {"mood": "{} mood", "director": "by {}", "lead": "with {}"}  # other kinds: the value alone
SECTIONS = {"Likes": "like", "Dislikes": "dislike", "Seen": "seen"}
FACT_KINDS = ("genre", "mood", "decade", "director", "lead", "title")  # in the order of a profile
NOTHING = "nothing said"
_HEADS = "|".join(SECTIONS)
_SECTION = re.compile(rf"\b({_HEADS}): *(.*?)(?:\.(?= *(?:{_HEADS}):)|\.?\s*$)")


class Fact(NamedTuple):
    """One fact of a profile.

    `attitude` is like, dislike or seen. `kind` is genre, mood, decade, director, lead or title. A
    refused film is a disliked title.
    """

    attitude: str
    kind: str
    value: str


def write_profile(likes: Sequence[str], dislikes: Sequence[str], seen: Sequence[str] = ()) -> str:
    """Return a profile of these entries; Seen is left out without any."""
    said = [", ".join(entries) or NOTHING for entries in (likes, dislikes, seen)]
    text = f"Likes: {said[0]}. Dislikes: {said[1]}."
    return f"{text} Seen: {said[2]}." if seen else text


def read_profile(text: str, catalogue: Catalogue) -> frozenset[Fact]:
    """Return the facts of a profile, none for a text of another form."""
    sections = _SECTION.findall(" ".join(text.split()))
    entries = ((SECTIONS[x], entry) for x, own in sections for entry in _entries(own, catalogue))
    return frozenset(Fact(like, *read_attribute(entry, catalogue)) for like, entry in entries)


def _entries(text: str, catalogue: Catalogue) -> list[str]:
    """Return the parts between the commas; a title that holds commas is one part."""
    parts, found = text.split(", "), []
    while parts:
        ends = range(min(len(parts), 9), 1, -1)  # no title has more commas
        n = next((n for n in ends if catalogue.get(", ".join(parts[:n]))), 1)
        found.append(", ".join(parts[:n]))
        parts = parts[n:]
    return [part for part in found if part and part != NOTHING]


def read_attribute(entry: str, catalogue: Catalogue) -> tuple[str, str]:
    """Return the (kind, value) of an entry: "by Michael Mann" -> ("director", "Michael Mann")."""
    if item := catalogue.get(entry):
        return "title", item.title
    for kind, form in FORMS.items():
        if found := re.fullmatch(form.replace("{}", "(.*)"), entry):
            return kind, found[1]
    return ("decade" if re.fullmatch(r"\d{4}s", entry) else "genre"), entry


def write_attribute(kind: str, value: str) -> str:
    """Return the entry of an attribute in a profile or on a card."""
    return FORMS.get(kind, "{}").format(value)


def attributes(item: Item) -> list[tuple[str, str]]:
    """Return every (kind, value) of a film that a seeker can wish for."""
    decades = (item.decade,) if item.decade else ()
    values = (item.genres, item.moods, decades, item.directors, item.stars, ())
    return [(kind, value) for kind, own in zip(FACT_KINDS, values, strict=True) for value in own]


def card(item: Item) -> str:
    """Return one line of a film's facts, what a user sees who looks the title up."""
    return ", ".join(write_attribute(*x) for x in attributes(item)) or "nothing known"


def fit(item: Item, facts: Iterable[Fact]) -> int:
    """Return how well a film meets the facts of a profile, 0 to 2.

    2: it meets all that is liked. 1: it meets half of it or more, or nothing is liked that a film
    can meet. 0: it meets less, has something disliked, or was refused or seen. Liked titles are no
    wishes.
    """
    own, facts = {*attributes(item), ("title", item.title)}, list(facts)
    if any(x.attitude != "like" and x[1:] in own for x in facts):
        return 0
    wishes = [x[1:] in own for x in facts if x.attitude == "like" and x.kind != "title"]
    if not wishes:
        return 1
    return 2 if all(wishes) else int(2 * sum(wishes) >= len(wishes))
