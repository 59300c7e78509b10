"""Titles in text: the rules that tell a film's title from an ordinary word.

The rules by which a title counts as named (`Catalogue.find`):
- with its year, "Heat (1995)" or "heat 1995", a title counts in any case; a year in brackets may be
  off by one (release dates differ by country), a year further off means a film outside the data;
- a long name ("the silence of the lambs": three words or more, one of them uncommon) counts in any
  case, other names ("The Thing", "Titanic") with their capitals, and a single word only if no
  uncommon capitalised word stands beside it ("Oliver Stone");
- a name that is an ordinary word ("It", "Up", "War", "Heat", "2012", "Drama") counts only with its
  year, in quotes with its capital, or with its capital right after a word such as "watch" or
  "called"; a genre's name not even then.

`leaks` is stricter: it finds every form that gives a title away. Nothing here knows of a catalogue.
"""

import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# The forms a genre's name takes in text; the first stands before "film". Their order here is the
# order of several before "film": "romantic comedy film", "sci-fi action film".
GENRE_FORMS: dict[str, tuple[str, ...]] = {
    "romance": ("romantic", "romance", "romances"),
    "animation": ("animated", "animation", "cartoon", "cartoons"),
    "family": ("family",),
    "fantasy": ("fantasy",),
    "sci-fi": ("sci-fi", "science fiction", "scifi"),
    "crime": ("crime",),
    "mystery": ("mystery", "mysteries"),
    "horror": ("horror",),
    "war": ("war",),
    "action": ("action",),
    "adventure": ("adventure", "adventures"),
    "musical": ("musical", "musicals"),
    "western": ("western", "westerns"),
    "drama": ("drama", "dramas", "dramatic"),
    "thriller": ("thriller", "thrillers"),
    "comedy": ("comedy", "comedies", "comedic"),
}
GENRE_WORDS = frozenset(form for forms in GENRE_FORMS.values() for form in forms)
# The most common words, and names of films that are ordinary words.
ORDINARY_WORDS = GENRE_WORDS.union(
    Path(__file__).with_name("ordinary_words.txt").read_text("utf-8").split()
)
NAMING_WORDS = frozenset(["called", "titled", "named"])
WATCHING_WORDS = frozenset(["watch", "watched", "watching", "see", "seen", "try"])
# Words that begin a sentence with a capital without being part of a name: "Watch Heat".
OPENERS = WATCHING_WORDS.union([
    "and", "are", "but", "can", "did", "does", "has", "have", "how", "is", "like", "love", "maybe",
    "no", "not", "or", "perhaps", "so", "then", "was", "were", "what", "why", "yes",
])  # fmt: skip
# Words right after which a title is expected.
CUES = NAMING_WORDS | WATCHING_WORDS.union(
    ["recommend", "recommended", "suggest", "suggested", "film", "films", "movie", "movies"]
)
QUOTES = "\"'“”‘’«»*_"
_WORD = re.compile(r"&|[^\W_]+(?:['’][^\W_]+)*")
_TITLE_YEAR = re.compile(r"^(.*?)\s*\((\d{4})\)\s*$")
YEAR_AFTER = re.compile(r"""[!?.]{0,3}["'”’*]?\s*\((\d{4})\)|["'”’*]?,?\s+(\d{4})\b""")
BREAK = re.compile(r"[()\[\]\"“”\n;]")


class Word(NamedTuple):
    """A word of a text: folded (lower case, no accents, no apostrophes), with its span."""

    key: str
    start: int
    end: int


def fold_case(text: str) -> str:
    """Return the text in lower case without accents, every character in its place."""
    if text.isascii():
        return text.lower()
    return "".join(unicodedata.normalize("NFD", char)[0].lower()[0] for char in text)


def words_of(text: str) -> list[Word]:
    """Return the words of a text; punctuation between them is left out."""
    found = _WORD.finditer(fold_case(text))
    return [Word(re.sub("['’]", "", m[0]).replace("&", "and"), *m.span()) for m in found]


def keys_of(name: str) -> list[str]:
    """Return the folded words of a name: "Ocean's Eleven" -> ["oceans", "eleven"]."""
    return [word.key for word in words_of(name)]


def split_title(title: str) -> tuple[str, int | None]:
    """Return a title's name and year: "Heat (1995)" -> ("Heat", 1995)."""
    match = _TITLE_YEAR.match(title)
    return (match[1] or title, int(match[2])) if match else (title.strip(), None)


def is_ordinary(name: str) -> bool:
    """Return whether a name could be an ordinary word of a sentence, such as "It" or "2012"."""
    keys = keys_of(name)
    if len(keys) != 1:
        return False
    return keys[0] in ORDINARY_WORDS or len(keys[0]) <= 3 or keys[0].isdigit()


