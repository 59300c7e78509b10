"""The main job: `python train.py` makes a language model a better recommender.

    sft         an adapter learns the recommender's turns
    simulator   a copy of it learns to play the user: seeker, internal seeker,
                summariser and judge
    pairs       PODCS: the recommender's samples are tried on the simulated user
    simpo       the recommender learns to prefer the chosen reply of each pair
    report      B/L, SFT, RL, RL+SES and RL+SES+cards on the same test
                dialogues, with 95% intervals

A finished stage is used again; an interrupted one resumes. The next command is
`python infer.py --ses`. `torchrun --nproc-per-node N train.py` does the same in
N processes, one per GPU.

A training flag with a stage's name in front holds for that stage alone:
--simpo-learning-rate 1e-4
"""

import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import shlex
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from usbrec import loading, parallel, runs
from usbrec.chat import Lesson, Message, Row
from usbrec.crs import lessons
from usbrec.crs.agents import Side
from usbrec.crs.datasets import read_pairs
from usbrec.crs.dialogue import Examples
from usbrec.crs.evaluation import evaluate_method
from usbrec.crs.podcs import build_pairs
from usbrec.extras.baselines import baseline_labels
from usbrec.extras.default_model import find_model
from usbrec.extras.measures import count_wins, judge_agreement, judge_ranked, sample_means
from usbrec.extras.once import share_answers
from usbrec.extras.pages import write_report_page
from usbrec.extras.report import format_report, interval, report_of
from usbrec.llm.adapter_files import WEIGHTS_FILE
from usbrec.llm.lora import add_adapter
from usbrec.llm.loss import Sft, Simpo
from usbrec.llm.packing import Tree, lesson_tree, pair_tree
from usbrec.llm.tokenizer import fit_prompt, prompt_room
from usbrec.llm.training import peak_memory, usable
from usbrec.options import Parser, UserError, add_table, seed_for, tell
from usbrec.settings import COMPARED, FLAGS, SHOWN, STAGES, add_settings, read_settings
from usbrec.work import Work

RowsOf = Callable[[str], Examples]  # the name of a limit (--max-NAME) -> rows


# --- the stages -------------------------------------------------------------------------------


def train_sft(work: Work) -> None:
    """Train an adapter on the recommender's gold turns, and on profiles and gold titles."""
    o, films, seed = work.settings.lesson, work.catalogue, work.settings.data.seed
    add_adapter(work.engine.model, "sft", work.settings.lora, seed_for(seed, "sft"))
    teach(work, "sft", lambda x: lessons.recommender_lessons(x("sft"), x("profiles"), films, o))


def train_simulator(work: Work) -> None:
    """Train a copy of the SFT adapter, which knows the films, to play the user and to judge."""
    options, films, seed = work.settings.lesson, work.catalogue, work.settings.data.seed

    def make(rows: RowsOf) -> list[Lesson]:
        draws = lessons.Suggestions(films, lessons.popularity_of(work.train, films))
        first, then = lessons.simulator_lessons(rows("simulator"), draws, seed, options)
        summaries = lessons.summary_lessons(rows("summaries"), films, options)
        cards = lessons.card_lessons(rows("cards"), draws, seed, options)
        return first + lessons.woven(then, summaries, cards)

    work.adapted("sft", "simulator")  # the copy that learns
    teach(work, "simulator", make)


def teach(work: Work, stage: str, make: Callable[[RowsOf], list[Lesson]]) -> None:
    """Train the adapter of the stage's name on the lessons that `make` returns."""

    def lay_out(rows: RowsOf, label: str) -> list[Tree]:
        made, limit = make(rows), work.engine.max_length
        trees = [lesson_tree(work.engine.tokenizer, lesson, limit) for lesson in made]
        kept, dropped = usable(trees, limit, Sft())
        long = sum(map(len, made)) - sum(len(tree.branches) for tree in trees)
        counts = {"chats left out as too long": long, **dropped}
        print_counts(f"{label}: {len(kept)} lessons, {sum(map(len, kept))} tokens", counts)
        return kept

    trees = lay_out(work.rows, stage)
    validation = lay_out(lambda _: work.valid, f"{stage}, validation") if work.valid else []
    work.learn(stage, Sft(), trees, validation)


