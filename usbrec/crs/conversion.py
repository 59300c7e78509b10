"""Commands for datasets: fetch, convert to our row format, check, export pairs for other trainers.

    python -m usbrec.crs.datasets convert redial SOURCE FOLDER --items data/redial/items.json
    python -m usbrec.crs.datasets check FOLDER
    python -m usbrec.crs.datasets export PAIRS FOLDER

| format | files in SOURCE | published as |
|---|---|---|
| redial | train_data.jsonl, test_data.jsonl | redial_dataset.zip of GitHub ReDialData/website |
| inspired | train.tsv, dev.tsv, test.tsv | data/dialog_data of GitHub sweetpeach/Inspired |
| opendialkg | SOURCE is opendialkg.csv | data of GitHub facebookresearch/opendialkg |
| crslab | {train,valid,test}_data.json | the datasets of GitHub RUCAIBox/CRSLab |
| chats | {train,valid,test}.jsonl | your own, as in docs/DATA.md |

Each format is read as chats, with the titles that it marks in them. SOURCE may be one file. A split
that it lacks becomes a tenth of its training dialogues. Equal input gives equal bytes.

trl takes pairs.jsonl as it is: a conversational preference dataset (`prompt`, `chosen`,
`rejected`). LLaMA-Factory takes the folder that `export` writes as its `dataset_dir` (dataset
`pairs`). Its `sharegpt` format needs a separate system prompt and alternating turns, the human's
first. So a conversation that the recommender opened begins with an empty human turn, as in
ReDial's own rows.
"""

import csv
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from http.client import HTTPException
from itertools import combinations, groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import Request, urlopen

from tqdm import tqdm

from usbrec.crs import datasets
from usbrec.crs.catalogue import Catalogue, parse_json
from usbrec.crs.titles import GENRE_WORDS, SPACELESS, key_of
from usbrec.options import Parser, UserError, add_table, read_text
from usbrec.parallel import run_together
from usbrec.runs import read_json, write_json, write_rows, write_whole

Chats = Iterator[tuple[str, Any]]  # the place of each chat in the source, and the chat
# the commands and their arguments; the formats and the names of their files by split; the sources:
# dataset -> file -> its address, which holds a commit, and git's checksum of it, which the commit
# lists: SHA-1 of "blob SIZE\0" and the bytes
KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))


# --- downloads --------------------------------------------------------------------------------


