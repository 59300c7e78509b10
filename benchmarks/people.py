"""The judges beside people: how far their scores agree with ratings that people gave.

    python benchmarks/people.py FILE --catalogues FOLDER [--run-dir RUN] [--liked FILE.jsonl]

FILE is dataset/crs_arena_eval.json of GitHub informagi/face: dialogues of people with nine
recommenders, on ReDial and OpenDialKG, of which people rated each reply's relevance (0 no, 1
somewhat, 2 yes) and the whole (0 to 4). FOLDER holds redial/ and opendialkg/ with their catalogues.
--liked takes ReDial's own dialogues (valid_raw.jsonl), in which the seekers said what they liked.

These dialogues have no targets, so the internal judge is measured, as the search asks it: it knows
a summary of the dialogue before the reply, and with cards the catalogue's facts of the reply's
first title. There a reply without a title is 0. Beside both stand two rules that need no judge, and
what costs nothing: the reply's length, whether it names a title, one score for all, chance.

    by turn      score and relevance; a judge passes a reply with a score of 1 or more, people
                 pass it as somewhat relevant or better
    by dialogue  the mean score of the replies and the overall impression
    by system    the ranks of the recommenders by the means of both
    liked        P(a film that the seeker liked scores above one that was disliked), over replies
                 that name one film, which is new and the recommender's idea

A run that is finished also gives its iEval, corrected for the external judge's errors
(`corrected_ieval`). Rows are in people/ in the run folder: the same command goes on from there, and
so does one with a higher --limit.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from contest import show
from correlation import (
    across,
    auc,
    corrected_rate,
    kappa,
    measured,
    pearson,
    spearman,
)

import infer
from usbrec import loading, runs
from usbrec.answering import Recommender, ReplyOptions
from usbrec.crs import datasets
from usbrec.crs.agents import Roles
from usbrec.crs.catalogue import Catalogue, parse_json
from usbrec.crs.dialogue import Dialogue, Utterance, add_turn
from usbrec.crs.ses import Node, SearchOptions, score_nodes
from usbrec.crs.titles import GENRE_FORMS, key_of
from usbrec.crs.wishes import Fact, fit, read_profile
from usbrec.extras.intervals import mean_interval
from usbrec.extras.measures import SUMMARY_TOKENS
from usbrec.extras.report import interval
from usbrec.llm.training import digest
from usbrec.options import Parser, UserError, add_flags, from_flags, read_text, seed_for
from usbrec.parallel import run_together
from usbrec.runs import Results, Row, run_chunks
from usbrec.settings import COMPARED, PRESETS

Figures = dict[str, dict[str, Any]]  # a scorer -> its figures
JUDGES = {
    "internal judge": SearchOptions(),
    "judge with cards": SearchOptions(**PRESETS["ses_cards"]),
}
DOMAINS = ("redial", "opendialkg")
PASSED, RELEVANT = 1.0, 1.0  # least score of a judge, least rating of people, that count as good
GREATEST = 2.0  # score
BATCH = 20  # dialogues of a results file
# Pearson's correlation of published evaluators with the same people, from
# meta_eval_interface/baselines.json of GitHub informagi/face (FACE, arXiv 2506.00314)
PUBLISHED = {
    "redial": {
        "by turn": {"LLM-Direct": 0.464, "G-Eval": 0.490, "FACE": 0.549},
        "by dialogue": {"LLM-Direct": 0.564, "G-Eval": 0.577, "FACE": 0.712},
    },
    "opendialkg": {
        "by turn": {"LLM-Direct": 0.452, "G-Eval": 0.533, "FACE": 0.543},
        "by dialogue": {"LLM-Direct": 0.655, "G-Eval": 0.656, "FACE": 0.766},
    },
}
SHOWN = "catalogues liked limit json run-dir simulator model device seed chunk-size"


# --- the dialogues of people ------------------------------------------------------------------


@dataclass(frozen=True)
class RatedTurn:
    """A recommender's reply to a person: the dialogue before it, and what people thought of it.

    `rating` is the reply's, or 1 or 0 for a film that was liked or not; `overall` the dialogue's.
    """

    dialog_id: str
    place: int
    system: str
    domain: str
    history: Dialogue
    reply: str
    rating: float | None
    overall: float | None = None


RatedTurns = Sequence[RatedTurn]


def read_arena(path: Path) -> list[RatedTurn]:
    """Return the replies of the dialogues in a crs_arena_eval.json.

    Raises UserError if the file is missing or not such a list.
    """
    text = read_text(path)
    try:
        return [turn for value in parse_json(text) for turn in rated_turns(value)]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        told = "not as crs_arena_eval.json of GitHub informagi/face"
        raise UserError(f"{path} is {told}: {type(error).__name__} {error}") from error


def rated_turns(value: Row) -> Iterator[RatedTurn]:
    """Yield the replies of one dialogue: `conv_id`, `dialogue`, `dial_level_aggregated`.

    An id is SYSTEM_DOMAIN_NAME. A reply that people could not judge has no rating.
    """
    name, dialogue = value["conv_id"], ()
    system, domain, _ = name.split("_", 2)
    if domain not in DOMAINS:
        raise UserError(
            f"conv_id {name!r}: expected SYSTEM_DOMAIN_NAME with one of {', '.join(DOMAINS)}"
        )
    overall = value["dial_level_aggregated"]["dialogue_overall"]
    for line in value["dialogue"]:
        text, place = line["utterance"], line["turn_ind"]
        if line["role"] == "ASST":
            rating = line.get("turn_level_aggregated", {}).get("relevance")
            of_system = (name, place, f"{system}_{domain}", domain)
            yield RatedTurn(*of_system, dialogue, text, rating, overall)
        speaker = {"ASST": "recommender", "USER": "seeker"}[line["role"]]
        dialogue = add_turn(dialogue, speaker, text)  # type: ignore[arg-type]


def read_liked(path: Path) -> list[RatedTurn]:
    """Return the replies of ReDial's dialogues whose film the seeker liked or disliked.

    A reply counts if it names one film, which is named there first, is the recommender's idea, and
    was marked by the seeker. Neighbouring messages of a speaker are one line. Raises UserError.
    """
    found: list[RatedTurn] = []
    for place, value in datasets.read_jsonl(path):
        try:
            found += liked_turns(value)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"{place}: not a dialogue as ReDial writes it"
            raise UserError(f"{told}: {type(error).__name__} {error}") from error
    return found


def liked_turns(value: Row) -> Iterator[RatedTurn]:
    """Yield the replies of one of ReDial's dialogues that `read_liked` counts."""
    films = (value["movieMentions"] or {}).items()  # an empty list where there are none
    names = {key: " ".join(title.split()) for key, title in films if title}
    answers, seeker = value["initiatorQuestions"] or {}, value["initiatorWorkerId"]
    said = [(x["senderWorkerId"] == seeker, x["text"]) for x in value["messages"] if x["text"]]
    dialogue, known = (), set[str]()
    for place, (is_seeker, lines) in enumerate(groupby(said, lambda line: line[0])):
        text = " ".join(line for _, line in lines)
        ids = set(re.findall(r"@(\d+)", text))
        shown = re.sub(r"@(\d+)", lambda found: names.get(found[1], found[0]), text)
        only = next(iter(ids)) if len(ids) == 1 and not ids & known else None
        marks = answers.get(only, {"suggested": None})
        if dialogue and not is_seeker and marks["suggested"] == 1 and marks["liked"] in (0, 1):
            named = (str(value["conversationId"]), place, "people", "redial")
            yield RatedTurn(*named, dialogue, shown, float(marks["liked"]))
        dialogue = (*dialogue, Utterance("seeker" if is_seeker else "recommender", shown))
        known |= ids


