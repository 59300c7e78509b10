"""Parsing of the score in a judge's sampled reply, a digit among words."""

import re
from unicodedata import normalize

MARKUP = re.compile(r"</?\w+>|\\[a-z]+|[*_`\"'{}\[\]|$\\【】「」“”]")  # JSON, tags, LaTeX, Markdown
# "from 0 to 2", "0, 1 or 2", "0-2" name the scale; "1/2", "1 out of 2" are a score over the scale.
SCALE = re.compile(r"(?i)\b[012](?:\s*(?:,|-|–|/|\bto\b|\bor\b|\band\b)+\s*[012])+\b(?!/)")
OVER_SCALE = re.compile(r"(?i)\b([012])(?:\.0+)?\s*(?:/|out of)\s*2(?:\.0+)?\b")
# A score stands alone after a sentence's start or a word that announces it, and ends its phrase.
SCORE = re.compile(
    r"(?i)(?:^|[.!?…]\s+|[:=>\n(]\s*"
    r"|\b(?:(?:give|rate|score)(?: it| this| that)?|say|is|be|a|rating|vote|answer|number)\s+)"
    r"([012])(?:\.0+)?"
    r"(?=\s*(?:$|\.(?!\d)|[,;:!?()\n…]|[-–—]\s|\b(?:because|since|as|for|points?)\b))"
)


def parse_score(text: str) -> int | None:
    """Return the score that a reply states, or None where it states none or several.

    "0 to 2 ... I give 2" is 2, "Toy Story 2 ... 0" is 0, "Toy Story 2" is None. Markup
    is left out, and characters of other widths are read as the plain ones: "{"score": ２}" is 2.
    """
    plain = MARKUP.sub(" ", normalize("NFKC", text)).strip()
    plain = SCALE.sub("", OVER_SCALE.sub(r"\1", plain))
    found = {int(score) for score in SCORE.findall(plain)}
    return found.pop() if len(found) == 1 else None
