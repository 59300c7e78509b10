"""The catalogue: items, the search for their titles in text, and the hiding of target titles.

titles.py has the names by which a title is known, and the rules that tell a title from an ordinary
word. A name without a year means an item if no other item has that name; a mention of a name that
several items share carries all of them. "Heat" means an item "Heat" rather than "Heat (TV)".

Left out: misspellings, translated titles, and abbreviations such as "LOTR".
"""

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from usbrec.crs import titles as rules
from usbrec.crs.titles import Word, key_of, names_of, plain, split_title, words_of
from usbrec.options import UserError, read_text

# The keys of an entry of items.json for genres, makers, stars and moods, of films, books, music and
# products; of several the first that has a value counts.
LISTS = ("genre category", "director author artist brand", "star actor", "mood")
NEUTRAL = "that film"
LONGEST_TITLE = 1000  # characters; every beginning of a name is kept


@dataclass(frozen=True)
class Item:
    """A film: its title as the dataset writes it, its bare name, and its facts (may be empty).

    The first of the stars is the lead.
    """

    title: str
    name: str
    year: int | None = None
    genres: tuple[str, ...] = ()
    directors: tuple[str, ...] = ()
    stars: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()

    @property
    def decade(self) -> str | None:
        """The decade of the year, such as "1990s", or None."""
        return None if self.year is None else f"{self.year // 10 * 10}s"


class Mention(NamedTuple):
    """A title found at text[start:end], year included; several items if the name is ambiguous."""

    start: int
    end: int
    items: tuple[Item, ...]


class Named(NamedTuple):
    """The items that one plain name may mean."""

    name: str
    items: list[Item]

    def owners(self) -> tuple[Item, ...]:
        """Return the items that bear the name without a description in brackets; if none, all."""
        owners = (item for item in self.items if key_of(item.name) == key_of(self.name))
        return tuple(owners) or tuple(self.items)


def parse_json(text: str, told: str = "") -> Any:
    """Return the value of a JSON text.

    Raises UserError, which begins with `told`, for malformed JSON and for half surrogate pairs,
    which UTF-8 cannot write.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{told}not JSON: {fault}") from error


def read_item(entry: Any, at: str = "the item") -> Item:
    """Return the item of an entry of an items.json: its makers, as authors, count as directors.

    Raises UserError naming the place `at` for an entry without a name, or a field of another type.
    """
    title = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(title, str) or not title.strip() or len(title) > LONGEST_TITLE:
        raise UserError(f"{at} has no name of 1 to {LONGEST_TITLE} characters")
    name, year = split_title(title.strip())
    if year is None and re.fullmatch(r"\d{1,4}", str(entry.get("year") or "")):
        year = int(entry["year"])
    lists = ([_texts(entry, key, at) for key in keys.split()] for keys in LISTS)
    genres, *others = (next(filter(None, found), ()) for found in lists)
    return Item(title.strip(), name, year, tuple(dict.fromkeys(map(_read_genre, genres))), *others)


def _texts(entry: Mapping[str, Any], key: str, at: str) -> tuple[str, ...]:
    """Return the different texts of an entry's field, a text or a list of texts."""
    values = entry.get(key) or []
    values = [values] if isinstance(values, str) else values
    if not (isinstance(values, list) and all(isinstance(x, str) for x in values)):
        raise UserError(f"{at}: {key!r} must be a list of strings")
    return tuple(dict.fromkeys(x.strip() for x in values if x.strip()))


def _read_genre(text: str) -> str:
    genre = re.sub(r"\s+(film|fiction)$", "", text.lower().replace("science fiction", "sci-fi"))
    return next((known for known, forms in rules.GENRE_FORMS.items() if genre in forms), genre)


