"""The wishes of the sample set's seekers, and the phrases of phrases.txt that express them."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from usbrec.crs.catalogue import Item
from usbrec.crs.rewrite import decade_forms, genre_word, genre_words, with_article
from usbrec.crs.wishes import FACT_KINDS, attributes

NOUNS = ("comedy", "drama", "thriller", "western", "musical")  # genres that need no "film"


class Wish(NamedTuple):
    """A wish of the seeker: a fact of a film, or a genre to avoid (`kind` "dislike")."""

    kind: str
    value: str

    @property
    def noun(self) -> str:
        """The wish as a noun: "crime film", "Al Pacino film", "tense mood", "1990s"."""
        value = genre_word(self.value) if self.kind == "genre" else self.value
        return {"mood": f"{value} mood", "decade": value}.get(self.kind, f"{value} film")

    def fits(self, item: Item) -> bool:
        """Return whether the film meets the wish."""
        if self.kind == "dislike":
            return self.value not in item.genres
        return self in facts_of(item)


@cache
def facts_of(item: Item) -> list[Wish]:
    """Return every fact of a film that a seeker can wish for."""
    facts = [Wish(*fact) for fact in attributes(item)]
    return sorted(facts, key=lambda fact: fact.kind == "mood")  # moods last


def fitting(films: Iterable[Item], wishes: Sequence[Wish]) -> list[Item]:
    """Return the films that meet all wishes."""
    return [film for film in films if all(wish.fits(film) for wish in wishes)]


def parted(wishes: Sequence[Wish]) -> tuple[list[Wish], list[Wish]]:
    """Return the wishes for something, and those against a genre."""
    wanted = [wish for wish in wishes if wish.kind != "dislike"]
    return wanted, [wish for wish in wishes if wish.kind == "dislike"]


@cache
def phrases() -> dict[str, list[str]]:
    """Return the phrases of phrases.txt, by act."""
    text = Path(__file__).with_name("phrases.txt").read_text(encoding="utf-8")
    sections = [section.split("]\n") for section in text.split("\n[")[1:]]
    return {act: lines.strip().split("\n") for act, lines in sections}


def form_of(rng: Random, decade: str) -> str:
    """Return a form of the decade: "1990s", "90s", "nineties", the first most often."""
    return rng.choice([decade, *decade_forms(decade)])


def noun_phrase(rng: Random, wishes: Sequence[Wish], form: str = "free") -> str:
    """Return a noun phrase of wishes: "a tense crime film from the nineties with Al Pacino".

    The form "plural" has no article; the form "plain" keeps the decade in digits. Both always say
    film or movie.
    """
    wished = {kind: [x.value for x in wishes if x.kind == kind] for kind in FACT_KINDS}
    before = [*wished["mood"], *genre_words(wished["genre"])]
    if form != "plain":
        wished["decade"] = [form_of(rng, decade) for decade in wished["decade"]]
    after = [
        rng.choice(phrases()[f"film {kind}"]).format(" and ".join(wished[kind]))
        for kind in ("decade", "director", "lead")
        if wished[kind]
    ]
    rng.shuffle(after)
    if form == "free" and not before and rng.random() < 0.4:
        return " ".join(["something", *after])
    heads = [rng.choice(["film", "movie"]) + ("s" if form == "plural" else "")]
    if form == "free" and before and before[-1] in NOUNS and rng.random() < 0.5:
        heads = []  # "a crime thriller"
    words = " ".join([*before, *heads, *after])
    return words if form == "plural" else with_article(words)


def phrase(rng: Random, act: str, wishes: Sequence[Wish] = (), **slots: str) -> str:
    """Return a drawn phrase of the act, its slots filled; {np} and {np_short} are the wishes.

    Each sentence begins with a capital.
    """
    text = rng.choice(phrases()[act])
    if "{np" in text:
        slots["np"] = noun_phrase(rng, wishes, "plain" if act.startswith("recommends") else "free")
        slots["np_short"] = noun_phrase(rng, wishes, "plural")
        slots["It_is"] = rng.choice(phrases()["it is"])
    return re.sub("(^|[.!?] )[a-z]", lambda start: start[0].upper(), text.format(**slots))


def state(rng: Random, wishes: Sequence[Wish], act: str = "seeker says", **slots: str) -> str:
    """Return the seeker's sentences that reveal these wishes, by a phrase of the act.

    An act without a slot for wishes goes before them. Each dislike has a sentence of its own, and a
    single wish may have one too.
    """
    wanted, alone = parted(wishes)
    parts = []
    if not any("{np" in text for text in phrases()[act]):
        parts, act = [phrase(rng, act)], "seeker says"
    if len(wanted) == 1 and act == "seeker says" and rng.random() < 0.6:
        alone = [*wanted, *alone]
    elif wanted:
        parts.append(phrase(rng, act, wanted, **slots))
    for kind, value in alone:
        word = form_of(rng, value) if kind == "decade" else genre_word(value)
        forms = {kind: word, f"a_{kind}": with_article(word), "genre_name": value}
        parts.append(phrase(rng, f"seeker says {kind}", **forms))
    return " ".join(parts)
