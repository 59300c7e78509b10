"""Readers: the sample set, iEvaLM's ReDial and OpenDialKG rows, one's own rows, plain dialogues.

`load_split("redial", "train")` and its kin return examples and the notes that must stand beside
every number made with them. A dataset is `sample`, `redial`, `opendialkg` or a folder that holds
{train,valid,test}.jsonl and items.json in the same format. Fetching is left to the user: the error
for a missing folder says where from.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usbrec.crs.catalogue import Catalogue, read_text
from usbrec.crs.dialogue import Dialogue, Example, Speaker, Utterance
from usbrec.options import UserError

ROOT = Path(__file__).resolve().parents[2] / "data"
NAMES = ("sample", "redial", "opendialkg")
SPLITS = ("train", "valid", "test")
ROLES: dict[str, Speaker] = {
    "user": "seeker",
    "seeker": "seeker",
    "assistant": "recommender",
    "recommender": "recommender",
}
VALID_SHARE = 10  # one in so many of ReDial's valid dialogues stays valid when there is no train


@dataclass(frozen=True)
class Split:
    """The examples of one split, and what a reader of numbers made with them must be told."""

    examples: list[Example]
    notes: list[str]


# --- files ------------------------------------------------------------------------------------


def _folder(name: str, data_dir: str | Path | None) -> Path:
    """Return the dataset's folder.

    Raises:
        UserError: there is no such folder; the message tells where its files come from.
    """
    folder = Path(data_dir or (ROOT / name if name in NAMES else name))
    if folder.is_dir():
        return folder
    if name in ("redial", "opendialkg"):
        raise UserError(
            f"no folder {folder} with the {name} rows: take data/{name}_eval and"
            f" data/{name}/id2info.json from GitHub RUCAIBox/iEvaLM-CRS and name the folder with"
            " --data-dir FOLDER"
        )
    raise UserError(f"no dataset {name!r}: expected {', '.join(NAMES)} or an existing folder")


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of the files that exists in the folder or, as iEvaLM has it, beside it."""
    stem = folder.name.removesuffix("_eval")
    for place in (folder, folder.with_name(stem), folder.with_name(f"{stem}_eval")):
        for name in names:
            if (place / name).is_file():
                return place / name
    return None


def _split_file(folder: Path, split: str) -> Path | None:
    return _first_file(folder, (f"{split}.jsonl", f"{split}_data_processed.jsonl"))


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each line's number and value; blank lines are passed over."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, _parse(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error


