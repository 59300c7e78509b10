"""What a run found: the report as one dict, as a table to read, as a picture, and a search drawn.

Every number stands beside its 95% interval and its n; a score that could not be read is counted
under `unparsed` and never enters a mean. Nothing here asks a model.

    python -m usbrec.crs.report runs/sample/report.json      # draws report.png beside it
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from usbrec.crs.dialogue import Dialogue, Utterance
from usbrec.crs.evaluation import EvalRow
from usbrec.crs.intervals import auc, mean_interval, paired_difference, rank_correlation
from usbrec.options import Parser, UserError, seed_for

METHODS = ("B/L", "SFT", "RL", "SES", "SFT+SES", "RL+SES")  # the order of the paper's table
Labels = Sequence[Mapping[str, Any]]


def build_report(
    methods: Mapping[str, Sequence[EvalRow]],
    baselines: Mapping[str, Sequence[Labels]],
    judge: Mapping[str, Any],
    options: Mapping[str, Any],
    counts: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Return report.json's content.

    `methods` maps the paper's names to rows over the same dialogues in the same order (asserted);
    `baselines` holds `baseline_labels` of those dialogues, `judge` the `agreement` of both judges.
    """
    seed = seed_for(seed, "report")
    ordered = {name: methods[name] for name in METHODS if name in methods}
    assert len(ordered) == len(methods), f"methods are named {METHODS}, got {tuple(methods)}"
    places = {name: [(r.dialog_id, r.turn_id) for r in rows] for name, rows in ordered.items()}
    assert len({tuple(place) for place in places.values()}) <= 1, "methods saw other dialogues"
    groups = [dialog_id for dialog_id, _ in next(iter(places.values()), [])]
    differences = {
        f"{later} - {earlier}": compare(ordered[later], ordered[earlier], seed)
        for earlier, later in combinations(ordered, 2)
    }
    return {
        "methods": {name: measure(rows, seed) for name, rows in ordered.items()},
        "differences": differences,
        "baselines": {name: recall(rows, groups, seed) for name, rows in baselines.items()},
        "judge": dict(judge),
        "unparsed": {name: _unparsed(rows) for name, rows in ordered.items()},
        "options": dict(options),
        "counts": dict(counts),
    }


def measure(rows: Sequence[EvalRow], seed: int) -> dict[str, Any]:
    """Return one method's means with their intervals, and the rules' opinion beside the judge's."""
    groups = [row.dialog_id for row in rows]
    read = [(row.score, row.grade) for row in rows if row.score is not None]
    scores = [score for score, _ in read]
    judged = [row.dialog_id for row in rows if row.score is not None]
    return {
        "ieval": mean_interval(scores, seed, groups=judged),
        **recall([row.labels for row in rows], groups, seed),
        "hit": mean_interval([float(row.hit) for row in rows], seed, groups=groups),
        "rule_grade": mean_interval([float(row.grade) for row in rows], seed, groups=groups),
        "judge_and_rules": {
            "auc": auc(
                [s for s, grade in read if grade == 2], [s for s, grade in read if grade < 2]
            ),
            "spearman": rank_correlation(scores, [float(grade) for _, grade in read]),
            "n": len(read),
        },
        "digit_mass": sum(row.mass for row in rows) / len(rows) if rows else None,
        "empty_replies": sum(reply == "" for row in rows for reply in row.replies),
    }


def recall(labels: Sequence[Labels], groups: Sequence[str], seed: int) -> dict[str, Any]:
    """Return Recall@1 over labels (as iEvaLM counts), over rows, and by repeated and new labels.

    Over rows: the share of rows of which the first title is any gold title.
    """
    repeated = [[x for x in row if x["repeated"]] for row in labels]
    new = [[x for x in row if not x["repeated"]] for row in labels]
    found = [float(any(x["found"] for x in row)) for row in labels]
    return {
        "recall@1": _over_labels(labels, groups, seed),
        "recall@1_rows": mean_interval(found, seed, groups=groups),
        "recall@1_repeated": _over_labels(repeated, groups, seed),
        "recall@1_new": _over_labels(new, groups, seed),
    }


def compare(later: Sequence[EvalRow], earlier: Sequence[EvalRow], seed: int) -> dict[str, Any]:
    """Return the paired differences of two methods over the same dialogues."""
    groups = [row.dialog_id for row in later]
    weights = [float(len(row.labels)) for row in later]

    def gap(value: Callable[[EvalRow], float | None], w: list[float] | None = None) -> Any:
        first, second = [value(row) for row in later], [value(row) for row in earlier]
        return paired_difference(first, second, seed, w, groups)

    return {
        "ieval": gap(lambda row: row.score),
        "recall@1": gap(lambda row: _share(row.labels), weights),
        "hit": gap(lambda row: float(row.hit)),
        "rule_grade": gap(lambda row: float(row.grade)),
    }


def _share(labels: Labels) -> float:
    return sum(bool(label["found"]) for label in labels) / len(labels)


def _over_labels(labels: Sequence[Labels], groups: Sequence[str], seed: int) -> dict[str, Any]:
    kept = [i for i, row in enumerate(labels) if row]
    values = [_share(labels[i]) for i in kept]
    weights = [float(len(labels[i])) for i in kept]
    return mean_interval(values, seed, weights, [groups[i] for i in kept])


