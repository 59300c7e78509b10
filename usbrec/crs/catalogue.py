"""The catalogue: items, finding their titles in text, keeping targets out of a seeker's words.

How a title is told from an ordinary word is the matter of titles.py. Without a year a name counts
for an item if exactly one item bears it; a mention of a name that several items bear carries all
of them.

What it leaves out: misspellings, translated titles, and abbreviations such as "LOTR".
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from usbrec.crs.titles import (
    BREAK,
    GENRE_FORMS,
    YEAR_AFTER,
    Word,
    fold,
    leaks,
    looks_like_title,
    split_title,
    words_of,
)
from usbrec.options import UserError

DECADE_NAMES = {
    "50s": "fifties", "60s": "sixties", "70s": "seventies", "80s": "eighties", "90s": "nineties"
}  # fmt: skip
LISTS = ("genre", "director", "star", "actor", "mood")  # fields of an entry of items.json
NEUTRAL = "that film"


@dataclass(frozen=True)
class Item:
    """A film: its title as the dataset writes it, its bare name, and its facts (may be empty)."""

    title: str
    name: str
    year: int | None = None
    genres: tuple[str, ...] = ()
    directors: tuple[str, ...] = ()
    stars: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()

    @property
    def lead(self) -> str | None:
        """The first of the stars."""
        return self.stars[0] if self.stars else None

    @property
    def decade(self) -> str | None:
        """The decade as it is spoken of: "1990s"."""
        return None if self.year is None else f"{self.year // 10 * 10}s"


@dataclass(frozen=True)
class Mention:
    """A title found at text[start:end] (its year included); several items: ambiguous."""

    start: int
    end: int
    items: tuple[Item, ...]


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raises UserError naming it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        what = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is not UTF-8 text: {what}") from error


def _read_people(entry: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """Return the entry's list under the first of the keys that it has, each name once."""
    value: str | list[str] = next(filter(None, map(entry.get, keys)), [])
    return tuple(dict.fromkeys([value] if isinstance(value, str) else value))


def _read_genre(text: str) -> str:
    genre = re.sub(r"\s+(film|fiction)$", "", text.lower().replace("science fiction", "sci-fi"))
    return next((known for known, forms in GENRE_FORMS.items() if genre in forms), genre)


def read_item(entry: dict[str, Any]) -> Item:
    """Read one entry of ReDial's, OpenDialKG's or our items.json (they differ in keys only)."""
    title = entry["name"].strip()
    name, year = split_title(title)
    if year is None and str(entry.get("year") or "").isdigit():
        year = int(entry["year"])
    genres = dict.fromkeys(_read_genre(genre) for genre in _read_people(entry, "genre"))
    return Item(
        title,
        name,
        year,
        tuple(genres),
        _read_people(entry, "director"),
        _read_people(entry, "star", "actor"),
        _read_people(entry, "mood"),
    )


