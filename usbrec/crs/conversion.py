"""Other datasets in our row format, and a look at a dataset before it is used.

    python -m usbrec.crs.datasets convert redial SOURCE FOLDER --items data/redial/items.json
    python -m usbrec.crs.datasets check FOLDER

| format | files in SOURCE | published as |
|---|---|---|
| redial | train_data.jsonl, test_data.jsonl | redial_dataset.zip of GitHub ReDialData/website |
| inspired | train.tsv, dev.tsv, test.tsv | data/dialog_data of GitHub sweetpeach/Inspired |
| opendialkg | SOURCE is opendialkg.csv | data of GitHub facebookresearch/opendialkg |
| crslab | {train,valid,test}_data.json | the datasets of GitHub RUCAIBox/CRSLab |
| chats | {train,valid,test}.jsonl | one's own, by docs/DATA.md |

Each format is read as chats, with the titles that it marks in them. SOURCE may be one file. A split
that it lacks is a tenth of its training dialogues. Equal input gives equal bytes.
"""

import csv
import html
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, combinations, groupby
from pathlib import Path
from urllib.parse import unquote

from usbrec.chat import Row
from usbrec.crs import datasets
from usbrec.crs.catalogue import LISTS, Catalogue, parse_json, read_item, read_text
from usbrec.crs.datasets import SPLITS
from usbrec.crs.fetching import SOURCES, fetch
from usbrec.crs.spelling import SPACELESS, key_of
from usbrec.crs.titles import GENRE_WORDS
from usbrec.options import Parser, UserError

Chats = Iterator[tuple[str, Row]]  # the place of each chat in the source, and the chat


# --- formats ----------------------------------------------------------------------------------


def read_redial(path: Path) -> Chats:
    """Yield ReDial's dialogues: "@123" in a text is a film, which `movieMentions` names."""
    for place, value in datasets.read_jsonl(path):
        roles = {value["initiatorWorkerId"]: "seeker", value["respondentWorkerId"]: "recommender"}
        names = {f"@{x}": " ".join(y.split()) for x, y in dict(value["movieMentions"]).items() if y}
        said = []
        for message in value["messages"]:
            parts = re.split(r"(@\d+)", html.unescape(message["text"]))
            text = "".join(names.get(part, part) for part in parts)
            items = [names[part] for part in parts if part in names]
            said.append(
                {"role": roles.get(message["senderWorkerId"]), "text": text, "items": items}
            )
        yield place, {"id": value["conversationId"], "messages": said}


def read_inspired(path: Path) -> Chats:
    """Yield INSPIRED's dialogues: a line of the table is an utterance, with the films in it."""
    for name, lines in groupby(read_table(path), lambda line: line["dialog_id"]):
        said = []
        for line in lines:
            text = line["text"].replace("QUOTATION_MARK", '"')
            items = list(filter(None, map(str.strip, line["movies"].split(";"))))
            said.append({"role": line["speaker"], "text": text, "items": items})
        yield f"{path}, {name}", {"id": name, "messages": said}


def read_opendialkg(path: Path) -> Chats:
    """Yield OpenDialKG's dialogues, without the actions between the lines, which mark no titles."""
    for number, line in enumerate(read_table(path), 1):
        actions = parse_json(line["Messages"])
        said = [{"role": x["sender"], "text": x["message"]} for x in actions if x["type"] == "chat"]
        yield f"{path}, dialogue {number}", {"id": number, "messages": said}


def read_crslab(path: Path) -> Chats:
    """Yield CRSLab's dialogues: texts or their words, films as titles or DBpedia's links."""
    for number, value in enumerate(parse_json(read_text(path)), 1):
        said = []
        for line in value.get("dialog") or value["messages"]:
            links = next((line[x] for x in ("movies", "movie", "item") if x in line), ())
            items = [unquote(re.sub(r"<http.*/|>$", "", x)).replace("_", " ") for x in links]
            words = line["text"] if isinstance(line["text"], str) else " ".join(line["text"])
            text = re.sub(rf" (?=[.,!?;:]|'\w|n't)|(?<=[{SPACELESS}]) (?=[{SPACELESS}])", "", words)
            unnamed = iter(items)
            text = re.sub(r"@\d+", lambda found, rest=unnamed: next(rest, found[0]), text)
            said.append({"role": line["role"], "text": text, "items": items})
        yield f"{path}, dialogue {number}", {"id": number, "messages": said}


def read_table(path: Path) -> Iterator[Row]:
    """Yield the lines of a .tsv or .csv file by the names of its columns."""
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    return csv.DictReader(io.StringIO(read_text(path), newline=""), dialect=dialect)


def read_entries(path: Path) -> dict[str, Row]:
    """Return the entries of an items.json or of a table with a column `name` or `title`.

    In a table a field's values stand between commas, and its name may end in "s", as in "actors".
    """
    if path.suffix == ".json":
        return parse_json(read_text(path))
    entries = {}
    for number, line in enumerate(read_table(path), 1):
        fields = {x: line.get(x) or line.get(f"{x}s") for x in chain(*LISTS)}
        lists = {x: values.split(", ") for x, values in fields.items() if values}
        name = line.get("name") or line["title"]
        entries[str(number)] = {"name": name, "year": line.get("year"), **lists}
    return entries


