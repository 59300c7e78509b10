"""One reply, a file of dialogues, a dataset's split, a chat, or a server.

Without flags the newest run of train.py answers a test dialogue of its dataset.

    python infer.py --ses                          search, and show the search
    python infer.py --chat --ses                   converse in the terminal
    python infer.py --dialogue FILE --json         dialogues, JSON or JSONL
    python infer.py --data redial --limit 200      a split, with a results file
    python infer.py --limit 0 --rank 50            Recall@1, 10 and 50
    python infer.py --recommender URL#MODEL        a server's model
    python infer.py --serve                        answer OpenAI's clients
    python infer.py --validate-simulator           the judges against the truth
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from usbrec import loading, parallel, runs
from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Sampling
from usbrec.crs.agents import Roles
from usbrec.crs.datasets import load_catalogue, load_split, read_dialogues
from usbrec.crs.dialogue import Dialogue, Example, Examples, format_dialogue
from usbrec.crs.evaluation import EvaluationOptions, gold_labels
from usbrec.crs.lessons import popularity_of
from usbrec.crs.ses import SearchOptions
from usbrec.extras import pages, report
from usbrec.extras.chatting import Answered, Chat, printer
from usbrec.extras.default_model import find_model
from usbrec.extras.measures import agreement, judge_agreement
from usbrec.llm.endpoint import is_server
from usbrec.llm.training import digest
from usbrec.options import Parser, UserError, add_flags, add_table, from_flags, seed_for, tell
from usbrec.runs import RUNS, Results, Row, run_chunks
from usbrec.settings import ADAPTERS, FLAGS, PRESETS, SHOWN, DataOptions

PLAIN = {"max_new_tokens": 48, "temperature": 0.0}  # the default sampling of plain replies


@dataclass(frozen=True)
class Setup:
    """The answering models and their data: base weights, both sides, judge, dataset, and folder.

    `sides` name an adapter, a model, a server's URL#MODEL, or "none": the base weights as they are.
    """

    model: loading.ModelOptions
    sides: dict[str, str]  # recommender, simulator, and judge if the external one is another
    data: str
    data_dir: str | None
    folder: Path  # of the run, else of all runs: it keeps answers and results

    def facts(self) -> dict[str, Any]:
        """Return the settings that decide a reply, the run's place left out."""
        weighed = {"weights": self.model.place(), **self.sides}
        digests = {x: loading.weights_digest(y, find_model) for x, y in weighed.items()}
        return {"model": self.model.facts(), **digests, "data": self.data, "dir": self.data_dir}

    def rows(self, name: str) -> list[Example]:
        """Return a split's rows, and print the split's notes."""
        split = load_split(self.data, name, self.data_dir)
        for note in split.notes:
            tell(f"note: {note}")
        return split.examples


# --- who answers ------------------------------------------------------------------------------


def set_up(flags: Namespace) -> Setup:
    """Return the run's model, adapters and dataset, or those that the flags name instead."""
    run = find_run(flags)
    base = {"recommender": "none", "simulator": "none"}
    own = read_run(run) if run else Setup(loading.ModelOptions(), base, "sample", None, RUNS)
    named = {x: getattr(flags, x) for x in (*base, "judge") if getattr(flags, x, None)}
    if run is None and is_server(named.get("recommender", "")):  # no local weights are needed
        named = {"simulator": named["recommender"], **named}
    model = from_flags(loading.ModelOptions, flags, defaults=asdict(own.model))
    data = DataOptions(flags.data or own.data, flags.data_dir)
    data_dir = data.data_dir or (own.data_dir if data.data == own.data else None)
    return Setup(model, own.sides | named, data.data, data_dir, own.folder)