class Catalogue:
    """The items of a dataset, looked up by title and found in text; iterates over the items."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items: tuple[Item, ...] = tuple(dict.fromkeys(items))
        self.genres = {*rules.GENRE_FORMS, *(genre for x in self.items for genre in x.genres)}
        self._by_title: dict[str, list[Item]] = {}
        self._by_name: dict[str, Named] = {}  # by the words of each name
        for item in self.items:
            self._by_title.setdefault(plain(item.title)[0].lower(), []).append(item)
            names = {key_of(name): name for name in (*names_of(item.title), item.name)}
            for key, name in names.items():
                self._by_name.setdefault(key, Named(plain(name)[0], [])).items.append(item)
        self._beginnings = {x[: m.end()] for x in self._by_name for m in re.finditer(r"\S+", x)}

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Return the catalogue of an items.json: an object of entries with at least a `name`.

        Raises:
            UserError: the file is missing or is not such an object.
        """
        entries = parse_json(read_text(path), f"the catalogue {path} is ")
        if not isinstance(entries, dict) or not entries:
            raise UserError(f"the catalogue {path} must be an object of items, each with a name")
        places = (f"item {key!r:.60} of the catalogue {path}" for key in entries)
        return cls(map(read_item, entries.values(), places))

    def named(self, title: str) -> tuple[Item, ...]:
        """Return all items that a title may mean: those of the exact title, else those of the name.

        A title with a year excludes items of another year.
        """
        if exact := self._by_title.get(plain(title)[0].lower()):
            return tuple(exact)
        found = (self._by_name[x] for x in map(key_of, names_of(title)) if x in self._by_name)
        own, year = next(found, Named("", [])), split_title(title)[1]
        if year is None:
            return own.owners()
        return tuple(x for x in own.items if x.year in (None, year))

    def get(self, title: str) -> Item | None:
        """Return the item that the title names, or None if there is none or more than one."""
        items = self.named(title)
        return items[0] if len(items) == 1 else None

    def find(self, text: str) -> list[Mention]:
        """Return the mentions of titles in the text, from left to right, without overlap.

        At each word the longest name is tried first. titles.py has the rules by which a word counts
        as a title.
        """
        shown, places = plain(text)
        words = words_of(shown)
        mentions: list[Mention] = []
        for first, word in enumerate(words):
            if mentions and word.start < mentions[-1].end:
                continue
            names: list[tuple[int, Named]] = []  # the last word of each name that begins here
            last, key = first, word.key
            while key in self._beginnings:
                if key in self._by_name:
                    names.append((last, self._by_name[key]))
                last += 1
                key += f" {words[last].key}" if last < len(words) else " "
            found = (_judge(shown, words, first, last, named) for last, named in reversed(names))
            mentions += islice(filter(None, found), 1)
        return [Mention(places[start], places[end], items) for start, end, items in mentions]

    def first(self, text: str) -> tuple[Item, ...]:
        """Return the readings of the first title in the text: several if its year is open."""
        return next((mention.items for mention in self.find(text)), ())

    def mentions(self, text: str, titles: Collection[str]) -> bool:
        """Return whether the text names one of the titles, including titles outside the catalogue.

        A mention without a year counts if all items that it may mean are among the titles. A title
        outside counts unless it is part of a longer one in there: "Up" of "Up in the Air".
        """
        wanted, found = {x for title in titles for x in self.named(title)}, self.find(text)
        if any(set(mention.items) <= wanted for mention in found):
            return True
        strangers = Catalogue(Item(x, *split_title(x)) for x in titles if not self.named(x))
        own = strangers.find(text)  # at c to d; what the catalogue has, at a to b
        return any(all(b < d or a > c or (a, b) == (c, d) for a, b, _ in found) for c, d, _ in own)

    def grade(self, item: Item | None, titles: Iterable[str]) -> int:
        """Return the grade of a recommendation against all items that the titles may mean, 0 to 2.

        2: it is one of them. 1: it shares a director, a star, or at least half of the genres (of
        the film that has fewer) with one. 0: none of these, or no item.
        """
        targets = [target for title in titles for target in self.named(title)]
        return 2 if item in targets else int(any(item and _is_kin(item, x) for x in targets))

    def grade_of(self, text: str, titles: Iterable[str]) -> int:
        """Return the grade of the text's first title: the worst of its readings, 0 without one."""
        return min((self.grade(item, titles) for item in self.first(text)), default=0)

    def hide(self, text: str, titles: Iterable[str]) -> str:
        """Return the text with the titles replaced by neutral words.

        Stricter than `find`: any case, quoted or not, with or without (any) year, without the
        leading article, and the parts of a name beside a colon or a dash. A name that is an
        ordinary word is replaced after a naming word, with a year, in quotes, with a capital within
        a sentence, or as a whole sentence. Other catalogue titles that contain the name
        ("Spider-Man 2"), and what is surely a longer title, are kept.
        """
        for title in titles:
            leaks, own = rules.leaks(text, title), set(self.named(title))
            others = [x for x in self.find(text) if not own & set(x.items)] if leaks else []
            for start, end in reversed(leaks):
                n = bisect_right(others, start, key=lambda x: x.start)
                if not (n and end <= others[n - 1].end):
                    text = text[:start] + NEUTRAL + text[end:]
        return text


def _judge(text: str, words: list[Word], first: int, last: int, named: Named) -> Mention | None:
    """Return the mention of the words first..last of a plain text, or None if they mean no title.

    The words spell the name.
    """
    gaps = [text[a.end : b.start] for a, b in pairwise(words[first : last + 1])]
    if any(len(gap) > 3 or rules.BREAK.search(gap) for gap in gaps):
        return None
    start, end = words[first].start, words[last].end
    if year := rules.YEAR_AFTER.match(text, end):
        if fitting := _fitting(named.items, int(year[1] or year[2])):
            return Mention(start, year.end(), fitting)
        if year[1]:
            return None
    is_title = rules.looks_like_title(text, words, first, last, named.name)
    return Mention(start, end, named.owners()) if is_title else None


def _fitting(items: list[Item], year: int) -> tuple[Item, ...]:
    """Return the items of that year, else of a year before or after, else those without a year."""
    for near in (0, 1):
        if found := [item for item in items if item.year and abs(item.year - year) <= near]:
            return tuple(found)
    return tuple(item for item in items if item.year is None)


def _is_kin(item: Item, other: Item) -> bool:
    shares_people = set(item.directors) & set(other.directors) or set(item.stars) & set(other.stars)
    shared = set(item.genres) & set(other.genres)
    return bool(shares_people) or 2 * len(shared) >= min(len(item.genres), len(other.genres)) > 0
