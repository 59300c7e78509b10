"""One reply, a file of dialogues, a dataset's split, or a chat: `python infer.py --ses`.

Without further flags the newest run of train.py answers a test dialogue of its dataset.

    python infer.py --ses                            searched, and the search is shown
    python infer.py --chat --ses                     a conversation in the terminal
    python infer.py --dialogue FILE --json           dialogues from JSON or JSONL
    python infer.py --data redial --limit 200        rows of a split, with a results file
    python infer.py --limit 0 --rank 50              the catalogue ranked, Recall@1, 10 and 50
    python infer.py --model FOLDER --adapter none    round the run folder
    python infer.py --validate-simulator             how well the judges agree with the truth
"""

import hashlib
import json
import os
import sys
import time
from argparse import Namespace
from argparse import RawDescriptionHelpFormatter as RawTextHelp
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from usbrec.chat import Sampling
from usbrec.crs.agents import Cast, recommender_prompt, recommender_turn, say
from usbrec.crs.agreement import agreement, judge_agreement
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.datasets import SPLITS, load_catalogue, load_split, read_dialogues
from usbrec.crs.dialogue import Dialogue, Example
from usbrec.crs.evaluation import EvaluationOptions, search_record, titles_in
from usbrec.crs.lessons import popularity_of
from usbrec.crs.recall import announce, format_recall, ranked_recall
from usbrec.crs.report import format_dialogue, format_facts, format_search, interval
from usbrec.crs.ses import SearchOptions, search
from usbrec.llm.adapter_files import load_adapter
from usbrec.llm.engine import Engine, Usage
from usbrec.llm.ranking import TOKENS, Ranking
from usbrec.options import Parser, UserError, add_flags, check, from_flags, option, seed_for
from usbrec.run import (
    RUNS,
    ModelOptions,
    costs,
    load_engine,
    newest_run,
    pick_rows,
    read_run,
    shortened_line,
)
from usbrec.runs import append_rows, dump, read_whole_lines, run_chunks, write_rows

Row = dict[str, Any]
VALIDATED = 100  # held-out dialogues on which the judges are checked


@dataclass(frozen=True)
class ReplyOptions:
    """How replies are made."""

    ses: bool = option(False, "search for the reply (SES) and show the search")
    temperature: float = option(0.0, "of a plain reply (a search: --ses-temperature)", low=0)
    top_k: int = option(0, "a plain reply's tokens are drawn from so many, the likeliest; 0: all")
    top_p: float = option(1.0, "from the likeliest that make up this share of the probability")
    min_p: float = option(0.0, "from those with at least this share of the likeliest's probability")
    repetition_penalty: float = option(
        1.0, "above 1: less often those of the prompt and of the reply so far"
    )
    max_new_tokens: int = option(48, "longest plain reply, in tokens", low=1)
    seed: int = option(0, "decides every draw, and which rows of a dataset are taken")
    chunk_size: int = option(
        32, "dialogues answered together; results come a chunk at a time", low=1
    )
    rank: int = option(0, "also rank the catalogue and give so many titles, best first", low=0)
    rank_tokens: int = option(
        TOKENS, "the most tokens a ranking may run; 0: until it is exact", low=0
    )

    def __post_init__(self) -> None:
        check(self)
        self.sampling()

    def sampling(self) -> Sampling:
        """Return how plain replies are drawn."""
        return Sampling(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p,
            self.repetition_penalty,
        )  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What is to answer: the base weights, the adapters by role, the dataset, and where from."""

    model: ModelOptions
    adapters: dict[str, Path]  # "recommender" and "simulator", each only if there is one
    data: str
    data_dir: str | None
    run: Path | None

    def deciding(self) -> dict[str, Any]:
        """Return all of it that decides a reply, in JSON's own types."""
        return {
            "model": asdict(self.model),
            "adapters": {role: digest_of(path) for role, path in self.adapters.items()},
            "data": self.data,
            "data-dir": self.data_dir,
        }


@dataclass(frozen=True)
class Asked:
    """A dialogue that awaits a reply, and the dataset's row behind it if there is one."""

    dialogue: Dialogue
    example: Example | None = None

    def named(self) -> Row:
        """Return what the dataset's row is called, and its gold titles."""
        x = self.example
        return {"dialog_id": x.dialog_id, "turn_id": x.turn_id, "gold": x.items} if x else {}


