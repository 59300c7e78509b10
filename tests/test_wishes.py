"""A profile's facts, a film's card and their fit."""

import json
from dataclasses import replace

import pytest

from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.datasets import ROOT, load_catalogue
from usbrec.crs.wishes import Fact, card, fit, read_profile

FILMS = load_catalogue("sample")
HEAT = Item(
    "Heat (1995)",
    *("Heat", 1995, ("crime", "thriller"), ("Michael Mann",)),
    stars=("Al Pacino", "Robert De Niro"),
    moods=("tense",),
)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_gold_profiles_hold_the_wishes_and_the_target_meets_them(split: str) -> None:
    for line in (ROOT / "sample" / f"{split}.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        facts = read_profile(row["profile"], FILMS)
        wishes = {tuple(x) for x in row["wishes"]}
        found = {("dislike" if x.attitude != "like" else x.kind, x.value)
                 for x in facts if x.kind != "title"}  # fmt: skip
        assert found == wishes
        target = FILMS.get(row["target"])
        assert target and fit(target, facts) == 2


def test_a_title_with_commas_and_stops_is_one_fact() -> None:
    names = ("Salt, Smoke, Ash and Rain (1966)", "E.T. the Extra-Terrestrial (1982)")
    films = Catalogue(Item(name, name[:-7], int(name[-5:-1])) for name in names)
    text = f"Likes: war, {names[0]}. Dislikes: nothing said. Seen: {names[1]}."
    expected = {("like", "genre", "war"), ("like", "title", names[0]), ("seen", "title", names[1])}
    assert {tuple(x) for x in read_profile(text, films)} == expected
    assert read_profile("The seeker wants crime.", films) == frozenset()


def test_a_genre_is_no_film_of_that_name() -> None:
    films = Catalogue([Item("War", "War"), Item("Family (2006)", "Family", 2006)])
    told = read_profile("Likes: war, Family (2006). Dislikes: family.", films)
    likes = {("like", "genre", "war"), ("like", "title", "Family (2006)")}
    assert {tuple(x) for x in told} == likes | {("dislike", "genre", "family")}
    jazz = Catalogue([Item("Jazz (1978)", "Jazz", 1978), Item("Kind", "Kind", None, ("jazz",))])
    assert [*read_profile("Dislikes: jazz.", jazz)] == [("dislike", "genre", "jazz")]
    assert [*read_profile("Dislikes: Jazz.", jazz)] == [("dislike", "title", "Jazz (1978)")]


def test_the_fit_counts_wishes_and_refuses_dislikes_and_known_films() -> None:
    crime, mann = Fact("like", "genre", "crime"), Fact("like", "director", "Michael Mann")
    fifties, liked = Fact("like", "decade", "1950s"), Fact("like", "title", "Alien (1979)")
    assert [fit(HEAT, x) for x in ([crime, mann], [crime, fifties], [fifties])] == [2, 1, 0]
    assert fit(HEAT, [fifties, crime, mann]) == 1 and fit(HEAT, [fifties, crime, fifties]) == 0
    assert fit(HEAT, [liked]) == 1 and fit(HEAT, []) == 1
    for against in (("dislike", "genre", "thriller"), ("dislike", "title", "Heat (1995)")):
        assert fit(HEAT, [crime, Fact(*against)]) == 0
    assert fit(HEAT, [crime, Fact("seen", "title", "Heat (1995)")]) == 0


def test_a_card_tells_the_facts_in_the_words_of_a_profile() -> None:
    told = (
        "crime, thriller, tense mood, 1990s, by Michael Mann, with Al Pacino, with Robert De Niro"
    )
    assert card(HEAT) == told
    assert fit(HEAT, read_profile(f"Likes: {told}.", FILMS)) == 2
    bare = replace(HEAT, genres=(), directors=(), stars=(), moods=(), year=None)
    assert card(bare) == "nothing known"
