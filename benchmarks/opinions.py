"""Second opinions: the replies of a finished run judged again, and what depends on the judge.

    python benchmarks/opinions.py --run-dir runs/sample [--judge OTHER] [--plot FILE.png]

The transcripts and explanations in the run's rows.jsonl are judged again, with the same targets:

    report         as the report did, which must give its scores again
    20 votes       sampled, in place of the expectation in closed form
    other words    the same question in the words of PARAPHRASE
    second judge   another model or adapter (--judge), such as the simulator of another seed's run

Each opinion stands beside the first: Pearson's correlation, mean absolute difference, quadratic
kappa of the most probable class, and the share of scores that could not be read. Then come the
paired differences of the methods by each opinion and by rules, which ask no judge; the calibration,
which is the share of replies that the rules grade 2, and 1 or more, by the score; and three signs
of failure, looked for and told in words. All intervals draw whole dialogues.

`--limit N` takes the run's first N dialogues, whose order is a seeded hash. Rows and the figures
are in opinions/ in the run folder: the same command goes on from there.
"""

import json
import sys
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from contest import show
from correlation import kappa, measured, pearson
from seeds import finished_rows
from sweep import check_plot, tell_end

import infer
from usbrec import loading, runs
from usbrec.answering import ReplyOptions
from usbrec.chat import Message, Messages
from usbrec.crs.agents import Roles, Side, Votes, external_judge_prompt
from usbrec.crs.dialogue import SILENCE, Utterance
from usbrec.extras.intervals import differences, mean_interval
from usbrec.extras.report import HEADINGS, compare, interval, summarise
from usbrec.llm.training import digest
from usbrec.options import Parser, UserError, add_flags, from_flags, seed_for
from usbrec.parallel import run_together
from usbrec.runs import Results, Row, run_chunks
from usbrec.settings import COMPARED

Figures = dict[str, dict[str, Any]]
Scored = dict[str, dict[str, list[Row]]]  # opinion -> method -> talks with the opinion's scores
FIRST, SECOND = "report", "second judge"
VOTES = 20
PARAPHRASE = (
    "Would you now watch what was suggested last? Reply 2 if that is {targets} or a film you would "
    "like even more, 1 if it is about as good, 0 if it is not as good. Reply with one digit."
)
METHODS = ("RL", "RL+SES", "RL+SES+cards")
RULES = {name: title for name, title in HEADINGS.items() if name != "ieval"}
GREATEST = 2.0  # score
SAME = 0.02  # scores of one judge differ by less where only the batches differ, in bfloat16
BINS = 8  # of the calibration, over 0 to GREATEST
STILL = 0.05  # standard deviation of scores that do not move
ONE_CLASS = 0.95  # share of replies in one class, above which scores do not move
ONE_REPLY = 0.2  # share of dialogues with the same reply, above which a method loops
GRADES = {"grade 2": 2, "grade 1 or more": 1}  # heading -> the least grade that counts
# the flags in --help; --help-all lists every flag
SHOWN = "run-dir methods limit judge simulator plot model device seed chunk-size"


# --- the run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reported:
    """How a run's report judged: the run's seed, the reading of scores, and the external judge.

    `judge` is None where the run's own simulator judged.
    """

    seed: int
    votes: Votes
    judge: str | None