@dataclass
class Recommender:
    """The model in its roles, ready to answer."""

    engine: Engine
    cast: Cast
    catalogue: Catalogue
    options: ReplyOptions
    searching: SearchOptions
    verbose: bool
    ranking: Ranking | None  # of the catalogue, with --rank
    told: Usage = field(default_factory=Usage)  # the engine's figures at the last `spent`

    def spent(self) -> dict[str, int]:
        """Return the tokens computed, reused and decoded since last asked; --verbose tells them."""
        spent = self.engine.usage.since(self.told)
        self.told = replace(self.engine.usage)
        if self.verbose:
            tell(costs(spent))
        return spent

    def answer(self, asked: Sequence[Asked]) -> list[Row]:
        """Return for each dialogue `reply`, `items` (the catalogue's titles in it), `seconds`.

        A dataset's row is named, with its `gold` titles. With --ses also `search`, which is None
        before the search's `start_turn`; with --rank also `ranked` and `proven`. `seconds` are
        equal shares of the time that the dialogues took together.
        """
        start, o = time.perf_counter(), self.options
        dialogues = [x.dialogue for x in asked]
        seeds = [seed_for(o.seed, "reply", format_dialogue(d)) for d in dialogues]
        # the recommender's next turn, counted from 1
        turns = [1 + sum(line.speaker == "recommender" for line in d) for d in dialogues]
        due = [o.ses and turn >= self.searching.start_turn for turn in turns]
        searched = [i for i in range(len(dialogues)) if due[i]]
        plain = [i for i in range(len(dialogues)) if not due[i]]
        found = search(
            self.engine, self.cast, [dialogues[i] for i in searched],
            [seeds[i] for i in searched], self.searching,
        )  # fmt: skip
        said = recommender_turn(
            self.engine, self.cast, [dialogues[i] for i in plain],
            o.sampling(), [seeds[i] for i in plain],
        )  # fmt: skip
        replies = dict(zip(plain, said, strict=True))
        replies |= {i: result.reply for i, result in zip(searched, found, strict=True)}
        searches = dict(zip(searched, map(search_record, found), strict=True))
        ranked = self.rank(dialogues)
        seconds = round((time.perf_counter() - start) / len(dialogues), 3)
        rows = []
        for i, x in enumerate(asked):
            row = {**x.named(), "reply": replies[i], "items": titles_in(self.catalogue, replies[i])}
            row |= {**ranked[i], "seconds": seconds}
            rows.append({**row, "search": searches.get(i)} if o.ses else row)
        return rows

    def rank(self, dialogues: Sequence[Dialogue]) -> list[Row]:
        """Return for each dialogue `ranked`, titles with the log-probability of their announcement,
        and `proven`, how many of the first are surely the best; nothing without --rank.
        """
        if self.ranking is None:
            return [{} for _ in dialogues]
        chats = [self.cast.recommends(recommender_prompt(d)) for d in dialogues]
        titles = [item.title for item in self.catalogue]
        return [
            {"ranked": [{"title": titles[i], "logprob": logprob} for i, logprob in best.texts],
             "proven": best.proven}
            for best in self.ranking.best(chats, self.options.rank, self.options.rank_tokens)
        ]  # fmt: skip


# --- what answers -----------------------------------------------------------------------------


def set_up(flags: Namespace) -> Setup:
    """Take the run's model, adapters and dataset, and over them what the flags name."""
    run = find_run(flags)
    adapters, made_with = read_run(run) if run else ({}, {})
    for role, given in (("recommender", flags.adapter), ("simulator", flags.simulator)):
        if given == "none":
            adapters.pop(role, None)
        elif given is not None:
            adapters[role] = Path(given)
    named = {item.name: getattr(flags, item.name) for item in fields(ModelOptions)}
    named = {name: value for name, value in named.items() if value is not None}
    model = ModelOptions(**{**made_with.get("model", {}), **named})
    data_dir = flags.data_dir or (made_with.get("data-dir") if flags.data is None else None)
    return Setup(model, adapters, flags.data or made_with.get("data", "sample"), data_dir, run)


