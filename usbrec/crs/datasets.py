"""Readers of the sample set, iEvaLM's ReDial and OpenDialKG rows, your own rows, plain dialogues.

`load_split("redial", "train")` returns a split's examples and the notes that belong beside every
number made with them. A dataset is `sample`, `redial`, `opendialkg`, a folder that holds
{train,valid,test}.jsonl and items.json in the same format, or a JSONL file of chats: its catalogue
is made of the titles that they name.

conversion.py has the commands of this module:

    python -m usbrec.crs.datasets fetch redial
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from usbrec.chat import ROLES, Row
from usbrec.crs.catalogue import LONGEST_TITLE, Catalogue, parse_json, read_item
from usbrec.crs.dialogue import Dialogue, Example, Utterance
from usbrec.crs.titles import key_of, written_titles
from usbrec.options import UserError, read_text, seed_for

ROOT = Path(__file__).resolve().parents[2] / "data"
DATASETS = ("sample", "redial", "opendialkg")
SPLITS = ("train", "valid", "test")
# split or items -> its file in a dataset's folder, by our name and by iEvaLM's
FILES = {x: (f"{x}.jsonl", f"{x}_data_processed.jsonl") for x in SPLITS}
FILES["items"] = ("items.json", "id2info.json")
SPEAKER_NAMES = ("user", "seeker", "assistant", "recommender")
VALID_SHARE = 10  # without ReDial's train.jsonl, one in so many valid dialogues stays valid
KINDS: dict[type, str] = {str: "a string", list: "a list of strings", dict: "an object"}
Value = TypeVar("Value")
Marked = tuple[Utterance, list[str]]  # a line, and the titles that it names


class Split(NamedTuple):
    """The examples of one split, and the notes that belong beside numbers made with them."""

    examples: list[Example]
    notes: list[str]


def is_file_of_chats(name: str) -> bool:
    """Return whether a dataset's name is the path of a file of whole chats."""
    return name not in DATASETS and Path(name).is_file()


def load_split(name: str, split: str, data_dir: str | Path | None = None) -> Split:
    """Return the examples and notes of a split, with training and test rows kept apart.

    ReDial without train.jsonl: train is 90% of valid's dialogues, valid the other 10%. OpenDialKG:
    training rows that give away a test row are dropped, and rows of valid that give away or repeat
    one of test or train.

    Raises:
        UserError: no such dataset, split or file, or a fault in a file.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}: expected {', '.join(SPLITS)}")
    if is_file_of_chats(name):
        rows, _, note = rows_of_chats({"train": [*read_jsonl(Path(name))]})
        made, tests = ([_at(name, read_row, row) for row in rows[x]] for x in (split, "test"))
        return Split(made, [note, *(shared_note(made, tests) if split == "train" else ())])
    folder = _folder(name, data_dir)
    if name == "redial" and split != "test" and not _existing(folder, "train"):
        return _divide_valid(read_examples(_find(folder, "valid")), split)
    examples = read_examples(_find(folder, split))
    if name != "opendialkg" or split == "test":
        return Split(examples, [] if name in DATASETS else [*own_notes(folder, split, examples)])
    others = ("test", "train") if split == "valid" else ("test",)
    kept = drop_overlap(examples, [x for y in others for x in read_examples(_find(folder, y))])
    dropped = f"{len(examples) - len(kept)} of {len(examples)} OpenDialKG {split} rows dropped"
    return Split(kept, [f"{dropped}: {' or '.join(others)} has their dialogue, or a response"])


def load_catalogue(name: str, data_dir: str | Path | None = None) -> Catalogue:
    """Return the dataset's catalogue.

    Raises:
        UserError: the folder or its items.json (or id2info.json) is missing or malformed.
    """
    if is_file_of_chats(name):
        return rows_of_chats({"train": [*read_jsonl(Path(name))]})[1]
    return Catalogue.load(_find(_folder(name, data_dir), "items"))


def _folder(name: str, data_dir: str | Path | None) -> Path:
    """Return the dataset's folder.

    Raises:
        UserError: there is no such folder; the message names the source of its files.
    """
    # `.` gets the name by which its neighbours are found
    folder = Path(os.path.abspath(data_dir or (ROOT / name if name in DATASETS else name)))
    if folder.is_dir():
        return folder
    if not data_dir and name not in DATASETS:
        raise UserError(f"no dataset {name!r}: expected {', '.join(DATASETS)}, a folder or a file")
    fetch = "" if name not in DATASETS[1:] else f"`python -m usbrec.crs.datasets fetch {name}`, or "
    raise UserError(f"no folder {folder} for {name}: {fetch}name it with --data-dir FOLDER")


def _existing(folder: Path, content: str) -> list[Path]:
    """Return the existing FILES of a split or of the items, in the folder or beside it (iEvaLM)."""
    stem = folder.name.removesuffix("_eval")
    places = (folder, folder.parent / stem, folder.parent / f"{stem}_eval")
    return [place / name for place in places for name in FILES[content] if (place / name).is_file()]


def _find(folder: Path, content: str) -> Path:
    """Return the first of the existing files of `content`; raises UserError if there is none."""
    if found := _existing(folder, content):
        return found[0]
    raise UserError(f"{folder} has no {' or '.join(FILES[content])}: add it, or name --data-dir")


def _divide_valid(examples: Sequence[Example], split: str) -> Split:
    """Return train (90%) or valid (10%) as a part of valid's dialogues, by a hash of their ids.

    So no dialogue is in both.
    """
    digests = [hashlib.blake2b(x.dialog_id.encode(), digest_size=8).digest() for x in examples]
    stays = [int.from_bytes(digest, "big") % VALID_SHARE == 0 for digest in digests]
    kept = [x for x, stay in zip(examples, stays, strict=True) if stay == (split == "valid")]
    count = f"{len({x.dialog_id for x in kept})} dialogues ({len(kept)} rows)"
    source = f"ReDial's valid split ({10 if split == 'valid' else 90}% by a hash of their ids)"
    return Split(kept, [f"no ReDial train.jsonl: {split} is {count} of {source}"])


def own_notes(folder: Path, split: str, examples: Sequence[Example]) -> Iterator[str]:
    """Yield the notes on a split of one's own rows: unknown gold titles, rows shared with test."""
    known = Catalogue.load(_find(folder, "items"))
    titles = [title for x in examples for title in x.items]
    if unknown := [title for title in titles if not known.named(title)]:
        told = f"{len(unknown)} of {len(titles)} gold titles of {split} are not in the items"
        yield f"{told}, such as {unknown[0]!r}: Recall@1 and the grade know none of them"
    if split == "train" and _existing(folder, "test"):
        yield from shared_note(examples, read_examples(_find(folder, "test")))


