"""The main job: `python train.py` makes a better recommender of a language model and measures it.

    simulator   an adapter learns to play the user: seeker, inner seeker, summariser and judge
    sft         an adapter learns the recommender's turns
    pairs       PODCS: the recommender's samples are tried on the simulated user
    simpo       the recommender learns to prefer what won the user over
    report      B/L, SFT, RL and RL+SES on the same test dialogues, with 95% intervals

A finished stage is used again; an interrupted one goes on. `python infer.py --ses` comes next.
`torchrun --nproc-per-node N train.py` does the same in N processes, one for each GPU.
"""

import sys
import warnings
from argparse import Namespace
from argparse import RawDescriptionHelpFormatter as RawTextHelp
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from usbrec import parallel
from usbrec.chat import Lesson, Message
from usbrec.crs.agents import Cast
from usbrec.crs.agreement import agreement, judge_agreement
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.datasets import load_catalogue, load_split
from usbrec.crs.dialogue import Example
from usbrec.crs.evaluation import EvalRow, baseline_labels, evaluate_method
from usbrec.crs.lessons import (
    popularity_of,
    recommender_lessons,
    simulator_lessons,
)
from usbrec.crs.podcs import build_pairs, count_reasons, outcome_record
from usbrec.crs.report import build_report, format_report
from usbrec.llm.adapter_files import load_adapter, save_adapter
from usbrec.llm.engine import Engine
from usbrec.llm.limits import fit_lesson, fit_prompt, prompt_room
from usbrec.llm.lora import add_adapter
from usbrec.llm.objectives import Objective, Sft, Simpo, pair_tree, usable_lessons, usable_pairs
from usbrec.llm.packing import Tree, lesson_tree
from usbrec.llm.training import TrainingOptions, put_weights, train
from usbrec.options import Parser, UserError, add_flags, from_flags, seed_for
from usbrec.run import (
    RUNS,
    ModelOptions,
    Run,
    give_back_memory,
    load_engine,
    pick_rows,
    shortened_line,
)
from usbrec.runs import read_whole_lines, run_chunks, write_json, write_rows, write_whole
from usbrec.stages import DEFAULTS, DONE, GROUPS, LEARNING, MADE, STAGES, DataOptions, Settings

METHODS = {  # the paper's names -> (recommender's adapter, with search)
    "B/L": (None, False),
    "SFT": ("sft", False),
    "RL": ("rl", False),
    "RL+SES": ("rl", True),
}


@dataclass
class Work:
    """What the stages share: the data, the model, and the run folder."""

    settings: Settings
    run: Run
    catalogue: Catalogue
    train: list[Example]
    valid: list[Example]  # none without --max-valid
    test: list[Example]
    notes: list[str]
    engine: Engine
    tensorboard: bool
    loaded: set[str] = field(default_factory=set)

    def rows(self, stage: str) -> list[Example]:
        """Return the training rows of a stage, the same ones in every run of these options."""
        data = self.settings.data
        return pick_rows(self.train, data.rows(stage), seed_for(data.seed, stage))

    def use(self, *names: str) -> None:
        """Have the run's adapters of these names beside the base weights."""
        missing = [name for name in names if name not in self.loaded]
        self.run.load_adapters(self.engine, missing)
        self.loaded.update(missing)

    def learn(
        self,
        stage: str,
        adapter: str,
        trees: Sequence[Tree],
        validation: Sequence[Tree],
        objective: Objective,
        options: TrainingOptions,
    ) -> None:
        """Train an adapter that the model has, and save it: with validation its best state.

        The last state then lies beside it, in `last`.
        """
        model, folder = self.engine.model, self.run.folder / adapter
        options = replace(options, seed=seed_for(self.settings.data.seed, stage, "order"))
        board = self.run.folder / "tensorboard" / stage if self.tensorboard else None
        trained = train(
            model, adapter, trees, objective, options, folder / "training", stage, validation, board
        )
        kept = {folder: trained.best}
        if validation:
            kept = {folder / "last": trained.last, **kept}
            print(f"{stage}: its validation loss was lowest after step {trained.best_step}")
        for place, weights in kept.items():
            put_weights(model, adapter, weights)
            if parallel.rank() == 0:
                save_adapter(model, adapter, place, base_name(self.settings.model))
        self.engine.forget()
        self.loaded.add(adapter)


def base_name(options: ModelOptions) -> str:
    """Return what an adapter's config calls its base."""
    return options.model or "HuggingFaceTB/SmolLM2-135M-Instruct"


