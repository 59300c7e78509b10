"""How well titles are found in text and hidden from it, against a dataset's own annotations.

    python benchmarks/titles.py [--data redial --data-dir FOLDER] [--limit N] [--json FILE]

The rows of ReDial, OpenDialKG and the sample set annotate titles: `rec` holds those of the reply,
`entity` those of the context, line after line. An entry of `entity` belongs to the next line in
which it stands word for word. Rows of one dialogue repeat its lines; each line is counted once.

finding: an annotated title is found if a mention in its line may mean it, a mention is right if it
    may mean a title annotated in its line, so that a missing year is no fault. Entries outside the
    catalogue (genres, people) count for nothing. What nobody annotated counts as wrong.
hiding: rows in which a line of the seeker's names a gold title, in the context or right behind the
    reply. A name stands there if its words do, in any case; an ordinary word ("It") if it is
    annotated or found, since as a word it is everywhere. Other annotated titles are cut out first:
    "Spider-Man 2" is not "Spider-Man". Below that each gold reply with its titles as written, in
    lower and upper case, and without years: here their places are known, for ordinary words too.
false alarms: mentions of titles that are one ordinary word, in seeker lines without annotated
    titles; "stands" counts the lines that hold the word in any case.
speed: `Catalogue.find` over the lines, in characters per second of processor time, the median of
    three, also with the catalogue filled up to 100,000 titles spliced from its own.

Intervals (95%) draw whole dialogues. No model is needed, nor torch.
"""

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.crs import datasets  # noqa: E402
from usbrec.crs.catalogue import Catalogue, Item, read_item  # noqa: E402
from usbrec.crs.titles import is_ordinary, key_of, names_of  # noqa: E402
from usbrec.extras.intervals import mean_interval  # noqa: E402
from usbrec.options import UserError, seed_for  # noqa: E402

AIM = 1_000_000  # characters a second
PADDED = 100_000
REACH = {"find": 1, "find_100k_items": 1}  # in AIM
MEASURES = ("precision", "recall")
TRAPS = ("It", "Up", "Her", "War")
KINDS = ("all titles", "one ordinary word")
YEAR = re.compile(r"\s*\(\d{4}\)$")
FORMS: dict[str, Callable[[str], str]] = {
    "as written": str,
    "lower case": str.lower,
    "upper case": str.upper,
    "without year": lambda title: YEAR.sub("", title) or title,
    "lower case without year": lambda title: (YEAR.sub("", title) or title).lower(),
}
Figures = dict[str, dict[str, Any]]  # a row of a table -> its figures


class Line(NamedTuple):
    """A line of a dialogue, the place of its turn, and the catalogue's titles annotated in it."""

    dialog_id: str
    turn_id: int
    is_seeker: bool
    text: str
    titles: tuple[str, ...]


class Row(NamedTuple):
    """A row: the context's lines, the reply with its gold titles, and the seeker's next line."""

    context: list[Line]
    reply: Line
    answer: Line | None


# --- the annotated lines ----------------------------------------------------------------------


