"""A grid of searches on held-out dialogues: the quality and the cost of each beside a plain reply.

    python benchmarks/sweep.py samples=1,3,8 temperature=0,0.5,0.8 [--limit 100] [--plot FILE.png]
    python benchmarks/sweep.py --ladder
    python benchmarks/sweep.py --budgets

Every combination of the values is a cell. An option is the end of a --ses flag: samples,
start_turn, cards=no,yes. --ses flags hold for every cell, --temperature and --max-new-tokens for
plain replies and explanations.

All cells meet the same dialogues of `valid` with the same seeds (usbrec/crs/evaluation.py), so that
the differences to the plain reply are paired. The newest run's recommender answers, or that of
--run-dir. A cell's rows are in sweep/ in the run folder, in a file that is named after all that
decided them: the same command goes on from there, and another grid takes over the cells that it
shares. The table is kept as sweep/NAME.json. Nothing here chooses a cell.

The ladder leads from the paper's search to those whose judge knows films, a change per row. Its
control needs no judge: the last column is Recall@1 of the candidate whose card fits the summary
best by rule, ties to the first.

The budgets are a quarter, a half and all of the tokens that a search asks for, by the search's own
estimate (usbrec/crs/ses.py, `plan`), for the paper's chain with eight candidates and for the search
with cards. All of them is the least budget with which no dialogue's search drops anything, so that
row is the plain search. "value" is the inner judge's value of the chosen candidate, in the rows of
a budget that which the whole search gives it, judged or not. "tokens / plain" are the prompt and
decoded tokens over those of the plain reply, as they were counted.
"""

import itertools
import json
import sys
import time
from argparse import SUPPRESS, Namespace
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

from contest import show

import infer
from usbrec import loading, runs
from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Sampling
from usbrec.crs.agents import JudgeScore, Roles
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Examples
from usbrec.crs.evaluation import EvaluationOptions, evaluate_method
from usbrec.crs.ses import SearchOptions, plan
from usbrec.crs.wishes import fit, read_profile
from usbrec.extras.intervals import mean_interval
from usbrec.extras.report import compare, interval, summarise
from usbrec.llm.training import digest
from usbrec.options import Parser, UserError, add_flags, from_flags, seed_for
from usbrec.parallel import run_together
from usbrec.runs import Results, Row, run_chunks
from usbrec.settings import PRESETS

