"""Films in words: described by their facts, replies rewritten without a trace of the old film."""

import random
import re
from typing import Any

import pytest
from test_catalogue import FACTS, item

from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.datasets import load_catalogue, load_split
from usbrec.crs.titles import GENRE_FORMS
from usbrec.crs.wishes import DECADE_NAMES, describe, rewrite


@pytest.fixture(scope="module")
def films() -> Catalogue:
    return Catalogue(item(*facts) for facts in FACTS)


@pytest.fixture(scope="module")
def sample() -> Catalogue:
    return load_catalogue("sample")


def test_a_film_is_described_by_its_facts(films: Catalogue) -> None:
    heat = films.get("Heat (1995)")
    assert describe(heat) == "a 1995 crime thriller film by Michael Mann with Al Pacino"
    assert describe(Item("X", "X", genres=("action",))) == "an action film"
    assert describe(Item("X", "X")) == "a film"
    assert describe(Item("X", "X", genres=("comedy", "heist"))) == "a heist comedy film"


def test_a_reply_is_rewritten_with_every_attribute(films: Catalogue) -> None:
    heat, up = films.get("Heat (1995)"), films.get("Up (2009)")
    text = "Try Heat (1995), a tense crime film from the 90s by Michael Mann with Al Pacino."
    assert rewrite(text, heat, up) == (
        "Try Up (2009), a heartwarming animated film from the 2000s by Pete Docter with Ed Asner."
    )
    assert rewrite("Crime films like Heat (1995)", heat, up) == "Animated films like Up (2009)"
    back = rewrite("It's an animated film, Up (2009), from the 2000s with Asner.", up, heat)
    assert back == "It's a crime film, Heat (1995), from the 1990s with Pacino."


def test_director_and_star_of_one_name_become_two_people(films: Catalogue) -> None:
    old, new = films.get("Unforgiven (1992)"), films.get("Spider-Man (2002)")
    text = "Unforgiven (1992) is directed by Clint Eastwood and stars Clint Eastwood."
    assert rewrite(text, old, new) == (
        "Spider-Man (2002) is directed by Sam Raimi and stars Tobey Maguire."
    )


def test_two_genres_become_one_where_the_new_film_has_one(films: Catalogue) -> None:
    old, new = films.get("Heat (1995)"), films.get("It (2017)")
    assert rewrite("a crime thriller film; crime and thriller", old, new) == (
        "a horror film; horror"
    )


@pytest.mark.parametrize(
    ("old", "new", "text", "expected"),
    [
        ({"genres": ("crime", "war")}, {"genres": ("comedy", "romance")},
         "A crime film and a war film.", "A comedy film and a romantic film."),
        ({"genres": ("crime", "war")}, {"genres": ("crime", "comedy")},
         "A crime and war film.", "A crime and comedy film."),
        ({"year": 1995}, {"year": 1985}, "A 90s film of 1995.", "An 80s film of 1985."),
        ({"year": 1995}, {"year": 1997}, "A film of the '90s.", "A film of the '90s."),
        ({"stars": ("Ida Day",)}, {"stars": ("Bo Lind",)},
         "Ida Day, seen on New Year's Day.", "Bo Lind, seen on New Year's Day."),
        ({"stars": ("Ida Dane", "Bo Lind")}, {"stars": ("Cy Moss", "Di Kerr")},
         "With Ida Dane and Lind.", "With Cy Moss and Kerr."),
        ({"stars": ("Ida Dane", "Bo Lind")}, {"stars": ("Bo Lind", "Cy Moss")},
         "With Bo Lind.", "With Bo Lind."),
        ({"stars": ("Ida Dane",)}, {"stars": ("Bo Lind",)}, "With IDA DANE.", "With Bo Lind."),
        ({"stars": ("Ann", "Ann Ray")}, {"stars": ("Bo Lind", "Cy Moss")},
         "With Ann Ray.", "With Cy Moss."),
    ],
    ids=["each genre its own", "a shared genre", "an article", "a shared decade", "a short name",
         "each star its own", "a shared star", "any case", "a name in a name"],
)  # fmt: skip
def test_what_differs_is_replaced_and_nothing_else(
    old: dict[str, Any], new: dict[str, Any], text: str, expected: str
) -> None:
    assert rewrite(text, Item("X", "X", **old), Item("Y", "Y", **new)) == expected


def test_facts_that_the_new_film_lacks_become_neutral_words(films: Catalogue) -> None:
    text = "A tense 1995 crime film by Michael Mann with Al Pacino."
    text = rewrite(text, films.get("Heat (1995)"), Item("X", "X"))
    assert text == "A different another year different film by someone else with someone else."


def traces(text: str, old: Item, new: Item, catalogue: Catalogue) -> list[str]:
    """What of the old film is left in a text rewritten for the new one."""
    text = text.replace(new.title, "")
    for name in (*new.directors, *new.stars):
        text = text.replace(name, "")
    left = [old.title] if catalogue.mentions(text, [old.title]) else []
    words = [*old.directors, *old.stars]
    words += [name.split()[-1] for name in words if len(name.split()[-1]) > 3]
    if old.year != new.year:
        words.append(str(old.year))
    if old.decade != new.decade:
        words += [old.decade, DECADE_NAMES.get(old.decade[2:], old.decade)]
    words += [mood for mood in old.moods if mood not in new.moods]
    for genre in old.genres:
        words += GENRE_FORMS[genre] if genre not in new.genres else ()
    return left + [word for word in words if re.search(rf"\b{re.escape(word)}\b", text)]


def test_no_trace_of_the_old_film_is_left_in_rewritten_sample_replies(sample: Catalogue) -> None:
    draws = random.Random(0)
    changed = 0
    for example in load_split("sample", "test").examples:
        old = sample.get(example.items[0])
        for new in draws.sample(sample.items, 4):
            if new.name == old.name:
                continue
            for text in (example.response, example.explanation):
                other = rewrite(text, old, new)
                assert traces(other, old, new, sample) == [], (text, other)
                assert not re.search(r"\b([Aa] [aeiou]|[Aa]n [^aeiouAEIOU8])", other), other
            assert sample.mentions(rewrite(example.response, old, new), [new.title])
            changed += 1
    assert changed > 1000