def train_simulator(work: Work) -> None:
    """Teach an adapter to play the user and to judge, from training dialogues alone."""
    settings, popularity = work.settings, popularity_of(work.train)
    seed = settings.data.seed
    lessons, checks = (
        simulator_lessons(rows, work.catalogue, popularity, seed, settings.lesson)
        for rows in (work.rows("simulator"), work.valid)
    )
    add_adapter(work.engine.model, "simulator", settings.lora, seed_for(seed, "simulator"))
    learn_lessons(work, "simulator", lessons, checks, settings.simulator)


def train_sft(work: Work) -> None:
    """Teach an adapter the recommender's turns."""
    lessons, checks = (
        recommender_lessons(rows, work.catalogue, work.settings.lesson)
        for rows in (work.rows("sft"), work.valid)
    )
    seed = seed_for(work.settings.data.seed, "sft")
    add_adapter(work.engine.model, "sft", work.settings.lora, seed)
    learn_lessons(work, "sft", lessons, checks, work.settings.sft)


def learn_lessons(
    work: Work,
    name: str,
    lessons: Sequence[Lesson],
    checks: Sequence[Lesson],
    options: TrainingOptions,
) -> None:
    """Train the adapter of a stage's name on lessons, and validate it on others."""
    trees = lay_out(work, lessons, name)
    validation = lay_out(work, checks, f"{name}, validation") if checks else []
    work.learn(name, name, trees, validation, Sft(), options)


def lay_out(work: Work, lessons: Sequence[Lesson], label: str) -> list[Tree]:
    """Return in token ids what fits of the lessons; say what does not."""
    tokenizer, limit = work.engine.tokenizer, work.engine.max_length
    fitted = [fit_lesson(tokenizer, lesson, limit) for lesson in lessons]
    trees = [lesson_tree(tokenizer, piece) for pieces in fitted for piece in pieces]
    kept, dropped = usable_lessons(trees, limit)
    dropped["dropped as too long"] += fitted.count([])
    changed = sum(pieces not in ([], [x]) for pieces, x in zip(fitted, lessons, strict=True))
    say_counts(
        f"{label}: {len(kept)} lessons, {sum(map(len, kept))} tokens",
        {"shortened": changed, **dropped},
    )
    return kept


def make_pairs(work: Work) -> None:
    """Try the recommender's samples on the simulated user; keep what won against what lost."""
    settings, run = work.settings, work.run
    work.use("simulator", "sft")
    cast = Cast(recommender="sft", simulator="simulator")

    def try_chunk(chunk: Sequence[Example]) -> list[dict[str, Any]]:
        seed = settings.data.seed
        outcomes = build_pairs(work.engine, cast, work.catalogue, chunk, seed, settings.pairs)
        return [outcome_record(outcome) for outcome in outcomes]

    records = run_chunks(
        run.folder / "samples.jsonl",
        work.rows("pairs"),
        settings.data.chunk_size,
        try_chunk,
        "pairs",
        settings.deciding("pairs"),
        before_chunk=work.engine.forget,
        spread=not work.engine.model.sharded,
    )
    pairs = [record["pair"] for record in records if record["pair"]]
    if parallel.rank() == 0:
        write_rows(run.folder / "pairs.jsonl", pairs)
    say_counts(f"pairs: {len(pairs)} of {len(records)} rows", count_reasons(records))


def train_simpo(work: Work) -> None:
    """Go on from the SFT adapter with the SimPO loss over the pairs.

    PODCS tries training rows alone, so validation takes some of their pairs away. The SFT adapter
    has met these dialogues: their loss tells when SimPO goes too far, not how it does on new ones.
    """
    settings = work.settings
    path = work.run.need("pairs.jsonl", "pairs")
    rows, held_out = hold_out(read_whole_lines(path), settings.data.max_valid)
    trees = lay_out_pairs(work, rows, "simpo")
    if not trees:
        raise UserError(
            f"{path} holds no pair to learn from: try more rows "
            "(--max-pairs), more samples (--pairs-samples) or a longer simulator stage"
        )
    validation = lay_out_pairs(work, held_out, "simpo, validation") if held_out else []
    load_adapter(work.engine.model, work.run.need("sft", "sft"), "rl")
    objective = Simpo(settings.simpo_loss)
    work.learn("simpo", "rl", trees, validation, objective, settings.simpo)


