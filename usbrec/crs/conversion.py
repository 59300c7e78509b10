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
from itertools import combinations, groupby
from pathlib import Path
from urllib.parse import unquote

from usbrec.chat import Row
from usbrec.crs import datasets
from usbrec.crs.catalogue import Catalogue, parse_json, read_text
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
    try:
        chats = {split: list(read(path)) for split, path in paths.items()}
        chats = chats or {"train": list(read(source))}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not in the format {form}: {error!r}") from error
    known = Catalogue.load(items) if items else None
    made, catalogue, notes = datasets.rows_of_chats(chats, known, seed)
    folder.mkdir(parents=True)
    for split, rows in made.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_bytes(lines.encode())
        yield f"{split}: {len(rows)} rows of {len({row['dialog_id'] for row in rows})} dialogues"
    entries = {number: {"name": x.title} for number, x in enumerate(catalogue, 1)}
    text = read_text(items) if items else json.dumps(entries, indent=1, ensure_ascii=False)
    (folder / "items.json").write_bytes(text.encode())
    yield f"items: {len(catalogue.items)}"
    yield from notes


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
