"""The same run with several seeds: each method's figures per seed, and the differences pooled.

    python train.py --seed 1 --run-dir runs/seed1          # a run per seed, the options alike
    python benchmarks/seeds.py runs/sample runs/seed1 runs/seed2 [--json FILE]

A seed decides the lessons, every draw, and the test dialogues. A pooled difference is over the rows
of all runs. Its interval draws whole dialogues, each with its rows of every run, since runs
that meet one dialogue are not independent. It does not cover the chance of other seeds: for that
compare the runs' own columns.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from contest import show

from usbrec import runs
from usbrec.extras.report import HEADINGS, compare, interval, summarise
from usbrec.options import UserError, seed_for
from usbrec.parallel import run_together
from usbrec.settings import COMPARED

Talks = Mapping[str, Sequence[runs.Row]]


def finished_rows(run: Path) -> list[runs.Row]:
    """Return the rows of a run's report; raises UserError unless it is finished."""
    runs.need(run / "report.json", "report")  # written last: all rows are there
    return runs.read_rows(runs.need(run / "rows.jsonl", "report"))


def read_run(folder: Path) -> tuple[dict[str, Any], Talks]:
    """Return the options of a run's report, and the talks of each method that it evaluated."""
    options = runs.read_json(runs.need(folder / "options" / "report.json", "report"))
    rows = finished_rows(folder)
    names = [name for name in COMPARED if any(name in row for row in rows)]
    talks = {name: [row[name] for row in rows if name in row] for name in names}
    return options, talks


def without_seeds(facts: Any) -> Any:
    """Return the options with every entry called "seed" left out."""
    if not isinstance(facts, Mapping):
        return facts
    return {name: without_seeds(x) for name, x in facts.items() if name != "seed"}


def pool(tried: Mapping[str, Talks]) -> dict[str, Any]:
    """Return the figures of each method by run and over all, and the pooled differences."""
    seed, methods = seed_for(0, "seeds"), list(next(iter(tried.values())))
    joined = {name: [row for talks in tried.values() for row in talks[name]] for name in methods}
    return {
        "runs": {
            run: {name: summarise(rows, seed) for name, rows in talks.items()}
            for run, talks in tried.items()
        },
        "all": {name: summarise(rows, seed) for name, rows in joined.items()},
        "differences": {
            f"{later} - {earlier}": compare(joined[later], joined[earlier], seed)
            for earlier, later in combinations(methods, 2)
        },
        "dialogues": len({row["dialog_id"] for row in joined[methods[0]]}),
    }


def compare_runs(arguments: Sequence[str] | None) -> None:
    """Read the runs, print the tables, and write the figures if a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with a report each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    flags = parser.parse_args(arguments)
    tried: dict[str, Talks] = {}
    first, *others = ((path, *read_run(path)) for path in flags.runs)
    for path, options, talks in (first, *others):
        if without_seeds(options) != without_seeds(first[1]) or list(talks) != list(first[2]):
            raise UserError(
                f"{path} has other options or methods than {first[0]}: only seeds may differ"
            )
        tried[str(path)] = talks
    found = pool(tried)
    for key in ("ieval", "recall@1"):
        rows = [
            [name, *(interval(run[name][key]) for run in found["runs"].values()), interval(x[key])]
            for name, x in found["all"].items()
        ]
        show(rows, [HEADINGS[key], *tried, "all"])
        print()
    gaps = found["differences"].items()
    rows = [[name, *(interval(x[key], form="+.3f") for key in HEADINGS)] for name, x in gaps]
    show(rows, [f"pooled over {found['dialogues']} dialogues", *HEADINGS.values()])
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("seeds.py", lambda: compare_runs(arguments))


if __name__ == "__main__":
    sys.exit(main())
