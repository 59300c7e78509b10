"""A sheet for people: the replies of two methods side by side, unnamed, and what people prefer.

    python benchmarks/blind.py --export sheet.csv --run-dir runs/sample --limit 50
    python benchmarks/blind.py --human sheet-ann.csv sheet-bo.csv --key sheet.key.json

The first command writes N test dialogues of a finished run, each with the replies of two methods in
random order as A and B. People fill the column `better` with A, B, or = where neither is. Replies
that are equal are left out and counted. sheet.key.json, which is not for them, tells the sides, the
external judge's scores, and the grades of the rules.

The second command reads any number of filled sheets of one key, a person each, as spreadsheet
programs save them (commas, semicolons or tabs, UTF-8). It prints

    win rate       the share of dialogues in which the second method is better, a tie as a half
    judge, rules   agreement with the preferences of the judge's scores and of the rules' grades
    people         agreement between two people, over the dialogues that both judged

each with its 95% interval over dialogues. `same` is the share of equal preferences; kappa is
Cohen's, with quadratic weights over worse, equal, better. Scores closer than 0.05 count as equal.
"""

import csv
import io
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any
from zlib import crc32

from contest import show
from correlation import kappa, measured
from seeds import finished_rows

from usbrec import runs
from usbrec.crs.dialogue import SILENCE, Utterance, format_dialogue
from usbrec.extras.intervals import mean_interval
from usbrec.extras.report import interval
from usbrec.options import Parser, UserError, read_text, seed_for
from usbrec.parallel import run_together
from usbrec.runs import Row

METHODS = ("RL", "RL+SES+cards")
SIDES = ("A", "B")
COLUMNS = ("number", "dialogue", *SIDES, "better")
CHOICES = (*SIDES, "=")
NEAR = 0.05  # scores of the judge that are closer prefer neither
FORMULA = ("=", "+", "-", "@")  # a cell that begins so is a formula for a spreadsheet program
# one preference: -1 the first method, 0 neither, 1 the second; by the row's number
Preferences = dict[int, float]


# --- the sheet --------------------------------------------------------------------------------


def read_pairs(run: Path, methods: Sequence[str]) -> list[tuple[Row, Row]]:
    """Return the talks of both methods per test dialogue of a run.

    Raises UserError for a method that the run did not evaluate.
    """
    path, rows = run / "rows.jsonl", finished_rows(run)
    for name in methods:
        if not any(name in row for row in rows):
            raise UserError(f"--methods: {path} has no replies of {name!r}")
    return [(row[methods[0]], row[methods[1]]) for row in rows if set(methods) <= set(row)]


def parted(talk: Row) -> tuple[str, str]:
    """Return the dialogue that all methods met, and what this one made of it.

    That is its reply. In a run of several turns it is the rest of the talk.
    """
    lines = tuple(Utterance(*line) for line in talk["transcript"])
    start = len(lines) - 2 * len(talk["replies"]) + 1
    rest = lines[start:]
    told = rest[0].text if len(rest) == 1 else format_dialogue(rest)
    return format_dialogue(lines[:start]), "(no reply)" if told == SILENCE else told


def build_sheet(
    pairs: Sequence[tuple[Row, Row]], methods: Sequence[str], limit: int, seed: int
) -> tuple[list[dict[str, Any]], Row]:
    """Return the sheet's rows and the key: `limit` dialogues (0: all) whose replies differ.

    The dialogues come in the order of a seeded hash of their ids, and so do the sides.
    """

    def key_of(talk: Row) -> int:
        return seed_for(seed, "blind", talk["dialog_id"], talk["turn_id"])

    different = [pair for pair in pairs if len({squeezed(parted(x)[1]) for x in pair}) > 1]
    ordered = sorted(different, key=lambda pair: key_of(pair[0]))
    sheet, keys = [], []
    for number, pair in enumerate(ordered[: limit or None], 1):
        turned = seed_for(key_of(pair[0]), "side") % 2
        places = dict(zip(SIDES, (1, 0) if turned else (0, 1), strict=True))
        talks = {side: pair[place] for side, place in places.items()}
        shown = {side: as_text(parted(talk)[1]) for side, talk in talks.items()}
        dialogue = parted(pair[0])[0]
        sheet.append({"number": number, "dialogue": dialogue, **shown, "better": ""})
        keys.append(
            {
                "number": number,
                "dialog_id": pair[0]["dialog_id"],
                "turn_id": pair[0]["turn_id"],
                "methods": {side: methods[place] for side, place in places.items()},
                "scores": {side: talk["score"] for side, talk in talks.items()},
                "grades": {side: talk["grade"] for side, talk in talks.items()},
                "check": check_of(shown),
            }
        )
    facts = {"seed": seed, "dialogues": len(pairs), "equal": len(pairs) - len(different)}
    return sheet, {"methods": list(methods), **facts, "rows": keys}


def squeezed(text: str) -> str:
    """Return a text with single spaces, by which replies are compared."""
    return " ".join(text.split())


