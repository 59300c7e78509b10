"""Readers: roles, splits, faults in files, and what METHOD counted in the real rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from usbrec.crs import datasets
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.datasets import (
    drop_overlap,
    load_catalogue,
    load_split,
    read_dialogues,
    read_examples,
    take_turns,
)
from usbrec.crs.dialogue import Example, Utterance
from usbrec.crs.titles import GENRE_WORDS, split_title
from usbrec.options import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")

ROW = {
    "dialog_id": 7,
    "turn_id": 3,
    "context": ["", "Hello!", "A crime film, please."],
    "entity": [],
    "rec": ["Heat (1995)"],
    "resp": "Try Heat (1995).",
}


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load_examples(*which: str | Path) -> list[Example]:
    return load_split(*which).examples


def audit(examples: list[Example], catalogue: Catalogue) -> dict[str, int]:
    """Count the gold titles, and those that make a label doubtful."""
    titles = [title for example in examples for title in example.items]
    meant = [len(catalogue.named(title)) for title in titles]
    bare = [title for title in titles if split_title(title)[1] is None]
    return {
        "labels": len(titles),
        "genre_words": sum(title.lower() in GENRE_WORDS for title in bare),
        "outside_catalogue": meant.count(0),
        "without_year": len(bare),
        "ambiguous": sum(count > 1 for count in meant),
    }


def speakers(lines: list[str]) -> list[tuple[str, str]]:
    return [(line.speaker[0], line.text) for line in take_turns(lines)]


# --- roles ------------------------------------------------------------------------------------


def test_roles_count_from_the_end_and_the_empty_first_line_goes() -> None:
    assert speakers(["Hi", "Hello", "Drama"]) == [("s", "Hi"), ("r", "Hello"), ("s", "Drama")]
    assert speakers(["", "Hello", "Drama"]) == [("r", "Hello"), ("s", "Drama")]
    assert speakers(["Hello", "Drama"]) == [("r", "Hello"), ("s", "Drama")]  # even length
    assert speakers(["Drama"]) == [("s", "Drama")]
    assert speakers([" Hello\n", " Drama "]) == [("r", "Hello"), ("s", "Drama")]


def test_lines_alternate_also_where_an_empty_line_stood_between() -> None:
    assert speakers(["Hi", "", "Drama", "Heat?", "No"]) == [
        ("s", "Hi Drama"),
        ("r", "Heat?"),
        ("s", "No"),
    ]


# --- rows -------------------------------------------------------------------------------------


def test_a_row_becomes_an_example_with_its_extra_fields(tmp_path: Path) -> None:
    extra = {
        "profile": "Likes: crime.",
        "explanation": "It is a crime film.",
        "reactions": {"accept": "Yes!", "refuse": "No, older."},
    }
    plain, full = read_examples(write_rows(tmp_path / "test.jsonl", ROW, ROW | extra))
    assert (plain.dialog_id, plain.turn_id, plain.items) == ("7", 3, ("Heat (1995)",))
    assert plain.history[-1] == Utterance("seeker", "A crime film, please.")
    assert plain.profile is plain.explanation is plain.accept is plain.refuse is None
    assert (full.profile, full.explanation) == ("Likes: crime.", "It is a crime film.")
    assert (full.accept, full.refuse) == ("Yes!", "No, older.")
    (long,) = read_examples(write_rows(tmp_path / "long.jsonl", ROW | {"rec": ["x" * 1000]}))
    assert long.items == ("x" * 1000,)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"context": "Hi"}, "'context' must be a list of strings"),
        ({"context": ["Hi", 3, "x"]}, "'context' must be a list of strings"),
        ({"context": []}, "must end with a line of the seeker's"),
        ({"context": ["Hi", "Hello", " "]}, "must end with a line of the seeker's"),
        ({"rec": "Heat"}, "'rec' must be a list of strings"),
        ({"resp": None}, "'resp' must be a string"),
        ({"rec": []}, "'rec' must name at least one item"),
        ({"rec": ["Heat (1995)", " "]}, "'rec' must name at least one item"),
        ({"rec": ["x" * 1001]}, "'rec' must name at least one item of 1 to 1000 letters"),
        ({"rec": 5}, "'rec' must be a list of strings"),
        ({"turn_id": "9" * 5000}, "'turn_id' must be a number"),
        ({"resp": " "}, "'resp' must say something"),
        ({"turn_id": "three"}, "'turn_id' must be a number"),
        ({"turn_id": [1]}, "'turn_id' must be a number"),
        ({"profile": 3}, "'profile' must be a string"),
        ({"reactions": ["Yes"]}, "'reactions' must be an object"),
        ({"reactions": {"accept": "Yes"}}, "no 'refuse'"),
    ],
)
def test_a_faulty_field_is_told_with_file_and_line(
    tmp_path: Path, change: dict, fault: str
) -> None:
    path = write_rows(tmp_path / "test.jsonl", ROW, ROW | change)
    with pytest.raises(UserError, match=fault) as error:
        read_examples(path)
    assert f"{path}, line 2" in str(error.value)


@pytest.mark.parametrize("field", ["dialog_id", "turn_id", "context", "rec", "resp"])
def test_a_missing_field_is_told_by_name(tmp_path: Path, field: str) -> None:
    row = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(UserError, match=f"line 1.*'{field}'"):
        read_examples(write_rows(tmp_path / "test.jsonl", row))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (json.dumps(ROW).encode() + b"\n\n{nonsense\n", "line 3: not JSON"),
        (b'["a", "b"]\n', "line 1: a row must be an object"),
        (b'{"resp": "\\ud800"}\n', "line 1: not JSON: .*surrogates not allowed"),
        (b"[" * 100000, "line 1: not JSON: nested too deeply"),
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (json.dumps(ROW).encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_faulty_file_is_one_clear_sentence(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        read_examples(path)
    assert str(path) in str(error.value)


def test_line_numbers_are_the_files_own_whatever_the_text_contains(tmp_path: Path) -> None:
    """U+2028 ends a line for `str.splitlines` but not in a JSONL file."""
    row = json.dumps(ROW | {"resp": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "test.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert len(read_examples(tmp_path / "test.jsonl")) == 2


# --- folders and splits -----------------------------------------------------------------------


def test_the_sample_set_is_found_without_a_folder() -> None:
    assert len(load_examples("sample", "test")) >= 320
    assert load_split("sample", "train").notes == []
    assert len(load_catalogue("sample").items) >= 240
    assert load_examples("sample", "valid")[0].accept


def test_a_missing_dataset_tells_where_from_and_which_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets, "ROOT", tmp_path)
    for name in ("redial", "opendialkg"):
        with pytest.raises(UserError, match=f"fetch {name}`, or .*--data-dir FOLDER") as error:
            load_examples(name, "test")
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(UserError, match="no dataset 'redail'"):
        load_examples("redail", "test")
    with pytest.raises(UserError, match="no split 'dev'"):
        load_examples("sample", "dev")


def test_a_folder_of_ones_own_is_a_dataset(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", ROW)
    (tmp_path / "items.json").write_text('{"1": {"name": "Heat (1995)"}}')
    assert load_examples(str(tmp_path), "test")[0].items == ("Heat (1995)",)
    assert load_catalogue(str(tmp_path)).get("Heat") is not None
    with pytest.raises(UserError, match="no train.jsonl"):
        load_examples(str(tmp_path), "train")
    (tmp_path / "items.json").unlink()
    with pytest.raises(UserError, match="no items.json"):
        load_catalogue(str(tmp_path))


def test_unknown_gold_titles_and_shared_rows_of_ones_own_data_are_told(tmp_path: Path) -> None:
    """Two of four labels are unknown, and so are all labels of one row; test has two of train's."""
    rows = [{**ROW, "turn_id": n} for n in (1, 3, 5)]
    rows[1] = {**rows[1], "rec": ["Nobody (1900)"], "resp": "Try Nobody (1900)."}
    rows[2] = {**rows[2], "rec": ["Heat (1995)", "No One"], "resp": "Heat (1995)?"}
    write_rows(tmp_path / "train.jsonl", *rows)
    write_rows(tmp_path / "test.jsonl", rows[0], {**rows[2], "dialog_id": 9})
    (tmp_path / "items.json").write_text(json.dumps({"1": {"name": "Heat (1995)"}}), "utf-8")
    unknown, shared = load_split(str(tmp_path), "train").notes
    assert unknown.startswith("2 of 4 gold titles of train are not in the items, such as 'Nobody")
    assert unknown.endswith("'Nobody (1900)': Recall@1 and the grade know none of them")
    assert shared.startswith("2 of 3 training rows are test rows too")
    assert [x[:35] for x in load_split(str(tmp_path), "test").notes] == [
        "1 of 3 gold titles of test are not "
    ]
    write_rows(tmp_path / "test.jsonl", {**ROW, "resp": "Heat (1995)!"})
    assert load_split(str(tmp_path), "test").notes == []
    assert len(load_split(str(tmp_path), "train").notes) == 1


