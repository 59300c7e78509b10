"""Edited files end in an answer or in one sentence: some edits of edits.py, and what they found."""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import edits
import pytest

from usbrec import runs
from usbrec.crs import datasets, wishes
from usbrec.crs.catalogue import Catalogue, read_item
from usbrec.crs.titles import names_of, split_title
from usbrec.llm.adapter_files import lora_config, targeted
from usbrec.llm.model_config import config_from
from usbrec.llm.tokenizer import ChatTokenizer, TokenizersVocabulary
from usbrec.options import UserError

COUNT = 20_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> edits.Place:
    """The original files, and what is read with them."""
    return edits.Place(tmp_path_factory.mktemp("edits").resolve())


def ended(read: Callable[[random.Random], Any], folder: Path, count: int = 1) -> edits.Found:
    """Return what edits of no file ended in, with this reader."""
    return edits.run(count, 0, folder, [edits.Target("made", 1, (), read)])


# --- the edits --------------------------------------------------------------------------------


def test_edited_files_end_in_an_answer_or_in_one_sentence(place: edits.Place) -> None:
    targets = place.targets()
    found = edits.run(COUNT, 0, place.folder, targets)
    assert {fault: seeds[:5] for fault, seeds in found.faults.items()} == {}
    assert found.answers.total() + found.refusals.total() == COUNT
    read = {x.name for x in targets if x.files}  # each of them is read at times, and refused
    assert set(found.answers) == {x.name for x in targets}
    assert set(found.refusals) >= read
    assert min(found.answers[x] for x in read) > 20 and min(found.refusals[x] for x in read) > 20


def test_the_original_files_are_all_answers(place: edits.Place) -> None:
    for target in place.targets():
        target.read(random.Random(0))


def test_an_edit_leaves_no_trace_and_is_drawn_from_its_seed_alone(place: edits.Place) -> None:
    def contents() -> dict[Path, bytes]:
        return {x: x.read_bytes() for x in sorted(place.folder.rglob("*")) if x.is_file()}

    before = contents()
    first = edits.run(60, 7, place.folder, place.targets())
    assert contents() == before
    second = edits.run(60, 7, place.folder, place.targets())
    assert (first.answers, first.kinds) == (second.answers, second.kinds)
    text = json.dumps(edits.FILMS).encode()
    alike = [edits.edited(random.Random(n), text) for n in (1, 1, 2)]
    assert alike[0] == alike[1] != alike[2]


def test_every_kind_of_edit_is_made() -> None:
    """Keys lost, doubled and renamed, types swapped, surrogates, deep and long values, bytes."""
    text = json.dumps({"name": "Up (2009)", "year": 2009, "genre": ["drama"]}).encode()
    made = [edits.edited(random.Random(n), text) for n in range(4000)]
    for part in (
        b'"year": "2009"', b'"year": [2009]', b'"year": NaN', b"\\ud800", b"\xed\xa0\x80",
        b"[[[[[[[[", "春".encode(), b"\\u0000", b'"YEAR"',
    ):  # fmt: skip
        assert any(part in x for x in made), part
    assert any(x.count(b'"year"') == 2 for x in made) and max(map(len, made)) > edits.LONG // 20
    assert any(b'"year"' not in x and b'"genre": ["drama"]' in x for x in made)
    assert any(x.startswith(b"\xff\xfe") for x in made) and b"" in made


# --- they can fail ----------------------------------------------------------------------------


def test_an_error_that_is_no_sentence_is_a_fault_with_its_seed(tmp_path: Path) -> None:
    def crash(rng: random.Random) -> None:
        if rng.random() < 0.5:
            raise KeyError("name")
        raise UserError("one sentence") if rng.random() < 0.5 else OSError("two\nlines")

    found = ended(crash, tmp_path, 40)
    [one, two] = sorted(found.faults)
    assert one.startswith("KeyError in the edit") and two.startswith("no sentence (2 lines)")
    seeds = found.faults[one]
    assert 5 < len(seeds) < 35 and "KeyError" in found.traces[one]
    again = edits.run(1, seeds[-1], tmp_path, [edits.Target("made", 1, (), crash)])
    assert [*again.faults] == [one]
    assert found.refusals.total() + len(seeds) == 40


@pytest.mark.parametrize("length", [10, 10_000])
def test_a_sentence_that_repeats_a_long_value_is_a_fault(tmp_path: Path, length: int) -> None:
    def refuse(rng: random.Random) -> None:
        raise UserError(f"got {'x' * length}")

    assert bool(ended(refuse, tmp_path).faults) == (length > edits.LONGEST_SENTENCE)


def test_an_edit_without_an_end_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "PATIENCE", 0.05)

    def hang(rng: random.Random) -> None:
        while True:
            with suppress(Exception):
                time.perf_counter()

    [fault] = ended(hang, tmp_path).faults
    assert fault.startswith("Hung in")


# --- what they have found ---------------------------------------------------------------------