def as_text(reply: str) -> str:
    """Return a reply as a cell that no spreadsheet program takes for a formula."""
    return f" {reply}" if reply.startswith(FORMULA) else reply


def check_of(row: Mapping[str, Any]) -> str:
    """Return a checksum of a row's two replies, by which a sheet of another key is noticed."""
    text = json.dumps([squeezed(row[side]) for side in SIDES])
    return f"{crc32(text.encode()):08x}"


def export(flags: Namespace) -> None:
    """Write the sheet and its key; raises UserError where one is there already."""
    path, key = flags.export, flags.key or flags.export.with_suffix(".key.json")
    if path.suffix != ".csv":
        raise UserError(f"--export must name a file that ends with .csv, got {path}")
    for place in (path, key):
        if place.exists():
            raise UserError(f"{place} is there already and is not overwritten: name another sheet")
    run = flags.run_dir or runs.RUNS / "sample"
    first, second = flags.methods
    if first == second:
        raise UserError(f"--methods must name two different methods, got {first!r} twice")
    pairs = read_pairs(run, flags.methods)
    sheet, keys = build_sheet(pairs, flags.methods, flags.limit, flags.seed)
    if not sheet:
        raise UserError(f"{run}: all replies of {first} and {second} are equal, or there are none")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(sheet)
    runs.write_json(key, keys)
    runs.write_whole(path, text.getvalue().encode("utf-8-sig"))  # Excel takes no other for UTF-8
    print(f"{path}: {len(sheet)} dialogues; fill the column better with {', '.join(CHOICES)}")
    print(f"{keys['equal']} of {keys['dialogues']} dialogues are left out: both replies are equal")
    print(f"{key}: the sides and the scores, not for those who judge")


# --- what people prefer -----------------------------------------------------------------------