def batches(turns: RatedTurns, limit: int, seed: int) -> list[list[RatedTurn]]:
    """Return the turns of `limit` dialogues (0: all) by BATCH dialogues.

    The dialogues come in the order of a seeded hash of their ids, so that a higher limit begins
    with the batches of a lower one, if that fills them.
    """
    order = sorted({x.dialog_id for x in turns}, key=lambda name: seed_for(seed, "people", name))
    kept = order[: limit or len(order)]
    parts = [set(kept[i : i + BATCH]) for i in range(0, len(kept), BATCH)]
    return [[x for x in turns if x.dialog_id in part] for part in parts]


# --- their scores -----------------------------------------------------------------------------


def judge_chunk(roles: Roles, turns: RatedTurns) -> list[Row]:
    """Return one row per turn: summary, title of the reply, scores of the judges and the rules.

    A title that leaves the year open fits as the worst of its readings, no title as 0.
    """
    histories, unseeded = [x.history for x in turns], [0] * len(turns)
    profiles = roles.complete(roles.summaries(histories, SUMMARY_TOKENS, unseeded))
    dialogues = [add_turn(x.history, "recommender", x.reply) for x in turns]
    judged: list[dict[str, Any]] = [{} for _ in turns]
    for name, options in JUDGES.items():
        nodes = [Node(*told, seed=0) for told in zip(dialogues, profiles, strict=True)]
        score_nodes(roles, nodes, options)
        for own, node in zip(judged, nodes, strict=True):
            own[name] = asdict(node.score)
    rows = []
    for x, profile, own in zip(turns, profiles, judged, strict=True):
        named = roles.catalogue.first(x.reply)
        wishes = {
            "rule on the summary": read_profile(profile, roles.catalogue),
            "rule on the seeker's words": said_genres(x.history),
        }
        row = {
            "dialog_id": x.dialog_id,
            "turn_id": x.place,
            "system": x.system,
            "rating": x.rating,
            "overall": x.overall,
            "words": len(x.reply.split()),
            "title": " or ".join(item.title for item in named) or None,
            "profile": profile,
            "judges": own,
            "rules": {
                k: min((fit(y, told) for y in named), default=0) for k, told in wishes.items()
            },
        }
        rows.append(row)
    return rows


