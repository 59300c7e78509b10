"""One spelling for titles and texts: plain text, its words, and the names that a title stands for.

Plain text is what titles.py searches: without accents, invisible characters, full-width letters and
curly apostrophes, the same for composed and decomposed characters. Case is kept.

Catalogues write one film in many ways. `names_of` knows these:

    Matrix, The (1999)              the article last, in a dozen languages (title_words.txt)
    Seven (a.k.a. Se7en) (1995)     another name
    Postman, The (Postino, Il)      a second title in brackets, unless it reads as a description:
    Dune (Dune Chronicles, #1)      a series with a number, a genre, an edition
    Heat (1995/I), Heat (1995 film) years as IMDb and Wikipedia write them
    Heat - Remastered 2011          an edition behind a dash

In scripts without spaces (Chinese, Japanese, Korean with its particles, Thai) a word is one
character, or a run of katakana.
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
WORD = re.compile(
    rf"{LETTER}+(?:[{_MARKS}]+{LETTER}*|'{LETTER}+)*|&|[ァ-ヺー]+|[{SPACELESS}][{_MARKS}]*"
)
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