def read_key(path: Path) -> Row:
    """Return the content of a key; raises UserError for a file that is none."""
    key = runs.read_json(path)
    try:
        is_right = {"equal", "dialogues"} <= set(key) and all(
            {"number", "dialog_id", "check"} <= set(row)
            and all(set(row[field]) == {*SIDES} for field in ("methods", "scores", "grades"))
            and set(row["methods"].values()) == set(key["methods"])
            for row in key["rows"]
        )
    except (KeyError, TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise UserError(f"{path} is not a key as --export writes it")
    return key


def read_sheet(path: Path, key: Row) -> tuple[Preferences, int]:
    """Return a person's preferences by the number of the row, and the count of unfilled rows.

    Rows that the person has removed count as unfilled. Raises UserError naming the line of an entry
    that is none, of a row that the key has not, and of a row that comes twice.
    """
    known, seen = {row["number"]: row for row in key["rows"]}, set[int]()
    found: Preferences = {}
    for at, cells in read_cells(path):
        told, better = cells["number"].strip(), cells["better"].strip().upper()
        number = int(told) if told.isdecimal() else 0
        if number not in known:
            raise UserError(f"{at}: number must be one of the key's, got {told!r:.40}")
        if number in seen:
            raise UserError(f"{at}: the number {number} comes twice")
        if check_of(cells) != known[number]["check"]:
            raise UserError(f"{at}: A and B are not as the key's sheet has them: another sheet?")
        if better not in ("", *CHOICES):
            got = cells["better"].strip()
            raise UserError(f"{at}: better must be A, B, = or empty, got {got!r:.40}")
        seen.add(number)
        if better:
            found[number] = preference(known[number], better, key["methods"][1])
    return found, len(known) - len(found)


def read_cells(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells of each row of a sheet, by the names of the columns.

    Columns may be in any order, and others beside them. Empty lines are passed over. Raises
    UserError for a file that is missing, not UTF-8, or lacks a column.
    """
    text = read_text(path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        names = [name.strip() for name in next(lines, [])]
        if absent := [name for name in COLUMNS if name not in names]:
            raise UserError(f"{path}: there is no column {absent[0]!r} in its first line")
        start = lines.line_num + 1
        for row in lines:
            at, start = f"{path}, line {start}", lines.line_num + 1
            if any(cell.strip() for cell in row):
                row += [""] * (len(names) - len(row))
                yield at, dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num}: not a row of a CSV: {error}") from error


def preference(row: Row, better: str, second: str) -> float:
    """Return 1 if the side `better` is the second method, -1 if it is the first, 0 for neither."""
    if better not in SIDES:
        return 0.0
    return 1.0 if row["methods"][better] == second else -1.0


def by_numbers(key: Row, field: str, near: float) -> Preferences:
    """Return what the key's scores or grades prefer: the greater, or neither if they are near.

    Rows without one of the two numbers are left out.
    """
    found: Preferences = {}
    for row in key["rows"]:
        a, b = (row[field][side] for side in SIDES)
        if a is not None and b is not None:
            better = "=" if abs(a - b) < near else SIDES[b > a]
            found[row["number"]] = preference(row, better, key["methods"][1])
    return found


# --- the figures ------------------------------------------------------------------------------


def measure(key: Row, sheets: Mapping[str, tuple[Preferences, int]], seed: int) -> Row:
    """Return all figures in JSON's types: per person, of all, and of the judge and the rules."""
    ids = {row["number"]: row["dialog_id"] for row in key["rows"]}
    people = {name: found for name, (found, _) in sheets.items()}
    others = {"judge": by_numbers(key, "scores", NEAR), "rules": by_numbers(key, "grades", 1)}
    every = list(people.values())
    return {
        "methods": key["methods"],
        "rows": len(key["rows"]),
        "equal": key["equal"],
        "dialogues": key["dialogues"],
        "people": {
            name: {"filled": len(found), "unfilled": unfilled, "win_rate": win_rate([found], seed)}
            for name, (found, unfilled) in sheets.items()
        },
        "win_rate": {
            "all people": win_rate(every, seed),
            **{name: win_rate([found], seed) for name, found in others.items()},
        },
        "agreement": {
            **{
                f"people and {name}": agreement([(x, own) for x in every], ids, seed)
                for name, own in others.items()
            },
            "two people": agreement(list(combinations(every, 2)), ids, seed),
        },
    }


def win_rate(people: Sequence[Preferences], seed: int) -> dict[str, Any]:
    """Return the share of dialogues in which the second method is better, a tie as a half.

    A dialogue that several people judged counts once, with their mean.
    """
    told: dict[int, list[float]] = {}
    for found in people:
        for number, value in found.items():
            told.setdefault(number, []).append((value + 1) / 2)
    return mean_interval([fmean(told[number]) for number in sorted(told)], seed)


def agreement(
    pairs: Sequence[tuple[Preferences, Preferences]], ids: Mapping[int, str], seed: int
) -> dict[str, Any]:
    """Return `same` and `kappa` over the rows that both of a pair judged, by whole dialogues."""
    rows = [(a[n], b[n], ids[n]) for a, b in pairs for n in sorted(a.keys() & b.keys())]
    one, other, groups = ([row[i] for row in rows] for i in range(3))
    same = [float(a == b) for a, b in zip(one, other, strict=True)]
    return {
        "same": mean_interval(same, seed, groups=groups),
        "kappa": measured(kappa, one, other, groups, seed),
    }


def show_all(found: Row) -> None:
    """Print the figures as tables."""
    first, second = found["methods"]
    told = f"{found['equal']} of the {found['dialogues']} dialogues had equal replies"
    print(f"{second} against {first}, {found['rows']} dialogues ({told})\n")
    rows = [
        [name, x["filled"], x["unfilled"], interval(x["win_rate"])]
        for name, x in found["people"].items()
    ]
    rows += [[name, "", "", interval(x)] for name, x in found["win_rate"].items()]
    show(rows, ["who", "filled", "unfilled", f"win rate of {second}"])
    print()
    rows = [[x, interval(y["same"]), interval(y["kappa"])] for x, y in found["agreement"].items()]
    show(rows, ["agreement of", "same", "kappa"])


def read_people(flags: Namespace) -> None:
    """Read the filled sheets, print the tables, and write the figures if a file is named."""
    if len(set(flags.human)) < len(flags.human):
        raise UserError("--human names a sheet twice: one sheet per person")
    path = flags.key or flags.human[0].with_suffix(".key.json")
    if not path.exists():
        raise UserError(f"{path} is missing: name the key that --export wrote with --key")
    key = read_key(path)
    sheets = {str(sheet): read_sheet(sheet, key) for sheet in flags.human}
    found = measure(key, sheets, seed_for(flags.seed, "blind"))
    show_all(found)
    if flags.json:
        runs.write_json(flags.json, found)


# --- the command ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: a sheet to write, or sheets to read."""
    parser = Parser(prog="blind.py", description=__doc__, usage="blind.py [FLAGS]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", type=Path, metavar="SHEET.csv", help="write a sheet and its key")
    what.add_argument("--human", type=Path, nargs="+", metavar="SHEET.csv", help="read filled ones")
    told = "the key (default: beside the sheet, or the first one, as SHEET.key.json)"
    parser.add_argument("--key", type=Path, metavar="FILE.json", help=told)
    parser.add_argument("--run-dir", type=Path, help="a run of train.py (default: runs/sample)")
    told = f"two columns of its report (default: {' '.join(METHODS)})"
    parser.add_argument("--methods", nargs=2, metavar="M", default=METHODS, help=told)
    parser.add_argument("--limit", type=int, default=50, help="dialogues, 0 for all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="decides dialogues, sides and draws")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    return parser


def act(arguments: Sequence[str] | None) -> None:
    """Write a sheet, or read sheets, as the flags say."""
    flags = build_parser().parse_args(arguments)
    if flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    if flags.export:
        export(flags)
    else:
        read_people(flags)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or read; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("blind.py", lambda: act(arguments))


if __name__ == "__main__":
    sys.exit(main())