def said_genres(history: Dialogue) -> frozenset[Fact]:
    """Return the genres that the seeker's lines name, as wishes; "no horror" counts as one too."""
    said = " ".join(key_of(line.text) for line in history if line.speaker == "seeker")
    forms = {name: [key_of(form) for form in own] for name, own in GENRE_FORMS.items()}
    return frozenset(
        Fact("like", "genre", name)
        for name, own in forms.items()
        if any(f" {form} " in f" {said} " for form in own)
    )


def judge_all(
    recommender: Recommender,
    catalogue: Catalogue,
    turns: RatedTurns,
    label: str,
    facts: Row,
    folder: Path,
) -> list[Row]:
    """Return the rows of one catalogue's turns, kept in a file named after what decides them."""
    roles, size = replace(recommender.roles, catalogue=catalogue), recommender.options.chunk_size
    judges = {name: asdict(options) for name, options in JUDGES.items()}
    own = {**facts, "judges": judges, "turns": digest(turns), "catalogue": digest(catalogue)}
    path = folder / f"{label}-{digest([json.dumps(own, sort_keys=True)])[:16]}.jsonl"
    results = Results(path, size, label, own, recommender.engines)
    return run_chunks(results, turns, partial(judge_chunk, roles))


def scores_of(row: Row, seed: int) -> dict[str, tuple[float | None, float | None]]:
    """Return {scorer: (score, class)}: 0 to 2, but for the length, which has no class.

    Both are None where a judge's score could not be read.
    """
    chance = seed_for(seed, "chance", row["dialog_id"], row["turn_id"]) % 3
    found = {name: (x["score"], x["label"]) for name, x in row["judges"].items()}
    plain = {"names a title": 2 * bool(row["title"]), "one score": 1, "chance": chance}
    found |= {name: (float(x), float(x)) for name, x in (row["rules"] | plain).items()}
    return {**found, "length in words": (float(row["words"]), None)}


# --- the figures ------------------------------------------------------------------------------


def columns(rows: Sequence[Row], key: str, name: str, seed: int) -> tuple[list[Any], ...]:
    """Return scores, classes, ratings by `key` and dialogues of the rows that the scorer scored."""
    told = [(*scores_of(row, seed)[name], row[key], row["dialog_id"]) for row in rows]
    read = [x for x in told if x[0] is not None]
    return tuple([x[i] for x in read] for i in range(4))


def measure_turns(rows: Sequence[Row], seed: int) -> Figures:
    """Return each scorer's agreement with the ratings of replies, by whole dialogues.

    `true_positive` is the share of the relevant replies that it passes, `true_negative` that of the
    others that it does not pass. Replies that people could not judge are left out.
    """
    rated = [row for row in rows if row["rating"] is not None]
    found: Figures = {}
    for name in scores_of(rated[0], seed) if rated else ():
        scores, classes, ratings, groups = columns(rated, "rating", name, seed)
        own = found[name] = {
            "spearman": measured(spearman, scores, ratings, groups, seed),
            "pearson": measured(pearson, scores, ratings, groups, seed),
        }
        if None not in classes:  # the length has no classes, and passes nothing
            pairs = [
                (float(x >= PASSED), y >= RELEVANT) for x, y in zip(scores, ratings, strict=True)
            ]
            good = [x if is_good else None for x, is_good in pairs]
            bad = [None if is_good else 1 - x for x, is_good in pairs]
            own["kappa"] = measured(kappa, classes, ratings, groups, seed)
            own["true_positive"] = mean_interval(good, seed, groups=groups)
            own["true_negative"] = mean_interval(bad, seed, groups=groups)
        own["unparsed"] = len(rated) - len(scores)
    return found


