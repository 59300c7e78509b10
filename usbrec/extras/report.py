"""The report of a run as a dict and as text, the recall of rankings, and searches as trees.

Every number has its 95% interval and its n. A score that could not be read is counted under
`unparsed` and never enters a mean. Nothing here asks a model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import Any

from usbrec.chat import Row
from usbrec.crs.agents import Titles
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Dialogue, Examples, Utterance, format_dialogue
from usbrec.crs.evaluation import Guesses, Labels, gold_labels
from usbrec.crs.lessons import popularity_of
from usbrec.extras.baselines import copied, nearest, popular
from usbrec.extras.intervals import differences, mean_interval
from usbrec.extras.measures import CHECKED, agreement, search_figures, summaries, within_dialogues
from usbrec.loading import costs
from usbrec.options import seed_for
from usbrec.settings import COMPARED

WIDTH = 120  # of the report's text
# of other methods the internal judge
CHOOSERS = {"RL+SES+cards": "judge with cards", "RL+SES+memory": "judge from memory"}
CUTS = (1, 10, 50)  # K of a ranking's Recall@K
HEADINGS = {
    "ieval": "iEval (0-2)", "recall@1": "Recall@1", "hit": "hit", "rule_grade": "rule grade (0-2)"
}  # fmt: skip
GREATEST = {"ieval": 2.0, "rule_grade": 2.0}  # values of these figures, 1 of the others
SPLIT_HEADINGS = {"recall@1_repeated": "repeated", "recall@1_new": "new"}
SEARCH_LEGEND = Path(__file__).with_name("search.txt").read_text("utf-8").strip()
# name -> a value per row, and a weight per row or None for equal weights
Figures = dict[str, tuple[Sequence[float | None], Sequence[float] | None]]
Facts = Mapping[str, Any]


def report_of(rows: Sequence[Facts], baselines: Facts, run: Facts, seed: int) -> Row:
    """Return `build_report` of the rows of rows.jsonl, the options and counts of their `run`."""
    noted = {x: [row[x] for row in rows if x in row] for x in (*COMPARED, "agreement", "ranked")}
    methods = {name: noted[name] for name in COMPARED if noted[name]}
    judge = agreement(noted["agreement"], seed)
    judge["within_dialogue"] = within_dialogues(noted["ranked"], seed)
    return {**build_report(methods, baselines, judge, seed, run["options"]["eval"]["seen"]), **run}


def build_report(methods: Facts, baselines: Facts, judge: Facts, seed: int, seen: int = 0) -> Row:
    """Return the content of report.json but for the options and counts of the run.

    `methods` maps names to the rows of `evaluate_method`, of the same dialogues in the same order
    (asserted). `baselines` holds the `baseline_labels` of those dialogues. `judge` holds the
    `agreement` of both judges and, as "within_dialogue", `within_dialogues`. Where there are more
    than `seen` dialogues, the figures of the methods stand a second time under "after", without the
    first `seen`.
    """
    seed = seed_for(seed, "report")
    places = [[(x["dialog_id"], x["turn_id"]) for x in rows] for rows in methods.values()]
    assert all(place == places[0] for place in places), "methods saw other dialogues"
    areas = {name: x["all"]["mean"] for name, x in judge.get("within_dialogue", {}).items()}
    found = compare_all(methods, baselines, seed)
    if places and 0 < seen < len(places[0]):
        rest, labels = ({k: x[seen:] for k, x in rows.items()} for rows in (methods, baselines))
        found["after"] = {"seen": seen, **compare_all(rest, labels, seed)}
    searched = [x for x, rows in methods.items() if any(row["searches"] for row in rows)]
    judges = {name: CHOOSERS.get(name, "internal judge") for name in searched}
    figures = {x: search_figures(methods[x], areas.get(judges[x]), seed) for x in searched}
    return {**found, "summary": summaries(methods, seed), "judge": dict(judge), "search": figures}


def compare_all(methods: Facts, baselines: Facts, seed: int) -> dict[str, Any]:
    """Return the figures of all methods and baselines, and the differences of the methods."""
    groups = [row["dialog_id"] for row in next(iter(methods.values()), ())]
    pairs = combinations(methods, 2)
    return {
        "methods": {name: summarise(rows, seed) for name, rows in methods.items()},
        "differences": {f"{b} - {a}": compare(methods[b], methods[a], seed) for a, b in pairs},
        "baselines": {name: recall(rows, groups, seed) for name, rows in baselines.items()},
        "unparsed": {name: _mean([x["score"] is None for x in y]) for name, y in methods.items()},
    }


def summarise(rows: Sequence[Facts], seed: int) -> dict[str, Any]:
    """Return a method's means with intervals, and the mean probability of its judge's digits."""
    digits = [x["digit_probability"] for x in rows if x["digit_probability"] is not None]
    found = _means(_figures(rows), [row["dialog_id"] for row in rows], seed)
    return {**found, "digit_probability": _mean(digits)}


def recall(labels: Sequence[Labels], groups: Sequence[str], seed: int) -> dict[str, Any]:
    """Return Recall@1 over labels (as iEvaLM counts), and over repeated and new labels."""
    return _means(_recall_figures(labels), groups, seed)


def compare(later: Sequence[Facts], earlier: Sequence[Facts], seed: int) -> dict[str, Any]:
    """Return the paired differences of two methods over the same dialogues, per figure."""
    gaps = _gaps(_figures(later), _figures(earlier))
    groups = [row["dialog_id"] for row in later]
    return _means({x: gaps[x] for x in HEADINGS}, groups, seed, signed=True)


def _gaps(figures: Figures, others: Figures) -> Figures:
    """Return per figure the differences to another method's, row by row."""
    return {x: (differences(y, others[x][0]), share) for x, (y, share) in figures.items()}