def _unparsed(rows: Sequence[EvalRow]) -> float | None:
    return sum(row.score is None for row in rows) / len(rows) if rows else None


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as text: a line a method, the differences, the baselines, the judges."""
    columns = ("ieval", "recall@1", "hit")
    lines = [_table_row("method", (*columns, "rule grade", "unparsed"))]
    for name, found in report["methods"].items():
        cells = [interval(found[key]) for key in (*columns, "rule_grade")]
        lines.append(_table_row(name, (*cells, f"{report['unparsed'][name]:.1%}")))
    for name, found in report["baselines"].items():
        lines.append(_table_row(name, ("", interval(found["recall@1"]), "", "", "")))
    lines += ["", _table_row("Recall@1 split", ("repeated", "new", "rows"))]
    for name, found in {**report["methods"], **report["baselines"]}.items():
        keys = ("recall@1_repeated", "recall@1_new", "recall@1_rows")
        lines.append(_table_row(name, [interval(found[key]) for key in keys]))
    lines += ["", _table_row("difference", columns)]
    for name, found in report["differences"].items():
        lines.append(_table_row(name, [interval(found[key], sign=True) for key in columns]))
    return "\n".join([*lines, "", *_judge_lines(report), _options_line(report)]).rstrip()


def _judge_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{name} judge, gold reply against a rewritten one: AUC {interval(found, mean='auc')}, "
        f"{found['unparsed']} unparsed, {report['judge'].get('skipped', 0)} skipped"
        for name, found in report["judge"].items()
        if isinstance(found, Mapping)
    ]
    for name, found in report["methods"].items():
        opinion = found["judge_and_rules"]
        lines.append(
            f"judge against rules, {name}: AUC {_number(opinion['auc'])}, "
            f"rank correlation {_number(opinion['spearman'])}, n {opinion['n']}; "
            f"digits' probability {_number(found['digit_mass'])}, "
            f"empty replies {found['empty_replies']}"
        )
    return lines


def _options_line(report: Mapping[str, Any]) -> str:
    named = {**report["counts"], **report["options"]}
    plain = {n: v for n, v in named.items() if not isinstance(v, Mapping | list | tuple)}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def interval(found: Mapping[str, Any], mean: str = "mean", sign: bool = False) -> str:
    """Return "0.52 [0.41, 0.63] n 60", or "none" where there were no rows."""
    if found[mean] is None:
        return "none"
    form = "+.3f" if sign else ".3f"
    low, high = (format(found[side], form) for side in ("low", "high"))
    return f"{format(found[mean], form)} [{low}, {high}] n {found['n']}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _table_row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<16}" + "".join(f"{cell:<30}" for cell in cells).rstrip()


def format_dialogue(dialogue: Dialogue) -> str:
    """Return a dialogue with its speakers, a line each."""
    return "\n".join(f"{line.speaker.capitalize()}: {_flat(line.text)}" for line in dialogue)


def _flat(text: str) -> str:
    return " ".join(text.split())


def format_search(root: Dialogue, search: Mapping[str, Any]) -> str:
    """Return a `search_record` as a tree: dialogue, profile, each candidate and its leaves."""
    lines = [format_dialogue(root), "", f"Profile: {_flat(search['profile'])}", ""]
    for number, candidate in enumerate(search["candidates"]):
        mark = "*" if number == search["best"] else " "
        value, leaves = _number(candidate["value"]), candidate["leaves"]
        lines.append(f"{mark} {value}  {_flat(candidate['reply']) or '(empty)'}")
        for leaf in leaves:
            last = leaf is leaves[-1]
            lines += _leaf_lines(leaf, "└─" if last else "├─", "  " if last else "│ ")
    return "\n".join(lines)


def _leaf_lines(leaf: Mapping[str, Any], branch: str, stem: str) -> list[str]:
    drawn = f" x{leaf['weight']}" if leaf["weight"] > 1 else ""
    head = f"    {branch} {_number(leaf['value'])}{drawn}  "
    ahead = tuple(Utterance(*line) for line in leaf["lines"][1:])  # the first is the candidate
    first, *rest = format_dialogue(ahead).splitlines() or ["(judged at once)"]
    return [head + first, *(f"    {stem} ".ljust(len(head)) + line for line in rest)]


def format_facts(answer: Mapping[str, Any]) -> str:
    """Return what stands below a reply: its titles, the best of a ranking, the gold titles."""
    lines = [f"  titles: {'; '.join(answer['items']) or 'none of the catalogue'}"]
    for place, best in enumerate(answer.get("ranked", ()), 1):
        lines.append(f"  {place:>3}. {best['title']}  {best['logprob']:.2f}")
    if "gold" in answer:
        lines.append(f"  gold title, which no speaker knew: {'; '.join(answer['gold'])}")
    return "\n".join([*lines, f"  {answer['seconds']} s\n"])


def save_plot(report: Mapping[str, Any], path: Path) -> None:
    """Save iEval and Recall@1 of each method with their intervals as a picture.

    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("ieval", "recall@1"), strict=True):
        found = {name: x[key] for name, x in report["methods"].items() if x[key]["n"]}
        means = [x["mean"] for x in found.values()]
        below = [x["mean"] - x["low"] for x in found.values()]
        above = [x["high"] - x["mean"] for x in found.values()]
        axis.bar(list(found), means, yerr=[below, above], capsize=4, color="tab:blue", alpha=0.7)
        axis.set_title(f"{key}, 95% interval")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a report; a user's fault is printed as one sentence and ends with 2."""
    parser = Parser(prog="report", description="Draw a report's methods with their intervals.")
    parser.add_argument("report", type=Path, help="a run's report.json")
    path = Path("report.json")
    try:
        path = parser.parse_args(arguments).report
        save_plot(json.loads(path.read_text("utf-8")), path.with_suffix(".png"))
    except (OSError, ValueError, KeyError) as error:
        print(f"report: {path}: {error}", file=sys.stderr)
        return 2
    print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