def measure_dialogues(rows: Sequence[Row], seed: int) -> Figures:
    """Return each scorer's agreement with the overall impression of dialogues, and of systems.

    A dialogue's score is the mean of its replies that have one. `systems` correlates the ranks of
    the recommenders by the means over their dialogues; its n is the number of dialogues.
    """
    rated, found = [row for row in rows if row["overall"] is not None], {}
    known = {row["dialog_id"]: row for row in rated}
    for name in scores_of(rated[0], seed) if rated else ():
        talks: dict[str, list[float]] = {}
        scores, _, _, groups = columns(rated, "overall", name, seed)
        for score, talk in zip(scores, groups, strict=True):
            talks.setdefault(talk, []).append(score)
        overall, systems = ([known[x][key] for x in talks] for key in ("overall", "system"))
        kinds = {"spearman": spearman, "pearson": pearson, "systems": across(systems)}
        means = [fmean(x) for x in talks.values()]
        found[name] = {k: measured(x, means, overall, [*talks], seed) for k, x in kinds.items()}
    return found


def measure_liked(rows: Sequence[Row], seed: int) -> Figures:
    """Return each scorer's AUC of liked films over disliked ones, by whole dialogues."""
    found: Figures = {}
    for name in scores_of(rows[0], seed) if rows else ():
        scores, _, liked, groups = columns(rows, "rating", name, seed)
        area = measured(auc, scores, liked, groups, seed)
        found[name] = {"auc": area, "unparsed": len(rows) - len(scores)}
    return found


def external_talks(folder: Path) -> list[Row]:
    """Return the rows of a run's report; none if it is unfinished or not by the external judge."""
    if not (folder / "report.json").exists():
        return []
    judged = runs.read_json(folder / "report.json")["options"]["eval"]["protocol"] != "profile"
    return runs.read_rows(folder / "rows.jsonl") if judged else []


def corrected_ieval(rows: Sequence[Row], seed: int) -> Figures:
    """Return {method: {"ieval", "passed", "corrected"}} of the rows of a run's rows.jsonl.

    iEval is the mean score, 0 to 2. `passed` is the share of the judged replies that the external
    judge scores 1 or more, `corrected` the share of good replies that explains it. The judge's
    sensitivity and specificity are those on held-out gold replies and the same rewritten for
    another film (`corrected_rate`). No score, no entry.
    """
    noted = [row["agreement"] for row in rows if row.get("agreement", {}).get("external")]
    marks = [
        (mark, truth, row["dialog_id"])
        for row in noted
        if None not in row["external"]
        for mark, truth in zip(row["external"], (1.0, 0.0), strict=True)
    ]
    found: Figures = {}
    for name in COMPARED:
        judged = [row[name] for row in rows if name in row and row[name]["score"] is not None]
        scores, talks = [x["score"] for x in judged], [x["dialog_id"] for x in judged]
        passed = [float(x >= PASSED) for x in scores]
        if not judged:
            continue
        found[name] = {
            "ieval": mean_interval(scores, seed, groups=talks, limits=(0.0, GREATEST)),
            "passed": mean_interval(passed, seed, groups=talks),
        }
        if marks:
            verdicts, truths, groups = map(list, zip(*marks, strict=True))
            verdicts = [float(x >= PASSED) for x in verdicts]
            own = (verdicts, truths, groups)
            found[name]["corrected"] = corrected_rate(passed, talks, *own, seed)
    return found


def measure(rated: Sequence[Row], liked: Sequence[Row], talks: Sequence[Row], seed: int) -> Row:
    """Return all figures in JSON's types, from the rows of both data sets and of the run."""
    sets = {"all": rated, **{x: [r for r in rated if r["system"].endswith(x)] for x in DOMAINS}}
    of_turns = sets | {"replies that name a title": [x for x in rated if x["title"]]}
    both, marks = {"rated": rated, "liked": liked}, {"liked": 1, "disliked": 0}
    return {
        "dialogues": {name: len({x["dialog_id"] for x in rows}) for name, rows in both.items()},
        "marks": {name: sum(x["rating"] == mark for x in liked) for name, mark in marks.items()},
        "digit_probability": {name: mean_digits([*rated, *liked], name) for name in JUDGES},
        "by turn": {name: measure_turns(x, seed) for name, x in of_turns.items()},
        "by dialogue": {name: measure_dialogues(x, seed) for name, x in sets.items()},
        "liked": measure_liked(liked, seed),
        "ieval": corrected_ieval(talks, seed),
        "published": PUBLISHED,
    }


