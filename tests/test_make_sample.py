"""The sample set: what it promises of sizes, splits, facts, language and profiles."""

import json
from collections import Counter

import make_sample as sample
import pytest
from make_sample import FOLDER, PHRASES, Wish, facts_of

from usbrec.crs.catalogue import Catalogue
from usbrec.crs.titles import GENRE_FORMS
from usbrec.crs.wishes import DECADE_NAMES

Rows = dict[str, list[dict]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return {
        split: [
            json.loads(line)
            for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in sample.DIALOGUES
    }


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.load(FOLDER / "items.json")


def every(rows: Rows) -> list[dict]:
    return [row for split in rows.values() for row in split]


def long(rows: list[dict]) -> list[dict]:
    """The rows of long dialogues, which hold all fields."""
    return [row for row in rows if "reactions" in row]


def test_the_generator_writes_the_very_bytes_of_the_folder() -> None:
    for split, made in sample.make_sample().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        assert text.encode() == (FOLDER / f"{split}.jsonl").read_bytes(), split


def test_another_seed_writes_other_dialogues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "DIALOGUES", {"train": 0, "test": 20})
    contexts = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sample, "SEED", seed)
        contexts.append([row["context"] for row in sample.make_sample()["test"]])
    assert contexts[0] == contexts[1] != contexts[2]


def test_the_catalogue_is_large_complete_and_has_traps(catalogue: Catalogue) -> None:
    assert len(catalogue.items) >= 240
    for film in catalogue:
        assert 1950 <= film.year <= 2024
        assert 1 <= len(film.genres) <= 3 and set(film.genres) <= set(GENRE_FORMS)
        assert len(film.directors) == 1 and film.stars and len(film.moods) == 1
        assert film.title == f"{film.name} ({film.year})"
    assert {"Heat", "Up", "Elf", "Her", "It"} <= {film.name for film in catalogue}
    assert len({film.title for film in catalogue}) == len(catalogue.items)
    assert len({film.name for film in catalogue}) < len(catalogue.items)
    directors = Counter(film.directors[0] for film in catalogue)
    assert sum(count > 1 for count in directors.values()) > 100


def test_the_splits_are_large_enough_and_share_no_dialogue(rows: Rows) -> None:
    assert len(rows["train"]) >= 700 and len(rows["valid"]) >= 120 and len(rows["test"]) >= 320
    splits = {key: {row["dialog_id"] for row in part} for key, part in rows.items()}
    contexts = {key: {tuple(row["context"]) for row in part} for key, part in rows.items()}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not splits[one] & splits[other]
        assert not contexts[one] & contexts[other]


def test_no_target_with_the_same_wishes_occurs_in_two_splits(rows: Rows) -> None:
    owner: dict[tuple, str] = {}
    for split, part in rows.items():
        for row in part:
            key = (row["target"], frozenset(map(tuple, row["wishes"])))
            assert owner.setdefault(key, split) == split, key


def test_short_dialogues_state_all_wishes_in_one_line_and_cover_every_film(rows: Rows) -> None:
    short = [row for row in rows["train"] if "reactions" not in row]
    assert len(short) == sample.DIALOGUES["train"] - sample.LONG and not [
        row for row in rows["test"] if row not in long([row])
    ]
    assert all(len(row["context"]) == 1 and row["entity"] == [] for row in short)
    assert min(Counter(row["target"] for row in short).values()) >= 5


def test_every_film_occurs_in_train_and_some_are_popular(rows: Rows, catalogue: Catalogue) -> None:
    counts = Counter(row["target"] for row in rows["train"])
    assert set(counts) == {film.title for film in catalogue}
    assert counts.most_common(1)[0][1] >= 50
    beginning = {row["target"] for row in rows["train"][:300]}
    assert len(beginning) > 120  # a part of train is as varied as the whole


def test_a_row_is_read_from_its_end_and_names_the_target(rows: Rows, catalogue: Catalogue) -> None:
    for row in every(rows):
        context = row["context"]
        assert len(context) % 2 == 1 and len(context) <= sample.MAX_LINES
        assert row["turn_id"] == len(context)
        assert all(context[1:]) and (context[0] or len(context) > 1)
        assert row["rec"] == [row["target"]]
        named = [one.title for m in catalogue.find(row["resp"]) for one in m.items]
        assert named == [row["target"]], row["resp"]
        found = [one.title for line in context for m in catalogue.find(line) for one in m.items]
        assert list(dict.fromkeys(found)) == row["entity"], row


def test_lines_are_short(rows: Rows) -> None:
    for row in every(rows):
        seeker = row["context"][::-2]
        assert all(len(line.split()) <= sample.MAX_WORDS + 4 for line in seeker), seeker
        assert len(row["resp"].split()) <= 26
        assert len(row.get("explanation", "").split()) <= 40
    lines = [len([line for line in row["context"] if line]) for row in long(every(rows))]
    assert 3 <= sum(lines) / len(lines) <= 5
    seekers = [line for row in every(rows) for line in row["context"][::-2]]
    assert (
        sum(len(line.split()) > 18 for line in seekers) < 30
    )  # only where long names leave no shorter phrase