def hold_out(rows: list[dict[str, Any]], count: int) -> tuple[list[dict], list[dict]]:
    """Return the pairs to learn from and those to validate on: the last `count`, a fifth at most.

    A pair whose prompt begins or continues that of a held-out one is of the same dialogue, and
    among neither.
    """
    cut = len(rows) - min(count, len(rows) // 5)
    held_out = rows[cut:]

    def akin(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(a == b for a, b in zip(one["prompt"], other["prompt"], strict=False))

    learned = [row for row in rows[:cut] if not any(akin(row, other) for other in held_out)]
    if len(learned) < cut:
        print(f"simpo: {cut - len(learned)} pairs of the validation's dialogues are left out")
    return learned, held_out


def lay_out_pairs(work: Work, rows: Sequence[dict[str, Any]], label: str) -> list[Tree]:
    """Return in token ids what fits of the pairs; say what does not."""
    tokenizer, limit = work.engine.tokenizer, work.engine.max_length
    trees, shortened = [], 0
    for row in rows:
        messages = [Message(**message) for message in row["prompt"]]
        prompt, was_shortened = fit_prompt(tokenizer, messages, prompt_room(limit))
        chosen, rejected = (tokenizer.reply(row[x][0]["content"]) for x in ("chosen", "rejected"))
        trees.append(pair_tree(prompt, chosen, rejected))
        shortened += was_shortened
    kept, dropped = usable_pairs(trees, limit)
    say_counts(
        f"{label}: {len(kept)} pairs, {sum(map(len, kept))} tokens",
        {"shortened": shortened, **dropped},
    )
    return kept


def evaluate(work: Work) -> None:
    """Let every method meet the same test dialogues and the same judge; write the report."""
    settings, run, d = work.settings, work.run, work.settings.data
    work.use("simulator", "sft", "rl")
    counts = d.rows("eval"), d.rows("agreement")
    count = max(counts) if all(counts) else 0  # 0: all
    tests = pick_rows(work.test, count, seed_for(d.seed, "test"), one_a_dialogue=True)
    talked, judged = (tests[: count or None] for count in counts)
    popularity = popularity_of(work.train)
    wanted = set(talked), set(judged)
    rows = run_chunks(
        run.folder / "rows.jsonl", tests, d.chunk_size,
        lambda chunk: evaluate_chunk(work, chunk, *wanted, popularity), "report",
        settings.deciding("report"), before_chunk=work.engine.forget,
        spread=not work.engine.model.sharded,
    )  # fmt: skip
    if parallel.rank() == 0:
        write_report(work, rows, baseline_labels(work.catalogue, talked, popularity))


def evaluate_chunk(
    work: Work, chunk: Sequence[Example], talked: set[Example], judged: set[Example],
    popularity: Mapping[str, int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return for each example how the judges score its gold reply, and every method's talk."""
    engine, catalogue, options = work.engine, work.catalogue, work.settings.eval
    seed = work.settings.data.seed
    rows: dict[Example, dict[str, Any]] = {x: {} for x in chunk}
    own = [x for x in chunk if x in judged]
    cast = Cast("sft", "simulator")
    found = judge_agreement(engine, cast, catalogue, own, popularity, seed, options)
    for x, row in zip(own, found, strict=True):
        rows[x]["agreement"] = row
    own = [x for x in chunk if x in talked]
    for name, (adapter, searches) in METHODS.items():
        cast, ses = Cast(adapter, "simulator"), work.settings.ses if searches else None
        talks = evaluate_method(engine, cast, catalogue, own, seed, options, ses)
        for x, talk in zip(own, talks, strict=True):
            rows[x][name] = asdict(talk)
    return list(rows.values())


def write_report(work: Work, rows: Sequence[dict[str, Any]], baselines: Mapping[str, Any]) -> None:
    """Write report.json and report.txt, and print the latter."""
    settings, folder, seed = work.settings, work.run.folder, work.settings.data.seed
    methods = {name: [EvalRow(**row[name]) for row in rows if name in row] for name in METHODS}
    report = build_report(
        methods,
        baselines,
        agreement([row["agreement"] for row in rows if "agreement" in row], seed),
        settings.deciding("report"),
        {"test": len(methods["B/L"]), "train": len(work.train), "notes": work.notes},
        seed,
    )
    text = format_report(report)
    write_whole(folder / "report.txt", (text + "\n").encode())
    write_json(folder / "report.json", report)
    print(text)


def gather_metrics(run: Run) -> None:
    """Write the training stages' metrics into one file, each line with its stage."""
    rows = []
    for stage, adapter in (("simulator", "simulator"), ("sft", "sft"), ("simpo", "rl")):
        path = run.folder / adapter / "training" / "metrics.jsonl"
        if path.exists():
            rows += [{"stage": stage, **row} for row in read_whole_lines(path)]
    write_rows(run.folder / "metrics.jsonl", rows)


def say_counts(text: str, counts: dict[str, int]) -> None:
    """Print a line with the counts that are not zero."""
    told = [f"{count} {reason}" for reason, count in counts.items() if count]
    print(f"{text} ({', '.join(told)})" if told else text)


DOES: dict[str, Callable[[Work], None]] = {
    "simulator": train_simulator,
    "sft": train_sft,
    "pairs": make_pairs,
    "simpo": train_simpo,
    "report": evaluate,
}


def build_parser() -> Parser:
    """Return the flags: those of the job, and one group for each options dataclass."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=RawTextHelp)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
        help=f"which of {', '.join(STAGES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/DATA)")
    parser.add_argument("--verbose", action="store_true", help="tell the tokens of every stage")
    parser.add_argument("--fresh", action="store_true", help="start the chosen stages over")
    parser.add_argument(
        "--tensorboard", action="store_true",
        help="draw the metrics into the run folder's tensorboard/ (needs the package tensorboard)",
    )  # fmt: skip
    parser.add_argument(
        "--shard", action="store_true",
        help="spread the frozen weights over torchrun's processes: for what one GPU cannot hold",
    )  # fmt: skip
    add_flags(parser, DataOptions)
    add_flags(parser, ModelOptions)
    for name, options in GROUPS.items():
        add_flags(parser, options, name.replace("_", "-"), DEFAULTS.get(name), skip=["seed"])
    return parser


def claim_stages(stages: Sequence[str], run: Run, settings: Settings, fresh: bool) -> list[str]:
    """Note the stages' options in the run folder; return the stages that are not yet done."""
    learning = [stage for stage in stages if stage in LEARNING]
    if learning and settings.model.quantise != "none":
        raise UserError(
            f"--quantise {settings.model.quantise} is for stages that learn nothing, "
            f"and {', '.join(learning)} would learn on rounded weights: name others (--stages)"
        )
    if fresh:
        for stage in stages:
            run.discard(stage, MADE[stage])
    for stage in stages:
        run.claim(stage, settings.deciding(stage), MADE[stage])
    return [stage for stage in stages if not (run.folder / DONE[stage]).exists()]


def run_stages(stages: Sequence[str], run: Run, settings: Settings, flags: Namespace) -> None:
    """Run what is not yet done of the stages, in their order."""
    todo = parallel.from_first(lambda: claim_stages(stages, run, settings, flags.fresh))
    for stage in stages:
        if stage not in todo:
            print(f"{stage}: done before, used again")
    if not todo:
        return
    d = settings.data
    names = ("train", "valid", "test") if d.max_valid else ("train", "test")
    splits = {name: load_split(d.data, name, d.data_dir) for name in names}
    notes = [note for split in splits.values() for note in split.notes]
    for note in notes:
        print(f"note: {note}")
    valid = []
    if d.max_valid:
        valid = pick_rows(splits["valid"].examples, d.max_valid, seed_for(d.seed, "valid"))
    work = Work(
        settings, run, load_catalogue(d.data, d.data_dir), splits["train"].examples, valid,
        splits["test"].examples, notes, load_engine(settings.model, flags.shard), flags.tensorboard,
    )  # fmt: skip
    for stage in todo:
        with run.timed(stage, work.engine, flags.verbose):
            DOES[stage](work)
        give_back_memory()
        if parallel.rank() == 0:
            gather_metrics(run)
        parallel.meet()  # the next stage reads what the first process has written
    if told := shortened_line(work.engine):
        print(told)


def work_through(arguments: Sequence[str] | None) -> None:
    """Parse the flags and run the stages."""
    flags = build_parser().parse_args(arguments)
    settings = Settings(
        data=from_flags(DataOptions, flags),
        model=from_flags(ModelOptions, flags),
        **{
            name: from_flags(options, flags, name.replace("_", "-"))
            for name, options in GROUPS.items()
        },
    )
    if flags.shard and parallel.world() == 1:
        raise UserError("--shard spreads weights over processes: torchrun --nproc-per-node N ...")
    if flags.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
    folder = flags.run_dir or RUNS / Path(settings.data.data).name
    stages = [stage for stage in STAGES if stage in flags.stages]
    run = Run(folder)
    with run.locked():
        run_stages(stages, run, settings, flags)
    print(f"{folder} is ready: python infer.py --ses")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the flags say; 2 for a user's fault, 130 for Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"warning: {message}", sys.stderr)
    return parallel.run_together("train.py", lambda: work_through(arguments))


if __name__ == "__main__":
    sys.exit(main())
