"""Pages for a browser: answers with their searches, and the report of a run.

A page is one file that fetches nothing and runs no script. What a click opens is in `<details>`.
`tag` escapes every text that comes from a model or from data.

    python infer.py --ses --trace search.html
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from usbrec.chat import Row
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Dialogue
from usbrec.crs.wishes import card
from usbrec.extras import report
from usbrec.runs import write_json, write_whole

VOTES = ("label", "digit_probability", "parse_rate")  # of a leaf
INTERVAL = re.compile(r"([+-]?\d+\.?\d*) \[([+-]?\d+\.?\d*), ([+-]?\d+\.?\d*)\]")  # in a report
FRAME = ("html", "css")  # of every page
TRACES = (".html", ".json")  # of a trace
Lines = Sequence[Sequence[str]]  # (speaker, text) each


class Markup(str):
    """HTML, which `tag` leaves as it is."""


def tag(name: str, *inside: str, **attributes: str) -> Markup:
    """Return an element; what is inside it and no Markup is escaped."""
    given = "".join(f' {x.rstrip("_")}="{escape(value)}"' for x, value in attributes.items())
    content = "".join(x if isinstance(x, Markup) else escape(x) for x in inside)
    return Markup(f"<{name}{given}>{content}</{name}>")


def write_page(path: Path, title: str, body: Sequence[Markup]) -> None:
    """Write a page of these elements, and below them the legend of searches."""
    frame, style = (Path(__file__).with_name(f"search.{x}").read_text("utf-8") for x in FRAME)
    elements = "\n".join([*body, tag("p", report.SEARCH_LEGEND, class_="note")])
    page = Template(frame).substitute(title=escape(title), style=style, body=elements)
    write_whole(path, page.encode(errors="backslashreplace"))


def write_trace(path: Path, answered: Sequence[tuple[Dialogue, Row]], films: Catalogue) -> None:
    """Write answers and their dialogues: as records (.json), or as a page with their searches."""
    records = [{"dialogue": [[x.speaker, x.text] for x in d], **row} for d, row in answered]
    if path.suffix == ".json":
        write_json(path, {"answers": records})
    else:
        opened = {"open": ""} if len(records) == 1 else {}
        answers = [tag("details", *_answer(x, films), class_="answer", **opened) for x in records]
        write_page(path, "Replies and their searches", answers)


def _answer(record: Row, films: Catalogue) -> list[Markup]:
    """Return a summary of one line, the dialogue, the search, the reply and the facts below it."""
    reply = record["reply"] or "(nothing)"
    return [
        tag("summary", tag("b", f"{record['dialogue'][-1][1]} → {reply}")),
        *_said(record["dialogue"]),
        *(_search(record["search"], films) if record.get("search") else ()),
        *_said([("recommender", reply)]),
        tag("p", report.format_facts(record), class_="note"),
    ]


def _said(lines: Lines) -> list[Markup]:
    return [tag("p", text, class_=f"said {speaker}") for speaker, text in lines]


def _search(search: Row, films: Catalogue) -> list[Markup]:
    """Return a search's profile, and one node per different candidate."""
    parts = [tag("p", tag("b", "Profile: "), search["profile"], class_="profile")]
    for x, count, chosen in report.distinct(search):
        leaves = [{**leaf, "lines": leaf["lines"][1:]} for leaf in x["leaves"]]  # not the candidate
        badge = _badge(x["value"], count, "* " if chosen else "", x.get("dropped"))
        parts.append(_node(badge, [("recommender", x["reply"])], leaves, films))
    return parts


def _badge(value: float | None, draws: int, mark: str = "", dropped: int | None = None) -> Markup:
    style, text = f"--part: {(value or 0) / 2:.0%}", report.value_text(value, draws, dropped)
    return tag("b" if mark else "span", mark + text, class_="value", style=style)


def _node(badge: Markup, said: Lines, leaves: Sequence[Row], films: Catalogue) -> Markup:
    """Return a node of the tree: its badge and lines, of which the last is a reply.

    A click shows the reply's card, and a node per different continuation in the `leaves`, or the
    judge's votes where they end.
    """
    inside = [tag("summary", badge, " → ".join(text for _, text in said) or "(empty)")]
    inside += [tag("p", f"{x.title}: {card(x)}", class_="note") for x in films.first(said[-1][1])]
    for lines, group in groupby(leaves, lambda leaf: leaf["lines"][:2]):
        below = [{**leaf, "lines": leaf["lines"][2:]} for leaf in group]
        leaf = below[0]
        if not lines:
            votes = [f"{x} {leaf[x]:.3g}" for x in VOTES if leaf[x] is not None] or ["not asked"]
            votes += [f"by its memory: {leaf['known']}"] if leaf.get("known") else []
            inside.append(tag("p", f"judge: {', '.join(votes)}".replace("_", " "), class_="note"))
        else:  # an inner node has no value of its own
            badge = Markup() if leaf["lines"] else _badge(leaf["value"], leaf["weight"])
            inside.append(_node(badge, lines, below, films))
    return tag("details", *inside, class_="node")


# --- the report -------------------------------------------------------------------------------


def write_report_page(path: Path, found: Row, rows: Sequence[Row], films: Catalogue) -> None:
    """Write the page of a report: its text with the intervals drawn, and one search.

    It is the first of the last method that searched in `rows`, which are those of rows.jsonl.
    """
    body = [tag("pre", _drawn(block)) for block in report.format_report(found).split("\n\n")]
    talks = (row[name] for name in reversed(found["search"]) for row in rows if name in row)
    if talk := next((x for x in talks if x["searches"]), None):
        search = talk["searches"][0]
        after = 2 * (len(talk["replies"]) - search["turn"]) + 1  # lines from its reply on
        parts = [*_said(talk["transcript"][:-after]), *_search(search, films)]
        body.append(tag("div", *parts, class_="answer"))
    write_page(path, "Report", body)


def _drawn(block: str) -> Markup:
    """Return lines of the report's text with a bar for each interval, one scale per column.

    Means that are no shares and no scores, such as counts of titles, get no bar.
    """
    lines = escape(block, quote=False).splitlines()
    ends: dict[int, list[float]] = defaultdict(lambda: [0.0])
    for found in (x for line in lines for x in INTERVAL.finditer(line)):
        ends[found.start()] += [x for x in map(float, found.groups()) if abs(x) <= 2]

    def bar(found: re.Match[str]) -> str:
        least, most = min(ends[found.start()]), max(ends[found.start()])
        mean, low, high = ((float(x) - least) / ((most - least) or 1) for x in found.groups())
        style = f"--mean: {mean:.1%}; --low: {low:.1%}; --high: {high:.1%}"
        return tag("span", found[0], class_="bar" if high <= 1 else "", style=style)

    return Markup("\n".join(INTERVAL.sub(bar, line) for line in lines))