def test_the_target_meets_every_wish_and_few_other_films_do(
    rows: Rows, catalogue: Catalogue
) -> None:
    chances = []
    for row in every(rows):
        wishes = [Wish(*wish) for wish in row["wishes"]]
        fitting = [film.title for film in catalogue if all(wish.fits(film) for wish in wishes)]
        assert row["target"] in fitting
        others = set(row["entity"]) - {row["target"]}
        chances.append(1 / len(set(fitting) - others))
    assert 0.4 <= sum(chances) / len(chances) <= 0.8


def test_copying_the_last_film_or_the_most_popular_one_rarely_hits(rows: Rows) -> None:
    test = rows["test"]
    repeated = sum(row["target"] in row["entity"] for row in test) / len(test)
    last = sum(row["entity"][-1:] == row["rec"] for row in test) / len(test)
    assert 0.1 <= repeated <= 0.15
    assert 0.04 <= last < repeated
    popular = Counter(row["target"] for row in rows["train"]).most_common(1)[0][0]
    assert 0.03 < sum(row["target"] == popular for row in test) / len(test) < 0.1


def test_language_varies(rows: Rows) -> None:
    train = long(rows["train"])
    seeker = [line for row in train for line in row["context"][::-2] if line]
    assert len(set(seeker)) > 1500
    assert len({row["resp"] for row in train}) > 0.95 * len(train)
    assert len(PHRASES) > 30 and sum(map(len, PHRASES.values())) > 250
    openers = Counter(row["context"][0] == "" for row in train)
    assert min(openers.values()) / len(train) > 0.25


def forms_of(kind: str, value: str) -> list[str]:
    """The forms in which a wish can be spoken of."""
    if kind in ("genre", "dislike"):
        return list(GENRE_FORMS[value])
    return [value, value[2:], DECADE_NAMES.get(value[2:], value)] if kind == "decade" else [value]


def test_a_profile_holds_what_the_seeker_said_and_nothing_else(rows: Rows) -> None:
    for row in every(rows):
        heard = " ".join(row["context"]).lower()
        for kind, value in row["wishes"]:
            assert kind in ("mood", "genre", "decade", "director", "lead", "dislike")
            assert any(form.lower() in heard for form in forms_of(kind, value)), row
            assert value in row["profile"]
        body = row["profile"].replace("Likes: ", "").replace(" Dislikes: ", ", ")
        parts = [part.strip(" .") for part in body.replace(" Seen: ", ", ").split(", ")]
        values = {value for _, value in row["wishes"]} | {"nothing said"}
        for part in filter(None, parts):
            bare = part.removesuffix(" mood").removeprefix("by ").removeprefix("with ")
            said = bare in {value.strip(".") for value in values}
            assert said or any(bare in film for film in row["entity"]), (part, row)
        if row["target"] not in row["entity"]:
            assert row["target"] not in row["profile"]


def test_reactions_name_no_title_and_refusals_hint_at_something_unsaid(
    rows: Rows, catalogue: Catalogue
) -> None:
    unsaid = 0
    for row in long(every(rows)):
        film = catalogue.get(row["target"])
        for text in row["reactions"].values():
            assert catalogue.hide(text, [row["target"]]) == text
            assert not catalogue.find(text)
        wishes = [tuple(wish) for wish in row["wishes"]]
        facts = [(fact.kind, fact.value) for fact in facts_of(film)]
        refusal = row["reactions"]["refuse"].lower()
        hints = [fact for fact in facts if any(f.lower() in refusal for f in forms_of(*fact))]
        assert hints, row
        unsaid += any(hint not in wishes for hint in hints)
    assert unsaid > 0.98 * len(long(every(rows)))


def test_an_explanation_holds_the_facts_of_the_target(rows: Rows, catalogue: Catalogue) -> None:
    for row in long(every(rows)):
        film = catalogue.get(row["target"])
        assert str(film.year) in row["explanation"] and film.directors[0] in row["explanation"]
        assert any(star in row["explanation"] for star in film.stars)
        assert row["target"] not in row["explanation"]


def test_refused_suggestions_fail_a_wish_or_were_seen(rows: Rows, catalogue: Catalogue) -> None:
    kinds = Counter()
    for row in rows["train"]:
        _, _, dislikes = row["profile"].partition("Dislikes: ")
        for title in row["entity"]:
            if title in dislikes.partition(" Seen:")[0]:
                film = catalogue.get(title)
                meets = all(Wish(*wish).fits(film) for wish in row["wishes"])
                kinds["meets all" if meets else "fails"] += 1
            kinds["seen"] += title in dislikes.partition(" Seen:")[2]
        kinds["liked"] += any(
            catalogue.grade(catalogue.get(title), [row["target"]]) == 1 for title in row["entity"]
        )
    assert kinds["fails"] > 150 and kinds["seen"] > 50 and kinds["liked"] > 100
    assert kinds["meets all"] < 0.05 * kinds["fails"]
