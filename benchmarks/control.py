"""Is it the preferences? The run's sft continued for SimPO's tokens, beside the run's SFT and RL.

    python benchmarks/control.py --run-dir runs/sample [--seed N and other flags of that run]

Two copies of the adapter `sft` learn on, with SimPO's rate and batches, until they have seen as
many tokens as SimPO did:

    SFT + gold      the gold replies of the dialogues that gave pairs
    SFT + chosen    the chosen replies of the pairs, a gold one or the best sample

Then they meet the run's test dialogues with the run's seeds and judge (usbrec/crs/evaluation.py),
so that all differences are paired. The run must have its report. Adapters, rows and the table
(control.json) are in control/ in the run folder; the same command goes on after an interruption.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from contest import show

import train
from usbrec import loading, runs
from usbrec.chat import Lesson, Message
from usbrec.crs.agents import Side
from usbrec.crs.datasets import read_pairs
from usbrec.crs.dialogue import Examples
from usbrec.crs.evaluation import evaluate_method
from usbrec.extras.default_model import find_model
from usbrec.extras.report import HEADINGS, compare, interval, summarise
from usbrec.llm.loss import Sft
from usbrec.llm.packing import Tree, lesson_tree
from usbrec.llm.training import TrainingJob, step_items, usable
from usbrec.llm.training import train as learn
from usbrec.options import UserError, seed_for
from usbrec.parallel import run_together
from usbrec.runs import RUNS, Results, Row, run_chunks
from usbrec.settings import Settings, read_settings
from usbrec.work import Work

CONTROLS = ("gold", "chosen")


def gold_replies(work: Work, count: int) -> list[str]:
    """Return the gold reply beside each of the `count` pairs, in their order."""
    rows = work.rows("pairs")
    records = runs.read_rows(runs.need(work.folder / "samples.jsonl", "pairs"))
    made = zip(rows, records, strict=True)
    found = [x.response for x, record in made for _ in record["pairs"]]
    if len(found) != count:
        raise UserError(f"{work.folder}: pairs.jsonl has {count} pairs, samples.jsonl {len(found)}")
    return found


def lesson_of(pair: Row, reply: str) -> Lesson:
    """Return the pair's prompt with this reply as the one to learn."""
    prompt = [Message(x["role"], x["content"]) for x in pair["prompt"]]
    return [(*prompt, Message("assistant", reply, 1.0))]


def lessons(work: Work, pairs: Sequence[Row], name: str) -> list[Tree]:
    """Return a control's dialogues as trees."""
    engine = work.engine
    replies = [pair["chosen"][0]["content"] for pair in pairs]
    if name == "gold":
        replies = gold_replies(work, len(pairs))
    made = map(lesson_of, pairs, replies)
    trees = [lesson_tree(engine.tokenizer, x) for x in made]
    return usable(trees, engine.max_length, Sft())[0]


def train_control(
    work: Work, pairs: Sequence[Row], tokens: int, settings: Settings, name: str
) -> Side:
    """Return the side of a copy of `sft` that has learned a control's dialogues."""
    trees = lessons(work, pairs, name)
    mean = sum(map(len, trees)) / len(trees)
    seed = seed_for(settings.data.seed, "control", "order")
    steps = max(1, round(tokens / mean / settings.simpo.batch_size))
    side = work.adapted("sft", name)
    options = replace(settings.simpo, seed=seed, steps=steps)
    job = TrainingJob(options, Sft(), work.folder / "control" / name, f"SFT + {name}")
    print(f"SFT + {name}: {len(trees)} dialogues, {steps} steps of {settings.simpo.batch_size}")
    learn(work.engine.model, name, trees, job)
    work.engine.clear_cache()
    return side


def meet(work: Work, side: Side, asked: Examples, settings: Settings, name: str) -> list[Row]:
    """Return a control's evaluated talks about the run's test dialogues."""
    roles = replace(work.roles("sft", settings.data.judge), recommender=side)

    def meet_chunk(chunk: Examples) -> list[Row]:
        return evaluate_method(roles, chunk, settings.data.seed, settings.eval)

    path, size = work.folder / "control" / f"{name}.jsonl", settings.data.chunk_size
    facts = {"report": runs.read_json(work.folder / "options" / "report.json")}
    results = Results(path, size, f"SFT + {name}", facts, list(work.models.engines.values()))
    return run_chunks(results, asked, meet_chunk)


def check(work: Work) -> None:
    """Raise UserError unless the run's report was made with these settings and this data."""
    facts = json.loads(json.dumps(work.facts("report")))
    note = runs.need(work.folder / "options" / "report.json", "report")
    if runs.read_json(note) != facts:
        raise UserError(f"{note} tells of other options or data: give the flags of that run")


def compare_controls(flags: Namespace) -> None:
    """Train and evaluate the controls, print the table, and keep it as control.json."""
    settings = read_settings(flags)
    if settings.data.rounds > 1:
        raise UserError("--rounds above 1: the controls have the rows and tokens of one round")
    folder = flags.run_dir or RUNS / Path(settings.data.data).name
    with runs.locked(folder):
        compare_within(Work(settings, folder, find_model), settings)


def compare_within(work: Work, settings: Settings) -> None:
    """Do the same for a run of these settings."""
    folder = work.folder
    check(work)
    work.prepare(["report"])
    rows = runs.read_rows(runs.need(folder / "rows.jsonl", "report"))
    tests = loading.pick_rows(work.test, 0, seed_for(settings.data.seed, "test"), apart=True)
    asked = tests[: settings.data.rows("eval") or None]
    talks = {x: [row[x] for row in rows if x in row] for x in ("SFT", "RL")}
    if any([x["dialog_id"] for x in y] != [x.dialog_id for x in asked] for y in talks.values()):
        raise UserError(f"{folder / 'rows.jsonl'} lacks SFT or RL of the test dialogues")
    pairs = [pair for _, pair in read_pairs(folder / "pairs.jsonl")]
    learned = train.lay_out_pairs(work, pairs)
    steps = step_items(settings.simpo, len(learned))
    tokens = sum(len(learned[i]) for step in steps for i in step)
    for name in CONTROLS:
        side = train_control(work, pairs, tokens, settings, name)
        talks[f"SFT + {name}"] = meet(work, side, asked, settings, name)
    seed = seed_for(settings.data.seed, "control")
    figures = {name: summarise(found, seed) for name, found in talks.items()}
    gaps = {f"{b} - {a}": compare(talks[b], talks[a], seed) for a, b in combinations(talks, 2)}
    for title, found, form in (("method", figures, ".3f"), ("difference", gaps, "+.3f")):
        lines = [[x, *(interval(y[key], form=form) for key in HEADINGS)] for x, y in found.items()]
        show(lines, [title, *HEADINGS.values()])
        print()
    runs.write_json(folder / "control" / "control.json", {"methods": figures, "differences": gaps})


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return 2 for a user's fault, 130 for Ctrl-C."""
    parser = train.build_parser()
    parser.prog, parser.usage, parser.description = "control.py", "control.py [FLAGS]", __doc__
    return run_together("control.py", lambda: compare_controls(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