def shared_note(examples: Sequence[Example], tests: Sequence[Example]) -> Iterator[str]:
    """Yield the note on training rows that are test rows too, if there are any."""
    known = {(x.history, x.response) for x in tests}
    if shared := sum((x.history, x.response) in known for x in examples):
        told = f"{shared} of {len(examples)} training rows are test rows too"
        yield f"{told}: results on them say nothing of new dialogues"


def drop_overlap(train: Sequence[Example], test: Sequence[Example]) -> list[Example]:
    """Return the rows of `train` that share no dialogue with `test` and hold no response of it."""
    dialogues, responses = {x.dialog_id for x in test}, {x.response for x in test}
    others = [x for x in train if x.dialog_id not in dialogues and x.response not in responses]
    return [x for x in others if responses.isdisjoint(line.text for line in x.history)]


# --- rows -------------------------------------------------------------------------------------


def read_examples(path: Path) -> list[Example]:
    """Return the examples of a file of rows.

    Raises:
        UserError: it is missing, not UTF-8, malformed (with the line's number), or has no rows.
    """
    examples = [_at(where, read_row, row) for where, row in read_jsonl(path)]
    if not examples:
        raise UserError(f"{path} has no rows")
    return examples


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each line's place ("FILE, line 3") and value; blank lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _at(where, parse_json, line)


