"""Text about films: a description from a film's facts, a reply rewritten for another film.

Left out: inflections other than those in GENRE_FORMS, pronouns ("he", "her"), and the plot.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from usbrec.crs.catalogue import Item
from usbrec.crs.titles import GENRE_FORMS, leaks

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
    text = with_article(" ".join(words))
    text += f" by {item.directors[0]}" if item.directors else ""
    return f"{text} with {item.stars[0]}" if item.stars else text


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
    found = match.group()
    told = re.search(r"\b(by|from|director)\s*$", match.string[: match.start()])
    directs = person in old.directors and (told or person not in old.stars)
    people, role = (new.directors, old.directors) if directs else (new.stars, old.stars)
    if not people or person in people:
        return found if people else "someone else"
    name = people[min(role.index(person), len(people) - 1)]
    return name if found.lower() == person.lower() else name.split()[-1]
