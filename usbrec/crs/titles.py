"""Titles in text: how a film's title is told from an ordinary word.

The rules by which a title counts as named (`Catalogue.find`):
- with its year, "Heat (1995)" or "heat 1995", a title counts in any case; a year in brackets may be
  off by one (release dates differ by country), a year further off names some film we do not have;
- a long name ("the silence of the lambs": three words or more, one of them uncommon) counts in any
  case, other names ("The Thing", "Titanic") with their capitals, and a single word only if no
  uncommon capitalised word stands beside it ("Oliver Stone");
- a name that is an ordinary word ("It", "Up", "War", "Heat", "2012", "Drama") counts only with its
  year, in quotes with its capital, or with its capital right after a word such as "watch" or
  "called"; a genre's name not even then.

`leaks` is stricter: it finds whatever gives a title away. Nothing here knows of a catalogue.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

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
ARTICLES = ("the", "a", "an")
QUOTES = "\"'“”‘’«»*_"
_WORD = re.compile(r"&|[^\W_]+(?:['’][^\W_]+)*")
_TITLE_YEAR = re.compile(r"^(.*?)\s*\((\d{4})\)\s*$")
YEAR_AFTER = re.compile(r"""[!?.]{0,3}["'”’*]?\s*\((\d{4})\)|["'”’*]?,?\s+(\d{4})\b""")
BREAK = re.compile(r"[()\[\]\"“”\n;]")


@dataclass(frozen=True)
class Word:
    """A word of a text: folded (lower case, no accents, no apostrophes), and where it stands."""

    key: str
    start: int
    end: int


def fold(text: str) -> str:
    """Return the text in lower case without accents; every character keeps its place."""
    if text.isascii():
        return text.lower()
    return "".join(unicodedata.normalize("NFD", char)[0].lower()[0] for char in text)


def words_of(text: str) -> list[Word]:
    """Return the words of a text; punctuation between them is left out."""
    words = []
    for match in _WORD.finditer(fold(text)):
        key = "and" if match.group() == "&" else re.sub("['’]", "", match.group())
        words.append(Word(key, match.start(), match.end()))
    return words


def split_title(title: str) -> tuple[str, int | None]:
    """Return a title's name and year: "Heat (1995)" -> ("Heat", 1995)."""
    match = _TITLE_YEAR.match(title)
    return (match.group(1) or title, int(match.group(2))) if match else (title.strip(), None)


@cache
def ordinary_words() -> frozenset[str]:
    """Return the commonest words and those that are films here and ordinary words everywhere."""
    path = Path(__file__).with_name("ordinary_words.txt")
    return GENRE_WORDS | frozenset(path.read_text(encoding="utf-8").split())


def is_ordinary(name: str) -> bool:
    """Tell whether a name could be an ordinary word of a sentence, such as "It" or "2012"."""
    keys = [word.key for word in words_of(name)]
    return len(keys) == 1 and (
        keys[0] in ordinary_words() or len(keys[0]) <= 3 or keys[0].isdigit()
    )


def _uncommon_words(name: str) -> list[str]:
    keys = [word.key for word in words_of(name)]
    return [key for key in keys if len(key) > 3 and key not in ordinary_words()]


def _has_capitals(surface: str, name: str) -> bool:
    """Tell whether every word with a capital (or a digit) in the name has it in the text too."""
    pairs = zip(words_of(name), words_of(surface), strict=True)
    return all(
        surface[seen.start] == name[word.start] or surface[seen.start].isupper()
        for word, seen in pairs
    )


def _is_quoted(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    opens = bool(before) and before in QUOTES and not text[start - 2 : start - 1].isalnum()
    return opens and bool(after) and after in QUOTES


def looks_like_title(text: str, words: list[Word], first: int, last: int, name: str) -> bool:
    """Tell whether the words first..last, without a year, stand there as the film of that name."""
    start, end = words[first].start, words[last].end
    surface = text[start:end]
    if is_ordinary(name):
        cue = first > 0 and not text[words[first - 1].end : start].strip(" " + QUOTES)
        cue = cue and words[first - 1].key in CUES
        cue = cue and words[first].key not in GENRE_WORDS and not surface.isdigit()
        return (cue or _is_quoted(text, start, end)) and _has_capitals(surface, name)
    if first == last and _is_part_of_name(text, words, first):
        return False
    is_long = len(words_of(name)) >= 3 and _uncommon_words(name)
    return bool(is_long) or _has_capitals(surface, name)


def _is_part_of_name(text: str, words: list[Word], index: int) -> bool:
    """Tell whether an uncommon capitalised word stands right beside: "Oliver Stone"."""
    return any(
        text[words[beside].start].isupper()
        and words[beside].key not in ordinary_words()
        and text[words[left].end : words[left + 1].start] == " "
        for beside, left in ((index - 1, index - 1), (index + 1, index))
        if 0 <= beside < len(words)
    )


def _spelling(name: str) -> str:
    """Return a pattern for the name in folded text, whatever stands between its words."""
    keys = [match.group() for match in _WORD.finditer(fold(name))]
    words = [
        "(?:&|and)" if key in ("&", "and") else re.sub("['’]", "['’]?", re.escape(key))
        for key in keys
    ]
    return r"\W{0,3}".join(words) or re.escape(fold(name))


@lru_cache(maxsize=4096)
def _leak_pattern(title: str) -> re.Pattern[str]:
    """Return the pattern of all forms of a title in folded text; group `name` without the year."""
    name, year = split_title(title)
    stripped = re.sub(rf"^(?:{'|'.join(ARTICLES)})\s+", "", name, flags=re.IGNORECASE)
    parts = [part for part in (stripped, *name.split(": ")) if part != name]
    telling = [x for x in parts if any(not key.isdigit() for key in _uncommon_words(x))]
    spellings = sorted({_spelling(form) for form in (name, *telling)}, key=len, reverse=True)
    bare_year = rf"|,?\s+{year}\b" if year else ""
    return re.compile(
        rf"(?<![^\W_])(?P<name>{'|'.join(spellings)})(?![^\W_])"
        rf"""(?P<year>[!?.]{{0,3}}["'”’*]?\s*\(\d{{4}}\){bare_year})?"""
    )


def leaks(text: str, title: str) -> list[tuple[int, int]]:
    """Return where the title stands in the text, by the rules of `Catalogue.hide`."""
    ordinary = is_ordinary(split_title(title)[0])
    spans = []
    for match in _leak_pattern(title).finditer(fold(text)):
        start, end = match.span("name")
        if not ordinary or match.group("year") or _is_meant(text, start, end):
            spans.append(match.span())
    return spans


def _is_meant(text: str, start: int, end: int) -> bool:
    """Tell whether the ordinary word text[start:end] stands there as a film's title."""
    before, after = text[:start].rstrip(QUOTES), text[end:].lstrip(QUOTES)
    previous, following = before.split()[-1:], after.split()[:1]
    if _is_quoted(text, start, end):
        return True
    if previous and previous[0].lower() in NAMING_WORDS:
        return True
    opens = not previous or before.rstrip()[-1] in ".!?:"
    if opens:
        return bool(re.match(r"\s*(?:[.!?]|$)", after))
    surface = text[start:end]
    shouted = surface.isupper() and len(surface) > 1 and previous[0].lower() == "the"
    part_of_name = any(
        word[:1].isupper() and word.split("'")[0] != "I" and word.lower() not in OPENERS
        for word in previous + following
    )
    return surface[0].isupper() and not part_of_name and not shouted
