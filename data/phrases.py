"""The wishes of the sample set's seekers, and the phrases of phrases.txt that express them."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from usbrec.crs.catalogue import Item
from usbrec.crs.rewrite import decade_forms, genre_word, genre_words, with_article
from usbrec.crs.wishes import attributes

NOUNS = ("comedy", "drama", "thriller", "western", "musical")  # genres that need no "film"
KINDS = ("mood", "genre", "decade", "director", "lead")  # the order of words in a noun phrase


@dataclass(frozen=True)
class Wish:
    """A wish of the seeker: a fact (`kind` in KINDS), or a genre to avoid (`kind` "dislike")."""

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


@cache
def phrases() -> dict[str, list[str]]:
    """Return the phrases of phrases.txt, by act."""
    text = Path(__file__).with_name("phrases.txt").read_text(encoding="utf-8")
    sections = [section.split("]\n") for section in text.split("\n[")[1:]]
    return {act: [line for line in lines.splitlines() if line] for act, lines in sections}


def parted(wishes: Sequence[Wish]) -> tuple[list[Wish], list[Wish]]:
    """Return the wishes for something, and those against a genre."""
    wanted = [wish for wish in wishes if wish.kind != "dislike"]
    return wanted, [wish for wish in wishes if wish.kind == "dislike"]


def sentence_case(text: str) -> str:
    """Return the text with a capital at the start of each sentence."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


@dataclass
class Words:
    """Seeded wordings of wishes and acts."""

    rng: random.Random

    def noun_phrase(self, wishes: Sequence[Wish], plural: bool = False, plain: bool = False) -> str:
        """Return a noun phrase of wishes: "a tense crime film from the nineties with Al Pacino".

        `plain` keeps a decade in digits.
        """
        choice = self.rng.choice
        wished = {kind: [x.value for x in wishes if x.kind == kind] for kind in KINDS}
        before = [*wished["mood"], *genre_words(wished["genre"])]
        after = []
        for decade in wished["decade"]:
            said = decade if plain else self.decade(decade)
            after.append(choice(["from the", "from the", "made in the"]) + f" {said}")
        after += [choice(["by", "directed by"]) + f" {name}" for name in wished["director"]]
        if wished["lead"]:
            after.append(choice(["with", "starring"]) + " " + " and ".join(wished["lead"]))
        self.rng.shuffle(after)
        if not before and not plural and not plain and self.rng.random() < 0.4:
            return " ".join(["something", *after])
        heads = [choice(["film", "movie"]) + ("s" if plural else "")]
        if not plain and not plural and before and before[-1] in NOUNS and self.rng.random() < 0.5:
            heads = []  # "a crime thriller"
        words = " ".join([*before, *heads, *after])
        return words if plural else with_article(words)

    def decade(self, decade: str) -> str:
        """Return a form of the decade: "1990s", "90s", "nineties", the first most often."""
        return self.rng.choice([decade, *decade_forms(decade)])

    def phrase(self, act: str, wishes: Sequence[Wish] = (), **slots: str) -> str:
        """Return a drawn phrase of the act, its slots filled; {np} and {np_short} are wishes."""
        text = self.rng.choice(phrases()[act])
        if "{np" in text or "{It_is}" in text:
            slots["np"] = self.noun_phrase(wishes, plain=act.startswith("recommends"))
            slots["np_short"] = self.noun_phrase(wishes, plural=True)
            opening = self.rng.choice(["It is", "It's", "This is", "That is"])
            slots["It_is"] = f"{opening} {slots['np']}"
        return text.format(**slots)

    def wish(self, wish: Wish) -> str:
        """Return the seeker's sentence for one wish, by a phrase of its kind."""
        value = self.decade(wish.value) if wish.kind == "decade" else genre_word(wish.value)
        slots = {wish.kind: value, f"a_{wish.kind}": with_article(value), "genre_name": wish.value}
        return self.phrase(f"seeker says {wish.kind}", [wish], **slots)

    def wishes(self, wishes: Sequence[Wish], act: str = "seeker says") -> str:
        """Return the seeker's sentences that reveal these wishes; each dislike has its own."""
        wanted, disliked = parted(wishes)
        parts = []
        if len(wanted) == 1 and act == "seeker says" and self.rng.random() < 0.6:
            parts.append(self.wish(wanted[0]))
        elif wanted:
            parts.append(self.phrase(act, wanted))
        return " ".join([*parts, *map(self.wish, disliked)])