def fetch_files(name: str, data_dir: str | None) -> Iterator[str]:
    """Fetch a dataset's missing files into its folder; yield a sentence for each of its files.

    Raises UserError for a file that cannot be fetched or written, and for a wrong checksum.
    """
    folder = Path(data_dir or datasets.ROOT / name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, (url, checksum) in KNOWN["sources"][name].items():
        path, part = folder / file, folder / f"{file}.part"
        arrived = path if path.exists() else fetch_file(url, part)
        content = arrived.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != checksum:
            part.unlink(missing_ok=True)
            raise UserError(f"{arrived} has not the checksum of {url}: remove it and fetch again")
        arrived.replace(path)
        yield f"{path}: {len(content)} bytes, the checksum is right"


def fetch_file(url: str, part: Path) -> Path:
    """Return `part` with the whole file, of which it may hold a beginning.

    Raises UserError; what has arrived stays in `part`.
    """
    try:
        with part.open("ab") as file:
            start = max(file.tell() - 1, 0)  # the last byte again: no server sends none
            with urlopen(Request(url, headers={"Range": f"bytes={start}-"}), timeout=60) as answer:
                start = start if answer.status == 206 else 0
                size = start + int(answer.headers["Content-Length"] or 0)
                file.truncate(start)
                with tqdm(None, part.stem, size, initial=start, unit="B", unit_scale=True) as bar:
                    while block := answer.read(1 << 16):
                        bar.update(file.write(block))
        if (got := part.stat().st_size) < size:
            raise HTTPException(f"the answer ended after {got} of {size} bytes")
    except (OSError, HTTPException) as error:
        raise UserError(f"{url} to {part}: {error}; the same command goes on from here") from error
    return part


# --- formats ----------------------------------------------------------------------------------


def read_redial(path: Path) -> Chats:
    """Yield ReDial's dialogues: "@123" in a text is a film, which `movieMentions` names."""
    for place, value in datasets.read_jsonl(path):
        roles = {value["initiatorWorkerId"]: "seeker", value["respondentWorkerId"]: "recommender"}
        films = value["movieMentions"] or {}  # the release writes an empty list for none
        names = {f"@{x}": " ".join(y.split()) for x, y in films.items() if y}
        said = []
        for message in value["messages"]:
            role, parts = roles.get(message["senderWorkerId"]), re.split(r"(@\d+)", message["text"])
            text = html.unescape("".join(names.get(part, part) for part in parts))
            items = [html.unescape(names[part]) for part in parts if part in names]
            said.append({"role": role, "text": text, "items": items})
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
            said.append({"role": line["role"], "text": filled(text, items), "items": items})
        yield f"{path}, dialogue {number}", {"messages": said}


def filled(text: str, names: Sequence[str]) -> str:
    """Return a text with the names in the places of its "@123", as far as they go."""
    rest = iter(names)
    return re.sub(r"@\d+", lambda found: next(rest, found[0]), text)


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the lines of a .tsv or .csv file by the names of its columns."""
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    return csv.DictReader(io.StringIO(read_text(path)), dialect=dialect)


_READERS = (read_redial, read_inspired, read_opendialkg, read_crslab, datasets.read_jsonl)
READERS = dict(zip(KNOWN["formats"], _READERS, strict=True))


# --- commands ---------------------------------------------------------------------------------


def convert(form: str, source: str, folder: str, items: str | None, seed: str) -> Iterator[str]:
    """Write a source's rows and items to a new folder; yield what was written and left out."""
    read, name, out = READERS[form], KNOWN["formats"][form], Path(folder)
    names = [(x, name.format(x)) for x in datasets.SPLITS] + [("valid", name.format("dev"))]
    found = [(split, path) for split, file in names for path in sorted(Path(source).rglob(file))]
    paths = dict(found) or {"train": Path(source)}
    if len(paths) < len(found):
        raise UserError(f"{source} holds several datasets: name one, {found[0][1]} or the like")
    try:
        chats = {split: list(read(path)) for split, path in paths.items()}
    except (KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{source} is not in the format {form}: {error!r}") from error
    known = Catalogue.load(Path(items)) if items else None
    made, catalogue, note = datasets.rows_of_chats(chats, known, seed)
    out.mkdir(parents=True)
    for split, rows in made.items():
        write_rows(out / f"{split}.jsonl", rows)
        yield f"{split}: {len(rows)} rows of {len({row['dialog_id'] for row in rows})} dialogues"
    entries = {number: {"name": x.title} for number, x in enumerate(catalogue, 1)}
    text = read_text(Path(items)) if items else json.dumps(entries, indent=1, ensure_ascii=False)
    (out / "items.json").write_bytes(text.encode())
    yield f"items: {len(catalogue.items)}; {note}"


def check(name: str, data_dir: str | None) -> Iterator[str]:
    """Yield what a dataset holds and what is odd in it, each with its count and an example.

    Raises UserError if it cannot be used.
    """
    catalogue, dialogues = datasets.load_catalogue(name, data_dir), dict[str, set[str]]()
    mentioned = cache(lambda text: [mention.items for mention in catalogue.find(text)])
    for split in datasets.SPLITS:
        examples, notes = datasets.load_split(name, split, data_dir)
        dialogues[split], found = {x.dialog_id for x in examples}, dict[str, list[str]]()
        for x in examples:
            seen = [items for line in x.history for items in mentioned(line.text)]
            for title in x.items:
                meant = set(catalogue.named(title))
                odd = {
                    "labels that the catalogue lacks": not meant,
                    "labels that may mean several items": len(meant) > 1,
                    "labels that are the name of a genre": key_of(title) in GENRE_WORDS,
                    "labels that the context names already": any(map(meant.issuperset, seen)),
                    "labels where the recommender opens": len(x.history) % 2 == 0,
                }
                for fault in filter(odd.get, odd):
                    found.setdefault(fault, []).append(f"{title!r} in dialogue {x.dialog_id}")
        yield from [f"{split}: {len(examples)} rows of {len(dialogues[split])} dialogues", *notes]
        for fault, cases in found.items():
            yield f"{split}, {fault}: {len(cases)}, such as {cases[0]}"
    for one, other in combinations(datasets.SPLITS, 2):
        if shared := sorted(dialogues[one] & dialogues[other]):
            yield f"dialogues of both {one} and {other}: {len(shared)}, such as {shared[0]}"


def export(pairs: str, folder: Path) -> Iterator[str]:
    """Write pairs.json and dataset_info.json, which describes it, for LLaMA-Factory."""
    rows = [llama_factory_row(pair, place) for place, pair in datasets.read_pairs(Path(pairs))]
    if not rows:
        raise UserError(f"{pairs} holds no pair")
    described = folder / "dataset_info.json"
    if described.exists() and read_json(described) != KNOWN["llama_factory"]:
        raise UserError(f"{described} describes other datasets: name a new folder")
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_whole(folder / "pairs.json", text.encode(errors="backslashreplace"))
    write_json(described, KNOWN["llama_factory"])
    yield f"{len(rows)} pairs in {folder}"


def llama_factory_row(pair: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a pair in LLaMA-Factory's `sharegpt` preference format."""
    roles = " ".join(message["role"] for message in pair["prompt"])
    if not re.fullmatch("system( assistant)?( user assistant)* user", roles):
        raise UserError(f"{place}: expected a prompt as train.py writes it, got {roles:.60}")
    system, *said = (message["content"] for message in pair["prompt"])
    said = said if len(said) % 2 else ["", *said]  # the recommender opened
    turns = [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(said)]
    sides = {x: {"from": "gpt", "value": pair[x][-1]["content"]} for x in ("chosen", "rejected")}
    return {"conversations": turns, "system": system, **sides}


COMMANDS: Any = {"fetch": fetch_files, "convert": convert, "check": check, "export": export}


def main(words: Sequence[str] | None = None) -> int:
    """Do what the words of a command say; return 2 for a user's fault, 130 for Ctrl-C."""
    parser = Parser(prog="datasets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (told, arguments) in KNOWN["commands"].items():
        add_table(commands.add_parser(name, help=told, description=told), arguments)

    def job() -> None:
        flags = vars(parser.parse_args(words))
        for told in COMMANDS[flags.pop("command")](**flags):
            print(told, flush=True)

    return run_together("datasets", job)