def make_pairs(work: Work, part: int = 0) -> Path:
    """Write pairs.jsonl, and return its path: the pairs of PODCS, from samples of the SFT adapter.

    Later parts of the rows are those of later rounds, with samples of the adapter that learns.
    """
    seed, options, roles = work.settings.data.seed, work.settings.pairs, work.roles("sft")
    folder, label = ".", "pairs"
    if part:
        folder, label = f"rl/round-{part + 1}", f"pairs, round {part + 1}"
        roles = replace(roles, recommender=Side(work.engine, "rl"))
    rows, path = work.rows("pairs", part), work.folder / folder / "pairs.jsonl"
    results = work.results(f"{folder}/samples.jsonl", label)
    records = runs.run_chunks(results, rows, lambda chunk: build_pairs(roles, chunk, seed, options))
    pairs = [pair for record in records for pair in record["pairs"]]
    if parallel.rank() == 0:
        runs.write_rows(path, pairs)
    reasons = Counter(record["reason"] for record in records)  # kinds of pairs, causes of drops
    print_counts(f"{label}: {len(pairs)} of {len(records)} rows", dict(sorted(reasons.items())))
    wins = count_wins(work.catalogue, rows, records)
    print_counts(f"{label}, the chosen side against the rejected by rule", wins)
    score, hit = map(interval, sample_means(work.catalogue, rows, records, seed))
    print(f"{label}, the samples by the judge: {score}; share that names a target: {hit}")
    return path


def train_simpo(work: Work) -> None:
    """Train a copy of the SFT adapter with the SimPO loss on the pairs, without validation.

    In each further round (--rounds) it learns on, from pairs of its own samples for the next rows.
    """
    path, last = work.need("pairs"), work.settings.data.rounds - 1
    places = [*(f"round-{part + 1}" for part in range(last)), "."]  # of what each round has taught
    done = [x for x in places[:-1] if (work.folder / "rl" / x / WEIGHTS_FILE).exists()]
    start = work.folder / "rl" / done[-1] if done else work.need("sft").parent
    work.models.side(str(start), "rl")  # the copy that learns
    for part in range(len(done), last + 1):
        if part:
            path = make_pairs(work, part)
            parallel.meet()  # the first process has written them
        trees = lay_out_pairs(work, [pair for _, pair in read_pairs(path)])
        if not trees:
            told = "try more rows (--max-pairs), more samples (--pairs-samples), a better simulator"
            raise UserError(f"{path} holds no pair to learn from: {told}")
        work.learn("simpo", Simpo(work.settings.simpo_loss), trees, at=places[part])


def lay_out_pairs(work: Work, rows: Sequence[Row]) -> list[Tree]:
    """Return the usable pairs as trees, and print the numbers shortened and dropped."""
    tokenizer, limit = work.engine.tokenizer, work.engine.max_length
    trees, shortened = [], 0
    for row in rows:
        messages = [Message(x["role"], x["content"]) for x in row["prompt"]]
        prompt, was_shortened = fit_prompt(tokenizer, messages, prompt_room(limit))
        chosen, rejected = (tokenizer.reply(row[x][0]["content"]) for x in ("chosen", "rejected"))
        trees.append(pair_tree(prompt, chosen, rejected))
        shortened += was_shortened
    kept, dropped = usable(trees, limit, Simpo())
    counts = {"shortened": shortened, **dropped}
    print_counts(f"simpo: {len(kept)} pairs, {sum(map(len, kept))} tokens", counts)
    return kept


def evaluate(work: Work) -> None:
    """Evaluate every method on the same test dialogues with the same judge; write the report."""
    settings, o, how = work.settings, work.settings.data, work.settings.eval
    tests = loading.pick_rows(work.test, 0, seed_for(o.seed, "test"), apart=True)
    talked, judged = (tests[: o.rows(name) or None] for name in ("eval", "agreement"))
    met = max(talked, judged, key=len)
    print(f"report: {len(met)} dialogues, one row of each, from {len(work.test)} test rows")
    popularity = lessons.popularity_of(work.train, work.catalogue)
    ranked = talked[: how.ranked_dialogues]
    speakers = {stage: work.roles(stage, o.judge) for stage, _ in COMPARED.values()}
    compared = {name: made for name, made in COMPARED.items() if name in o.methods}

    def meet_chunk(chunk: Examples) -> list[Row]:
        checked, tried, heard = ([x for x in chunk if x in y] for y in (judged, ranked, talked))
        roles = share_answers(speakers)
        found = {"agreement": judge_agreement(roles["sft"], checked, popularity, o.seed, how)}
        found["ranked"] = judge_ranked(roles["simpo"], tried, how, "RL+SES+memory" in o.methods)
        for name, (stage, group) in compared.items():
            options = getattr(settings, group) if group else None
            found[name] = evaluate_method(roles[stage], heard, o.seed, how, options)
        # each list has the rows of the chunk's first dialogues
        return [{name: x[i] for name, x in found.items() if i < len(x)} for i in range(len(chunk))]

    rows = runs.run_chunks(work.results("rows.jsonl", "report"), met, meet_chunk)
    if parallel.rank() == 0:
        write_report(work, rows, baseline_labels(work.catalogue, talked, work.train))