def find_run(flags: Namespace) -> Path | None:
    """Return the run folder that was named, else the newest; None where flags go round it."""
    if flags.run_dir is not None:
        if not (flags.run_dir / "options.json").is_file():
            raise UserError(
                f"{flags.run_dir} is no run folder (no options.json in it): "
                f"make one with `python train.py --run-dir {flags.run_dir}`"
            )
        return Path(flags.run_dir)
    if flags.model is not None:
        return None
    try:
        return newest_run(RUNS)
    except UserError:
        if flags.adapter is None:
            raise
        return None  # it would have told the simulator and the dataset, no more


def assemble(
    setup: Setup, options: ReplyOptions, searching: SearchOptions, verbose: bool
) -> Recommender:
    """Load the weights, put the adapters beside them, and say on stderr what there is."""
    catalogue = load_catalogue(setup.data, setup.data_dir)
    engine = load_engine(setup.model)
    for role, folder in setup.adapters.items():
        load_adapter(engine.model, folder, role)
    for role in ("recommender", "simulator"):
        tell(f"{role}: {setup.adapters.get(role, 'the base weights as they are')}")
    cast = Cast(**{role: role for role in setup.adapters})
    ranking = Ranking(engine, [announce(x.title) for x in catalogue]) if options.rank else None
    return Recommender(engine, cast, catalogue, options, searching, verbose, ranking)


def digest_of(adapter: Path) -> str:
    """Return a name for an adapter's weights as they are now."""
    path = adapter / "adapter_model.safetensors"
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def tell(text: str) -> None:
    """Print what is not a result."""
    print(text, file=sys.stderr)


# --- replies ----------------------------------------------------------------------------------


def read_asked(flags: Namespace, setup: Setup, seed: int) -> list[Asked]:
    """Return the dialogues of --dialogue, or --limit rows of the dataset in their order."""
    if flags.dialogue is not None:
        return [Asked(dialogue) for dialogue in read_dialogues(flags.dialogue)]
    limit = 1 if flags.limit is None else flags.limit
    rows = load_rows(setup, flags.split or "test")
    taken = {(x.dialog_id, x.turn_id) for x in pick_rows(rows, limit, seed_for(seed, "infer"))}
    return [Asked(x.history, x) for x in rows if (x.dialog_id, x.turn_id) in taken]


def load_rows(setup: Setup, name: str) -> list[Example]:
    """Return a split's rows; its notes are told."""
    split = load_split(setup.data, name, setup.data_dir)
    for note in split.notes:
        tell(f"note: {note}")
    return split.examples


def reply_into(
    path: Path, recommender: Recommender, asked: Sequence[Asked], deciding: dict[str, Any]
) -> list[Row]:
    """Append the rows to a results file, chunk by chunk, and go on from what it holds.

    Their seconds and equal shares of a chunk's tokens go to FILE.timings.jsonl: the results are
    the same bytes however often the work was interrupted.
    """
    times = path.with_suffix(".timings.jsonl")
    if times.exists():
        write_rows(times, read_whole_lines(times))  # without the line that a kill has torn

    def reply_chunk(chunk: Sequence[tuple[int, Asked]]) -> list[Row]:
        rows, spent = recommender.answer([x for _, x in chunk]), recommender.spent()
        share = {name: round(count / len(chunk), 1) for name, count in spent.items()}
        took = zip(chunk, [row.pop("seconds") for row in rows], strict=True)
        lines = [{"place": place, "seconds": seconds, **share} for (place, _), seconds in took]
        append_rows(times, lines)
        return rows

    rows = run_chunks(
        path, list(enumerate(asked)), recommender.options.chunk_size, reply_chunk, "infer",
        deciding, before_chunk=recommender.engine.forget,
    )  # fmt: skip
    seconds = {line["place"]: line["seconds"] for line in read_whole_lines(times)}
    tell(f"{len(rows)} replies in {path}")
    return [{**row, "seconds": seconds.get(i)} for i, row in enumerate(rows)]


