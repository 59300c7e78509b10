"""Any number of results beside each other, on the rows that they share, paired.

    python benchmarks/compare.py runs/sample runs/other                # run folders with a report
    python benchmarks/compare.py A.jsonl B.jsonl C.jsonl [--json FILE] # results files of infer.py

A column is a method of a run, or a results file of replies to a dataset's split. The figures are
the report's, over the rows that all columns have; a difference is to the first column, or to the
one that --against names, with a 95% interval over whole dialogues. Results of other gold titles are
refused. Replies alone have no iEval, and iEval is compared only where the same judge scored with
the same options: each run trains a judge of its own.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seeds
from contest import show

from usbrec import runs
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.datasets import load_catalogue, load_split
from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import gold_labels
from usbrec.extras.default_model import find_model
from usbrec.extras.report import HEADINGS, compare, interval, summarise
from usbrec.loading import is_adapter, weights_digest
from usbrec.options import UserError, seed_for
from usbrec.parallel import run_together

Key = tuple[Any, Any]  # dialog_id and turn_id


@dataclass(frozen=True)
class Column:
    """A method's rows, as the report reads them, by their ids; `judge` tells who scored them."""

    name: str
    rows: dict[Key, runs.Row]
    judge: str


def read_columns(path: Path) -> Iterator[Column]:
    """Yield the methods of a run folder, or the one column of a results file."""
    if path.is_dir():
        yield from columns_of(path)
    elif not path.exists():
        raise UserError(f"{path}: expected a run folder or a results file, found nothing")
    else:
        yield read_replies(path)


def columns_of(folder: Path) -> Iterator[Column]:
    """Yield a column per method of a run's report."""
    options, talks = seeds.read_run(folder)
    adapter = str(folder / "simulator")
    weights = weights_digest(adapter, find_model) if is_adapter(adapter) else ""
    others = {x: options[x] for x in options if x.startswith("other-")}
    judge = json.dumps([weights, options["eval"], options["model"], others], sort_keys=True)
    for name, made in talks.items():
        yield Column(f"{folder}, {name}", by_ids(folder, made), judge)


def read_replies(path: Path) -> Column:
    """Return the column of infer.py's replies to rows of a dataset."""
    facts = runs.read_json(path.with_name(path.name + ".options.json"))
    made = runs.read_rows(path)
    if "reply" not in facts or not all("gold" in row for row in made):
        raise UserError(f"{path}: expected infer.py's replies to rows of a dataset")
    catalogue = load_catalogue(facts["data"], facts["dir"])
    known = examples_of(facts["data"], facts["dir"])
    rows = []
    for number, row in enumerate(made, 1):
        x = known.get(key_of(row))
        if x is None or list(x.items) != row["gold"]:
            raise UserError(f"{path}, line {number}: the dataset {facts['data']} has no such row")
        rows.append(scored(catalogue, x, row["reply"]))
    return Column(str(path), by_ids(path, rows), "none")


def examples_of(data: str, data_dir: str | None) -> dict[Key, Example]:
    """Return all rows of a dataset by their ids; test has the last word."""
    found: dict[Key, Example] = {}
    for name in ("train", "valid", "test"):
        found |= {(x.dialog_id, x.turn_id): x for x in load_split(data, name, data_dir).examples}
    return found


def scored(catalogue: Catalogue, x: Example, reply: str) -> runs.Row:
    """Return what the rules say of a reply, in the fields of the report's rows."""
    return {
        "dialog_id": x.dialog_id,
        "turn_id": x.turn_id,
        "score": None,
        "digit_probability": None,
        "labels": gold_labels(catalogue, x, [catalogue.first(reply)]),
        "hit": catalogue.mentions(reply, x.items),
        "grade": catalogue.grade_of(reply, x.items),
    }


def key_of(row: runs.Row) -> Key:
    """Return a row's ids."""
    return row["dialog_id"], row["turn_id"]


def by_ids(path: Path, rows: Sequence[runs.Row]) -> dict[Key, runs.Row]:
    """Return rows by their ids, each once."""
    found = {key_of(row): row for row in rows}
    if len(found) < len(rows):
        raise UserError(f"{path} has rows of the same ids: they cannot be paired")
    return found


def shared(columns: Sequence[Column]) -> list[Key]:
    """Return the ids that all columns have, in the first one's order.

    Raises UserError if there are none, or if their gold titles differ.
    """
    first = columns[0]
    keys = [key for key in first.rows if all(key in column.rows for column in columns)]
    if not keys:
        raise UserError(f"the results share no row with {first.name}")
    for column in columns:
        for key in keys:
            gold, own = ([x["title"] for x in y.rows[key]["labels"]] for y in (first, column))
            if gold != own:
                told = f"dialogue {key[0]}, turn {key[1]} has the gold titles {own}"
                raise UserError(f"{column.name}: {told}, in {first.name} {gold}")
    return keys


def measure(columns: Sequence[Column], against: Column) -> dict[str, Any]:
    """Return the figures of each column, and its differences to `against`."""
    seed, keys = seed_for(0, "compare"), shared(columns)
    rows = {column.name: [column.rows[key] for key in keys] for column in columns}
    found: dict[str, Any] = {"rows": len(keys), "dialogues": len({key[0] for key in keys})}
    found["columns"] = {name: summarise(own, seed) for name, own in rows.items()}
    found["against"], found["differences"] = against.name, {}
    for column in columns:
        if column is not against:
            gaps = compare(rows[column.name], rows[against.name], seed)
            if column.judge != against.judge:
                del gaps["ieval"]
            found["differences"][column.name] = gaps
    return found


def compare_results(arguments: Sequence[str] | None) -> None:
    """Read the results, print the tables, and write the figures if a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="run folders, or results files")
    told = "the column that the others are compared with (default: the first)"
    parser.add_argument("--against", metavar="COLUMN", help=told)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    flags = parser.parse_args(arguments)
    columns = [column for path in flags.results for column in read_columns(path)]
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise UserError("each result can be named once")
    if flags.against not in (None, *names):
        raise UserError(f"--against must be one of {'; '.join(names)}, got {flags.against}")
    against = columns[names.index(flags.against) if flags.against else 0]
    found = measure(columns, against)
    head = f"{found['rows']} rows of {found['dialogues']} dialogues"
    rows = [[name, *(interval(x[k]) for k in HEADINGS)] for name, x in found["columns"].items()]
    show(rows, [head, *HEADINGS.values()])
    rows = []
    for name, x in found["differences"].items():
        gaps = [interval(x[k], form="+.3f") if k in x else "other judge" for k in HEADINGS]
        rows.append([name, *gaps])
    if rows:
        print()
        show(rows, [f"less {against.name}", *HEADINGS.values()])
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the results; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("compare.py", lambda: compare_results(arguments))


if __name__ == "__main__":
    sys.exit(main())