def write_report(work: Work, rows: Sequence[Row], baselines: Mapping[str, Any]) -> None:
    """Write report.json, report.txt and report.html, and print the text."""
    options, seed = runs.read_json(work.folder / "options/report.json"), work.settings.data.seed
    counts = {"test": len(baselines["copy-last"]), "train": len(work.train), "notes": work.notes}
    report = report_of(rows, baselines, {"options": options, "counts": counts}, seed)
    text = format_report(report)
    runs.write_whole(work.folder / "report.txt", (text + "\n").encode())
    write_report_page(work.folder / "report.html", report, rows, work.catalogue)
    runs.write_json(work.folder / "report.json", report)
    print(text)


def print_counts(text: str, counts: Mapping[str, int]) -> None:
    """Print a line with the counts that are not zero."""
    told = [f"{count} {reason}" for reason, count in counts.items() if count]
    print(f"{text} ({', '.join(told)})" if told else text)


DOES = (train_sft, train_simulator, make_pairs, train_simpo, evaluate)  # the stages, in order


# --- the run ----------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: the flags of the job, and one group per options dataclass."""
    parser = Parser(SHOWN["train"], prog="train.py", description=__doc__, usage="train.py [FLAGS]")
    add_table(parser.add_argument_group("job"), FLAGS["job"])
    add_settings(parser)
    return parser


def run_stages(work: Work, stages: Sequence[str], flags: Namespace) -> None:
    """Run the stages that are not yet done, in their order, and note what each cost."""
    if flags.fresh:  # what is missing is told before anything is deleted
        work.prepare(stages)
    todo = parallel.from_first(lambda: work.claim(stages, flags.fresh))
    for stage in (x for x in stages if x not in todo):
        print(f"{stage}: done before, used again")
    work.prepare(todo)
    for stage in todo:
        start, before = time.perf_counter(), loading.usage_of(work.models.engines.values())
        dict(zip(STAGES, DOES, strict=True))[stage](work)
        spent = loading.usage_of(work.models.engines.values()).since(before)
        seconds = round(time.perf_counter() - start, 1)
        if parallel.rank() == 0:
            peak = peak_memory(loading.pick_device(work.settings.model.device))
            row = {"stage": stage, "seconds": seconds, "peak_memory_bytes": peak, **spent}
            runs.append_rows(work.folder / "timings.jsonl", [row])
            if flags.verbose:
                tell(f"{stage}: {loading.costs(spent)}")
        loading.give_back_memory()
        parallel.meet()  # the next stage reads what the first process has written
    for told in loading.shortened_lines(work.models.engines.values()):
        print(told)


def work_through(arguments: Sequence[str] | None) -> None:
    """Parse the flags and run the stages."""
    flags = build_parser().parse_args(arguments)
    settings = read_settings(flags)
    if flags.shard and parallel.world() == 1:
        raise UserError("--shard spreads weights over processes: torchrun --nproc-per-node N ...")
    folder = flags.run_dir or runs.RUNS / Path(settings.data.data).name
    stages = [stage for stage in STAGES if stage in flags.stages]
    if settings.data.simulator is not None and "simulator" in stages:
        stages.remove("simulator")
        print(f"simulator: {settings.data.simulator} plays the user, there is nothing to train")
    with runs.locked(folder):
        run_stages(Work(settings, folder, find_model, flags.shard), stages, flags)
    then = f": python infer.py --ses --run-dir {shlex.quote(str(folder))}"
    print(f"{folder} is ready{'' if settings.data.recommender else then}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that the flags name; return 2 for a user's fault, 130 for Ctrl-C."""
    return parallel.run_together("train.py", lambda: work_through(arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