@pytest.mark.parametrize("named", ["redial", "redial_eval"])
def test_ievalms_own_layout_is_read_from_either_of_its_folders(tmp_path: Path, named: str) -> None:
    rows, items = tmp_path / "redial_eval", tmp_path / "redial"
    rows.mkdir()
    items.mkdir()
    write_rows(rows / "test_data_processed.jsonl", ROW)
    (items / "id2info.json").write_text('{"1": {"name": "Heat (1995)"}}')
    assert len(load_examples("redial", "test", tmp_path / named)) == 1
    assert len(load_catalogue("redial", tmp_path / named).items) == 1


def test_redial_without_train_divides_valid_by_dialogue(tmp_path: Path) -> None:
    rows = [ROW | {"dialog_id": number // 3} for number in range(600)]
    write_rows(tmp_path / "valid.jsonl", *rows)
    parts = {split: load_split("redial", split, tmp_path) for split in ("train", "valid")}
    ids = {split: {one.dialog_id for one in part.examples} for split, part in parts.items()}
    assert not ids["train"] & ids["valid"]
    assert len(ids["train"] | ids["valid"]) == 200
    assert 0.03 < len(ids["valid"]) / 200 < 0.2
    assert all("of ReDial's valid split" in part.notes[0] for part in parts.values())
    write_rows(tmp_path / "train.jsonl", ROW)  # with a train split nothing is divided
    assert len(load_examples("redial", "train", tmp_path)) == 1
    assert len(load_examples("redial", "valid", tmp_path)) == 600


def test_opendialkg_training_rows_that_give_a_test_row_away_are_dropped(tmp_path: Path) -> None:
    test = ROW | {"dialog_id": 1, "resp": "The answer."}
    leaks = [
        ROW | {"dialog_id": 1},
        ROW | {"dialog_id": 2, "resp": "The answer."},
        ROW | {"dialog_id": 3, "context": ["Hi", "The answer.", "Thanks, more?"]},
    ]
    write_rows(tmp_path / "train.jsonl", *leaks, ROW | {"dialog_id": 4})
    write_rows(tmp_path / "test.jsonl", test)
    part = load_split("opendialkg", "train", tmp_path)
    assert [one.dialog_id for one in part.examples] == ["4"]
    assert "3 of 4 OpenDialKG train rows dropped" in part.notes[0]


def test_opendialkgs_valid_rows_are_none_of_test_and_none_of_train(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", ROW | {"dialog_id": 1, "resp": "The answer."})
    write_rows(tmp_path / "train.jsonl", ROW | {"dialog_id": 2, "resp": "Another."})
    given = [ROW | {"dialog_id": x} for x in (1, 2, 3)] + [
        ROW | {"dialog_id": 4, "resp": "Another."}
    ]
    write_rows(tmp_path / "valid.jsonl", *given)
    part = load_split("opendialkg", "valid", tmp_path)
    assert [one.dialog_id for one in part.examples] == ["3"]
    assert part.notes[0].startswith("3 of 4 OpenDialKG valid rows dropped: test or train has")


def test_a_label_means_one_film_of_the_catalogue_or_none_or_several(tmp_path: Path) -> None:
    titles = ["Heat (1995)", "Drama", "True Grit", "True Grit (2010)", "Nowhere (1950)"]
    examples = read_examples(write_rows(tmp_path / "test.jsonl", ROW | {"rec": titles}))
    known = ["Heat (1995)", "True Grit (1969)", "True Grit (2010)"]
    catalogue = Catalogue(Item(title, *split_title(title)) for title in known)
    assert audit(examples, catalogue) == {
        "labels": 5,
        "genre_words": 1,
        "outside_catalogue": 2,
        "without_year": 2,
        "ambiguous": 1,
    }


# --- the real rows ----------------------------------------------------------------------------


def raw(name: str, split: str) -> list[dict]:
    text = (SHARED / name / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@needs_shared
def test_redials_test_rows_are_as_counted() -> None:
    rows, examples = raw("redial", "test"), load_examples("redial", "test", SHARED / "redial")
    assert len(rows) == len(examples) == 3341
    opened = sum(example.history[0].speaker == "recommender" for example in examples)
    assert (
        round(opened / len(rows), 3)
        == 0.647
        == round(sum(row["context"][0] == "" for row in rows) / len(rows), 3)
    )
    for example in examples:
        roles = [line.speaker for line in example.history]
        assert roles[-1] == "seeker" and all(a != b for a, b in zip(roles, roles[1:], strict=False))
        assert all(line.text.strip() for line in example.history)
    counts = audit(examples, load_catalogue("redial", SHARED / "redial"))
    assert (counts["labels"], counts["without_year"]) == (4499, 218)
    assert counts["outside_catalogue"] == counts["ambiguous"] == 0
    repeated = [any(t in " ".join(row["context"]) for t in row["rec"]) for row in rows]
    assert round(sum(repeated) / len(rows), 3) == 0.126


@needs_shared
def test_redials_valid_is_divided_and_shares_no_dialogue_with_test() -> None:
    train, valid = (load_split("redial", split, SHARED / "redial") for split in ("train", "valid"))
    assert len(train.examples) + len(valid.examples) == 2716
    assert 0.08 < len(valid.examples) / 2716 < 0.12
    test = {example.dialog_id for example in load_examples("redial", "test", SHARED / "redial")}
    assert not test & {example.dialog_id for example in (*train.examples, *valid.examples)}


@needs_shared
def test_opendialkg_is_as_counted_and_its_leaks_are_dropped() -> None:
    folder = SHARED / "opendialkg"
    even = [
        sum(len(row["context"]) % 2 == 0 for row in raw("opendialkg", split))
        for split in ("train", "valid", "test")
    ]
    assert even == [5, 1, 2]
    test = load_examples("opendialkg", "test", folder)
    everything = read_examples(folder / "train.jsonl")
    shared = {one.dialog_id for one in test} & {one.dialog_id for one in everything}
    assert (len({one.dialog_id for one in test}), len(shared)) == (1113, 558)
    said = {line.text for one in everything for line in one.history}
    assert sum(one.response in said for one in test) == 310
    train = load_split("opendialkg", "train", folder)
    assert train.examples == drop_overlap(everything, test) and train.notes
    assert len(everything) - len(train.examples) == 729
    said = {line.text for one in train.examples for line in one.history}
    assert not any(one.response in said for one in test)
    assert not shared & {one.dialog_id for one in train.examples}
    rows = raw("opendialkg", "test")
    repeated = [any(title in row["entity"] for title in row["rec"]) for row in rows]
    assert round(sum(repeated) / len(repeated), 3) == 0.357
    counts = audit(test, load_catalogue("opendialkg", folder))
    assert counts["labels"] == counts["without_year"] == 1262
    assert counts["genre_words"] > 0


# --- plain dialogues --------------------------------------------------------------------------

MESSAGES = [
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "A crime film?"},
]
OURS = [
    {"speaker": "recommender", "text": "Hello!"},
    {"speaker": "seeker", "text": "A crime film?"},
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(MESSAGES),
        json.dumps(OURS, indent=1),
        json.dumps({"messages": MESSAGES}),
        json.dumps({"messages": MESSAGES}) + "\n",
        "\n".join(map(json.dumps, MESSAGES)),
        "\n".join(map(json.dumps, OURS)) + "\n\n",
    ],
)
def test_one_dialogue_is_read_from_json_or_jsonl(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dialogue.json"
    path.write_text(text)
    expected = (Utterance("recommender", "Hello!"), Utterance("seeker", "A crime film?"))
    assert read_dialogues(path) == [expected]


def test_many_dialogues_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.jsonl"
    path.write_text(json.dumps(MESSAGES) + "\n" + json.dumps({"messages": MESSAGES[1:]}) + "\n")
    assert [len(dialogue) for dialogue in read_dialogues(path)] == [2, 1]


@pytest.mark.parametrize("wrap", [list, lambda messages: {"messages": messages}])
def test_many_dialogues_are_read_from_one_list(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([wrap(MESSAGES), wrap(MESSAGES[1:])]))
    assert [len(dialogue) for dialogue in read_dialogues(path)] == [2, 1]
    path.write_text(json.dumps([wrap(MESSAGES), wrap(MESSAGES[:1])]))
    with pytest.raises(UserError, match="dialogue 2: the dialogue must end"):
        read_dialogues(path)


@pytest.mark.parametrize("role", ["USER", "Seeker", " user "])
def test_a_role_is_read_in_any_case_and_one_message_is_a_dialogue(
    tmp_path: Path, role: str
) -> None:
    path = tmp_path / "dialogue.jsonl"
    path.write_text(json.dumps({"role": role, "content": "Hi"}) + "\n")
    assert read_dialogues(path) == [(Utterance("seeker", "Hi"),)]


def test_messages_of_one_speaker_in_a_row_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "dialogue.json"
    twice = [MESSAGES[1], {"role": "user", "content": " "}, {"role": "user", "content": "Old."}]
    path.write_text(json.dumps(twice))
    assert read_dialogues(path) == [(Utterance("seeker", "A crime film? Old."),)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no dialogue"),
        ("{", "line 1: not JSON"),
        ("[]", "must end with a line of the seeker's"),
        (json.dumps(MESSAGES[:1]), "must end with a line of the seeker's"),
        (json.dumps([{"role": "critic", "content": "x"}]), "needs a role"),
        (json.dumps([{"role": "system", "content": "x"}]), "must end with a line of the seeker's"),
        (json.dumps([{"role": "user"}]), "needs a role"),
        (json.dumps([{"role": ["user"], "content": "x"}]), "needs a role"),
        (json.dumps(["Hi"]), "a message must be an object"),
        ('"Hi"', "expected a list of messages"),
        (json.dumps(MESSAGES) + "\n" + json.dumps(MESSAGES[:1]), "line 2: the dialogue must end"),
    ],
)
def test_a_faulty_dialogue_is_one_clear_sentence(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "dialogue.json"
    path.write_text(text)
    with pytest.raises(UserError, match=fault) as error:
        read_dialogues(path)
    assert str(path) in str(error.value)


def test_a_control_token_in_a_line_stays_text(tmp_path: Path) -> None:
    row = ROW | {"context": ["<|im_end|> hi"]}
    (example,) = read_examples(write_rows(tmp_path / "test.jsonl", row))
    assert example.history[0].text == "<|im_end|> hi"


def test_the_sample_sets_rows_keep_their_labels_after_reading() -> None:
    counts = Counter(len(example.items) for example in load_examples("sample", "test"))
    assert set(counts) == {1}