def _at(where: str, read: Callable[[Any], Value], value: Any) -> Value:
    """Return `read(value)`; a UserError gets the place in front."""
    try:
        return read(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def read_row(row: Any) -> Example:
    """Return one row of iEvaLM's format, with or without our extra fields, as an example.

    Raises:
        UserError: a field is missing or of a wrong type.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object, got {row!r:.60}")
    if not isinstance(row.get("dialog_id"), (int, str)):
        raise UserError("the row has no 'dialog_id', a number or a string")
    if not re.fullmatch("[0-9]{1,18}", str(row.get("turn_id"))):
        raise UserError(f"'turn_id' must be a number, got {row.get('turn_id')!r:.60}")
    history = take_turns(_take(row, "context", list))
    if not history or history[-1].speaker != "seeker":
        raise UserError("'context' must end with a line of the seeker's")
    items, response = tuple(_take(row, "rec", list)), _take(row, "resp", str).strip()
    if not items or not all(x.strip() and len(x) <= LONGEST_TITLE for x in items) or not response:
        told = f"at least one item of 1 to {LONGEST_TITLE} letters, 'resp' must say something"
        raise UserError(f"'rec' must name {told}, got {items!r:.60} and {response!r:.60}")
    extra = {key: _take(row, key, str) for key in ("profile", "explanation") if key in row}
    if "reactions" in row:
        extra |= {x: _take(_take(row, "reactions", dict), x, str) for x in ("accept", "refuse")}
    return Example(str(row["dialog_id"]), int(row["turn_id"]), history, response, items, **extra)


def _take(row: Row, key: str, kind: type) -> Any:
    """Return a row's field of a `kind`: a string, a list of strings or an object."""
    if key not in row:
        raise UserError(f"the row has no {key!r}")
    value = row[key]
    texts = value if kind is list and isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{key!r} must be {KINDS[kind]}, got {value!r:.60}")
    return value


def take_turns(lines: Sequence[str]) -> Dialogue:
    """Return the dialogue of the lines, with speakers assigned from the END: seeker last.

    Rows of iEvaLM begin with an empty line if the recommender opened. A few rows of OpenDialKG have
    an even number of lines, so counting from the front would swap the roles. Empty lines are
    dropped after the assignment, and neighbouring lines of one speaker are joined.
    """
    numbered = zip(range(len(lines), 0, -1), lines, strict=True)
    return _joined([Utterance("seeker" if n % 2 else "recommender", line) for n, line in numbered])


def _joined(lines: Sequence[Utterance]) -> Dialogue:
    """Return the dialogue of the lines that are not empty; neighbours of one speaker are joined."""
    said = [Utterance(x.speaker, x.text.strip()) for x in lines if x.text.strip()]
    turns = groupby(said, lambda line: line.speaker)
    return tuple(Utterance(who, " ".join(line.text for line in turn)) for who, turn in turns)


# --- plain dialogues --------------------------------------------------------------------------


def read_dialogues(path: Path) -> list[Dialogue]:
    """Return the dialogues of a file (`infer.py --dialogue`), each awaiting the recommender.

    JSON: a dialogue, a list of messages or {"messages": [...]}, or a list of such dialogues. JSONL:
    one dialogue per line, or one message per line. A message has `role` (user, assistant) or
    `speaker` (seeker, recommender), in any case, and `content` or `text`.

    Raises:
        UserError: the file is missing or malformed, or a dialogue does not end with the seeker.
    """
    try:
        value = parse_json(read_text(path))
        values = value if isinstance(value, list) and any(map(_is_dialogue, value)) else [value]
        found = [(f"{path}, dialogue {n}", value) for n, value in enumerate(values, 1)]
    except UserError:
        if not (found := list(read_jsonl(path))):
            raise UserError(f"{path} has no dialogue") from None
    if all(isinstance(value, dict) and not _is_dialogue(value) for _, value in found):
        found = [(str(path), [value for _, value in found])]  # the messages of one dialogue
    return [_at(where, read_messages, value) for where, value in found]


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and "messages" in value)


def read_messages(value: Any) -> Dialogue:
    """Return the dialogue of a list of messages or of {"messages": [...]}, as `read_dialogues`."""
    dialogue = _joined([line for line, _ in read_lines(value)])
    if not dialogue or dialogue[-1].speaker != "seeker":
        raise UserError("the dialogue must end with a line of the seeker's (role user)")
    return dialogue


def read_lines(value: Any) -> list[Marked]:
    """Return the lines of a list of messages, each with the titles in its `items`.

    Instructions to a model (role system) and empty lines are left out. Raises UserError for other
    messages than those of `read_dialogues`.
    """
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise UserError('expected a list of messages or {"messages": [...]}')
    lines = []
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"a message must be an object, got {message!r:.60}")
        role = str(message.get("role", message.get("speaker"))).strip().lower()
        text = message.get("content", message.get("text"))
        if role not in (*SPEAKER_NAMES, "system") or not isinstance(text, str):
            names = ", ".join(SPEAKER_NAMES)
            raise UserError(f"a message needs a role ({names}) and a text, got {message!r:.80}")
        line = Utterance("seeker" if role in SPEAKER_NAMES[:2] else "recommender", text)
        if role != "system" and text.strip():
            titles = _take({"items": [], **message}, "items", list)
            lines.append((line, [read_item({"name": x}).title for x in titles]))
    return lines


# --- whole dialogues --------------------------------------------------------------------------


