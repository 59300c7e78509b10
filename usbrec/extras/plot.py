"""A report as a picture: iEval and Recall@1 of each method with their 95% intervals.

    python -m usbrec.extras.plot runs/sample/report.json      # draws report.png beside it

It needs matplotlib.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from usbrec.options import Parser, UserError
from usbrec.parallel import run_together
from usbrec.runs import read_json


def save_plot(report: Mapping[str, Any], path: Path) -> None:
    """Save iEval and Recall@1 of each method with their intervals as a picture.

    Raises UserError where matplotlib is not installed, and for a report without methods or figures.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    try:
        for axis, key in zip(figure.subplots(1, 2), ("ieval", "recall@1"), strict=True):
            found = {name: x[key] for name, x in report["methods"].items() if x[key]["n"]}
            means = [x["mean"] for x in found.values()]
            sides = [[abs(x[y] - x["mean"]) for x in found.values()] for y in ("low", "high")]
            axis.bar(list(found), means, yerr=sides, capsize=4, color="tab:blue", alpha=0.7)
            axis.set_title(f"{key}, 95% interval")
    except (AttributeError, KeyError, TypeError) as error:
        told = "the report does not give every method's iEval and Recall@1 as train.py writes them"
        raise UserError(f"no plot in {path}: {told}") from error
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a report; a user's fault is printed as one sentence and ends with 2."""
    parser = Parser(prog="plot", description="Draw a report's methods with their intervals.")
    parser.add_argument("report", type=Path, help="a run's report.json")

    def job() -> None:
        path = parser.parse_args(arguments).report
        save_plot(read_json(path), path.with_suffix(".png"))
        print(path.with_suffix(".png"))

    return run_together("plot", job)


if __name__ == "__main__":
    sys.exit(main())
