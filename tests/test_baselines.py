"""Baselines and upper marks by hand."""

from dataclasses import replace

from scripted import talk
from test_evaluation import EXAMPLES, FILMS, LOFT, NEW, OLD, WELL

from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Example
from usbrec.extras.baselines import baseline_labels, copied, nearest, popular


def test_copy_last_takes_the_last_title_of_the_newest_line_that_has_one() -> None:
    lines = talk("Dark Well (1999)", "Red Loft (2001) or Night Ferry (1950)", "Neither.")
    assert copied(FILMS, Example("d", 1, lines, "", ()))[0] == (OLD,)
    assert copied(FILMS, Example("d", 1, talk("Hi"), "", ())) == []


def test_most_popular_is_the_most_frequent_label_of_the_catalogue() -> None:
    assert popular(FILMS, {"Not Ours": 9, LOFT.title: 2, WELL.title: 2})[0] == (WELL,)
    assert popular(FILMS, {}) == []


def test_baselines_tell_repeated_from_new_labels() -> None:
    train = [*EXAMPLES, said("more", "Hm.")]
    found = baseline_labels(FILMS, EXAMPLES, train)
    assert [row[0]["found"] for row in found["copy-last"]] == [False, True]
    assert [row[0]["found"] for row in found["most-popular"]] == [True, False]
    assert [row[0]["repeated"] for row in found["copy-last"]] == [False, True]


def test_a_label_outside_the_catalogue_can_be_repeated_but_never_found() -> None:
    titles = ("Lost Reel (1930)", WELL.title)
    example = Example("d", 1, talk("Lost Reel (1930)? Seen."), "", titles)
    found = baseline_labels(FILMS, [example], [said("a", "Hm.")])["most-popular"][0]
    assert [(x["repeated"], x["found"]) for x in found] == [(True, False), (False, True)]


def said(name: str, *lines: str, title: str = WELL.title) -> Example:
    return Example(name, 1, talk(*lines), "", (title,))


def test_the_nearest_training_dialogue_shares_the_rare_words_of_the_seeker() -> None:
    """Of four, "film" is in 4, "dark" in 2, "cosy" in 1: squares of log(4 / n) 0, 0.48, 1.92.

    "dark cosy film" has length 1.55. It shares 1.92 with a, whose length is 1.39, and 0.48 with b
    and d, whose length is 0.69: cosines 0.89, 0.45 and 0.45. Neither the recommender's words count
    nor repetitions.
    """
    train = [said("b", "Dark film?"), said("a", "Cosy film!"), said("c", "film", "cosy dark"),
             said("d", "dark film")]  # fmt: skip
    asked = [said("x", "Dark, cosy film."), said("y", "dark"), said("z", "film", "cosy", "Hm.")]
    asked.append(said("w", "Dark, dark, dark, dark, dark, dark, dark, but cosy."))
    assert [x.dialog_id for x in nearest(asked, train)] == ["a", "b", "b", "a"]


def test_a_long_training_dialogue_is_not_nearer_for_its_length() -> None:
    """Both share "dark"; the first says three other rare words too."""
    train = [said("a", "dark one two three"), said("b", "dark"), said("c", "none")]
    assert [x.dialog_id for x in nearest([said("x", "dark")], train)] == ["b"]


def test_a_rare_word_in_common_is_nearer_than_two_usual_ones() -> None:
    """Of four, "cosy" is in 1, the others in 2 each: squares of log(4 / n) 1.92 and 0.48.

    a shares 1.92 and has length 1.55, b shares 0.96 and has length 0.98: cosines 1.24 to 0.98.
    With the logarithms in place of their squares b would win.
    """
    train = [said("b", "dark slow"), said("a", "cosy long"), said("c", "long dark"),
             said("d", "slow")]  # fmt: skip
    assert [x.dialog_id for x in nearest([said("x", "cosy dark slow")], train)] == ["a"]


def test_the_nearest_baseline_guesses_that_dialogues_target() -> None:
    train = [said("a", "dark", title=WELL.title), said("b", "funny", title=LOFT.title)]
    asked = [said("x", "A dark one?"), said("y", "funny")]
    found = baseline_labels(FILMS, asked, train)["nearest"]
    assert [row[0]["found"] for row in found] == [True, False]


def test_of_several_targets_of_the_nearest_dialogue_the_first_is_guessed() -> None:
    train = [replace(said("a", "dark"), items=(LOFT.title, WELL.title))]
    (row,) = baseline_labels(FILMS, [replace(said("x", "dark"), items=train[0].items)], train)[
        "nearest"
    ]
    assert [(x["title"], x["found"]) for x in row] == [(LOFT.title, True), (WELL.title, False)]


def test_of_equally_popular_films_the_rule_listener_takes_the_first_by_title() -> None:
    """The catalogue has them the other way round."""
    asked = replace(said("x", "Hi", title=OLD.title), profile="Likes: crime.")
    films = Catalogue([NEW, OLD, WELL])
    (row,) = baseline_labels(films, [asked], [said("a", "Hm.")])["rule listener"]
    assert row[0]["found"]


def test_two_listeners_hear_every_wish_of_the_gold_profile() -> None:
    """Two crime films fit the first; the target is the less popular one: 0, and 1 / 2 at random.

    One fits the second. None meets both wishes of the third, its target only one of them.
    """
    profiles = ("Likes: crime.", "Likes: comedy.", "Likes: war, horror.")
    targets = (OLD.title, LOFT.title, WELL.title)
    asked = [
        replace(said(text, "Hi", title=title), profile=text)
        for text, title in zip(profiles, targets, strict=True)
    ]
    train = [said("a", "Hm.", title=x.title) for x in (NEW, NEW, OLD, *[WELL] * 9)]
    found = baseline_labels(FILMS, asked, train)
    assert [row[0]["found"] for row in found["rule listener"]] == [False, True, False]
    assert [row[0]["found"] for row in found["random listener"]] == [0.5, 1.0, 0.0]
    mixed = baseline_labels(FILMS, [*asked, *EXAMPLES], train)
    assert set(mixed) == {"copy-last", "most-popular", "nearest"}