def mean_digits(rows: Sequence[Row], judge: str) -> float | None:
    """Return the mean probability of the three digits among a judge's replies."""
    found = [row["judges"][judge]["digit_probability"] for row in rows]
    read = [x for x in found if x is not None]
    return fmean(read) if read else None


# --- the table --------------------------------------------------------------------------------


def show_figures(title: str, figures: Figures) -> None:
    """Print a table of a row per scorer; nothing without figures."""
    heads = list(dict.fromkeys(name for row in figures.values() for name in row))
    lines = [[name, *(cell(row.get(head)) for head in heads)] for name, row in figures.items()]
    if lines:
        show(lines, [title, *(head.replace("_", " ") for head in heads)])
        print()


def cell(value: Any) -> str:
    """Return a figure as text: a number, or a mean with its interval and n."""
    if isinstance(value, Mapping):
        return interval(value)
    return "" if value is None else str(value)


def show_all(found: Row) -> None:
    """Print all tables."""
    for kind in ("by turn", "by dialogue"):
        for name, figures in found[kind].items():
            told = found["published"].get(name, {}).get(kind, {})
            show_figures(f"{kind}, {name}", figures | {k: {"pearson": x} for k, x in told.items()})
    marks = found["marks"]
    show_figures(f"{marks['liked']} liked, {marks['disliked']} disliked", found["liked"])
    show_figures("iEval", found["ieval"])
    rates = [x["corrected"] for x in found["ieval"].values() if "corrected" in x]
    if rates:
        told = "the external judge passes {sensitivity:.3f} of the gold replies and refuses "
        told += (
            "{specificity:.3f} of the rewritten ones ({calibrated_on} in all). Assumed: {assumes}."
        )
        print(told.format(**rates[0]))


# --- the command ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser: the files, and those flags of infer.py that say who judges."""
    parser = Parser(SHOWN, prog="people.py", description=__doc__, usage="people.py FILE [FLAGS]")
    parser.add_argument("file", type=Path, metavar="FILE", help="crs_arena_eval.json")
    told = "the folder of redial/ and opendialkg/ (default: data)"
    parser.add_argument("--catalogues", type=Path, default=datasets.ROOT, help=told)
    parser.add_argument("--liked", type=Path, metavar="FILE.jsonl", help="ReDial's valid_raw.jsonl")
    told = "dialogues of each data set, 0 for all (default 0)"
    parser.add_argument("--limit", type=int, default=0, help=told)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    parser.add_argument("--run-dir", type=Path, help="a run of train.py (default: the newest)")
    parser.add_argument("--simulator", help="the adapter or model that judges, or none")
    add_flags(parser, loading.ModelOptions)
    add_flags(parser, ReplyOptions, skip=("ses", "rank", "rank_tokens"))
    parser.set_defaults(recommender="none", data=None, data_dir=None, verbose=False)
    return parser


def measure_people(arguments: Sequence[str] | None) -> None:
    """Judge the dialogues of people, print the tables, and write the figures."""
    flags = build_parser().parse_args(arguments)
    if flags.limit < 0:
        raise UserError(f"--limit must be 0 (all) or more, got {flags.limit}")
    seed, setup = from_flags(ReplyOptions, flags).seed, infer.set_up(flags)
    turns = read_arena(flags.file)
    sets = {domain: [x for x in turns if x.domain == domain] for domain in DOMAINS}
    sets["liked"] = read_liked(flags.liked) if flags.liked else []
    films = {x: datasets.load_catalogue(x, flags.catalogues / x) for x in DOMAINS}
    films["liked"] = films["redial"]
    recommender, facts = infer.assemble(setup, flags), {**setup.facts(), "seed": seed}
    judged, folder = partial(judge_all, recommender), setup.folder / "people"
    rows = {
        label: [
            row
            for part in batches(own, flags.limit, seed)
            for row in judged(films[label], part, label, facts, folder)
        ]
        for label, own in sets.items()
    }
    known = external_talks(setup.folder)
    rated = [row for domain in DOMAINS for row in rows[domain]]
    found = {"seed": seed, "limit": flags.limit}
    found |= measure(rated, rows["liked"], known, seed_for(seed, "people"))
    show_all(found)
    for told in loading.shortened_lines(recommender.engines):
        infer.tell(told)
    if flags.json:
        runs.write_json(flags.json, found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 2 for a user's fault, 130 for Ctrl-C."""
    return run_together("people.py", lambda: measure_people(arguments))


if __name__ == "__main__":
    sys.exit(main())
