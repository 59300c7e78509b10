"""Titles: one spelling for them and for texts, and the rules that tell one from an ordinary word.

Titles are searched in plain text: without accents, invisible characters, full-width letters and
curly apostrophes, and equal for composed and decomposed characters. Case is kept.

Catalogues write one film in many ways. `names_of` knows these:

    Matrix, The (1999)              the article last, in a dozen languages (title_words.txt)
    Seven (a.k.a. Se7en) (1995)     another name
    Postman, The (Postino, Il)      a second title in brackets, unless it reads as a description:
    Dune (Dune Chronicles, #1)      a series with a number, a genre, an edition
    Heat (1995/I), Heat (1995 film) years as IMDb and Wikipedia write them
    Heat - Remastered 2011          an edition behind a dash

In scripts without spaces (Chinese, Japanese, Korean with its particles, Thai) a word is one
character, or a run of katakana.

The rules by which a title counts as named (`Catalogue.find`):
- with its year, "Heat (1995)" or "heat 1995", a title counts in any case; a year in brackets may be
  off by one (release dates differ by country), a year further off means a film outside the data;
- a long name ("the silence of the lambs": three words or more, one of them uncommon) counts in any
  case, other names ("The Thing", "Titanic") with their capitals;
- a name that is an ordinary word ("It", "Up", "War", "Heat", "2012", "Drama") counts only with its
  year, in quotes with its capital, or with its capital right after a word such as "watch" or
  "called"; a genre's name does not count after such a word;
- a name in a script without spaces ("春江花月") counts anywhere; one of up to three characters (of
  up to five in Thai) and every Korean name only with its year, in quotes or title marks (《》), or
  alone: at the edges of a sentence, after "watch" or before particles (看远山吗, 바람길을).

A name without a year does not count if it is part of a longer title ("Night Train") or of a
person's name ("Oliver Stone"). One of these right beside it shows that:
- a number, a part or another year: "Night Train 2", "Night Train, Part Two", "Night Train 1990";
- a capitalised word, also behind ":", "-", "of", "to" or "vs.": "Night Train Returns", "Late Night
  Train", "Night Train to Lisbon", "Alien: Covenant", "Murder on the Night Train". Not if this word
  begins a sentence ("Night Train It was good", "Avoid Night Train");
- words in title case with a year behind them: "Night Train in Space (2003)";
- the other words of a quote or title marks that it begins: "Night Train is late", 《春江花月夜》.
Where the text leaves it open, the name does not count: "I saw Titanic Friday", "Alien: Amazing", a
title right before another one without a comma. "and" joins two titles: "Night Train and Heat".

`leaks` is stricter: it finds every form that gives a title away, also where the text leaves it open
whether a longer title is meant. It spares numbers, quotes, years behind title case, and subtitles
that begin with "The". Nothing here knows of a catalogue.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

_TEXT = Path(__file__).with_name("title_words.txt").read_text("utf-8")
WORD_LISTS = {name: words for name, *words in map(str.split, _TEXT.split("\n\n"))}
# Letters of Thai, Lao, Burmese, Khmer, kana, Han, and Hangul.
SPACELESS = "ก-\u0e4eກ-\u0edfက-၉ក-\u17d3々-〇ぁ-ヺー-ヿ㐀-鿿가-힣豈-\ufaff\U00020000-\U0003ffff"
# Signs of Asian scripts that are no accents: vowels, tones, the voicing of kana.
_SIGNS = map(chr, (*range(0x900, 0x1AB0), 0x3099, 0x309A))
_MARKS = "".join(sign for sign in _SIGNS if unicodedata.category(sign)[0] == "M")
LETTER = rf"[^\W_{SPACELESS}]"
_SIGN = f"[{_MARKS}]"
WORD = re.compile(rf"{LETTER}+(?:{_SIGN}+{LETTER}*|'{LETTER}+)*|&|[ァ-ヺー]+|[{SPACELESS}]{_SIGN}*")
# A character with the accents, vowels and voicing signs behind it.
_CLUSTER = re.compile("(?s:.)[\u0300-\u036f\u1160-\u11ff\u3099\u309a\uff9e\uff9f]*")
_SWAPS = str.maketrans({**dict.fromkeys("‘’ʼ′`´", "'"), "ß": "ss", "™": ""})
YEAR = r"[(\[（](\d{4})(?i:/[ivx]+|[-–]\d{0,4}|(?: tv)? (?:film|series|novel))?\s?[年년]?[)\]）]"
_TITLE_YEAR = re.compile(rf"\s?{YEAR}(?=\s*[(\[（]|\s*$)")
_ARTICLES, _EDITIONS, _KINDS = ("|".join(WORD_LISTS[x]) for x in ("articles", "editions", "kinds"))
_ARTICLE_LAST = re.compile(rf"^([^(\[]+?),\s*({_ARTICLES})(?=$|\s*[:(\[]|\s[-–]\s)", re.I)
_BRACKET = re.compile(r"(?<=.)(?:\s+[(\[]|[（【])([^()\[\]（）【】]*)[)\]）】]")
_AKA = re.compile(r"[\s;,/]{0,9}\b(?:a\.\s?k\.\s?a\.|aka|also known as):?\s+", re.I)
_DESCRIBES = re.compile(rf"#|版$|\b(?:\d+|{_EDITIONS}|{_KINDS})\b|^\W*\w{{0,2}}\W*$|^u\.", re.I)
_LAST_PART = re.compile(rf"\s#[\d.]+$|\s[-–]\s[^-–]*\b(?:{_EDITIONS})\b[^-–]*$", re.I)

# The forms a genre's name takes in text; the first stands before "film". Their order here is the
# order of several before "film": "romantic comedy film", "sci-fi action film".
_FORMS = Path(__file__).with_name("genre_forms.txt").read_text("utf-8").splitlines()
GENRE_FORMS = {name: forms.split(", ") for name, forms in (line.split(": ") for line in _FORMS)}
GENRE_WORDS = frozenset(form for forms in GENRE_FORMS.values() for form in forms)
# title_words.txt: the most common words, and names of films that are ordinary words.
ORDINARY_WORDS = GENRE_WORDS.union(WORD_LISTS["ordinary"])
# Also: words right before a title; the same and others; words that begin a sentence with a capital
# ("Watch Heat") and are no part of a name; words that do ("It is tense") or begin a title if a
# capital follows ("The Force Awakens").
_LISTS = ("naming", "cues", "openers", "starters")
NAMING_WORDS, CUES, OPENERS, STARTERS = (frozenset(WORD_LISTS[x]) for x in _LISTS)
QUOTES = "'\"“”„«»「」*_《》〈〉『』"  # the last six hold a title and nothing else
NEARBY = 1000  # characters beside a name that can decide what it means
BREAK = re.compile(r"[\"“”\n;。「」《》〈〉『』]")
YEAR_AFTER = re.compile(rf"""[!?.]{{0,3}}["'”*»」》〉』)\]]*\s*{YEAR}|["'”*]?,?\s+(\d{{4}})\b""")
_CAPITAL = "[A-ZΑ-ΩЀ-Я]"  # of a plain text
_JOINT = r"(?: |-|: | [-–—] )"
_LINK = r"(?: (?:of|to|v|vs\.?|versus)(?: the| an?)?)?"  # "Night Train to Lisbon"
_SMALL = "of|the|an?|to|in|on|for|from|by"  # words within a title
_NAME = rf"{_CAPITAL}[\w']*"
_TITLED = rf"(?:{_NAME}|\d+|(?:{_SMALL}|at|is|vs\.?)(?!\w))"
# Behind a name, these make another title of it: " 2", " Part Two", ": The Return.", and words up to
# a year, as in "Seven Sailors (1961)".
_OTHER = re.compile(
    r"(?:[,:]? (?i:part|vol\.?|volume|chapter|episode|season|book) (?:\d+|[IVX]+|(?i:one|two))"
    r"| ?(?:\d+|[IVX]{2,4}|[VX])| (?:Returns|Reloaded|Rises|Begins|Forever|Again))"
    r"(?![\da-zA-Z'/%번次遍]|[.:]\d|(?: (?:or|to) \d+)? (?:times|stars|hours|days|years|out of))"
    rf"|(?:: | [-–—] )(?:The|An?|Episode) {_CAPITAL}\w*(?: {_TITLED})*(?=[.,!?\"”]|$)"
    rf"|{_JOINT}{_TITLED}(?:[ :&–-]{{1,3}}{_TITLED}){{0,7}} ?{YEAR}"
)
# A capital behind a name: "Night Train Express", "Night Train to Lisbon", but not "Heat. It is".
_GOES_ON = re.compile(
    rf"{_LINK}{_JOINT}(?!(?i:{'|'.join(OPENERS)})\b)"
    rf"(?!(?i:{'|'.join(STARTERS)})\b(?! {_CAPITAL})){_CAPITAL}|: ?[{SPACELESS}]"
)
_BEFORE = re.compile(rf"([.!?:\"“\n(]\s*)?(?<!['\w])(\d{{1,3}}|{_NAME})(?: on the|{_LINK})[ -]$")
_OPENED = re.compile(r"(?:(?<!\w)[\"“«„「*]|[《〈『][^》〉』]*)$")
_CLOSED = re.compile(rf"([^{QUOTES}\n.,!?;()]{{0,60}})[{QUOTES[1:]}]")
# A title that no catalogue tells: in quotes or title marks, or in title case before its year, of so
# many marks, words and letters at most that the time of a text grows with its length alone.
_INITIAL = rf"[A-ZÀ-ÞΑ-ΩЀ-Я\d{SPACELESS}]"
_PART = rf"(?:(?:Mrs?|Ms|Dr|St)\.|{_INITIAL}[\w'’-]{{0,79}}|&|(?:{_SMALL}|and)(?!\w))"
_WRITTEN = re.compile(
    rf"(?<![a-zA-Z\d])[\"“«*_《〈『]{{1,9}}({_INITIAL}[^\"“”«»*_《》〈〉『』\n]{{0,79}})(?<![.,;:])"
    rf"[\"”»*_》〉』]+(?![a-zA-Z\d])(?: ?{YEAR})?"
    rf"|(?<!\w)(?!(?i:{'|'.join(CUES)})\b)"
    rf"((?={_INITIAL}){_PART}(?:(?: |: | [-–] ){_PART}){{0,24}}[!?]*) ?{YEAR}"
)
_SPACELESS = re.compile(f"[{SPACELESS}]")
# In scripts without spaces a short name stands alone: after "watch", before particles.
_ALONE_BEFORE = re.compile(rf"(?:[^{SPACELESS}]|[看過过了荐薦欢歡叫]|^)$")
_ALONE_AFTER = re.compile(rf"(?:{'|'.join(WORD_LISTS['particles'])})*(?![{SPACELESS}])")


# --- one spelling -----------------------------------------------------------------------------


class Word(NamedTuple):
    """A word of a plain text: in lower case, without apostrophes, with its span."""

    key: str
    start: int
    end: int


@cache
def _plain_cluster(cluster: str) -> str:
    kinds = ("Mn", "Me", "Cf")  # accents and invisible characters
    chars = unicodedata.normalize("NFKD", cluster.translate(_SWAPS))
    kept = (x for x in chars if x in _MARKS or unicodedata.category(x) not in kinds)
    return unicodedata.normalize("NFC", "".join(kept))


def plain(text: str) -> tuple[str, Sequence[int]]:
    """Return the plain text, and the place in `text` of each of its characters and of its end.

    "Ame\u0301lie（2001）" -> "Amelie(2001)", (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
    """
    if text.isascii():
        return text, range(len(text) + 1)
    parts = [(_plain_cluster(match[0]), match.start()) for match in _CLUSTER.finditer(text)]
    places = [place for part, place in parts for _ in part]
    return "".join(part for part, _ in parts), [*places, len(text)]


def words_of(text: str) -> list[Word]:
    """Return the words of a plain text; punctuation between them is left out."""
    found = WORD.finditer(text.lower())
    return [Word(m[0].replace("'", "").replace("&", "and"), *m.span()) for m in found]


def key_of(name: str) -> str:
    """Return the words of a name, plain and in lower case: "Océan's Eleven" -> "oceans eleven"."""
    return " ".join(word.key for word in words_of(plain(name)[0]))


def split_title(title: str) -> tuple[str, int | None]:
    """Return a title's own name and year: "Matrix, The (1999)" -> ("The Matrix", 1999)."""
    year = _TITLE_YEAR.search(title)
    return names_of(title)[0], int(year[1]) if year else None


@lru_cache(maxsize=4096)
def names_of(title: str) -> list[str]:
    """Return the names that a title stands for, its own first, without its year.

    "Postman, The (Postino, Il) (1994)" -> "The Postman", "Il Postino", and as written.
    A description stays in the own name: "Heat (Crime Film)" -> "Heat (Crime Film)", "Heat".
    """
    written = " ".join(_TITLE_YEAR.sub("", title, count=1).split()) or title.strip()
    first, *others = _AKA.split(_LAST_PART.sub("", _BRACKET.sub("", written)))
    own = written if _LAST_PART.search(written) else first
    for bracket in _BRACKET.findall(written):
        text, *more = _AKA.split(bracket)
        if more or not _DESCRIBES.search(text):
            others += [text, *more]
        else:
            own = written
    moved = [_ARTICLE_LAST.sub(r"\2 \1", name) for name in (own, first, *others) if name]
    names = [re.sub("^(l['’]) ", r"\1", name, flags=re.I) for name in moved]
    return list(dict.fromkeys([*names, written]))


# --- titles in text ---------------------------------------------------------------------------


def written_titles(text: str) -> list[str]:
    """Return what a text marks as titles: 'Try Heat (1995) or "Up"' -> ["Heat (1995)", "Up"]."""
    found = ((m[1] or m[3], m[2] or m[4]) for m in _WRITTEN.finditer(text))
    return [f"{name} ({year})" if year else name for name, year in found]


@lru_cache(maxsize=4096)
def is_ordinary(name: str) -> bool:
    """Return whether a plain name could be a word of a sentence, such as "It", "2012" or "火".

    So could any Korean name: particles tell words apart there.
    """
    if _SPACELESS.search(name):
        limit = 5 if name[0] < "\u3000" else 99 if "가" <= name[0] <= "힣" else 3
        return len(re.sub(r"\W", "", name)) <= limit
    key = key_of(name)
    return " " not in key and (key in ORDINARY_WORDS or len(key) <= 3 or key.isdigit())


def _uncommon_words(name: str) -> list[str]:
    return [key for key in key_of(name).split() if len(key) > 3 and key not in ORDINARY_WORDS]


def _has_capitals(surface: str, name: str) -> bool:
    """Return whether each word with a capital (or digit) in the name has one in the text too."""
    initials, seen = ([text[word.start] for word in words_of(text)] for text in (name, surface))
    return all(a == b or b.isupper() for a, b in zip(initials, seen, strict=True))


def _is_quoted(text: str, start: int, end: int) -> bool:
    """Return whether text[start:end] is in quotes or, without spaces, a word of its own."""
    before, after = text[max(start - 1, 0) : start], text[end : end + 1]
    is_spaceless = _SPACELESS.search(text[start:end]) and end > start + 1
    if is_spaceless and _ALONE_BEFORE.search(before) and _ALONE_AFTER.match(text, end):
        return True
    both = bool(before and after) and before in QUOTES and after in QUOTES
    return both and (before in "“«「《〈『" or not text[start - 2 : start - 1].isalnum())


def looks_like_title(text: str, words: list[Word], first: int, last: int, name: str) -> bool:
    """Return whether the words first..last, without a year, mean the film of that plain name."""
    start, end = words[first].start, words[last].end
    surface = text[start:end]
    if is_ordinary(name):
        cue = words[first - 1] if first else Word("", 0, 0)
        is_cued = cue.key in CUES and not text[cue.end : start].strip(" " + QUOTES)
        is_cued = is_cued and words[first].key not in GENRE_WORDS and not surface.isdigit()
        counts = (is_cued or _is_quoted(text, start, end)) and _has_capitals(surface, name)
    else:
        is_long = key_of(name).count(" ") >= 2 and _uncommon_words(name)
        counts = bool(is_long) or _has_capitals(surface, name)
    return counts and not _is_longer(text, start, end)


def _is_longer(text: str, start: int, end: int) -> bool:
    """Return whether text[start:end] may be a part of a longer title or of another name."""
    if _OTHER.match(text, end) or _GOES_ON.match(text, end) or _rest_of_quote(text, start, end):
        return True
    before = _BEFORE.search(text[start - 40 : start] if start > 40 else "\n" + text[:start])
    if before is None or text.startswith("The ", start):
        return False
    word, _, possessive = before[2].lower().partition("'")
    if possessive and " " in text[start:end]:  # "Dante's Inferno", but "Cameron's Night Train"
        return False
    return word not in OPENERS.union(CUES, ORDINARY_WORDS if before[1] else STARTERS)


def _rest_of_quote(text: str, start: int, end: int) -> str:
    """Return the other words of the quote or title marks that text[start:end] begins."""
    opened = _OPENED.search(text[max(start - 40, 0) : start])
    closed = opened and _CLOSED.match(text, end)
    return (opened[0][1:] + closed[1]).strip() if opened and closed else ""


def _spelling(name: str) -> str:
    """Return a pattern of a plain name in lower case, for any punctuation between its words.

    It begins and ends at the edge of a word, where its script has spaces between words: "Heat" is
    in "我看了Heat", not in "Heated".
    """
    words = [re.sub("'", "'?", re.escape(word)) for word in WORD.findall(name.lower())]
    words = ["(?:&|and)" if word in (r"\&", "and") else word for word in words]
    pattern = r"\W{0,3}".join(words) or re.escape(name.lower())
    pattern += r"[)\]]?" if name[-1:] in (")", "]") else ""
    return pattern if _SPACELESS.search(name) else rf"(?<!{LETTER}){pattern}(?!{LETTER})"


@lru_cache(maxsize=4096)
def _leak_pattern(title: str) -> re.Pattern[str]:
    """Return the pattern of all forms of a title in plain text; group `name` without the year."""
    names = [name for x in (title, *names_of(title)) if (name := plain(x)[0]).strip()]
    year = split_title(title)[1]
    parts = [part for name in names for part in (name, *re.split(r": | [-–—] ", name))]
    parts += [re.sub(r"^(?:the|a|an)\s+", "", part, flags=re.IGNORECASE) for part in parts]
    telling = [x for x in parts if any(not key.isdigit() for key in _uncommon_words(x))]
    spellings = sorted({_spelling(form) for form in (*names, *telling)}, key=len, reverse=True)
    bare_year = rf"|,?\s+{year}(?!{LETTER})" if year else ""
    form = rf"(?P<name>{'|'.join(spellings) or '(?!)'})"
    return re.compile(rf"""{form}(?P<year>[!?.]{{0,3}}["'”*»」》〉』)\]]*\s*{YEAR}{bare_year})?""")


def leaks(text: str, title: str) -> list[tuple[int, int]]:
    """Return the spans of a title in a text, by the rules of `Catalogue.hide`."""
    shown, places = plain(text)
    found = [x for x in _leak_pattern(title).finditer(shown.lower()) if x["name"]]
    # a title that is written as in the catalogue is all `name`, its year included
    dated = {x.span() for x in found if x["year"] or re.search(YEAR, x["name"])}
    meant = [x for x in found if x.span() in dated or _is_meant(shown, *x.span("name"))]
    return [(places[match.start()], places[match.end()]) for match in meant]


def _is_meant(text: str, start: int, end: int) -> bool:
    """Return whether text[start:end] means a film: no ordinary word, no surely longer title."""
    rest, other = _rest_of_quote(text, start, end).split(), _OTHER.match(text, end)
    if (other and not re.match(r" \d{4}", other[0])) or (rest and not rest[-1][0].islower()):
        return False
    if not is_ordinary(text[start:end]):
        return True
    before = text[max(start - NEARBY, 0) : start].rstrip(QUOTES)
    after = text[end : end + NEARBY].lstrip(QUOTES)
    previous, following = before.split()[-1:], after.split()[:1]
    if _is_quoted(text, start, end) or (previous and previous[0].lower() in NAMING_WORDS):
        return True
    if not previous or before.rstrip()[-1] in ".!?:":  # first word: is it the whole sentence?
        return bool(re.match(r"\s*(?:[.!?]|$)", after))
    surface = text[start:end]
    shouted = surface.isupper() and len(surface) > 1 and previous[0].lower() == "the"
    beside = [x for x in previous + following if x[:1].isupper() and x.lower() not in OPENERS]
    # beside a capital it is a part of a name
    return surface[0].isupper() and not shouted and all(x.split("'")[0] == "I" for x in beside)
