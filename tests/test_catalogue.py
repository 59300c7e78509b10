"""Titles in text: found, not found in ordinary words, hidden, graded."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from usbrec.crs.catalogue import Catalogue, Item, read_item
from usbrec.crs.datasets import load_catalogue, load_split, read_examples
from usbrec.crs.wishes import rewrite
from usbrec.options import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FACTS = (
    ("Heat (1995)", "crime,thriller", "Michael Mann", "Al Pacino,Robert De Niro", "tense"),
    ("Up (2009)", "animation,family", "Pete Docter", "Ed Asner", "heartwarming"),
    ("It (2017)", "horror", "Andy Muschietti", "Bill Skarsgard", "scary"),
    ("War (2007)", "action", "Philip G. Atwell", "Jet Li", "dark"),
    ("Her (2013)", "romance,drama", "Spike Jonze", "Joaquin Phoenix", "tender"),
    ("2012 (2009)", "action,sci-fi", "Roland Emmerich", "John Cusack", "epic"),
    ("Drama (2010)", "drama", "Matias Lira", "", ""),
    ("You (2009)", "drama", "Melora Hardin", "", ""),
    ("Titanic (1997)", "romance,drama", "James Cameron", "Kate Winslet", "sad"),
    ("Spider-Man (2002)", "action", "Sam Raimi", "Tobey Maguire", "thrilling"),
    ("Spider-Man 2 (2004)", "action", "Sam Raimi", "Tobey Maguire", "thrilling"),
    ("Ocean's Eleven (2001)", "crime", "Steven Soderbergh", "George Clooney", "stylish"),
    ("The Godfather (1972)", "crime,drama", "Francis Ford Coppola", "Al Pacino", "epic"),
    ("The Silence of the Lambs (1991)", "crime,thriller", "Jonathan Demme", "Jodie Foster", ""),
    ("Amélie (2001)", "romance,comedy", "Jean-Pierre Jeunet", "Audrey Tautou", "magical"),
    ("Pride & Prejudice (2005)", "romance", "Joe Wright", "Keira Knightley", "tender"),
    ("True Grit (1969)", "western", "Henry Hathaway", "John Wayne", "thrilling"),
    ("True Grit (2010)", "western", "Joel Coen", "Jeff Bridges", "gritty"),
    ("Stone (2010)", "drama", "John Curran", "Edward Norton", ""),
    ("Unforgiven (1992)", "western,drama", "Clint Eastwood", "Clint Eastwood", "dark"),
)


def item(title: str, genres: str, director: str, stars: str, mood: str) -> Item:
    return read_item(
        {
            "name": title,
            "genre": genres.split(","),
            "director": [director],
            "star": [star for star in stars.split(",") if star],
            "mood": [mood] if mood else [],
        }
    )


@pytest.fixture(scope="module")
def films() -> Catalogue:
    return Catalogue(item(*facts) for facts in FACTS)


@pytest.fixture(scope="module")
def sample() -> Catalogue:
    return load_catalogue("sample")


def found(films: Catalogue, text: str) -> list[str]:
    """The titles of each mention, joined by | where ambiguous."""
    return ["|".join(item.title for item in mention.items) for mention in films.find(text)]


# --- reading ----------------------------------------------------------------------------------


def test_items_of_redial_opendialkg_and_the_sample_set_are_read_by_one_reader() -> None:
    redial = read_item(
        {"name": "Heat (1995)", "genre": ["crime"], "director": ["Mann"], "star": ["A", "B"]}
    )
    assert (redial.name, redial.year, redial.decade) == ("Heat", 1995, "1990s")
    assert redial.stars == ("A", "B")
    kg = read_item(
        {
            "name": "Heat",
            "year": "1995",
            "genre": ["Crime Fiction", "Science Fiction", "Animation", "Romance Film", "Romance"],
            "actor": ["A", "B", "A"],
        }
    )
    assert (kg.title, kg.name, kg.year) == ("Heat", "Heat", 1995)
    assert read_item({"name": "Heat (1995)", "year": "1986"}).year == 1995
    assert kg.genres == ("crime", "sci-fi", "animation", "romance")
    assert kg.stars == ("A", "B") and kg.directors == ()
    assert read_item({"name": "Nobody Knows"}).decade is None
    empty = {"star": ["", " "], "director": "", "genre": [" "], "mood": ["", "tense"]}
    item = read_item({"name": "Nobody Knows", "year": "9" * 5000, **empty})
    assert (item.year, item.stars, item.directors, item.genres) == (None, (), (), ())
    assert item.moods == ("tense",)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "is not JSON"),
        (b"[]", "object of items"),
        (b"{}", "object of items"),
        (b'{"1": {"title": "Heat"}}', "item '1'"),
        (b'{"1": {"name": "Heat", "genre": 3}}', "item '1'.*'genre' must be a list"),
        (b'{"1": {"name": "Heat", "star": [["x"]]}}', "'star' must be a list"),
        (b"[" * 100000, "is not JSON"),
        (b'{"1": {"name": "Heat", "year": %s}}' % (b"9" * 5000), "is not JSON"),
        (b'{"1": {"name": "Heat \\ud800"}}', "is not JSON"),
        (b'{"1": {"name": " "}}', "item '1' .* has no name"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_faulty_catalogue_file_is_one_clear_sentence(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    path = tmp_path / "items.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        Catalogue.load(path)
    assert str(path) in str(error.value)


def test_a_missing_catalogue_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.json"):
        Catalogue.load(tmp_path / "nowhere.json")


def test_a_year_less_title_counts_only_if_one_item_bears_its_name(films: Catalogue) -> None:
    assert films.get("Heat").title == "Heat (1995)"
    assert films.get("heat (1995)").title == "Heat (1995)"
    assert films.get("True Grit") is None
    assert len(films.named("True Grit")) == 2
    assert films.get("True Grit (2010)").year == 2010
    assert films.get("Heat (1986)") is None
    assert films.get("Casablanca") is None


def test_a_title_has_a_thousand_characters_at_most() -> None:
    assert read_item({"name": "x" * 1000}).title == "x" * 1000
    with pytest.raises(UserError, match="no name of 1 to 1000 characters"):
        read_item({"name": "x" * 1001})


# --- finding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "It was up to you, and war is hell; I love her in the heat of 2012.",
        "I'd like a Drama or a drama. Drama! Something dramatic.",
        "You should see what it does to her.",
        "Up next? Heat and war. It is. You too. Her lover. War films are fine.",
        "I haven't seen it. What do you recommend? You know me.",
        "Yes! We loved that movie. It was scary back then.",
        "It (1990) is another film, and so is Heat (1986).",
        "Do you know who Oliver Stone is?",
        "a film from 2012, or 2009",
        "He has true grit.",
        "The movie Drama?",
        "We could watch 2012 of them.",
    ],
)
def test_ordinary_words_raise_no_false_alarm(films: Catalogue, text: str) -> None:
    assert found(films, text) == []


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("You should watch Heat (1995)!", ["Heat (1995)"]),
        ("try heat (1995) or UP 2009", ["Heat (1995)", "Up (2009)"]),
        ("Released a year off: Heat (1996).", ["Heat (1995)"]),
        ('Have you seen "It"? Or “Up”?', ["It (2017)", "Up (2009)"]),
        ("You should watch Her. I have seen Heat.", ["Her (2013)", "Heat (1995)"]),
        ("a film called Up", ["Up (2009)"]),
        ("Titanic was sad, but titanic things are not films.", ["Titanic (1997)"]),
        ("the silence of the lambs", ["The Silence of the Lambs (1991)"]),
        ("I love Spider-Man 2, more than Spider-Man", ["Spider-Man 2 (2004)", "Spider-Man (2002)"]),
        ("Oceans Eleven and Ocean’s Eleven", ["Ocean's Eleven (2001)"] * 2),
        ("Amelie (2001); Pride and Prejudice", ["Amélie (2001)", "Pride & Prejudice (2005)"]),
        ("True Grit is fine", ["True Grit (1969)|True Grit (2010)"]),
        ("true grit (2010) is better", ["True Grit (2010)"]),
        ("2012 (2009) and not 2012", ["2012 (2009)"]),
        ('"Heat" (1995) and The Godfather', ["Heat (1995)", "The Godfather (1972)"]),
        ("I liked Stone.", ["Stone (2010)"]),
        ("I like Marlon Brando The Godfather", ["The Godfather (1972)"]),
    ],
)
def test_titles_are_found_in_order(films: Catalogue, text: str, titles: list[str]) -> None:
    assert found(films, text) == titles


def test_a_year_means_the_film_of_that_year_before_its_neighbours_and_those_without() -> None:
    names = ("Night Train (1986)", "Night Train (1987)", "Glass Road")
    films = Catalogue(read_item({"name": name}) for name in names)
    assert found(films, "Night Train (1986), Night Train (1987)") == [*names[:2]]
    assert found(films, "Night Train (1988), Glass Road (1999)") == [*names[1:]]
    one = films.get("Glass Road (1999)")
    assert one is not None and one.title == "Glass Road"


def test_a_mention_tells_where_it_stands(films: Catalogue) -> None:
    text = "Then watch Heat (1995), please."
    (mention,) = films.find(text)
    assert text[mention.start : mention.end] == "Heat (1995)"


def test_every_sample_title_is_found_in_a_sentence_as_itself(sample: Catalogue) -> None:
    for film in sample:
        assert found(sample, f"You might like {film.title}. It is good.") == [film.title]


def test_mentions_needs_all_meant_items_among_the_titles(films: Catalogue) -> None:
    assert films.mentions("Watch Heat (1995).", ["Heat (1995)", "Up (2009)"])
    assert not films.mentions("Watch Up (2009).", ["Heat (1995)"])
    assert not films.mentions("Watch True Grit.", ["True Grit (2010)"])
    assert films.mentions("Watch True Grit.", ["True Grit (2010)", "True Grit (1969)"])
    assert films.mentions("Watch Casablanca (1942).", ["Casablanca (1942)"])  # not in there
    assert not films.mentions("Watch Casablanca (1942).", ["Vertigo (1958)"])
    longer = Catalogue([Item("Up in the Fog (2009)", "Up in the Fog", 2009)])
    assert not longer.mentions("You should watch Up in the Fog.", ["Up (2009)"])
    assert longer.mentions('You should watch Up in the Fog, or "Up".', ["Up (2009)"])
    assert films.mentions("Watch Heat (1996).", ["Heat (1996)"])  # as a year off by one is read


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_titles_in_real_responses_are_those_that_annotators_marked() -> None:
    catalogue = load_catalogue("redial", SHARED / "redial")
    right = found_titles = marked = 0
    for example in read_examples(SHARED / "redial" / "test.jsonl")[::4]:
        titles = {one.title for m in catalogue.find(example.response) for one in m.items}
        right += len(titles & set(example.items))
        found_titles += len(titles)
        marked += len(set(example.items))
    assert right / marked > 0.99
    assert right / found_titles > 0.95  # the rest are mostly titles that nobody marked


# --- hiding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "title", "hidden"),
    [
        ("I want Heat.", "Heat (1995)", "I want that film."),
        ("heat (1995), HEAT (1995)", "Heat (1995)", "that film, that film"),
        ('"heat" or “Heat” (1995)', "Heat (1995)", '"that film" or “that film'),
        ("In the heat of summer.", "Heat (1995)", "In the heat of summer."),
        ("Heat!", "Heat (1995)", "that film!"),
        ("a film called up", "Up (2009)", "a film called that film"),
        ("It is up to you.", "It (2017)", "It is up to you."),
        ("Is it It? IT scared me.", "It (2017)", "Is it that film? IT scared me."),
        ("World War II films, war films", "War (2007)", "World War II films, war films"),
        (
            "Was Us made in the US or the UK?",
            "Us (2019)",
            "Was that film made in the US or the UK?",
        ),
        ("Watch Heat tonight", "Heat (1995)", "Watch that film tonight"),
        ("I saw Us, made in the US here.", "Us (2019)", "I saw that film, made in the US here."),
        ("TITANIC, titanic, Titanic 1997", "Titanic (1997)", "that film, that film, that film"),
        ("the godfather, or Godfather", "The Godfather (1972)", "that film, or that film"),
        ("amelie and AMÉLIE", "Amélie (2001)", "that film and that film"),
        ("pride and prejudice", "Pride & Prejudice (2005)", "that film"),
        ("oceans eleven", "Ocean's Eleven (2001)", "that film"),
        ("Spider-Man 2, not spider man", "Spider-Man (2002)", "Spider-Man 2, not that film"),
        ("Mission Impossible", "Mission: Impossible (1996)", "that film"),
        ("Is it Fury Road?", "Mad Max: Fury Road (2015)", "Is it that film?"),
        ("hunger games?", "The Hunger Games: Catching Fire (2013)", "that film?"),
        ("lantern keeper", "Night Ferry: The Lantern Keeper (2017)", "that film"),
        ("lantern keeper", "Night Ferry: Part V - The Lantern Keeper (2017)", "that film"),
        ("a well-lantern keeper", "A Well-Lantern (2017)", "that film keeper"),
        ("I saw the X yesterday.", "X (2022)", "I saw the that film yesterday."),
        ("Which year? 2049.", "Night Ferry: 2049 (2017)", "Which year? 2049."),
    ],
)
def test_a_target_is_kept_out_of_the_seekers_words(
    films: Catalogue, text: str, title: str, hidden: str
) -> None:
    assert films.hide(text, [title]) == hidden


def test_no_sample_title_survives_hiding_in_any_case_or_quotes(sample: Catalogue) -> None:
    for film in sample:
        for form in (film.title, film.title.lower(), film.title.upper(), f'"{film.name}"'):
            text = sample.hide(f"Maybe {form} then?", [film.title])
            assert re.fullmatch('Maybe "?that film[!.]*"? then\\?', text), text


def test_hiding_leaves_ordinary_sentences_alone(sample: Catalogue) -> None:
    text = "It is up to us: the big room, speed, a signal of her ghost, and I saw 1917 men drive."
    titles = [
        "It (2017)",
        "Up (2009)",
        "Us (2019)",
        "Big (1988)",
        "Speed (1994)",
        "Her (2013)",
        "Ghost (1990)",
        "Saw (2004)",
        "1917 (2019)",
        "Drive (2011)",
        "Signs (2002)",
    ]
    assert all(sample.get(title) for title in titles)
    assert sample.hide(text, titles) == text


# --- longer titles ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trains() -> Catalogue:
    names = ("Night Train (1986)", "Seven (1995)", "Alien (1979)", "Star Wars (1977)", "Up (2009)")
    return Catalogue(read_item({"name": name}) for name in names)


@pytest.mark.parametrize(
    "text",
    [
        "Watch Night Train 2 (1990).",
        "Watch night train 2 (1990).",
        "Night Train II, or Night Train, Part Two",
        "Try Night Train Returns.",
        "Night Train to Lisbon, or the Late Night Train",
        "Murder on the Night Train",
        'Try "Night Train is Late".',
        "I saw Night Train 1953, then Night Train in Space (2003).",
        "I'd suggest Seven Sailors (1961).",
        'Watch Up There (2012), or "Up in Smoke".',
        "Star Wars: The Force Awakens",
        "Star Wars - Rogue One, Star Wars: Episode V",
        "Alien: Covenant, Alien vs. Predator, Alien³",
        "Dante's Alien is a poem.",
        "Star; Wars. That was last Night\nTrain is late.",
    ],
)
def test_a_longer_title_is_another_film(trains: Catalogue, text: str) -> None:
    assert found(trains, text) == []


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("Watch Seven tonight. Try Seven, it is tense.", ["Seven (1995)"] * 2),
        ("Watch Seven with Brad Pitt. That is a film.", ["Seven (1995)"]),
        ("Night Train and Alien", ["Night Train (1986)", "Alien (1979)"]),
        ("Have you seen Alien? It is good.", ["Alien (1979)"]),
        (
            "I saw Night Train 3 or 4 times, and Alien 2 times",
            ["Night Train (1986)", "Alien (1979)"],
        ),
        ("Star Wars: it is fun. Star Wars: It is fun.", ["Star Wars (1977)"] * 2),
        ("Avoid it. I loved Star Wars It was good", ["Star Wars (1977)"]),
        ('Is "Alien" better than "Star Wars"?', ["Alien (1979)", "Star Wars (1977)"]),
        ("Ridley Scott's Night Train on Netflix", ["Night Train (1986)"]),
        ("I saw Titanic (1997) and Alien by Ridley Scott", ["Alien (1979)"]),
    ],
)
def test_other_words_make_no_longer_title(trains: Catalogue, text: str, titles: list[str]) -> None:
    assert found(trains, text) == titles


def test_a_name_is_hidden_wherever_a_long_text_repeats_it(trains: Catalogue) -> None:
    """Each time is one of its own: with all text before and after it this would take minutes."""
    line = "Night Train 2 (1990), not Night Train.\n"
    hidden = trains.hide(line * 1500, ["Night Train (1986)"])
    assert hidden == trains.hide(line, ["Night Train (1986)"]) * 1500


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Night Train 2 (1990), not Night Train", "Night Train 2 (1990), not that film"),
        ("Night Train Returns, night train", "Night Train Returns, that film"),
        ('"Night Train is Late", "Night Train"', '"Night Train is Late", "that film"'),
        ("Night Train: The Way Home.", "Night Train: The Way Home."),
        ("Night Train in Space (2003)", "Night Train in Space (2003)"),
        ("Night Train Friday, Night Train: Amazing", "that film Friday, that film: Amazing"),
        ("I saw Night Train 2 times, or in 1990", "I saw that film 2 times, or in 1990"),
        ("night train 1987", "that film 1987"),
        ("Night Train (1986) Alien (1979)", "that film Alien (1979)"),
        ("night train (1986) Or Up (2009)", "that film Or Up (2009)"),
    ],
)
def test_hiding_spares_longer_titles_and_leaks_nothing(
    trains: Catalogue, text: str, hidden: str
) -> None:
    assert trains.hide(text, ["Night Train (1986)"]) == hidden


# --- one title, many spellings ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "texts"),
    [
        ("Matrix, The (1999)", ["The Matrix", "the matrix (1999)", "Matrix, The (1999)"]),
        ("Avventura, L' (1960)", ["L'Avventura", "L’avventura (1960)"]),
        ("Godfather, The: Part II (1974)", ["The Godfather: Part II", "The Godfather Part II"]),
        ("Seven (a.k.a. Se7en) (1995)", ["Se7en", "Seven (1995)", "Seven (a.k.a. Se7en) (1995)"]),
        ("Postman, The (Postino, Il) (1994)", ["Il Postino", "The Postman (1994)"]),
        ("Stone Garden (1999/I)", ["Stone Garden", "Stone Garden (1999)", "Stone Garden (1999/I)"]),
        ("Crash Course (2004 film)", ["Crash Course (2004)"]),
        ("Glass Road (1999) (TV)", ["Glass Road (1999)", "Glass Road"]),
        ("The Crown (Kingdoms, #1)", ["The Crown", "The Crown (Kingdoms, #1)"]),
        (
            "Harbour Lights - Remastered 2011",
            ["Harbour Lights", "Harbour Lights - Remastered 2011"],
        ),
        ("Océane (2001)", ["Oce\u0301ane", "Oceane (2001)", "Ｏｃéａｎｅ（２００１）"]),
        ("The Lantern (1999)", ["The Lan\u00adtern", "The Lan\u200btern (1999)"]),
        ("春江花月 (2001)", ["推荐春江花月给你", "《春江花月》", "春江花月（2001年）"]),
        ("远山 (1994)", ["推荐《远山》给你", "看过远山吗", "远山（1994）"]),
        ("海辺の手紙 (2016)", ["昨日海辺の手紙を見た", "「海辺の手紙」"]),
        ("ガラスの城 (2010)", ["ｶﾞﾗｽの城が好き", "カ\u3099ラスの城が好き"]),
        (
            "바람길 (2019)",
            ["바람길을 보고 싶어요", "바람길에서도", "\u1107\u1161\u1105\u1161\u11b7길"],
        ),
        ("สายลมเหนือ (2017)", ["ลองดูสายลมเหนือสิ"]),
        ("नीला आकाश (2010)", ["मैंने नीला आकाश देखी"]),
        ("Тихий дом (2000)", ["новый Тихий дом сегодня"]),
        ("รักแท้ (2000)", ["《รักแท้》", "รักแท้ (2000)"]),
        ("Heat (1995)", ["我看了Heat（1995）很好", "看过《Heat》吗"]),
        ("Große Stadt (1990)", ["GROSSE STADT (1990)", "Grosse Stadt™"]),
    ],
)
def test_a_title_is_found_and_hidden_in_every_spelling(title: str, texts: list[str]) -> None:
    one = Catalogue([read_item({"name": title})])
    for text in texts:
        assert found(one, f"Watch {text}!") == [title], text
        hidden = one.hide(f"Watch {text}!", [title])
        assert "that film" in hidden and not found(one, hidden), hidden
    assert one.get(title) is not None and one.hide(f"Try {title} then", [title]).count(" ") == 3


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("远山 (1994)", "永远山高"),
        ("远山高 (1994)", "永远山高地"),
        ("火 (1990)", "火很大"),
        ("春江花月 (2001)", "《春江花月夜》很好"),
        ("战争之狼 (2015)", "战争之狼2很好"),
        ("바람길 (2019)", "큰바람길목"),
        ("かき (2001)", "「かぎ」"),
        ("바람 (2019)", "버럼을 봤어요"),
        ("รักแท้ (2000)", "ความรักแท้จริง"),
        ("复仇之城 (2012)", "复仇之城：终局很好"),
        ("アバター (2009)", "スーパーアバターズ"),
        ("바람의노래 (2019)", "큰바람의노래목"),
        ("สายลม (2017)", "ความสายลมจริง"),
    ],
)
def test_a_name_within_a_longer_word_is_no_title(title: str, text: str) -> None:
    assert found(Catalogue([read_item({"name": title})]), text) == []


def test_a_title_and_its_part_in_another_script_are_one_title() -> None:
    title = "远山高城: Silver Harbour (2001)"
    one = Catalogue([read_item({"name": title})])
    text = "我喜欢远山高城: Silver Harbour 吗"
    assert one.hide(text, [title]) == "我喜欢that film 吗"
    assert one.hide("我看了silver harbour 2001年的", [title]) == "我看了that film年的"
    other = read_item({"name": "Heat (1995)"})
    assert rewrite(text, one.items[0], other) == "我喜欢Heat 吗"


def test_a_short_name_or_common_words_alone_are_no_title_and_capitals_may_be_more() -> None:
    names = ("Ada (1961)", "All About Them (1990)", "Harbour side (1990)")
    films = Catalogue(read_item({"name": name}) for name in names)
    assert found(films, "I know all about them, and Ada lives here.") == []
    assert found(films, "Watch Ada. I LOVED HARBOUR SIDE!") == ["Ada (1961)", "Harbour side (1990)"]


def test_a_mention_with_invisible_characters_keeps_its_place() -> None:
    one = Catalogue([read_item({"name": "Océane (2001)"})])
    text = "Oh \ufeffse\u0301e Oce\u0301\u200bane!"
    (mention,) = one.find(text)
    assert text[mention.start : mention.end] == "Oce\u0301\u200bane"


def test_names_without_a_space_between_them_are_two_titles() -> None:
    names = ("春江花月 (2001)", "海辺手紙 (2016)")
    films = Catalogue(read_item({"name": name}) for name in names)
    assert found(films, "春江花月海辺手紙") == [*names]


def test_hiding_spares_a_title_that_ends_with_the_hidden_name() -> None:
    names = ("Night Lantern (1986)", "Lantern (2002)")
    films = Catalogue(read_item({"name": name}) for name in names)
    text = "I saw Night Lantern, not Lantern."
    assert films.hide(text, names[1:]) == "I saw Night Lantern, not that film."


def test_a_bare_name_means_the_item_without_a_description() -> None:
    names = (
        "Rebecca (Drama Film)",
        "Rebecca",
        "Vertigo (TV)",
        "Dune, The (Edition)",
        "Dune Sea, A",
    )
    films = Catalogue(read_item({"name": name}) for name in names)
    assert found(films, "Try Rebecca, or Vertigo.") == ["Rebecca", "Vertigo (TV)"]
    assert found(films, "Try Rebecca (Drama Film).") == ["Rebecca (Drama Film)"]
    assert films.get("Rebecca").title == "Rebecca"
    songs = Catalogue(
        read_item({"name": name}) for name in ("Blue Bay - Remastered 2011", "Blue Bay")
    )
    assert found(songs, "Play Blue Bay.") == ["Blue Bay"]
    assert films.get("The Dune").title == "Dune, The (Edition)"
    assert films.get("A Dune Sea").title == "Dune Sea, A"


# --- facts ------------------------------------------------------------------------------------


def test_a_recommendation_is_graded_by_what_it_shares_with_the_target(films: Catalogue) -> None:
    heat, godfather = films.get("Heat (1995)"), films.get("The Godfather (1972)")
    titanic, up = films.get("Titanic (1997)"), films.get("Up (2009)")
    assert films.grade(heat, [heat.title]) == 2
    assert films.grade(godfather, [heat.title]) == 1  # a star
    assert films.grade(titanic, ["Her (2013)"]) == 1  # genres
    assert films.grade(Item("X", "X", stars=("Robert De Niro",)), [heat.title]) == 1  # no lead
    many = Item("X", "X", genres=("crime", "war", "western"))
    assert films.grade(many, [heat.title]) == 1  # one of Heat's two
    assert films.grade(films.get("Spider-Man 2 (2004)"), ["Spider-Man (2002)"]) == 1
    assert films.grade(up, [heat.title]) == 0
    assert films.grade(up, [heat.title, up.title]) == 2
    assert films.grade(None, [heat.title]) == 0
    nameless = Item("X", "X")
    assert Catalogue([Item("Y", "Y")]).grade(nameless, ["Y"]) == 0  # no facts, nothing shared


def test_a_fifth_to_a_third_of_popular_films_share_something_with_a_random_target(
    sample: Catalogue,
) -> None:
    draws = random.Random(0)
    popular = [example.items[0] for example in load_split("sample", "train").examples]
    grades = [
        sample.grade(sample.get(draws.choice(popular)), [draws.choice(sample.items).title])
        for _ in range(4000)
    ]
    assert 0.2 <= grades.count(1) / len(grades) <= 0.37


def test_finding_in_thousands_of_titles_takes_milliseconds(tmp_path: Path) -> None:
    """6,500 titles, 300 replies: one walk over a tree of words, not one search a title."""
    names = {str(n): {"name": f"Film of Number {n} ({1950 + n % 70})"} for n in range(6500)}
    (tmp_path / "items.json").write_text(json.dumps(names))
    catalogue = Catalogue.load(tmp_path / "items.json")
    start = time.process_time()
    hits = sum(len(catalogue.find(f"Try Film of Number {n * 7}, it is good.")) for n in range(300))
    assert hits == 300
    assert time.process_time() - start < 1.0