def placed(lines: Sequence[str], titles: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the titles of each line: `titles` run through the lines in order, once per line.

    A title that stands in none of the lines left, and those behind it, are left out.
    """
    waiting, found = list(titles), list[tuple[str, ...]]()
    for line in lines:
        taken: tuple[str, ...] = ()
        while waiting and waiting[0].lower() in line.lower() and waiting[0] not in taken:
            taken += (waiting.pop(0),)
        found.append(taken)
    return found


def read_rows(values: Iterable[dict[str, Any]], catalogue: Catalogue) -> list[Row]:
    """Return the rows of a file, each line with its annotated titles; the last line is a seeker's.

    The seeker's answer to a reply stands in the context of a later row of the dialogue.
    """
    known, rows = {item.title for item in catalogue}, []
    for row in values:
        datasets.read_row(row)  # raises UserError for a malformed one
        if "entity" not in row:
            raise UserError("a row has no entity: the titles of its context")
        name, context = str(row["dialog_id"]), row["context"]
        annotated = [title for title in map(str.strip, row["entity"]) if title in known]
        told = enumerate(zip(context, placed(context, annotated), strict=True))
        lines = [
            Line(name, place, (len(context) - place) % 2 == 1, text, titles)
            for place, (text, titles) in told
            if text.strip()
        ]
        gold = tuple(title for title in map(str.strip, row["rec"]) if title in known)
        rows.append(Row(lines, Line(name, len(context), False, row["resp"], gold), None))
    said = {(x.dialog_id, x.turn_id): x for row in rows for x in row.context if x.is_seeker}
    replies = [row.reply for row in rows]
    answers = [said.get((reply.dialog_id, reply.turn_id + 1)) for reply in replies]
    return [row._replace(answer=line) for row, line in zip(rows, answers, strict=True)]


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Return each line of the rows once; the reply's annotation goes before the context's."""
    lines = [row.reply for row in rows] + [line for row in rows for line in row.context]
    return list({(x.dialog_id, x.turn_id, x.text): x for x in reversed(lines)}.values())


# --- the measures -----------------------------------------------------------------------------


def share(values: Sequence[float], lines: Sequence[Line]) -> dict[str, Any]:
    """Return the mean of the values with its interval over dialogues, a line per value."""
    return mean_interval(values, seed_for(0, "titles"), groups=[line.dialog_id for line in lines])


def ordinary(items: Iterable[Item]) -> bool:
    """Return whether all of the items bear a name that is one ordinary word."""
    return all(is_ordinary(item.name) for item in items)


def judge_finding(lines: Sequence[Line], catalogue: Catalogue) -> Figures:
    """Return precision and recall with their intervals, over all titles and for ordinary words."""
    right: dict[str, list[tuple[bool, Line]]] = {kind: [] for kind in KINDS}
    found: dict[str, list[tuple[bool, Line]]] = {kind: [] for kind in KINDS}
    for line in lines:
        mentions = {mention.items for mention in catalogue.find(line.text)}
        wanted = {catalogue.named(title) for title in line.titles}
        for these, others, hits in ((mentions, wanted, right), (wanted, mentions, found)):
            known = {item for items in others for item in items}
            for items in these:
                for kind in KINDS if ordinary(items) else KINDS[:1]:
                    hits[kind].append((not known.isdisjoint(items), line))
    return {
        kind: {
            name: share([hit for hit, _ in hits[kind]], [line for _, line in hits[kind]])
            for name, hits in zip(MEASURES, (right, found), strict=True)
        }
        for kind in KINDS
    }


def times(text: str, title: str) -> int:
    """Return how often the words of the title's own name stand in the text, in any case."""
    words, name = (f"<{key_of(x).replace(' ', '><')}>" for x in (text, names_of(title)[0]))
    return words.count(name)


def is_named(line: Line, text: str, title: str, catalogue: Catalogue) -> bool:
    """Return whether the text, made from the line, names the title."""
    own = set(catalogue.named(title))
    if ordinary(own):
        return title in text or any(own & set(x.items) for x in catalogue.find(text))
    return times(without(text, set(line.titles) - {title}), title) > 0


def without(text: str, titles: Iterable[str]) -> str:
    """Return the text with the titles, as they are written, cut out in any case."""
    for title in sorted(titles, key=len, reverse=True):
        text = re.sub(re.escape(title), "#", text, flags=re.IGNORECASE)
    return text


def judge_hiding(rows: Sequence[Row], catalogue: Catalogue) -> Figures:
    """Return the share of rows that name a gold title before and after hiding, by kind of text."""
    figures: Figures = {}
    for kind in KINDS:
        golds = [
            [x for x in row.reply.titles if kind == KINDS[0] or ordinary(catalogue.named(x))]
            for row in rows
        ]
        asked = [(row, gold) for row, gold in zip(rows, golds, strict=True) if gold]
        replies = [row.reply for row, _ in asked]
        before, after = [], []
        for row, gold in asked:
            spoken = [x for x in row.context if x.is_seeker] + [row.answer] * bool(row.answer)
            told = [(x, t) for x in spoken for t in gold if is_named(x, x.text, t, catalogue)]
            hidden = [(x, catalogue.hide(x.text, row.reply.titles), t) for x, t in told]
            before.append(bool(told))
            after.append(any(is_named(*case, catalogue) for case in hidden))
        told_of = {"before": share(before, replies), "after": share(after, replies)}
        figures[f"seeker's lines, {kind}"] = told_of
        for form, change in FORMS.items():
            leaks = [leaks_in_reply(row.reply, gold, change, catalogue) for row, gold in asked]
            figures[f"replies {form}, {kind}"] = {"after": share(leaks, replies)}
    return figures


def leaks_in_reply(
    reply: Line, gold: Sequence[str], change: Callable[[str], str], catalogue: Catalogue
) -> bool:
    """Return whether a reply with its gold titles in another form names one after hiding.

    It does if the title's words stand there more often than where the titles are cut out.
    """
    text = reply.text
    for title in sorted(reply.titles, key=len, reverse=True):
        text = re.sub(re.escape(title), lambda m: change(m[0]), text, flags=re.IGNORECASE)
    hidden, rest = catalogue.hide(text, reply.titles), without(reply.text, reply.titles)
    return any(times(hidden, title) > times(rest, title) for title in gold)


def count_false_alarms(lines: Sequence[Line], catalogue: Catalogue) -> Figures:
    """Return for each trap, the others found most, and all: lines that hold it, lines found in."""
    spoken = [line.text for line in lines if line.is_seeker and not line.titles]
    stands, found = Counter[str](), Counter[str]()
    names = {key_of(item.name): item.name for item in catalogue if is_ordinary(item.name)}
    for text in spoken:
        stands.update({names[word] for word in key_of(text).split() if word in names})
        mentions = [mention for mention in catalogue.find(text) if ordinary(mention.items)]
        found.update({names[key_of(mention.items[0].name)] for mention in mentions})
    shown = dict.fromkeys([*TRAPS, *(name for name, _ in found.most_common(5))])
    counts = {name: (stands[name], found[name]) for name in shown if name in names.values()}
    counts["all of them"] = (sum(stands.values()), sum(found.values()))
    return {
        name: {"stands": count, "found": hits, "per_1000_lines": 1000 * hits / max(len(spoken), 1)}
        for name, (count, hits) in counts.items()
    }


def padded(catalogue: Catalogue, count: int) -> list[Item]:
    """Return the items, filled up with made-up titles: a beginning of one and an end of another."""
    rng, names = random.Random(0), [item.name.split() for item in catalogue]
    items = {item.title: item for item in catalogue}
    while len(items) < count:
        first, second = rng.choice(names), rng.choice(names)
        words = first[: rng.randint(1, len(first))] + second[rng.randint(0, len(second) - 1) :]
        title = f"{' '.join(words)} ({rng.randint(1930, 2020)})"
        items.setdefault(title, read_item({"name": title}))
    return list(items.values())


def measure_speed(lines: Sequence[Line], catalogue: Catalogue) -> Figures:
    """Return characters per second and the seconds to build, of the catalogue and a large one."""
    figures: Figures = {}
    for items in (catalogue.items, padded(catalogue, PADDED)):
        start = time.process_time()
        tried = Catalogue(items)
        built, seconds = time.process_time() - start, []
        for _ in range(3):
            start = time.process_time()
            for line in lines:
                tried.find(line.text)
            seconds.append(time.process_time() - start)
        speed = sum(len(line.text) for line in lines) / statistics.median(seconds)
        figures[f"{len(tried.items):,} items"] = {
            "chars_per_second": speed,
            "seconds_to_build": built,
        }
    return figures


# --- the report -------------------------------------------------------------------------------


def cell(figure: Any) -> str:
    """Return a figure as text: a count, a rate, or a mean with its interval and number."""
    if not isinstance(figure, dict):
        return f"{figure:,.0f}" if figure >= 1000 or isinstance(figure, int) else f"{figure:.2f}"
    if figure["mean"] is None:
        return "none"
    return "{mean:.4f} [{low:.4f}, {high:.4f}] of {n:,}".format(**figure)


def show(title: str, figures: Figures) -> None:
    """Print a table of figures."""
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    print(f"| {title} | {' | '.join(name.replace('_', ' ') for name in names)} |")
    print("|" + "---|" * (len(names) + 1))
    for label, row in figures.items():
        cells = [cell(row[name]) if name in row else "" for name in names]
        print(f"| {label} | {' | '.join(cells)} |")
    print()


def measure(name: str, split: str, data_dir: str | None, limit: int) -> dict[str, Figures]:
    """Return the tables of a dataset's split, over a seeded draw of `limit` rows (0: all).

    Raises:
        UserError: the dataset or a file is missing or malformed.
    """
    catalogue, folder = datasets.load_catalogue(name, data_dir), datasets._folder(name, data_dir)
    path = datasets._find(folder, split)
    rows = read_rows((value for _, value in datasets.read_jsonl(path)), catalogue)
    if 0 < limit < len(rows):
        rows = random.Random(0).sample(rows, limit)
    lines = lines_of(rows)
    return {
        "finding": judge_finding(lines, catalogue),
        "hiding": judge_hiding(rows, catalogue),
        "false alarms": count_false_alarms(lines, catalogue),
        "speed": measure_speed(lines, catalogue),
    }


def flatten(tables: dict[str, Figures]) -> dict[str, float]:
    """Return the figures of the last line: means and rates, in speeds millions of characters."""
    kinds = {kind: kind.replace(" ", "_") for kind in KINDS}
    found = {f"{x}_{kinds[k]}": tables["finding"][k][x]["mean"] for k in KINDS for x in MEASURES}
    for kind, row in ((kind, tables["hiding"][f"seeker's lines, {kind}"]) for kind in KINDS):
        found |= {f"named_{x}_{kinds[kind]}": row[x]["mean"] for x in ("before", "after")}
    found["false_alarms_per_1000"] = tables["false alarms"]["all of them"]["per_1000_lines"]
    for name, row in zip(REACH, tables["speed"].values(), strict=True):
        found[name] = row["chars_per_second"] / AIM
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and the line of JSON; return 2 for a user's fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="sample", help="sample, redial, opendialkg or a folder")
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the dataset's files lie")
    parser.add_argument("--split", default="test", choices=datasets.SPLITS)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="a seeded draw of N rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    flags = parser.parse_args(arguments)
    try:
        if flags.limit < 0:
            raise UserError(f"--limit must be at least 0, got {flags.limit}")
        tables = measure(flags.data, flags.split, flags.data_dir, flags.limit)
        for title, figures in tables.items():
            show(title, figures)
        if flags.json:
            flags.json.write_text(json.dumps(tables, indent=1) + "\n", "utf-8")
    except (UserError, OSError) as error:
        print(f"titles.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"benchmark": "titles", "ratios": flatten(tables), "reach": REACH}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