def _parse(text: str) -> Any:
    """Read JSON whose strings can be written as UTF-8, which half a surrogate pair cannot."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


# --- rows -------------------------------------------------------------------------------------


def take_turns(lines: Sequence[str]) -> Dialogue:
    """Assign speakers from the END (the last line is the seeker's), then drop empty lines.

    Rows of iEvaLM begin with an empty line when the recommender opened; a few of OpenDialKG have
    an even number of lines, so that counting from the front would shift every role. Lines that
    become neighbours of one speaker when an empty line between them goes are joined.
    """
    dialogue: list[Utterance] = []
    for left, line in zip(range(len(lines), 0, -1), lines, strict=True):
        _say(dialogue, "seeker" if left % 2 else "recommender", line)
    return tuple(dialogue)


def _say(dialogue: list[Utterance], speaker: Speaker, text: str) -> None:
    """Append a line unless it is empty; a second line of one speaker joins the first."""
    text = text.strip()
    if text and dialogue and dialogue[-1].speaker == speaker:
        dialogue[-1] = Utterance(speaker, f"{dialogue[-1].text} {text}")
    elif text:
        dialogue.append(Utterance(speaker, text))


def _take(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """Return a row's field, a string or a list of strings."""
    if key not in row:
        raise UserError(f"{where}: the row has no {key!r}")
    value = row[key]
    strings = kind is not list or all(isinstance(part, str) for part in value or [])
    if not isinstance(value, kind) or not strings:
        wanted = "a list of strings" if kind is list else "a string"
        raise UserError(f"{where}: {key!r} must be {wanted}, got {value!r:.60}")
    return value


def read_row(row: Any, where: str) -> Example:
    """Turn one row of iEvaLM's format, with or without our extra fields, into an example.

    Raises:
        UserError: a field is missing or of a wrong type; `where` names the file and line.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, got {row!r:.60}")
    for key in ("dialog_id", "turn_id"):
        if not isinstance(row.get(key), (int, str)):
            raise UserError(f"{where}: the row has no {key!r}, a number or a string")
    if not str(row["turn_id"]).isdigit():
        raise UserError(f"{where}: 'turn_id' must be a number, got {row['turn_id']!r:.60}")
    history = take_turns(_take(row, "context", list, where))
    if not history or history[-1].speaker != "seeker":
        raise UserError(f"{where}: 'context' must end with a line of the seeker's")
    items, response = _take(row, "rec", list, where), _take(row, "resp", str, where).strip()
    if not items or not response:
        raise UserError(f"{where}: 'rec' must name at least one item and 'resp' must say something")
    extra = {key: _take(row, key, str, where) for key in ("profile", "explanation") if key in row}
    if "reactions" in row:
        reactions = row["reactions"]
        if not isinstance(reactions, dict):
            raise UserError(f"{where}: 'reactions' must be an object, got {reactions!r:.60}")
        extra |= {key: _take(reactions, key, str, where) for key in ("accept", "refuse")}
    place = str(row["dialog_id"]), int(row["turn_id"])
    return Example(*place, history, response, tuple(items), **extra)


def read_examples(path: Path) -> list[Example]:
    """Read a file of rows as it is.

    Raises:
        UserError: it is missing, not UTF-8, malformed (with the line's number), or has no rows.
    """
    examples = [read_row(row, f"{path}, line {number}") for number, row in _read_jsonl(path)]
    if not examples:
        raise UserError(f"{path} has no rows")
    return examples


# --- splits -----------------------------------------------------------------------------------


def load_split(name: str, split: str, data_dir: str | Path | None = None) -> Split:
    """Return a dataset's split by the rules that keep training and test apart.

    ReDial without train.jsonl: train is 90% of valid's dialogues, valid the other 10%. OpenDialKG:
    training rows that give away a test row are dropped.

    Raises:
        UserError: no such dataset, split or file, or a fault in a file.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}: expected {', '.join(SPLITS)}")
    folder = _folder(name, data_dir)
    if name == "redial" and split != "test" and _split_file(folder, "train") is None:
        return _divide_valid(read_examples(_present(folder, "valid")), split)
    examples = read_examples(_present(folder, split))
    if name == "opendialkg" and split == "train":
        kept = drop_overlap(examples, read_examples(_present(folder, "test")))
        note = (
            f"{len(examples) - len(kept)} of {len(examples)} OpenDialKG training rows dropped:"
            " their dialogue, or a test response, occurs in test"
        )
        return Split(kept, [note])
    return Split(examples, [])


def _present(folder: Path, split: str) -> Path:
    path = _split_file(folder, split)
    if path is None:
        raise UserError(
            f"{folder} has no {split}.jsonl (nor {split}_data_processed.jsonl); --data-dir FOLDER"
            " names the folder that has it"
        )
    return path


def _divide_valid(examples: Sequence[Example], split: str) -> Split:
    """Split valid's dialogues 90 : 10 by a hash of their ids, so that no dialogue is in both."""
    valid = [_hash(x.dialog_id) % VALID_SHARE == 0 for x in examples]
    kept = [
        x for x, is_valid in zip(examples, valid, strict=True) if is_valid == (split == "valid")
    ]
    dialogues = len({example.dialog_id for example in kept})
    note = (
        f"no ReDial train.jsonl: {split} is {dialogues} dialogues ({len(kept)} rows) of ReDial's"
        f" valid split ({'10' if split == 'valid' else '90'}% by a hash of their ids)"
    )
    return Split(kept, [note])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def drop_overlap(train: Sequence[Example], test: Sequence[Example]) -> list[Example]:
    """Return the training rows that share no dialogue with test and hold no test response."""
    dialogues = {example.dialog_id for example in test}
    responses = {example.response for example in test}

    def leaks(x: Example) -> bool:
        said = {x.response, *(line.text for line in x.history)}
        return x.dialog_id in dialogues or not said.isdisjoint(responses)

    return [example for example in train if not leaks(example)]


def load_catalogue(name: str, data_dir: str | Path | None = None) -> Catalogue:
    """Return the dataset's catalogue.

    Raises:
        UserError: the folder or its items.json (or id2info.json) is missing or malformed.
    """
    folder = _folder(name, data_dir)
    path = _first_file(folder, ("items.json", "id2info.json"))
    if path is None:
        raise UserError(f"{folder} has no items.json (nor id2info.json)")
    return Catalogue.load(path)


# --- plain dialogues --------------------------------------------------------------------------


def read_dialogues(path: Path) -> list[Dialogue]:
    """Read dialogues that await the recommender's reply, for `infer.py --dialogue FILE`.

    JSON: a list of messages or {"messages": [...]}. JSONL: such a dialogue a line, or one message
    a line. A message has `role` (user, assistant) or `speaker` (seeker, recommender), and `content`
    or `text`.

    Raises:
        UserError: the file is missing or malformed, or a dialogue does not end with the seeker.
    """
    text = read_text(path)
    try:
        whole = _parse(text)
    except ValueError:
        values = list(_read_jsonl(path))
    else:
        return [_read_messages(whole, str(path))]
    if values and all(isinstance(value, dict) and "messages" not in value for _, value in values):
        return [_read_messages([value for _, value in values], str(path))]
    if not values:
        raise UserError(f"{path} has no dialogue")
    return [_read_messages(value, f"{path}, line {number}") for number, value in values]


def _read_messages(value: Any, where: str) -> Dialogue:
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise UserError(f'{where}: expected a list of messages or {{"messages": [...]}}')
    dialogue: list[Utterance] = []
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"{where}: a message must be an object, got {message!r:.60}")
        role = message.get("role", message.get("speaker"))
        text = message.get("content", message.get("text"))
        if role not in ROLES or not isinstance(text, str):
            raise UserError(
                f"{where}: a message needs a role (user, assistant) or speaker (seeker,"
                f" recommender) and content, got {message!r:.80}"
            )
        _say(dialogue, ROLES[role], text)
    if not dialogue or dialogue[-1].speaker != "seeker":
        raise UserError(f"{where}: the dialogue must end with a line of the seeker's (role user)")
    return tuple(dialogue)