@pytest.fixture
def patient() -> Iterator[None]:
    """Fail a test that takes as much processor time as an edit may."""
    with edits.within(edits.PATIENCE):
        yield


def long_text(unit: str) -> str:
    return unit * (edits.LONG // len(unit))


@pytest.mark.parametrize("title", ["\u200b", "\u0301", "\ufeff (1999)"])
def test_a_title_without_a_letter_hides_nothing(title: str) -> None:
    text = "The Up is \u200b good, the end."
    assert Catalogue([]).hide(text, [title]) == text


@pytest.mark.parametrize("title", ["", " \t"])
def test_an_empty_title_hides_nothing_of_a_long_gap(title: str, patient: None) -> None:
    """Its pattern matched everywhere, and looked for a year behind each space: quadratic."""
    text = "The" + long_text(" ") + "end"
    assert Catalogue([]).hide(text, [title]) == text


def test_a_results_file_with_a_number_that_json_has_not_is_refused(place: edits.Place) -> None:
    path = place.folder / "rows.jsonl"
    before = path.read_text("utf-8")
    for number in ("NaN", "-Infinity", "1e999"):
        path.write_text(before.replace("1.5", number), "utf-8")
        with pytest.raises(UserError, match=r"rows.jsonl, line 1.*or edited"):
            place.remake()
    path.write_text(before, "utf-8")
    assert place.remake() == edits.MADE


@pytest.mark.parametrize("alpha", ["1e-300", "NaN", "1e999", "true", "9" * 30, '"16"'])
def test_an_adapters_scale_that_no_option_may_have_is_named_with_its_file(alpha: str) -> None:
    with pytest.raises(UserError, match="^x: lora_alpha must be "):
        lora_config({"peft_type": "LORA", "r": 2, "lora_alpha": json.loads(alpha)}, Path("x"))


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999}", "(" * 2000])
def test_a_pattern_that_re_refuses_is_refused(place: edits.Place, pattern: str) -> None:
    with pytest.raises(UserError, match="^x: target_modules is no valid pattern"):
        targeted(place.model, pattern, Path("x"))


@pytest.mark.parametrize("name", ["a\nb", "देव\u2028द", "x" * 5000])
def test_a_key_of_a_file_stays_one_line_of_a_sentence(place: edits.Place, name: str) -> None:
    note = place.folder / "note.json"
    note.write_text(json.dumps({**place.noted, name: 1}), "utf-8")
    for read in (
        lambda: lora_config({"peft_type": "LORA", name: 1}, Path("x")),
        lambda: runs.claim(note, place.noted, [note], "start over"),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize("size", ["x", None, [1], {}, 2.5, True])
def test_a_vocabulary_size_that_is_no_number_is_named(place: edits.Place, size: Any) -> None:
    path = place.folder / "model" / "config.json"
    before = path.read_text("utf-8")
    path.write_text(json.dumps({**json.loads(before), "padded_vocab_size": size}), "utf-8")
    try:
        with pytest.raises(UserError, match="vocab_size is "):
            ChatTokenizer.from_folder(path.parent)
    finally:
        path.write_text(before, "utf-8")


@pytest.mark.parametrize(
    "changed", [{"continuing_subword_prefix": "long"}, {"a\nb": {}, "type": ""}]
)
def test_a_tokenizer_over_which_its_package_panics_is_refused_in_one_line(
    place: edits.Place, tmp_path: Path, changed: dict[str, Any]
) -> None:
    content = json.loads((place.folder / "model" / "tokenizer.json").read_text("utf-8"))
    content["model"] |= changed
    content["added_tokens"][0]["a\nb"] = 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match="no tokenizer that can be read") as error:
        TokenizersVocabulary(tmp_path / "tokenizer.json")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("unit", [" ", ",", "; /", " (", "Up, ", "\t\n"])
def test_a_long_title_or_profile_takes_a_time_in_proportion(patient: None, unit: str) -> None:
    films = Catalogue(map(read_item, edits.FILMS.values()))
    names_of(f"Up{long_text(unit)}!")
    split_title(f"Up{long_text(unit)}!")
    wishes.read_profile(f"Likes: {long_text(unit)}.", films)


def test_a_title_of_a_thousand_words_is_none(patient: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no name"):
        read_item({"name": long_text("a ")})
    with pytest.raises(UserError, match="'rec' must name"):
        datasets.read_row({**edits.ROWS[0], "rec": [long_text("a ")]})


def test_a_value_is_refused_at_every_depth(place: edits.Place) -> None:
    """Whatever Python parses it can print, from where the readers stand."""
    row, note = place.folder / "deep.jsonl", place.folder / "deep.json"
    for depth in range(1, 1100):
        nested = "[" * depth + "]" * depth
        row.write_text(nested, "utf-8")
        note.write_text(f'{{"model_type": {nested}}}', "utf-8")
        for read in (datasets.read_examples, datasets.read_dialogues):
            with pytest.raises(UserError):
                read(row)
        with pytest.raises(UserError):
            config_from(runs.read_json(note), note)