class Catalogue:
    """Items that can be looked up by title and found in text; iterates over its items."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items: tuple[Item, ...] = tuple(dict.fromkeys(items))
        self._by_title: dict[str, list[Item]] = {}
        self._by_name: dict[str, list[Item]] = {}
        self._trie: dict[str, Any] = {}  # word -> trie; "" -> the items whose name ends here
        for item in self.items:
            self._by_title.setdefault(fold(item.title), []).append(item)
            keys = [word.key for word in words_of(item.name)]
            self._by_name.setdefault(" ".join(keys), []).append(item)
            node = self._trie
            for key in keys:
                node = node.setdefault(key, {})
            if keys:
                node.setdefault("", []).append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read an items.json: an object of entries with at least a `name`.

        Raises:
            UserError: the file is missing or is not such an object.
        """
        try:
            entries = json.loads(read_text(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"the catalogue {path} is not JSON: {error}") from error
        if not isinstance(entries, dict) or not entries:
            raise UserError(f"the catalogue {path} must be an object of items, each with a name")
        for key, entry in entries.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise UserError(f"item {key!r} of the catalogue {path} has no name")
            for field in LISTS:
                values = entry.get(field) or []
                if not (isinstance(values, str | list) and all(isinstance(x, str) for x in values)):
                    raise UserError(
                        f"item {key!r} of the catalogue {path}: {field!r} must be a list of"
                        f" strings, got {values!r:.60}"
                    )
        return cls(read_item(entry) for entry in entries.values())

    def named(self, title: str) -> tuple[Item, ...]:
        """Return all items a title may mean: with a year at most that year's, else by name."""
        if exact := self._by_title.get(fold(title)):
            return tuple(exact)
        name, year = split_title(title)
        same_name = self._by_name.get(" ".join(word.key for word in words_of(name)), [])
        return tuple(x for x in same_name if year is None or x.year in (None, year))

    def get(self, title: str) -> Item | None:
        """Return the item that the title names, or None if there is none or more than one."""
        items = self.named(title)
        return items[0] if len(items) == 1 else None

    def find(self, text: str) -> list[Mention]:
        """Return the titles in the text from left to right, the longest first, none inside another.

        The module's docstring has the rules by which a word counts as a title.
        """
        words = words_of(text)
        mentions: list[Mention] = []
        index = 0
        while index < len(words):
            mention, index = self._mention_at(text, words, index)
            if mention:
                mentions.append(mention)
        return mentions

    def _mention_at(self, text: str, words: list[Word], index: int) -> tuple[Mention | None, int]:
        """Return the longest title that begins at this word, and the word to go on from."""
        node, matches = self._trie, []
        for last in range(index, len(words)):
            gap = text[words[last - 1].end : words[last].start] if last > index else ""
            if words[last].key not in node or len(gap) > 3 or BREAK.search(gap):
                break
            node = node[words[last].key]
            if "" in node:
                matches.append((last, node[""]))
        for last, items in reversed(matches):
            mention = _judge_match(text, words, index, last, items)
            if mention:
                following = last + 1
                while following < len(words) and words[following].start < mention.end:
                    following += 1
                return mention, following
        return None, index + 1

    def mentions(self, text: str, titles: Iterable[str]) -> bool:
        """Tell whether the text names one of the titles, also titles outside the catalogue.

        A mention without a year counts if all items that it may mean are among the titles.
        """
        titles = list(titles)
        wanted = {item for title in titles for item in self.named(title)}
        if any(set(mention.items) <= wanted for mention in self.find(text)):
            return True
        unknown = tuple(title for title in titles if not self.named(title))
        return bool(unknown and _catalogue_of(unknown).find(text))

    def grade(self, item: Item | None, titles: Iterable[str]) -> int:
        """Return `grade` of the item against all items that the titles may mean."""
        return grade(item, [target for title in titles for target in self.named(title)])

    def hide(self, text: str, titles: Iterable[str]) -> str:
        """Return the text with the titles replaced by neutral words.

        Stricter than `find`: any case, quoted or not, with or without (any) year, without the
        leading article, and the parts of a name before and after a colon. Names that are ordinary
        words go when a year, quotes or a naming word show them to be titles, when they carry a
        capital within a sentence, or when they are all that is said. Other catalogue titles that
        contain the name ("Spider-Man 2") stay.
        """
        for title in titles:
            found = leaks(text, title)
            mentions, own = self.find(text) if found else [], set(self.named(title))
            others = [mention for mention in mentions if not own & set(mention.items)]
            for start, end in reversed(found):
                if not any(other.start <= start and end <= other.end for other in others):
                    text = text[:start] + NEUTRAL + text[end:]
        return text


@lru_cache(maxsize=256)
def _catalogue_of(titles: tuple[str, ...]) -> Catalogue:
    return Catalogue(Item(title, *split_title(title)) for title in titles)


def _judge_match(
    text: str, words: list[Word], first: int, last: int, items: Sequence[Item]
) -> Mention | None:
    """Return the mention if the words first..last, which spell the items' name, mean a title."""
    start, end = words[first].start, words[last].end
    if year := YEAR_AFTER.match(text, end):
        if fitting := _fitting(items, int(year.group(1) or year.group(2))):
            return Mention(start, year.end(), fitting)
        if year.group(1):
            return None
    named = looks_like_title(text, words, first, last, items[0].name)
    return Mention(start, end, tuple(items)) if named else None


def _fitting(items: Sequence[Item], year: int) -> tuple[Item, ...]:
    """Return the items of that year, else of a year beside it, else those without a year."""
    for near in (0, 1):
        found = [item for item in items if item.year and abs(item.year - year) <= near]
        if found:
            return tuple(found)
    return tuple(item for item in items if item.year is None)


# --- facts: agreement, description, rewriting --------------------------------------------------


def grade(item: Item | None, targets: Iterable[Item]) -> int:
    """Return how well a recommendation agrees with the truth.

    2: it is a target. 1: it shares the director, a star, or at least half of the genres (of
    whichever film has fewer) with some target. 0: nothing of that, or no item.
    """
    if item is None:
        return 0
    grades = (2 if item == target else int(_is_kin(item, target)) for target in targets)
    return max(grades, default=0)


def _is_kin(item: Item, other: Item) -> bool:
    shares_people = set(item.directors) & set(other.directors) or set(item.stars) & set(other.stars)
    shared = set(item.genres) & set(other.genres)
    return bool(shares_people) or 2 * len(shared) >= min(len(item.genres), len(other.genres)) > 0


def genre_word(genre: str) -> str:
    """Return the genre as it stands before "film": "animation" -> "animated"."""
    return GENRE_FORMS.get(genre, (genre,))[0]


def genre_words(genres: Sequence[str]) -> list[str]:
    """Return the genres as they stand before "film", in the usual order: "romantic comedy"."""
    place = {genre: i for i, genre in enumerate(GENRE_FORMS)}  # an unknown one stands in front
    return [genre_word(genre) for genre in sorted(genres, key=lambda x: place.get(x, -1))]


def with_article(words: str) -> str:
    """Return the words after "a" or "an"."""
    return f"{'an' if re.match('[aeiou]|8', words, re.IGNORECASE) else 'a'} {words}"


def describe(item: Item) -> str:
    """Return the facts in one clause: "a 1995 crime film by Michael Mann with Al Pacino"."""
    year = [str(item.year)] if item.year else []
    text = with_article(" ".join([*year, *genre_words(item.genres[:2]), "film"]))
    if item.directors:
        text += f" by {item.directors[0]}"
    return f"{text} with {item.lead}" if item.lead else text


def rewrite(text: str, old: Item, new: Item) -> str:
    """Return a reply about `old` as it would read about `new`: title and every attribute changed.

    Title, year, decade, director, stars, genres and moods of the old film that occur in the text
    become the new film's; what both films share stays. "a"/"an" follows its new word. Where the
    new film lacks a fact, neutral words stand in ("someone else", "different", "another year").
    """
    spans = [
        (start, end, new.title if re.search(r"\d{4}\)?$", text[start:end]) else new.name)
        for start, end in leaks(text, old.title)
    ]
    for pattern, swap in _swaps(old, new):
        for match in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", text, re.IGNORECASE):
            if not any(match.start() < end and start < match.end() for start, end, _ in spans):
                before = text[: match.start()]
                spans.append((*match.span(), swap(before, match.group())))
    result, place = "", 0
    for start, end, words in sorted(spans):
        result += text[place:start]
        if article := re.search(r"(?<![^\W_])(an?) $", result, re.IGNORECASE):
            right = with_article(words).split()[0]
            right = right.capitalize() if article.group(1)[0].isupper() else right
            result = f"{result[: article.start()]}{right} "
        elif re.search(r"(?:^|[.!?] *)$", result) and text[start].isupper():
            words = words[0].upper() + words[1:]
        result, place = result + words, end
    return _merge_repeats(result + text[place:], new)


def _merge_repeats(text: str, item: Item) -> str:
    """Write "comedy and comedy" as "comedy", which two genres become for a film with one."""
    for genre in item.genres or ("different",):
        word = re.escape(genre_word(genre))
        text = re.sub(rf"\b({word})(?:(?:,| and|, and)? \1)+\b", r"\1", text)
    return text


# (text before, words found) -> the words that replace them
_Swap = Callable[[str, str], str]


def _swaps(old: Item, new: Item) -> Iterator[tuple[str, _Swap]]:
    """Yield the pattern of each attribute of `old` and what takes its place, longest first."""
    people = dict.fromkeys((*old.directors, *old.stars))
    for person in sorted(people, key=len, reverse=True):
        yield re.escape(person), _person_swap(person, old, new)
    for person in people:
        surname = person.split()[-1]
        if len(surname) > 3 and surname != person:
            yield f"(?-i:{re.escape(surname)})", _person_swap(person, old, new, surname=True)
    for pattern, word in (*_year_words(old, new), *_genre_words(old, new), *_mood_words(old, new)):
        yield pattern, _always(word)


def _always(word: str) -> _Swap:
    return lambda before, found: word


def _person_swap(person: str, old: Item, new: Item, surname: bool = False) -> _Swap:
    def swap(before: str, found: str) -> str:
        directs = person in old.directors and (
            person not in old.stars or re.search(r"\b(by|from|director)\s*$", before)
        )
        people = new.directors if directs else new.stars
        roles = old.directors if directs else old.stars
        if not people:
            return "someone else"
        if person in people:
            return found
        name = people[min(roles.index(person), len(people) - 1)]
        return name.split()[-1] if surname else name

    return swap


def _year_words(old: Item, new: Item) -> Iterator[tuple[str, str]]:
    """Yield the year, then "1990s", "90s" and "nineties", each with the new decade's like form."""
    if old.year and old.year != new.year:
        yield str(old.year), str(new.year or "another year")
    if old.decade != new.decade:
        old_forms, new_forms = _decade_forms(old), _decade_forms(new) or ["another decade"]
        for place, form in enumerate(old_forms):
            word = new_forms[min(place, len(new_forms) - 1)]
            yield ("['’]?" if place == 1 else "") + form, word


def _decade_forms(item: Item) -> list[str]:
    """Return "1990s", "90s" and "nineties"; "2000s" alone from then on."""
    if item.decade is None:
        return []
    short = item.decade[2:]
    named = DECADE_NAMES.get(short) if item.decade.startswith("19") else None
    return [item.decade, short, named] if named else [item.decade]


def _genre_words(old: Item, new: Item) -> Iterator[tuple[str, str]]:
    others = [genre for genre in new.genres if genre not in old.genres] or list(new.genres)
    for place, genre in enumerate(genre for genre in old.genres if genre not in new.genres):
        word = genre_word(others[place % len(others)]) if others else "different"
        forms = sorted(GENRE_FORMS.get(genre, (genre,)), key=len, reverse=True)
        yield f"(?:{'|'.join(map(re.escape, forms))})", word


def _mood_words(old: Item, new: Item) -> Iterator[tuple[str, str]]:
    for mood in old.moods:
        if mood not in new.moods:
            yield re.escape(mood), new.moods[0] if new.moods else "different"