def reply_all(
    recommender: Recommender, asked: Sequence[Asked], flags: Namespace, setup: Setup
) -> None:
    """Answer every dialogue; a dataset's rows, if more than one, always by way of a file."""
    deciding = {
        **setup.deciding(),
        "reply": asdict(recommender.options),
        "search": asdict(recommender.searching) if recommender.options.ses else None,
        "dialogues": name_for([format_dialogue(x.dialogue) for x in asked]),
    }
    out = flags.out
    if out is None and len(asked) > 1 and flags.dialogue is None:
        out = results_file(setup, f"{flags.split or 'test'}-replies", deciding)
    if out is not None:
        rows = reply_into(out, recommender, asked, deciding)
        for x, row in zip(asked, rows, strict=True):
            show(x.dialogue, row, flags.json)
        if recommender.options.rank and flags.dialogue is None:
            tell_recall(recommender, [x.example for x in asked if x.example], rows, setup)
        return
    size = recommender.options.chunk_size
    for start in range(0, len(asked), size):
        chunk = asked[start : start + size]
        rows = recommender.answer(chunk)
        recommender.spent()
        for x, row in zip(chunk, rows, strict=True):
            show(x.dialogue, row, flags.json)


def tell_recall(
    recommender: Recommender, examples: Sequence[Example], rows: Sequence[Row], setup: Setup
) -> None:
    """Tell how often the gold titles of a split's rows are among the best, beside baselines."""
    ranked = [[best["title"] for best in row["ranked"]] for row in rows]
    popularity = popularity_of(load_rows(setup, "train"))
    found = ranked_recall(
        recommender.catalogue, examples, ranked, popularity, recommender.options.seed
    )
    tell(format_recall(found))


def results_file(setup: Setup, kind: str, deciding: dict[str, Any]) -> Path:
    """Return a place of its own for the results of these options, in the run folder if any."""
    name = f"{Path(setup.data).name}-{kind}-{name_for(deciding)}.jsonl"
    return (setup.run or RUNS) / "infer" / name