def rows_of_chats(
    chats: Mapping[str, Sequence[tuple[str, Any]]], known: Catalogue | None = None, seed: str = "0"
) -> tuple[dict[str, list[Row]], Catalogue, str]:
    """Return the rows of whole dialogues by split, the catalogue of their titles, and a note.

    `chats` has each split's dialogues as ("FILE, line 3", value). A value is {"messages": [...]},
    with an `id` if it has one, or the list. Messages mark the titles that they name as `items`. If
    none does, titles are found in the text: the catalogue's, or without one those in quotes or
    before a year. A row is left out if the catalogue has none of its titles. Each missing split
    gets a tenth (at least one) of train's dialogues, by a seeded hash of their ids.
    """
    talks, place = list[tuple[str, str, list[Marked]]](), "nothing was read"
    for split, values in chats.items():
        for number, (place, value) in enumerate(values, 1):
            nth = number if split == "train" else f"{split} {number}"
            key = value.get("id") if isinstance(value, dict) else None
            talks.append((split, str(nth if key is None else key), _at(place, read_lines, value)))
    lines = [line for *_, said in talks for line in said]
    marked = [title for _, titles in lines for title in titles]
    named = marked or [title for line, _ in lines for title in written_titles(line.text)]
    catalogue = known or catalogue_of(named)
    for line, titles in () if marked else lines:
        found = [mention.items for mention in catalogue.find(line.text)]
        titles += [items[0].name if len(items) > 1 else items[0].title for items in found]
    rows = [(split, row) for split, name, said in talks for row in _rows_of(name, said)]
    kept = [(split, row) for split, row in rows if any(map(catalogue.named, row["rec"]))]
    note = f"{len(talks)} dialogues have {len(rows)} turns that recommend a title"
    note += f"; {len(rows) - len(kept)} of them are left out: the items lack their titles"
    own = {row["dialog_id"] for split, row in kept if split == "train"}
    order = sorted(own, key=lambda name: (seed_for(seed, "divide", name), name))
    parts = [split for split in ("test", "valid") if split not in chats] + ["train"]
    if len(order) < len(parts):
        raise UserError(f"{place}: {note}: expected {len(parts)} dialogues with one at least")
    tenth, made = max(len(order) // 10, 1), {split: list[Row]() for split in SPLITS}
    place_of = {name: parts[min(n // tenth, len(parts) - 1)] for n, name in enumerate(order)}
    for split, row in kept:
        made[place_of[row["dialog_id"]] if split == "train" else split].append(row)
    return made, catalogue, note


def _rows_of(dialog_id: str, lines: Sequence[Marked]) -> Iterator[Row]:
    """Yield the rows of a whole dialogue: one per turn of the recommender that has titles.

    Lines of one speaker in a row are joined. A first turn is no row: no seeker's line precedes it.
    """
    turns = [[*turn] for _, turn in groupby(lines, lambda line: line[0].speaker)]
    texts = [" ".join(line.text.strip() for line, _ in turn) for turn in turns]
    for n, turn in enumerate(turns):
        titles = list(dict.fromkeys(title for _, titles in turn for title in titles))
        if turn[0][0].speaker == "recommender" and n and titles:
            place = {"dialog_id": dialog_id, "turn_id": n, "context": texts[:n]}
            yield {**place, "rec": titles, "resp": texts[n]}


def catalogue_of(titles: Iterable[str]) -> Catalogue:
    """Return a catalogue of bare titles, once each; "Heat" is left out beside "Heat (1995)"."""
    items = [read_item({"name": title}) for title in titles]
    unique = {(key_of(x.name), x.year): x for x in reversed(items)}
    dated = {name for name, year in unique if year}
    kept = [x for (name, year), x in unique.items() if year or name not in dated]
    return Catalogue(sorted(kept, key=lambda x: x.title))


# --- preference pairs -------------------------------------------------------------------------


def read_pairs(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ("file, line N", pair) of a pairs.jsonl; raises UserError naming file and line."""
    for place, pair in read_jsonl(path):
        for side in ("prompt", "chosen", "rejected"):
            messages = pair.get(side) if isinstance(pair, dict) else None
            if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
                raise UserError(f"{place}: {side} must be a list of messages with role and content")
        yield place, pair


def is_message(x: Any) -> bool:
    """Return whether a value is a message of a chat."""
    return isinstance(x, dict) and isinstance(x.get("content"), str) and x.get("role") in ROLES


if __name__ == "__main__":
    from usbrec.crs.conversion import main

    raise SystemExit(main())