# format -> the reader of a file, and the file's name by split
FORMATS = {
    "redial": (read_redial, "{}_data.jsonl"),
    "inspired": (read_inspired, "{}.tsv"),
    "opendialkg": (read_opendialkg, "{}.csv"),
    "crslab": (read_crslab, "{}_data.json"),
    "chats": (datasets.read_jsonl, "{}.jsonl"),
}


# --- commands ---------------------------------------------------------------------------------


def convert(form: str, source: Path, folder: Path, items: Path | None, seed: int) -> Iterator[str]:
    """Write a source's rows and items to a new folder; yield what was written and left out."""
    read, name = FORMATS[form]
    names = [(x, name.format(x)) for x in SPLITS] + [("valid", name.format("dev"))]
    paths = {split: path for split, file in names for path in sorted(source.rglob(file))}
    paths = paths or {"train": source}
    try:
        entries = read_entries(items) if items else {}
        placed = [(split, chat) for split, path in paths.items() for chat in read(path)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not in the format {form}: {error!r}") from error
    known = Catalogue(map(read_item, entries.values())) if entries else None
    talks, known = datasets.read_chats((chat for _, chat in placed), known)
    rows = [
        (split, row)
        for (split, _), talk in zip(placed, talks, strict=True)
        for row in datasets.rows_of(*talk)
    ]
    lost = [row for _, row in rows if not any(map(known.named, row["rec"]))]
    kept = [(split, row) for split, row in rows if row not in lost]
    missing = [split for split in ("test", "valid") if split not in paths]
    parts = datasets.divide((row["dialog_id"] for x, row in kept if x == "train"), missing, seed)
    folder.mkdir(parents=True)
    for split in SPLITS:
        own = [row for x, row in kept if (parts[row["dialog_id"]] if x == "train" else x) == split]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (folder / f"{split}.jsonl").write_bytes(lines.encode())
        yield f"{split}: {len(own)} rows of {len({row['dialog_id'] for row in own})} dialogues"
    entries = entries or {str(n): {"name": x.title} for n, x in enumerate(known, 1)}
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    (folder / "items.json").write_bytes(text.encode())
    yield f"items: {len(entries)}"
    if lost:
        told = f"none of their titles is in {items}, such as {lost[0]['rec']}"
        yield f"{len(lost)} of {len(rows)} rows left out: {told}"


def check(name: str, data_dir: str | None) -> Iterator[str]:
    """Yield what a dataset holds and what is odd in it, each with its count and an example.

    Raises UserError if it cannot be used.
    """
    catalogue, dialogues = datasets.load_catalogue(name, data_dir), dict[str, set[str]]()
    mentioned = cache(lambda text: [mention.items for mention in catalogue.find(text)])
    for split in SPLITS:
        examples, notes = datasets.load_split(name, split, data_dir)
        dialogues[split], found = {x.dialog_id for x in examples}, defaultdict(list)
        for x in examples:
            seen = [items for line in x.history for items in mentioned(line.text)]
            for title in x.items:
                meant = set(catalogue.named(title))
                odd = {
                    "are not in the catalogue": not meant,
                    "may mean several items": len(meant) > 1,
                    "are the name of a genre": key_of(title) in GENRE_WORDS,
                    "stand in the context already": any(map(meant.issuperset, seen)),
                    "are of dialogues that the recommender opens": len(x.history) % 2 == 0,
                }
                for fault in filter(odd.get, odd):
                    found[fault].append(f"{title!r} in dialogue {x.dialog_id}")
        labels = sum(len(x.items) for x in examples)
        yield f"{split}: {len(examples)} rows of {len(dialogues[split])} dialogues, {labels} labels"
        yield from notes
        for fault, cases in found.items():
            yield f"{split}: {len(cases)} labels {fault}, such as {cases[0]}"
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(dialogues[one] & dialogues[other]):
            yield f"{one} and {other} share {len(shared)} dialogues, such as {shared[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, convert or check as the arguments say; return 2 for a user's fault."""
    parser = Parser(prog="datasets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download a dataset")
    fetching.add_argument("name", choices=SOURCES)
    converting = commands.add_parser("convert", help="write another dataset in our row format")
    converting.add_argument("form", choices=FORMATS)
    for place in ("source", "folder", "--items"):
        converting.add_argument(place, type=Path)
    converting.add_argument("--seed", type=int, default=0, help="divides what has no splits")
    checking = commands.add_parser("check", help="tell what a dataset holds, and what is odd in it")
    checking.add_argument("name", help="sample, redial, opendialkg, a folder or a file of chats")
    for command in (fetching, checking):
        command.add_argument("--data-dir", help="the folder of redial or opendialkg")
    try:
        flags = vars(parser.parse_args(arguments))
        run = {"fetch": fetch, "convert": convert, "check": check}[flags.pop("command")]
        for told in run(**flags):
            print(told, flush=True)
    except (OSError, UserError) as error:
        print(f"datasets: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndatasets: stopped", file=sys.stderr)
        return 130
    return 0