def find_run(flags: Namespace) -> Path | None:
    """Return the named run folder, else that of the newest finished adapter in RUNS.

    It is None if the flags need no run. Raises UserError if they need one and there is none.
    """
    if flags.run_dir is not None or hasattr(flags, "model"):
        return flags.run_dir
    if made := list(RUNS.glob("*/*/adapter_model.safetensors")):
        return max(made, key=lambda path: path.stat().st_mtime).parents[1]
    if flags.recommender is None:  # else a run would give the simulator and the dataset only
        told = "make one with `python train.py`, or go round it with --model and --recommender"
        raise UserError(f"there is no finished run in {RUNS}: {told}")
    return None


def read_run(folder: Path) -> Setup:
    """Return a run's model, its best recommender, its simulator and its dataset.

    Raises UserError if it has no adapter yet, or its notes are not train.py's.
    """
    adapters = {stage: folder / name for stage, name in ADAPTERS.items()}
    done = {x: str(y) for x, y in adapters.items() if (y / "adapter_model.safetensors").exists()}
    if not done:
        raise UserError(f"{folder} has no finished adapter: python train.py --run-dir {folder}")
    simulator, last = done.get("simulator", "none"), [*done][-1]
    note = runs.need(folder / "options" / f"{last}.json", last)
    notes = {path: runs.read_json(path) for path in sorted(note.parent.glob("*.json"))}
    try:
        for facts in notes.values():
            simulator = facts.get("other-simulator", {"path": simulator})["path"]
        facts = notes[note]
        model = loading.ModelOptions(**facts["model"])
        data = DataOptions(facts["data"], facts.get("data-dir"), simulator=str(Path(simulator)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{note} is not as train.py writes it") from error
    sides = {"recommender": done.get("simpo") or done.get("sft", "none"), "simulator": simulator}
    return Setup(model, sides, data.data, data.data_dir, folder)


def assemble(setup: Setup, flags: Namespace) -> Recommender:
    """Return the recommender with weights and adapters loaded; print the sides on stderr."""
    options = from_flags(ReplyOptions, flags)
    defaults = next((own for name, own in PRESETS.items() if getattr(flags, name, False)), {})
    searching = from_flags(SearchOptions, flags, "ses", defaults=defaults)
    sampling = from_flags(Sampling, flags, defaults=PLAIN)
    catalogue = load_catalogue(setup.data, setup.data_dir)
    models = loading.Models(setup.model, find_model, setup.folder / "answers.jsonl")
    sides = {role: models.side(name, role) for role, name in setup.sides.items()}
    for role, name in setup.sides.items():
        tell(f"{role}: {'the base weights as they are' if name == 'none' else name}")
    roles = Roles(sides["recommender"], sides["simulator"], catalogue, sides.get("judge"))
    engines = list(models.engines.values())  # the recommender's is the first
    return Recommender(roles, engines, options, sampling, searching, flags.verbose)


def load_recommender(*words: str) -> Recommender:
    """Return the recommender that infer.py asks when it is started with these words."""
    flags = build_parser().parse_args(words)
    return assemble(set_up(flags), flags)


# --- replies ----------------------------------------------------------------------------------


def read_asked(flags: Namespace, setup: Setup, seed: int) -> list[Example]:
    """Return the dialogues of --dialogue, or --limit rows of the dataset in their order."""
    if flags.dialogue is not None:
        return [Example("", 0, dialogue, "", ()) for dialogue in read_dialogues(flags.dialogue)]
    rows, limit = setup.rows(flags.split or "test"), 1 if flags.limit is None else flags.limit
    taken = {id(x) for x in loading.pick_rows(rows, limit, seed_for(seed, "infer"))}
    return [x for x in rows if id(x) in taken]


def reply(recommender: Recommender, asked: Examples, flags: Namespace, setup: Setup) -> Answered:
    """Answer, print and return all dialogues; several rows of a dataset have a results file."""
    o, films, from_data = recommender.options, recommender.roles.catalogue, flags.dialogue is None
    facts = {**setup.facts(), "reply": asdict(o) | asdict(recommender.sampling)}
    facts["search"] = asdict(recommender.searching) if o.ses else None
    facts |= {"dialogues": digest(asked), "catalogue": digest(films)}
    out = flags.out
    if out is None and len(asked) > 1 and from_data:
        out = results_file(setup, f"{flags.split or 'test'}-replies", facts)
    train = setup.rows("train") if o.rank and out and from_data else []
    rows = reply_into(out, recommender, asked, facts) if out else by_chunks(recommender, asked)
    answered: Answered = []
    for x, row in zip(asked, rows, strict=True):
        show(x.history, row, flags.json)
        answered.append((x.history, row))
    if isinstance(rows, list) and from_data:
        groups = [x.dialog_id for x in asked]
        named = [films.first(row["reply"]) for row in rows]
        labels = [gold_labels(films, x, [y]) for x, y in zip(asked, named, strict=True)]
        found = {"first title of the reply": {1: report.recall(labels, groups, o.seed)}}
        if o.rank:
            ranked = [[best["title"] for best in row["ranked"]] for row in rows]
            found |= report.ranked_recall(films, asked, ranked, train, o.seed)
        tell(report.format_recall(found))
    return answered


def by_chunks(recommender: Recommender, asked: Examples) -> Iterator[Row]:
    """Yield one row per dialogue; a chunk is answered when its first row is needed."""
    size = recommender.options.chunk_size
    for start in range(0, len(asked), size):
        yield from recommender.answer(asked[start : start + size])


def reply_into(path: Path, recommender: Recommender, asked: Examples, facts: Row) -> list[Row]:
    """Return one row per dialogue: those in a results file, then new ones, appended by chunks.

    They have no seconds and tokens, so that the results are the same bytes after any number of
    interruptions; --verbose tells them.
    """

    def reply_chunk(chunk: Examples) -> list[Row]:
        rows = recommender.answer(chunk)
        return [{x: row[x] for x in row if x not in ("seconds", "tokens")} for row in rows]

    results = Results(path, recommender.options.chunk_size, "infer", facts, recommender.engines)
    rows = run_chunks(results, asked, reply_chunk)
    tell(f"{len(rows)} replies in {path}")
    return rows


def results_file(setup: Setup, kind: str, facts: Mapping[str, Any]) -> Path:
    """Return the path of the results of these facts, in the run folder if there is one."""
    name = f"{Path(setup.data).name}-{kind}-{digest(facts.items())[:8]}.jsonl"
    return setup.folder / "infer" / name


# --- the printed reply ------------------------------------------------------------------------


def show(dialogue: Dialogue, row: Row, as_json: bool, printed: bool = False) -> None:
    """Print a row as JSON, or the dialogue, the search as a tree, the reply and its titles.

    A reply that is `printed` already is not printed again.
    """
    if as_json:
        print(runs.dump(row), flush=True)
        return
    if row.get("search"):
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(report.format_search(dialogue, row["search"], coloured).strip() + "\n")
    elif dialogue:
        print(format_dialogue(dialogue) + "\n")
    if not printed:
        printer()(row["reply"])
    print("" if row["reply"].split() else "(nothing)")
    print(report.format_facts(row), flush=True)


# --- the judges -------------------------------------------------------------------------------


def validate_simulator(recommender: Recommender, flags: Namespace, setup: Setup) -> None:
    """Print how each judge tells held-out gold replies from ones for another film."""
    seed, options = recommender.options.seed, EvaluationOptions()
    split, limit = flags.split or "valid", 100 if flags.limit is None else flags.limit
    rows = loading.pick_rows(setup.rows(split), limit, seed_for(seed, "validate"), apart=True)
    popularity = popularity_of(setup.rows("train"), recommender.roles.catalogue)
    facts = {**setup.facts(), "split": split, "limit": limit, "seed": seed, "eval": asdict(options)}
    facts["contents"] = digest([rows, popularity, *recommender.roles.catalogue])
    out, roles = flags.out or results_file(setup, f"{split}-judges", facts), recommender.roles
    results = Results(out, recommender.options.chunk_size, "validate", facts, recommender.engines)
    made = run_chunks(results, rows, lambda x: judge_agreement(roles, x, popularity, seed, options))
    recommender.spent()
    found = agreement(made, seed)
    head = f"{setup.data}, {split}, {len(rows)} dialogues; AUC [95% interval], and mean scores"
    print(runs.dump(found) if flags.json else "\n".join([head, *report.judge_lines(found)]))


# --- the command ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: flags for the dialogues, for the models, and for the replies."""
    parser = Parser(SHOWN["infer"], prog="infer.py", description=__doc__, usage="infer.py [FLAGS]")
    what = parser.add_argument_group("what to answer (default: a test row of the run's dataset)")
    add_table(what.add_mutually_exclusive_group(), FLAGS["one of these"])
    add_table(what, FLAGS["what to answer"])
    add_table(parser.add_argument_group("who answers"), FLAGS["who answers"])
    add_flags(parser, loading.ModelOptions)
    add_flags(parser, ReplyOptions)
    add_flags(parser, Sampling, defaults=PLAIN, skip=("stop",))
    add_flags(parser, SearchOptions, "ses")
    return parser


def refuse_unread(flags: Namespace) -> None:
    """Raise UserError for flags that would have no effect."""
    if flags.limit is not None and flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    choosing = [name for name in ("split", "limit") if getattr(flags, name) is not None]
    if choosing and (flags.chat or flags.serve or flags.dialogue is not None):
        raise UserError(f"--{choosing[0]} chooses rows: not with --chat, --serve, --dialogue")
    idle = "out trace json judge ses ses_start_turn rank" if flags.serve else "host port"
    if unread := [x.replace("_", "-") for x in idle.split() if getattr(flags, x, None)]:
        raise UserError(f"--{unread[0]} has no effect with{'' if flags.serve else 'out'} --serve")
    if flags.chat and sys.stdin is None:
        raise UserError("--chat reads lines from the standard input, which is closed")
    if flags.out is not None and (flags.chat or (flags.out.exists() and not flags.out.is_file())):
        raise UserError(f"--out must name a file, and not stand beside --chat, got {flags.out}")
    others = {os.path.abspath(x) for x in (flags.dialogue, flags.out) if x}
    wrong = flags.validate_simulator or (flags.trace and os.path.abspath(flags.trace) in others)
    if flags.trace and (wrong or flags.trace.suffix not in pages.TRACES):
        raise UserError(f"--trace keeps replies in an .html or .json of its own, got {flags.trace}")


def answer(flags: Namespace) -> None:
    """Answer, converse, serve or check the judges, as the flags say."""
    refuse_unread(flags)
    options, setup = from_flags(ReplyOptions, flags), set_up(flags)
    if flags.serve:
        from usbrec.extras.server import serve  # needs packages of its own

        port = 8000 if flags.port is None else flags.port
        return serve(assemble(setup, flags), flags.host or "127.0.0.1", port, tell)
    asked = [] if flags.chat or flags.validate_simulator else read_asked(flags, setup, options.seed)
    recommender = assemble(setup, flags)
    if options.ses:
        tell(f"search: up to {sum(recommender.searching.levels)} replies per dialogue are tried")
        tell(report.SEARCH_LEGEND)
    given = [name for name, value in vars(flags).items() if value is not None]
    for told in recommender.unread(given, flags.validate_simulator):
        tell(f"note: {told}")
    if flags.validate_simulator:
        validate_simulator(recommender, flags, setup)
    else:
        chat = Chat(recommender, show, flags.json) if flags.chat else None
        answered = chat.converse() if chat else reply(recommender, asked, flags, setup)
        if flags.trace is not None and parallel.rank() == 0:
            pages.write_trace(flags.trace, answered, recommender.roles.catalogue)
    for told in loading.shortened_lines(recommender.engines):
        tell(told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags and answer; return 2 for a user's fault, 130 for Ctrl-C."""
    return parallel.run_together("infer.py", lambda: answer(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
