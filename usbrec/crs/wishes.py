"""What a seeker wants, as facts; a film's card in the same words; the fit of both by rule.

A profile is text: "Likes: crime, tense mood, 1990s, with Al Pacino. Dislikes: war. Seen: Heat
(1995)." Its facts are (attitude, kind, value), such as ("like", "lead", "Al Pacino"). The gold
profile and a language model's summary are read by the same rules, and nothing is mended: an entry
that no rule knows counts as a genre, so a misspelt name is a wrong fact.

    card    "crime, thriller, tense mood, 1990s, by Michael Mann, with Al Pacino"

The second half of the file puts films into words: it describes a film, and rewrites a reply for
another film. Left out there: inflections other than those in GENRE_FORMS, pronouns ("he", "her"),
and the plot.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.titles import GENRE_FORMS, leaks

FORMS = {"mood": "{} mood", "director": "by {}", "lead": "with {}"}  # other kinds: the value alone
SECTIONS = {"Likes": "like", "Dislikes": "dislike", "Seen": "seen"}
FACT_KINDS = ("genre", "mood", "decade", "director", "lead", "title")  # in the order of a profile
NOTHING, UNKNOWN = "nothing said", "nothing known"  # in a profile, on a card
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
    """Return the (kind, value) of an entry: "by Michael Mann" -> ("director", "Michael Mann").

    "war" is the genre, also where a film "War" is in the catalogue.
    """
    if entry not in catalogue.genres and (item := catalogue.get(entry)):
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
    return ", ".join(write_attribute(*x) for x in attributes(item)) or UNKNOWN


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
    return 2 if wishes and all(wishes) else int(2 * sum(wishes) >= len(wishes))


# --- films in words ---------------------------------------------------------------------------

_NAMES = ["fifties", "sixties", "seventies", "eighties", "nineties"]
DECADE_NAMES = {f"{n}0s": name for n, name in enumerate(_NAMES, 5)}  # "50s" -> "fifties"


def genre_word(genre: str) -> str:
    """Return the form of a genre before "film": "animation" -> "animated"."""
    return GENRE_FORMS.get(genre, (genre,))[0]


def genre_words(genres: Sequence[str]) -> list[str]:
    """Return the forms of the genres before "film", in the usual order: "romantic comedy"."""
    place = {genre: i for i, genre in enumerate(GENRE_FORMS)}  # unknown genres come first
    return [genre_word(genre) for genre in sorted(genres, key=lambda x: place.get(x, -1))]


def decade_forms(decade: str) -> list[str]:
    """Return the forms of a decade: "1990s", "90s", "nineties"; from "2000s" on the first alone."""
    name = DECADE_NAMES.get(decade[2:]) if decade.startswith("19") else None
    return [decade, decade[2:], name] if name else [decade]


def with_article(words: str) -> str:
    """Return the words after "a" or "an"."""
    return f"{'an' if re.match('[aeiou]|8', words, re.IGNORECASE) else 'a'} {words}"


def describe(item: Item) -> str:
    """Return a film's facts in one clause: "a 1995 crime film by Michael Mann with Al Pacino"."""
    words = [*([str(item.year)] if item.year else []), *genre_words(item.genres[:2]), "film"]
    words += [f"by {x}" for x in item.directors[:1]] + [f"with {x}" for x in item.stars[:1]]
    return with_article(" ".join(words))


def rewrite(text: str, old: Item, new: Item) -> str:
    """Return a reply about `old` rewritten for `new`, with title and every attribute replaced.

    Title, year, decade, director, stars, genres and moods of the old film that occur in the text
    become the new film's. Facts that both films share are kept. "a"/"an" is adapted to the word
    after it. Where the new film lacks a fact, neutral words are used ("someone else", "different",
    "another year").
    """
    own, dated = leaks(text, old.title), re.compile(r"\d{4}\)?$")
    spans = [(a, b, new.title if dated.search(text[a:b]) else new.name) for a, b in own]
    for pattern, words in _replacements(old, new):
        for match in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", text, re.IGNORECASE):
            if not any(match.start() < end and start < match.end() for start, end, _ in spans):
                spans.append((*match.span(), words if isinstance(words, str) else words(match)))
    result, place = "", 0
    for start, end, words in sorted(spans):
        result += text[place:start]
        tail = result[-40:]
        if article := re.search(r"(?<![^\W_])(an?) $", tail, re.IGNORECASE):
            right, _, _ = with_article(words).partition(" ")
            right = right.capitalize() if article[1][0].isupper() else right
            result = f"{result[: len(result) - len(tail) + article.start()]}{right} "
        elif re.search(r"(?:^|[.!?] *)$", tail) and text[start].isupper():
            words = words[0].upper() + words[1:]
        result, place = result + words, end
    result += text[place:]
    for genre in new.genres or ("different",):  # "comedy and comedy", once two genres, is "comedy"
        word = re.escape(genre_word(genre))
        result = re.sub(rf"\b({word})(?:(?:,| and|, and)? \1)+\b", r"\1", result)
    return result


def rewrite_all(text: str, films: Iterable[tuple[Item, Item]]) -> str:
    """Return a text about several films rewritten for others, by pairs (old, new)."""
    for old, new in films:
        text = rewrite(text, old, new)
    return text


_Replacement = str | Callable[[re.Match[str]], str]


def _replacements(old: Item, new: Item) -> Iterator[tuple[str, _Replacement]]:
    """Yield the pattern of each attribute of `old` and its replacement, people first."""
    people = dict.fromkeys((*old.directors, *old.stars))
    for person in sorted(people, key=len, reverse=True):
        yield re.escape(person), partial(_other_person, person, old, new)
    for person in people:
        surname = person.split()[-1]
        if len(surname) > 3 and surname != person:
            yield f"(?-i:{re.escape(surname)})", partial(_other_person, person, old, new)
    if old.year and old.year != new.year:
        yield str(old.year), str(new.year or "another year")
    if old.decade and old.decade != new.decade:
        others = decade_forms(new.decade) if new.decade else ["another decade"]
        # a form becomes the form at the same place, or the last
        for place, form in enumerate(decade_forms(old.decade)):
            yield ("['’]?" if place == 1 else "") + form, others[min(place, len(others) - 1)]
    others = [genre for genre in new.genres if genre not in old.genres] or list(new.genres)
    for place, genre in enumerate(genre for genre in old.genres if genre not in new.genres):
        forms = sorted(GENRE_FORMS.get(genre, (genre,)), key=len, reverse=True)
        word = genre_word(others[place % len(others)]) if others else "different"
        yield f"(?:{'|'.join(map(re.escape, forms))})", word
    for mood in (mood for mood in old.moods if mood not in new.moods):
        yield re.escape(mood), new.moods[0] if new.moods else "different"


def _other_person(person: str, old: Item, new: Item, match: re.Match[str]) -> str:
    """Return the replacement of a person: a person of the same role in the new film.

    A full name becomes a full name, a surname a surname.
    """
    told = re.search(r"\b(by|from|director)\s*$", match.string[: match.start()])
    directs = person in old.directors and (told or person not in old.stars)
    people, role = (new.directors, old.directors) if directs else (new.stars, old.stars)
    if not people or person in people:
        return match[0] if people else "someone else"
    name = people[min(role.index(person), len(people) - 1)]
    return name if match[0].lower() == person.lower() else name.split()[-1]