def _means(figures: Figures, groups: Sequence[str], seed: int, signed: bool = False) -> Row:
    """Return the mean of each figure with its interval; `signed` figures are differences."""
    found = {}
    for name, (values, weights) in figures.items():
        most = GREATEST.get(name, 1.0)
        found[name] = mean_interval(values, seed, weights, groups, (-most if signed else 0.0, most))
    return found


def _figures(rows: Sequence[Facts]) -> Figures:
    return {
        "ieval": ([row["score"] for row in rows], None),
        **_recall_figures([row["labels"] for row in rows]),
        "hit": ([float(row["hit"]) for row in rows], None),
        "rule_grade": ([float(row["grade"]) for row in rows], None),
    }


def _recall_figures(labels: Sequence[Labels]) -> Figures:
    """Return the recall figures: per row the share of labels found, weighted by their number."""
    kinds = {"recall@1": (True, False), "recall@1_repeated": (True,), "recall@1_new": (False,)}
    figures: Figures = {}
    for name, kind in kinds.items():
        found = [[float(x["found"]) for x in row if x["repeated"] in kind] for row in labels]
        figures[name] = [*map(_mean, found)], [*map(len, found)]
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- the recall of rankings ---------------------------------------------------------------------


def ranked_recall(
    catalogue: Catalogue, examples: Examples, ranked: Titles, train: Examples, seed: int
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return {method: {K: `recall` at K}} for each K of CUTS up to the length of the rankings.

    Rankings are best first. Four baselines are measured beside them: nearest guesses the first
    label of the training row with the most similar words; copy-last the titles of the dialogue,
    newest first; most-popular the training labels, most frequent first; copy, then popular the one
    and then the other. The mean is over labels, as in iEvaLM; intervals draw whole dialogues. The
    last entry is the paired difference to the last baseline.
    """
    groups = [example.dialog_id for example in examples]
    most = popular(catalogue, popularity_of(train, catalogue))
    copies = [copied(catalogue, example) for example in examples]
    methods: dict[str, Sequence[Guesses]] = {
        "ranked": [[catalogue.named(title) for title in titles] for titles in ranked],
        "nearest": [[catalogue.named(x.items[0])] for x in nearest(examples, train)],
        "copy-last": copies,
        "most-popular": [most] * len(examples),
        "copy, then popular": [list(dict.fromkeys([*own, *most])) for own in copies],
    }
    cuts = [k for k in CUTS if k <= max(map(len, ranked))]

    def labels_at(k: int, own: Sequence[Guesses]) -> list[Labels]:
        return [gold_labels(catalogue, x, y[:k]) for x, y in zip(examples, own, strict=True)]

    first, *_, last = methods
    labels = {name: {k: labels_at(k, own) for k in cuts} for name, own in methods.items()}
    found = {name: {k: recall(x[k], groups, seed) for k in cuts} for name, x in labels.items()}
    pairs = {k: [_recall_figures(labels[name][k]) for name in (first, last)] for k in cuts}
    gaps = {k: _means(_gaps(*both), groups, seed, signed=True) for k, both in pairs.items()}
    return {**found, f"{first} - {last}": gaps}


def format_recall(found: Mapping[str, Mapping[int, Facts]]) -> str:
    """Return a table of one line per method and K: over all, repeated and new labels."""
    rows = {f"{name} @{k}": row for name, cuts in found.items() for k, row in cuts.items()}
    return "\n".join(_table("Recall", {"recall@1": "all", **SPLIT_HEADINGS}, rows))


# --- text ---------------------------------------------------------------------------------------


def format_report(report: Facts) -> str:
    """Return the report as text: figures, a legend, the data's notes, options and models."""
    after, methods = report.get("after"), report["methods"]
    digits = [f"{name} {_number(x['digit_probability'])}" for name, x in methods.items()]
    facts = {**report["counts"], **report["options"]}
    models = {n: x.get("path", x.get("model")) for n, x in facts.items() if isinstance(x, Mapping)}
    facts |= {n: x for n, x in models.items() if x}
    plain = [f"{n} {x}" for n, x in facts.items() if not isinstance(x, Mapping | list | tuple)]
    parts = [
        _method_table("method", report),
        _method_table(f"after the first {after['seen']}", after) if after else [],
        _table("Recall@1 of", SPLIT_HEADINGS, {**methods, **report["baselines"]}),
        _table("difference", HEADINGS, report["differences"], form="+.3f"),
        *_search_tables(report),
        [*judge_lines(report["judge"]), f"digits' probability: {', '.join(digits)}"],
        Path(__file__).with_name("legend.txt").read_text("utf-8").splitlines(),
        [fill(f"note: {x}", WIDTH) for x in facts.get("notes", ())],
        [fill(", ".join(plain), WIDTH, break_long_words=False, break_on_hyphens=False)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines).rstrip()


def _method_table(title: str, found: Facts) -> list[str]:
    """Return the table of the methods and baselines that `compare_all` has measured."""
    unparsed = {name: f"{share:.1%}" for name, share in found["unparsed"].items()}
    methods = {name: {**x, "unparsed": unparsed[name]} for name, x in found["methods"].items()}
    return _table(title, {**HEADINGS, "unparsed": "unparsed"}, {**methods, **found["baselines"]})


def _table(title: str, columns: Mapping[str, str], rows: Facts, form: str = ".3f") -> list[str]:
    """Return a head and one line per row; a cell is empty if the row has no such column.

    The head tells the number of values, "n 128", or the least and the greatest number of the rows.
    No rows give no table.
    """
    lines = [[title, *columns.values()], *([name] for name in rows)]
    for place, key in enumerate(columns, 1):
        found = [row.get(key, "") for row in rows.values()]
        if counts := sorted({x["n"] for x in found if not isinstance(x, str)}):
            lines[0][place] += f", n {'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}"
        for line, x in zip(lines[1:], found, strict=True):
            line.append(x if isinstance(x, str) else interval(x, form=form).split(" n ")[0])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [" ".join(map(str.ljust, line, widths)).rstrip() for line in lines if rows]


def _search_tables(report: Facts) -> list[list[str]]:
    """Return tables of summaries, candidates (a method per column) and AUC within a dialogue."""
    found, heads = report["search"], {name: name for name in ("precision", "recall", "exact")}
    within = report["judge"].get("within_dialogue", {})
    kinds = {"all": "against all misses", "broken": "against misses that break a wish"}
    keys = next(iter(found.values()), ())  # every method has the same figures
    rows = {key.replace("_", " "): {name: x[key] for name, x in found.items()} for key in keys}
    parts = [[*found][i : i + 4] for i in range(0, len(found), 4)]  # more are too wide
    return [
        _table("summary of", heads, report["summary"]),
        *(_table("candidates of", dict(zip(x, x, strict=True)), rows) for x in parts),
        _table("AUC within a dialogue", kinds, within) or ["AUC within a dialogue: left out"],
    ]


def judge_lines(judge: Facts) -> list[str]:
    """Return a line per judge of an `agreement`."""
    line = "{}, gold against rewritten: AUC {}, means {} and {}, {} unparsed, {} skipped"
    found = {told: judge[x] for x, told in CHECKED.items()}
    areas = {x: (interval(y, mean="auc"), *map(_number, y["means"])) for x, y in found.items()}
    return [line.format(x, *areas[x], found[x]["unparsed"], judge["skipped"]) for x in found]


def interval(found: Facts, mean: str = "mean", form: str = ".3f") -> str:
    """Return "0.520 [0.410, 0.630] n 60", or "none" if there were no rows; no zero has a minus."""
    if found[mean] is None:
        return "none"
    middle, low, high = (format(round(found[x], 3) + 0.0, form) for x in (mean, "low", "high"))
    return f"{middle} [{low}, {high}] n {found['n']}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def distinct(search: Facts) -> list[tuple[Facts, int, bool]]:
    """Return each different candidate of a search, how often it was drawn, and if it was chosen."""
    found = search["candidates"]
    first, chosen = {x["reply"]: x for x in reversed(found)}, found[search["best"]]["reply"]
    drawn = Counter(x["reply"] for x in found)
    return [(first[reply], count, reply == chosen) for reply, count in drawn.items()]


def format_search(root: Dialogue, search: Facts, coloured: bool = False) -> str:
    """Return a search's record drawn as a tree: dialogue, profile, candidates and their leaves.

    Equal candidates are drawn once. `coloured` text has a terminal's escape codes.
    """
    lines = [format_dialogue(root), "", f"Profile: {' '.join(search['profile'].split())}", ""]
    for x, n, chosen in distinct(search):
        reply = " ".join(x["reply"].split()) or "(empty)"
        head = f"{'*' if chosen else ' '} {value_text(x['value'], n, x.get('dropped'))}  {reply}"
        lines.append(f"\033[{'1;32' if chosen else '1'}m{head}\033[0m" if coloured else head)
        leaves = [y for y in x["leaves"] if len(y["lines"]) > 1]  # not judged at once
        for leaf in leaves:
            lines += _leaf_lines(leaf, *(("└─", "  ") if leaf is leaves[-1] else ("├─", "│ ")))
    return "\n".join(lines)


def value_text(value: float | None, draws: int, dropped: int | None = None) -> str:
    """Return a value of the search, how often its reply was drawn, and when a budget dropped it.

    So "1.50 x2, dropped at turn 2".
    """
    drawn = f"{_number(value)} x{draws}" if draws > 1 else _number(value)
    return f"{drawn}, dropped at turn {dropped}" if dropped else drawn


def _leaf_lines(leaf: Facts, branch: str, stem: str) -> list[str]:
    head = f"    {branch} {value_text(leaf['value'], leaf['weight'])}  "
    # the first line is the candidate
    first, *rest = format_dialogue(tuple(Utterance(*x) for x in leaf["lines"][1:])).splitlines()
    return [head + first, *(f"    {stem} ".ljust(len(head)) + line for line in rest)]


def format_facts(answer: Facts) -> str:
    """Return the lines below a reply: its titles, the ranking, the gold titles and the costs."""
    lines = [f"  titles: {'; '.join(answer['items']) or 'none of the catalogue'}"]
    for place, best in enumerate(answer.get("ranked", ()), 1):
        lines.append(f"  {place:>3}. {best['title']}  {best['logprob']:.2f}")
    if "gold" in answer:
        lines.append(f"  gold title: {'; '.join(answer['gold'])}")
    spent = [f"  {answer['seconds']} s, {costs(answer['tokens'])}"] if "seconds" in answer else []
    return "\n".join([*lines, *spent, ""])