def name_for(value: Any) -> str:
    """Return 8 hexadecimal digits that stand for a value of JSON's types."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def talk(recommender: Recommender, as_json: bool) -> None:
    """Converse in the terminal until an empty line or the end of the input.

    A reply that is not searched is printed as it is drawn.
    """
    streamed = not (as_json or recommender.options.ses)
    dialogue: Dialogue = ()
    prompt = "Seeker: " if sys.stdin.isatty() and not as_json else ""
    tell("Say what you would like to watch; an empty line ends the conversation.")
    with suppress(EOFError):
        while line := input(prompt).strip():
            dialogue = say(dialogue, "seeker", line)
            recommender.engine.listener = printer() if streamed else None
            [row] = recommender.answer([Asked(dialogue)])
            if streamed:
                show_facts(row)
            else:
                show((), row, as_json)
            recommender.spent()
            dialogue = say(dialogue, "recommender", row["reply"])


# --- what is shown ----------------------------------------------------------------------------


def show(dialogue: Dialogue, row: Row, as_json: bool) -> None:
    """Print a row as JSON, or the dialogue, the search as a tree, the reply and its titles."""
    if as_json:
        print(dump(row), flush=True)
        return
    if row.get("search"):
        print(format_search(dialogue, row["search"]).strip() + "\n")
    elif dialogue:
        print(format_dialogue(dialogue) + "\n")
    printer()(row["reply"])
    show_facts(row)


def printer() -> Callable[[str], None]:
    """Return what prints a reply in one line, piece by piece."""
    text, shown = "", 0
    print("Recommender: ", end="", flush=True)

    def hear(piece: str) -> None:
        nonlocal text, shown
        text += piece
        line = " ".join(text.split())  # a piece more only makes it longer
        print(line[shown:], end="", flush=True)
        shown = len(line)

    return hear


def show_facts(row: Row) -> None:
    """Print what stands below a reply."""
    print("" if row["reply"].split() else "(nothing)")
    print(format_facts(row), flush=True)


# --- the judges -------------------------------------------------------------------------------


def validate_simulator(recommender: Recommender, flags: Namespace, setup: Setup) -> None:
    """Print how well either judge tells a held-out gold reply from one for another film."""
    seed, split = recommender.options.seed, flags.split or "valid"
    limit = VALIDATED if flags.limit is None else flags.limit
    rows = pick_rows(load_rows(setup, split), limit, seed_for(seed, "validate"), True)
    popularity = popularity_of(load_rows(setup, "train"))
    options = EvaluationOptions()
    deciding = {
        **setup.deciding(), "split": split, "limit": limit, "seed": seed, "eval": asdict(options)
    }  # fmt: skip
    out = flags.out or results_file(setup, f"{split}-judges", deciding)

    def judge_chunk(chunk: Sequence[Example]) -> list[Row]:
        judged = judge_agreement(
            recommender.engine, recommender.cast, recommender.catalogue, chunk, popularity,
            seed, options,
        )  # fmt: skip
        recommender.spent()
        return judged

    found = run_chunks(
        out, rows, recommender.options.chunk_size, judge_chunk, "validate", deciding,
        before_chunk=recommender.engine.forget,
    )  # fmt: skip
    result = agreement(found, seed)
    if flags.json:
        print(dump(result))
        return
    print(f"{setup.data}, {split}: gold replies against the same rewritten for another film,")
    print(f"{len(rows)} dialogues, {result['skipped']} skipped; AUC [95% interval], 0.5 is chance")
    for name in ("external", "internal"):
        line = f"{name} judge: {interval(result[name], mean='auc')}"
        print(f"{line}, {result[name]['unparsed']} unparsed")


# --- the command ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the flags: what to answer, who answers, and how."""
    parser = Parser(prog="infer.py", description=__doc__, formatter_class=RawTextHelp)
    what = parser.add_argument_group("what to answer (default: a test row of the run's dataset)")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--dialogue", type=Path, metavar="FILE", help="dialogues, JSON or JSONL")
    source.add_argument("--chat", action="store_true", help="converse in the terminal")
    source.add_argument(
        "--validate-simulator", action="store_true", help="check the judges on held-out dialogues"
    )
    what.add_argument("--data", help="sample, redial, opendialkg or a folder (default: the run's)")
    what.add_argument("--data-dir", help="the folder of a downloaded dataset")
    what.add_argument("--split", choices=SPLITS, help="default: test; valid for the judges")
    what.add_argument("--limit", type=int, help="rows of the split, 0 for all (default: 1)")
    what.add_argument("--out", type=Path, metavar="FILE", help="results file; goes on from there")
    what.add_argument("--verbose", action="store_true", help="tell the tokens of every call")
    what.add_argument("--json", action="store_true", help="one JSON object a dialogue")
    who = parser.add_argument_group("who answers")
    who.add_argument("--run-dir", type=Path, help="a run of train.py (default: the newest)")
    who.add_argument("--adapter", help="the recommender's adapter folder, or none")
    who.add_argument("--simulator", help="the simulator's adapter folder, or none")
    inherited = ("chat_date", "dtype", "device", "max_length", "quantise")
    add_flags(parser, ModelOptions, defaults=dict.fromkeys(inherited))
    add_flags(parser, ReplyOptions)
    add_flags(parser, SearchOptions, "ses")
    return parser


def refuse_unread(flags: Namespace) -> None:
    """Refuse flags that would go unread."""
    if flags.limit is not None and flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    if flags.chat or flags.dialogue is not None:
        for name in ("split", "limit"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} chooses rows of a dataset: not with --chat, --dialogue")
    if flags.chat and flags.out is not None:
        raise UserError("--out keeps the replies to dialogues that are given: not with --chat")


def answer(flags: Namespace) -> None:
    """Do what the flags say."""
    refuse_unread(flags)
    options = from_flags(ReplyOptions, flags)
    searching = from_flags(SearchOptions, flags, "ses")
    setup = set_up(flags)
    asked = [] if flags.chat or flags.validate_simulator else read_asked(flags, setup, options.seed)
    recommender = assemble(setup, options, searching, flags.verbose)
    if flags.chat:
        talk(recommender, flags.json)
    elif flags.validate_simulator:
        validate_simulator(recommender, flags, setup)
    else:
        reply_all(recommender, asked, flags, setup)
    if told := shortened_line(recommender.engine):
        tell(told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, answer; 2 for a user's fault, 130 for Ctrl-C."""
    try:
        answer(build_parser().parse_args(arguments))
    except UserError as error:
        tell(f"infer.py: {error}")
        return 2
    except KeyboardInterrupt:
        tell("\ninfer.py: stopped; a results file goes on from here with the same command")
        return 130
    except BrokenPipeError:  # whoever read the output (head, less) has gone; so may the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