Searching = SearchOptions | None  # None is the plain reply
Cells = list[tuple[dict[str, Any], Searching]]  # the values of the swept options, and the search
Met = tuple[list[Row], list[Row]]  # the talks of a cell, and the costs of each
FIGURES = {"ieval": "iEval, 0 to 2", "recall@1": "Recall@1"}
TOKENS = {"prompt_tokens": "prompt tokens", "decoded_tokens": "decoded tokens"}
COSTS = ("seconds", *TOKENS)
KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {  # how a value is read, what is expected
    bool: ({"no": False, "yes": True}.__getitem__, "yes or no"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}
LADDER: dict[str, dict[str, Any]] = {  # a row -> what it changes
    "the paper's chain": {},
    "its candidate judged too": {"scored": "path"},
    "the candidate alone judged": {"scored": "leaf", "turns": 1},
    "three different titles": {"candidates": "distinct"},
    "cards": {"cards": True, "veto": False},
    "veto": {"veto": True},
    "the three likeliest titles": {"candidates": "ranked", "prior": 0.0},
    "eight of them": {"samples": 8},
    "values weighted by probability": {"prior": 0.3},
    "from memory in place of cards": {"cards": False, "memory": True},
}
BUDGETED: dict[str, dict[str, Any]] = {"chain, N=8": {"samples": 8}, "cards": PRESETS["ses_cards"]}
SHARES = (1.0, 0.5, 0.25)  # of the tokens of a whole search, which comes first
MOST_TOKENS = 10**9  # of a search, more than any asks for
# the flags in --help; --help-all lists every flag
SHOWN = """ladder budgets run-dir limit plot data data-dir recommender simulator model device seed
    chunk-size temperature max-new-tokens ses-samples ses-turns ses-mode ses-cards"""


# --- the grid ---------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: the grid, and those flags of infer.py that say who answers and how."""
    usage = "sweep.py [FLAGS] OPTION=VALUE,VALUE ..."
    parser = Parser(SHOWN, prog="sweep.py", description=__doc__, usage=usage)
    parser.add_argument("grid", nargs="*", metavar="OPTION=VALUES")
    parser.add_argument("--ladder", action="store_true", help="in place of a grid")
    parser.add_argument("--budgets", action="store_true", help="in place of a grid")
    parser.add_argument("--limit", type=int, default=100, help="dialogues, 0 for all (default 100)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the cells")
    parser.add_argument("--verbose", action="store_true", help="tell the tokens of every chunk")
    parser.add_argument("--data", help="sample, redial, opendialkg or a folder (or the run's)")
    parser.add_argument("--data-dir", help="the folder of a downloaded dataset")
    parser.add_argument("--run-dir", type=Path, help="a run of train.py (default: the newest)")
    parser.add_argument("--recommender", help="an adapter, a model, a server's URL#MODEL, or none")
    parser.add_argument("--simulator", help="the same, playing the user")
    told = "the same, as the external judge (default: the simulator)"
    parser.add_argument("--judge", default=SUPPRESS, help=told)
    add_flags(parser, loading.ModelOptions)
    add_flags(parser, ReplyOptions, skip=("ses", "rank", "rank_tokens"))
    unread = ("top_k", "top_p", "min_p", "stop")
    add_flags(parser, Sampling, defaults=infer.PLAIN, skip=unread)
    add_flags(parser, SearchOptions, "ses")
    return parser


def read_grid(flags: Namespace, asked: Examples = (), titles: int = 0) -> Cells:
    """Return the cells: the plain reply, then the grid, the last option fastest.

    A cell's search is that of the --ses flags and the cell's values; cards bring the defaults of
    --ses-cards. Budgets are shares of what the dialogues ask for. Raises UserError for an option or
    a value that no search has.
    """
    hints = get_type_hints(SearchOptions)
    given = {name[4:]: x for name, x in vars(flags).items() if name.startswith("ses_")}
    if flags.budgets:
        return budget_cells(asked, given, titles)
    if flags.ladder:
        if given:
            raise UserError("--ladder has its own searches: no --ses flags")
        cells: Cells = [({}, None)]
        values: dict[str, Any] = {}
        for name, change in LADDER.items():
            values |= change
            cells.append(({"changed": name}, SearchOptions(**values)))
        return cells
    swept: dict[str, dict[Any, None]] = {}  # a value that is given twice makes one cell
    for word in flags.grid:
        start, equals, texts = word.partition("=")
        name = start.replace("-", "_")
        if not equals or name not in hints:
            told = f"expected OPTION=VALUE,VALUE with OPTION one of {', '.join(hints)}"
            raise UserError(f"{told}; got {word!r}")
        if name in given:
            raise UserError(f"{word} tries values: not with --ses-{start}, which holds for all")
        read, expected = KINDS.get(hints[name], (str, "text"))
        for text in texts.split(","):
            try:
                swept.setdefault(name, {})[read(text)] = None
            except (KeyError, ValueError) as error:
                raise UserError(f"{name}: expected {expected}, got {text!r} in {word}") from error
    cells = [({}, None)]
    for combination in itertools.product(*swept.values()):
        values = given | dict(zip(swept, combination, strict=True))
        try:
            own = (x for name, x in PRESETS.items() if values.get(name.removeprefix("ses_")))
            search = SearchOptions(**{**next(own, {}), **values})
        except ValueError as error:
            raise UserError(f"{error} (an option of the search)") from error
        cells.append(({name: values[name] for name in swept}, search))
    return cells


def budget_cells(asked: Examples, given: Mapping[str, Any], titles: int) -> Cells:
    """Return the plain reply and the budgets of each search; `given` options hold for all.

    The dialogues and the number of `titles` of the catalogue decide what a whole search takes.
    """
    cells: Cells = [({}, None)]
    for name, values in BUDGETED.items():
        search = SearchOptions(**{**values, **given})
        whole = whole_tokens(asked, search, titles)
        for share in SHARES:
            budget = round(share * whole)
            told = {"of": name, "share": share, "budget_tokens": budget}
            cells.append((told, replace(search, budget_tokens=budget)))
    return cells


def whole_tokens(asked: Examples, search: SearchOptions, titles: int = 0) -> int:
    """Return the least budget of tokens with which no dialogue's search drops anything."""

    def is_enough(tokens: int) -> bool:
        searching = replace(search, budget_tokens=tokens)
        return not any(plan(x.history, searching, titles) for x in asked)

    return 1 + bisect_left(range(1, MOST_TOKENS), True, key=is_enough)


def check(flags: Namespace) -> None:
    """Raise UserError for what would fail only after the long work."""
    if sum(map(bool, (flags.grid, flags.ladder, flags.budgets))) != 1:
        raise UserError("nothing or too much to try: give OPTION=VALUES, --ladder or --budgets")
    if flags.budgets and any(name.startswith("ses_budget") for name in vars(flags)):
        raise UserError("--budgets has budgets of its own: no --ses-budget flags")
    if flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    check_plot(flags.plot)


def check_plot(path: Path | None) -> None:
    """Raise UserError if a picture cannot be drawn into this file."""
    if path and path.suffix != ".png":
        raise UserError(f"--plot must name a file that ends with .png, got {path}")
    if path and not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")
    if path and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")


# --- the cells --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TimedRoles(Roles):
    """Roles that call `replied` once all replies are there, before they are judged."""

    replied: Callable[[], None]

    def explain_and_judge(self, *asked: Any, **named: Any) -> list[tuple[str, JudgeScore]]:
        """Return the explanations and scores of `Roles.explain_and_judge`."""
        self.replied()
        return super().explain_and_judge(*asked, **named)


def meet_chunk(
    recommender: Recommender, options: EvaluationOptions, searching: Searching, chunk: Examples
) -> list[Row]:
    """Return the evaluated talks about a chunk, each with an equal share of the replies' costs.

    Explaining and judging, which cost every cell the same, are left out.
    """
    costs: dict[str, float] = {}
    recommender.spent()  # the judge's tokens since the last chunk's replies
    start = time.perf_counter()

    def replied() -> None:
        spent = {"seconds": time.perf_counter() - start, **recommender.spent()}
        costs.update({name: round(spent[name] / len(chunk), 6) for name in COSTS})

    roles = TimedRoles(**vars(recommender.roles), replied=replied)
    talks = evaluate_method(roles, chunk, recommender.options.seed, options, searching)
    return [{**talk, "costs": costs} for talk in talks]


def run_sweep(
    recommender: Recommender, cells: Cells, asked: Examples, facts: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Return the sweep in JSON's types: the facts, and the figures of each cell.

    `facts` decide a reply besides the options and the dialogues. A talk has as many turns as the
    latest `start_turn`, so that every search takes place. Rows that `folder` has are read from it.
    """
    o, drawn, films = recommender.options, recommender.sampling, recommender.roles.catalogue
    turns = max((search.start_turn for _, search in cells if search), default=1)
    options = EvaluationOptions(
        turns=turns, temperature=drawn.temperature, max_new_tokens=drawn.max_new_tokens
    )
    shared = {**facts, "seed": o.seed, "chunk-size": o.chunk_size, "eval": asdict(options)}
    shared |= {"dialogues": digest(asked), "catalogue": digest(films)}
    found: list[Row] = []
    met: list[Met] = []
    for number, (values, search) in enumerate(cells, 1):
        own = {**shared, "search": asdict(search) if search else None}
        path, label = folder / f"{name_for(own)}.jsonl", f"cell {number} of {len(cells)}"
        results = Results(path, o.chunk_size, label, own, recommender.engines)
        rows = run_chunks(results, asked, partial(meet_chunk, recommender, options, search))
        costs = [row.pop("costs") for row in rows]
        met.append((rows, costs))
        if values.get("share", 1.0) == 1.0:
            judged = met[-1][0]
        cell = {"values": values, "search": own["search"], "rows": path.name}
        ruled = {"rule": rule_recall(met[-1][0], films, seed_for(o.seed, "sweep"))}
        cell["value"] = chosen_value(met[-1][0], judged, seed_for(o.seed, "sweep"))
        found.append(cell | figures(met[-1], met[0], seed_for(o.seed, "sweep")) | ruled)
    swept = list(cells[-1][0])
    name = f"{'-'.join(swept)}-{name_for([cell['rows'] for cell in found])}"
    return {"name": name, "swept": swept, "n": len(asked), **shared, "cells": found}


def name_for(value: Any) -> str:
    """Return a name of 16 hexadecimal digits for a value of JSON's types."""
    return digest([json.dumps(value, sort_keys=True)])[:16]


def figures(own: Met, plain: Met, seed: int) -> dict[str, Any]:
    """Return a cell's means, its paired differences to the plain reply, and its costs.

    The costs are per dialogue. `times` is the seconds over those of the plain reply, `tokens` the
    tokens over its tokens.
    """
    (talks, lines), (others, least) = own, plain
    costs = {name: fmean(x[name] for x in lines) for name in COSTS}
    costs["times"] = costs["seconds"] / fmean(x["seconds"] for x in least)
    costs["tokens"] = total(lines) / total(least)
    means, gaps = summarise(talks, seed), compare(talks, others, seed)
    told = {"differences": {name: gaps[name] for name in FIGURES}, "costs": costs}
    return {name: means[name] for name in FIGURES} | told


def total(lines: Sequence[Row]) -> float:
    """Return the prompt and decoded tokens of all dialogues."""
    return sum(x[name] for x in lines for name in TOKENS)


def chosen_value(talks: Sequence[Row], judged: Sequence[Row], seed: int) -> dict[str, Any]:
    """Return the mean value, with its interval, of the candidates that the first searches chose.

    A value is that of the same first response in the searches of `judged`. A response without one
    does not count.
    """
    values: list[float | None] = []
    for own, other in zip(talks, judged, strict=True):
        if own["searches"]:
            asked, known = own["searches"][0], other["searches"][0]["candidates"]
            given = {opening(x): x["value"] for x in reversed(known)}
            values.append(given.get(opening(asked["candidates"][asked["best"]])))
    return mean_interval(values, seed, limits=(0.0, 2.0))


def opening(candidate: Row) -> str:
    """Return a candidate's first response as it was judged, "" for an empty one."""
    return str(candidate["leaves"][0]["lines"][0][1]) if candidate["leaves"] else ""


def rule_recall(talks: Sequence[Row], films: Catalogue, seed: int) -> dict[str, Any]:
    """Return Recall@1, with its interval, of the candidate whose card fits the summary best.

    The rule is `wishes.fit`, ties go to the first, and a reply without a title fits worst. Of each
    talk the first search counts.
    """
    found = []
    for search in (talk["searches"][0] for talk in talks if talk["searches"]):
        told = read_profile(search["profile"], films)
        items = [films.get(x["title"] or "") for x in search["candidates"]]
        fits = [-1 if item is None else fit(item, told) for item in items]
        found.append(float(search["candidates"][fits.index(max(fits))]["found"]))
    return mean_interval(found, seed)


# --- the table and the picture ----------------------------------------------------------------


def header_of(sweep: Mapping[str, Any]) -> list[str]:
    """Return the titles of the table's columns."""
    gaps = [f"{title} - plain" for title in FIGURES.values()]
    return [
        "",
        *sweep["swept"],
        *FIGURES.values(),
        *gaps,
        "value",
        "time / plain",
        "tokens / plain",
        *TOKENS.values(),
        "by rule",
    ]


def line_of(sweep: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    """Return a cell's line: its values, means, differences and costs."""
    values = [word(cell["values"].get(name, "")) for name in sweep["swept"]]
    means = [interval(cell[name]) for name in FIGURES]
    gaps = [interval(cell["differences"][name], form="+.3f") for name in FIGURES]
    costs = [f"{cell['costs'][name]:.1f}" for name in ("times", "tokens", *TOKENS)]
    kind = "search" if cell["values"] else "plain reply"
    return [kind, *values, *means, *gaps, interval(cell["value"]), *costs, interval(cell["rule"])]


def word(value: Any) -> str:
    """Return a value as it is given on the command line."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def save_plot(sweep: Mapping[str, Any], path: Path) -> None:
    """Draw iEval and Recall@1 over the first swept option, a line per combination of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), FIGURES, strict=True):
        plain = sweep["cells"][0][key]["mean"]
        for name, points in lines_of(sweep, key).items():
            means = [x["mean"] for x in points.values()]
            below = [x["mean"] - x["low"] for x in points.values()]
            above = [x["high"] - x["mean"] for x in points.values()]
            reach = [below, above]
            axis.errorbar(list(points), means, yerr=reach, capsize=4, marker="o", label=name)
        if plain is not None:
            axis.axhline(plain, linestyle="--", color="gray", label="plain reply")
        axis.set_title(f"{FIGURES[key]}, 95% interval")
        axis.set_xlabel(sweep["swept"][0])
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def lines_of(sweep: Mapping[str, Any], key: str) -> dict[str, dict[Any, Row]]:
    """Return the searches' values of a figure by line, then by value of the first option."""
    first, *others = sweep["swept"]
    lines: dict[str, dict[Any, Row]] = {}
    for cell in sweep["cells"][1:]:
        values = cell["values"]
        name = ", ".join(f"{x} {word(values[x])}" for x in others) or "search"
        at = word(values[first]) if isinstance(values[first], bool) else values[first]
        if cell[key]["n"]:
            lines.setdefault(name, {})[at] = cell[key]
    return lines


# --- the command ------------------------------------------------------------------------------


def sweep_all(arguments: Sequence[str] | None) -> None:
    """Compute the cells, print the table, and keep it beside the cells."""
    flags = build_parser().parse_intermixed_args(arguments)
    check(flags)
    cells = [] if flags.budgets else read_grid(flags)  # faults of the grid, before the work
    setup = infer.set_up(flags)
    seed, folder = from_flags(ReplyOptions, flags).seed, setup.folder / "sweep"
    asked = held_out(setup, flags.limit, seed_for(seed, "sweep"))
    recommender = infer.assemble(setup, flags)
    cells = cells or read_grid(flags, asked, len(recommender.roles.catalogue.items))
    found = run_sweep(recommender, cells, asked, setup.facts(), folder)
    runs.write_json(folder / f"{found['name']}.json", found)
    show([line_of(found, cell) for cell in found["cells"]], header_of(found))
    if flags.plot:
        save_plot(found, flags.plot)
    tell_end(recommender, folder / f"{found['name']}.json")


def held_out(setup: infer.Setup, limit: int, seed: int) -> Examples:
    """Return `limit` dialogues of the split valid (0: all); raises UserError if it has none."""
    asked = loading.pick_rows(setup.rows("valid"), limit, seed, apart=True)
    if not asked:
        raise UserError(f"the split valid of {setup.data} has no dialogues")
    return asked


def tell_end(recommender: Recommender, path: Path) -> None:
    """Tell how many prompts were shortened, and the file that holds the figures."""
    for told in loading.shortened_lines(recommender.engines):
        infer.tell(told)
    infer.tell(f"the same for programs: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("sweep.py", lambda: sweep_all(arguments))


if __name__ == "__main__":
    sys.exit(main())