def _uncommon_words(name: str) -> list[str]:
    return [key for key in keys_of(name) if len(key) > 3 and key not in ORDINARY_WORDS]


def _has_capitals(surface: str, name: str) -> bool:
    """Return whether each word with a capital (or digit) in the name has one in the text too."""
    initials = [name[word.start] for word in words_of(name)]
    seen = [surface[word.start] for word in words_of(surface)]
    return all(a == b or b.isupper() for a, b in zip(initials, seen, strict=True))


def _is_quoted(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    both = bool(before and after) and before in QUOTES and after in QUOTES
    return both and not text[start - 2 : start - 1].isalnum()


def looks_like_title(text: str, words: list[Word], first: int, last: int, name: str) -> bool:
    """Return whether the words first..last, without a year, mean the film of that name."""
    start, end = words[first].start, words[last].end
    surface = text[start:end]
    if is_ordinary(name):
        cue = words[first - 1] if first else Word("", 0, 0)
        is_cued = cue.key in CUES and not text[cue.end : start].strip(" " + QUOTES)
        is_cued = is_cued and words[first].key not in GENRE_WORDS and not surface.isdigit()
        return (is_cued or _is_quoted(text, start, end)) and _has_capitals(surface, name)
    if first == last and _is_part_of_name(text, words, first):
        return False
    is_long = len(keys_of(name)) >= 3 and _uncommon_words(name)
    return bool(is_long) or _has_capitals(surface, name)


def _is_part_of_name(text: str, words: list[Word], place: int) -> bool:
    """Return whether an uncommon capitalised word is right beside: "Oliver Stone"."""
    word = words[place]
    return any(
        text[x.start].isupper() and x.key not in ORDINARY_WORDS
        for x in words[max(place - 1, 0) : place + 2]
        if text[x.end : word.start] == " " or text[word.end : x.start] == " "
    )


def _spelling(name: str) -> str:
    """Return a pattern of the name in folded text, for any punctuation between its words."""
    folded = fold_case(name)
    words = [re.sub("['’]", "['’]?", re.escape(word)) for word in _WORD.findall(folded)]
    words = ["(?:&|and)" if word in (r"\&", "and") else word for word in words]
    return r"\W{0,3}".join(words) or re.escape(folded)


@lru_cache(maxsize=4096)
def _leak_pattern(title: str) -> re.Pattern[str]:
    """Return the pattern of all forms of a title in folded text; group `name` without the year."""
    name, year = split_title(title)
    stripped = re.sub(r"^(?:the|a|an)\s+", "", name, flags=re.IGNORECASE)
    parts = [part for part in (stripped, *name.split(": ")) if part != name]
    telling = [x for x in parts if any(not key.isdigit() for key in _uncommon_words(x))]
    spellings = sorted({_spelling(form) for form in (name, *telling)}, key=len, reverse=True)
    bare_year = rf"|,?\s+{year}\b" if year else ""
    return re.compile(
        rf"(?<![^\W_])(?P<name>{'|'.join(spellings)})(?![^\W_])"
        rf"""(?P<year>[!?.]{{0,3}}["'”’*]?\s*\(\d{{4}}\){bare_year})?"""
    )


def leaks(text: str, title: str) -> list[tuple[int, int]]:
    """Return the spans of a title in a text, by the rules of `Catalogue.hide`."""
    found = list(_leak_pattern(title).finditer(fold_case(text)))
    if is_ordinary(split_title(title)[0]):
        found = [x for x in found if x["year"] or _is_meant(text, *x.span("name"))]
    return [match.span() for match in found]


def _is_meant(text: str, start: int, end: int) -> bool:
    """Return whether the ordinary word text[start:end] means a film."""
    before, after = text[:start].rstrip(QUOTES), text[end:].lstrip(QUOTES)
    previous, following = before.split()[-1:], after.split()[:1]
    if _is_quoted(text, start, end) or (previous and previous[0].lower() in NAMING_WORDS):
        return True
    if not previous or before.rstrip()[-1] in ".!?:":  # first word: is it the whole sentence?
        return bool(re.match(r"\s*(?:[.!?]|$)", after))
    surface = text[start:end]
    shouted = surface.isupper() and len(surface) > 1 and previous[0].lower() == "the"
    beside = [x for x in previous + following if x[:1].isupper() and x.lower() not in OPENERS]
    part_of_name = any(x.split("'")[0] != "I" for x in beside)
    return surface[0].isupper() and not part_of_name and not shouted