def as_reported(run: Path) -> Reported:
    """Return how the run's report judged.

    Raises UserError for other notes than train.py's, and if the internal judge gave the scores.
    """
    note = runs.need(run / "options" / "report.json", "report")
    facts = runs.read_json(note)
    try:
        if facts["eval"]["protocol"] == "profile":
            raise UserError(f"{note}: with --eval-protocol profile no external judge was asked")
        votes = Votes(facts["eval"]["votes"], facts["eval"]["vote_temperature"])
        return Reported(facts["seed"], votes, facts.get("other-judge", {"path": None})["path"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{note} is not as train.py writes it") from error


def read_talks(run: Path, methods: Sequence[str], limit: int = 0) -> list[Row]:
    """Return the rows of the first `limit` dialogues (0: all) that all the methods met.

    Raises UserError for a method that the run did not evaluate.
    """
    path, rows = run / "rows.jsonl", finished_rows(run)
    there = [name for name in COMPARED if any(name in row for row in rows)]
    if absent := [name for name in methods if name not in there]:
        told = f"expected some of {', '.join(there) or 'none'}, which {path} has"
        raise UserError(f"--methods: {told}; got {absent[0]!r}")
    met = [row for row in rows if all(name in row for name in methods)]
    return met[:limit] if limit else met


# --- the opinions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Opinion:
    """A way to get a score: seed and reading, the question (None: the report's), and the judge.

    `by` is None for the judge of the report.
    """

    seed: int
    votes: Votes
    question: str | None = None
    by: Side | None = None


def opinions_of(told: Reported, second: Side | None, seed: int) -> dict[str, Opinion]:
    """Return the opinions by name, the report's first; the last only with a second judge."""
    found = {
        FIRST: Opinion(told.seed, told.votes),
        f"{VOTES} votes": Opinion(seed, Votes(VOTES, told.votes.vote_temperature)),
        "other words": Opinion(seed, told.votes, PARAPHRASE),
        SECOND: Opinion(seed, told.votes, by=second),
    }
    return found if second else {name: x for name, x in found.items() if name != SECOND}


def prompt_of(talk: Row, question: str | None) -> Messages:
    """Return the external judge's prompt about a talk, its last message in other words if asked."""
    targets = [label["title"] for label in talk["labels"]]
    dialogue = tuple(Utterance(*line) for line in talk["transcript"])
    prompt = external_judge_prompt(dialogue, talk["explanation"], targets)
    if question is None:
        return prompt
    return (*prompt[:-1], Message("system", question.replace("{targets}", "; ".join(targets))))


def judge_chunk(
    roles: Roles, opinions: Mapping[str, Opinion], methods: Sequence[str], rows: Sequence[Row]
) -> list[Row]:
    """Return per dialogue its ids and {opinion: {method: the fields of a JudgeScore}}.

    A method is judged in a call of its own, as in the report, so that the batches are the same.
    """
    ids = [{key: row[methods[0]][key] for key in ("dialog_id", "turn_id")} for row in rows]
    made: list[Row] = [{**own, "opinions": {name: {} for name in opinions}} for own in ids]
    for name, opinion in opinions.items():
        seeds = [seed_for(seed_for(opinion.seed, "ieval", *own.values()), "judge") for own in ids]
        for method in methods:
            prompts = [prompt_of(row[method], opinion.question) for row in rows]
            scores = roles.judge(prompts, opinion.votes, seeds, opinion.by)
            for own, score in zip(made, scores, strict=True):
                own["opinions"][name][method] = asdict(score)
    return made


def scored_talks(rows: Sequence[Row], judged: Sequence[Row], methods: Sequence[str]) -> Scored:
    """Return the talks of each method, with the scores of each opinion in place of the report's."""
    both = list(zip(rows, judged, strict=True))
    return {
        name: {m: [{**row[m], **own["opinions"][name][m]} for row, own in both] for m in methods}
        for name in judged[0]["opinions"]
    }


# --- the figures ------------------------------------------------------------------------------


def measure(rows: Sequence[Row], scored: Scored, seed: int) -> Row:
    """Return all figures in JSON's types."""
    methods = list(scored[FIRST])
    gaps = {
        f"{later} - {earlier}": paired(scored, later, earlier, seed)
        for earlier, later in combinations(methods, 2)
    }
    return {
        "repeated": repeated(rows, scored[FIRST]),
        "opinions": {
            "all": against_first({name: joined(x) for name, x in scored.items()}, seed),
            **{m: against_first({name: x[m] for name, x in scored.items()}, seed) for m in methods},
        },
        "methods": {method: means(scored, method, seed) for method in methods},
        "differences": gaps,
        "calibration": {name: calibration(joined(x), seed) for name, x in scored.items()},
        "signs": signs(scored, gaps),
    }


def joined(talks: Mapping[str, list[Row]]) -> list[Row]:
    """Return the talks of all methods."""
    return [talk for own in talks.values() for talk in own]


def repeated(rows: Sequence[Row], first: Mapping[str, list[Row]]) -> Row:
    """Return how many scores of the report came again, and the greatest difference.

    `equal` counts to the last digit, `same` up to SAME. Scores that could not be read are equal to
    their like alone.
    """
    pairs = [
        (row[method]["score"], talk["score"])
        for method, talks in first.items()
        for row, talk in zip(rows, talks, strict=True)
    ]
    apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    unread = sum(a is b is None for a, b in pairs)
    return {
        "n": len(pairs),
        "equal": sum(a == b for a, b in pairs),
        "same": sum(x < SAME for x in apart) + unread,
        "greatest_difference": max(apart, default=None),
        "unparsed": fmean(b is None for _, b in pairs),
    }


def against_first(talks: Mapping[str, Sequence[Row]], seed: int) -> Figures:
    """Return the other opinions' agreement with the first, over talks that both could score."""
    found: Figures = {}
    for name, own in talks.items():
        if name == FIRST:
            continue
        unread = fmean(x["score"] is None for x in own)
        pairs = [
            (x, y)
            for x, y in zip(own, talks[FIRST], strict=True)
            if x["score"] is not None and y["score"] is not None
        ]
        groups = [x["dialog_id"] for x, _ in pairs]
        scores, labels = ([[z[key] for z in pair] for pair in pairs] for key in ("score", "label"))
        apart = [abs(a - b) for a, b in scores]
        found[name] = {
            "pearson": measured(pearson, *columns(scores), groups, seed),
            "mean_difference": mean_interval(apart, seed, None, groups, (0.0, GREATEST)),
            "kappa": measured(kappa, *columns(labels), groups, seed),
            "unparsed": unread,
        }
    return found


def columns(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return the first and the second value of each pair."""
    return [a for a, _ in pairs], [b for _, b in pairs]


def means(scored: Scored, method: str, seed: int) -> dict[str, Any]:
    """Return a method's mean score by each opinion, and its figures by rules alone."""
    groups, found = [talk["dialog_id"] for talk in scored[FIRST][method]], {}
    for name, talks in scored.items():
        scores = [talk["score"] for talk in talks[method]]
        found[name] = mean_interval(scores, seed, None, groups, (0.0, GREATEST))
    ruled = summarise(scored[FIRST][method], seed)
    return found | {name: ruled[name] for name in RULES}


def paired(scored: Scored, later: str, earlier: str, seed: int) -> dict[str, Any]:
    """Return the paired difference of two methods by each opinion, and by rules alone."""
    groups = [talk["dialog_id"] for talk in scored[FIRST][later]]
    found = {}
    for name, talks in scored.items():
        scores = [[talk["score"] for talk in talks[method]] for method in (later, earlier)]
        limits = (-GREATEST, GREATEST)
        found[name] = mean_interval(differences(*scores), seed, None, groups, limits)
    ruled = compare(scored[FIRST][later], scored[FIRST][earlier], seed)
    return found | {name: ruled[name] for name in RULES}


def calibration(talks: Sequence[Row], seed: int) -> Figures:
    """Return by bin of the score its mean, and the shares of replies by the grade of the rules.

    A bin holds its lower end, the last its upper end too. Empty bins are left out.
    """
    width, bins = GREATEST / BINS, dict[int, list[Row]]()
    for talk in talks:
        if talk["score"] is not None:
            bins.setdefault(min(int(talk["score"] / width), BINS - 1), []).append(talk)
    found: Figures = {}
    for place, own in sorted(bins.items()):
        groups = [talk["dialog_id"] for talk in own]
        found[f"{place * width:.2f} to {(place + 1) * width:.2f}"] = {
            "score": fmean(talk["score"] for talk in own),
            **{
                name: mean_interval([float(x["grade"] >= least) for x in own], seed, groups=groups)
                for name, least in GRADES.items()
            },
        }
    return found


# --- signs of failure -------------------------------------------------------------------------


def signs(scored: Scored, gaps: Figures) -> dict[str, list[str]]:
    """Return a sentence per finding, by the three signs that the paper names."""
    still = [
        f"{method} by {name}: {told}"
        for name, talks in scored.items()
        for method, own in talks.items()
        if (told := stillness(own))
    ]
    looping = [f"{m}: {told}" for m, talks in scored[FIRST].items() for told in loops(talks)]
    against = [x for pair, gap in gaps.items() for x in high_and_low(pair, gap, list(scored))]
    return {
        "scores that do not move": still,
        "loops": looping,
        "high iEval with low recall": against,
    }


def stillness(talks: Sequence[Row]) -> str:
    """Return how little the scores move: a small deviation, or one class nearly everywhere."""
    read = [talk for talk in talks if talk["score"] is not None]
    if not read:
        return ""
    deviation, counts = pstdev(x["score"] for x in read), Counter(x["label"] for x in read)
    [(label, count)] = counts.most_common(1)
    if deviation >= STILL and count / len(read) <= ONE_CLASS:
        return ""
    spread = f"their standard deviation is {deviation:.3f}"
    return f"{spread}, and {count} of {len(read)} are of class {label}"


def loops(talks: Sequence[Row]) -> list[str]:
    """Return a sentence on replies that repeat a line of their dialogue, and on one for many."""
    again = [reply for talk in talks for reply in repeats(talk)]
    total, found = sum(len(talk["replies"]) for talk in talks), []
    if again:
        told = f"{len(again)} of {total} replies repeat an earlier line of their dialogue"
        found.append(f"{told}, such as {again[0]!r:.80}")
    met: dict[str, dict[str, str]] = {}  # a reply -> how it reads in each dialogue
    for talk in talks:
        for reply in talk["replies"]:
            met.setdefault(squeezed(reply), {})[talk["dialog_id"]] = reply
    dialogues = len({talk["dialog_id"] for talk in talks})
    most = max(met.values(), key=len)
    if len(most) > max(1, ONE_REPLY * dialogues):
        shown = next(iter(most.values()))
        found.append(f"the same reply in {len(most)} of {dialogues} dialogues, {shown!r:.80}")
    return found


def repeats(talk: Row) -> list[str]:
    """Return those replies of a talk that were said before in it; silence does not count."""
    texts = [text for _, text in talk["transcript"]]
    lines = list(map(squeezed, texts))
    places = range(len(lines) - 2 * len(talk["replies"]) + 1, len(lines), 2)
    return [texts[i] for i in places if lines[i] != SILENCE and lines[i] in lines[:i]]


def squeezed(text: str) -> str:
    """Return a text in small letters with single spaces, by which lines are compared."""
    return " ".join(text.casefold().split())


def high_and_low(pair: str, gap: Mapping[str, Any], opinions: Sequence[str]) -> list[str]:
    """Return a sentence per opinion by which one of two methods is above, and below by Recall@1.

    Both must hold for the whole 95% interval of the paired difference.
    """
    recall, found = gap["recall@1"], []
    for name in opinions:
        if side(gap[name]) * side(recall) < 0:
            told = f"iEval {interval(gap[name], form='+.3f')}"
            found.append(f"{pair} by {name}: {told}, Recall@1 {interval(recall, form='+.3f')}")
    return found


def side(gap: Mapping[str, Any]) -> int:
    """Return 1 or -1 for a difference whose interval lies above or below 0, else 0."""
    return 0 if gap["mean"] is None else (gap["low"] > 0) - (gap["high"] < 0)


# --- the tables and the picture ---------------------------------------------------------------


def show_all(found: Row) -> None:
    """Print the figures as tables, and the signs as sentences."""
    print(repetition(found["repeated"]) + "\n")
    for scope, figures in found["opinions"].items():
        show_table(f"against the report's, {scope}", figures)
    show_table("mean score by", found["methods"])
    show_table("difference by", found["differences"], form="+.3f")
    for name, figures in found["calibration"].items():
        show_table(f"score, {name}", figures)
    for sign, told in found["signs"].items():
        print(f"{sign}: {'' if told else 'not seen'}")
        for sentence in told:
            print(f"  {sentence}")


def repetition(told: Row) -> str:
    """Return the sentence that says whether the report's scores came again."""
    counts = f"{told['equal']} of {told['n']} scores are the report's to the last digit"
    if told["equal"] < told["n"]:
        counts += f", {told['same']} within {SAME}"
    if told["greatest_difference"]:
        counts += f"; the greatest difference is {told['greatest_difference']:.2g}"
    if told["unparsed"]:
        counts += f"; {told['unparsed']:.1%} could not be read"
    if told["same"] == told["n"]:
        return f"judged as the report did: {counts}"
    return f"NOT THE REPORT'S SCORES: {counts}. Is it the run's judge, model, dtype and device?"


def show_table(title: str, figures: Mapping[str, Mapping[str, Any]], form: str = ".3f") -> None:
    """Print a line per entry; nothing without entries."""
    heads = list(dict.fromkeys(name for row in figures.values() for name in row))

    def cell(value: Any) -> str:
        return interval(value, form=form) if isinstance(value, Mapping) else f"{value:.3f}"

    if figures:
        lines = [[name, *(cell(row[head]) for head in heads)] for name, row in figures.items()]
        show(lines, [title, *(HEADINGS.get(x, x.replace("_", " ")) for x in heads)])
        print()


def save_plot(found: Mapping[str, Figures], path: Path) -> None:
    """Draw the calibration: the share of replies of a grade over the score, a line per opinion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, grade in zip(figure.subplots(1, 2, sharey=True), GRADES, strict=True):
        for name, bins in found.items():
            scores, shares = [x["score"] for x in bins.values()], [x[grade] for x in bins.values()]
            below = [x["mean"] - x["low"] for x in shares]
            above = [x["high"] - x["mean"] for x in shares]
            means = [x["mean"] for x in shares]
            axis.errorbar(scores, means, yerr=[below, above], capsize=4, marker="o", label=name)
        axis.set_title(f"replies of {grade} by rule, 95% interval")
        axis.set_xlabel("mean score of the judge")
        axis.set_xlim(0, GREATEST)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


# --- the command ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: the run and its methods, and those flags of infer.py that say who judges.

    The flags of a recommender have no effect here, so that there are none.
    """
    parser = Parser(SHOWN, prog="opinions.py", description=__doc__, usage="opinions.py [FLAGS]")
    parser.add_argument("--run-dir", type=Path, help="a finished run of train.py (or the newest)")
    told = f"columns of its report (default: {' '.join(METHODS)})"
    parser.add_argument("--methods", nargs="+", metavar="M", default=METHODS, help=told)
    parser.add_argument("--limit", type=int, default=0, help="dialogues, 0 for all (default 0)")
    told = "a second judge: adapter, model, server's URL#MODEL, or none"
    parser.add_argument("--judge", default=SUPPRESS, help=told)
    told = "the report's judge, if it stands elsewhere now"
    parser.add_argument("--simulator", help=told)
    told = "also draw the calibration"
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=told)
    add_flags(parser, loading.ModelOptions)
    add_flags(parser, ReplyOptions, skip=("ses", "rank", "rank_tokens"))
    parser.set_defaults(recommender="none", data=None, data_dir=None, verbose=False)
    return parser


def compare_opinions(arguments: Sequence[str] | None) -> None:
    """Judge the run's replies again, print the tables, and keep the figures beside the rows."""
    flags = build_parser().parse_args(arguments)
    if flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    check_plot(flags.plot)
    flags.run_dir = run = infer.find_run(flags)
    if run is None:
        raise UserError("--model needs --run-dir too: the run whose replies are judged again")
    methods, told = list(dict.fromkeys(flags.methods)), as_reported(run)
    rows = read_talks(run, methods, flags.limit)
    if not rows:
        raise UserError(f"{run / 'rows.jsonl'} has no dialogue that all of {methods} met")
    flags.simulator = flags.simulator or told.judge
    setup, options = infer.set_up(flags), from_flags(ReplyOptions, flags)
    recommender = infer.assemble(setup, flags)
    roles, seed = recommender.roles, seed_for(options.seed, "opinions")
    opinions, size = opinions_of(told, roles.external, seed), options.chunk_size
    facts = {**setup.facts(), "report": asdict(told), "methods": methods, "seed": options.seed}
    facts |= {"votes": VOTES, "question": PARAPHRASE, "chunk-size": size, "talks": digest(rows)}
    path = run / "opinions" / f"{digest([json.dumps(facts, sort_keys=True)])[:16]}.jsonl"
    results = Results(path, size, "opinions", facts, recommender.engines)
    judged = run_chunks(results, rows, partial(judge_chunk, roles, opinions, methods))
    found = {"dialogues": len(rows), "seed": options.seed}
    found |= measure(rows, scored_talks(rows, judged, methods), seed)
    runs.write_json(path.with_suffix(".json"), found)
    show_all(found)
    if flags.plot:
        save_plot(found["calibration"], flags.plot)
    tell_end(recommender, path.with_suffix(".json"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("opinions.py", lambda: compare_opinions(arguments))


if __name__ == "__main__":
    sys.exit(main())
