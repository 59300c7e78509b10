"""Pages: what they show, that no text breaks out of its place, that nothing is fetched.

A browser loads them too, where there is one.
"""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, role_of, talk
from test_report import FACTS, JUDGE, PLAIN, SEARCH, TUNED
from test_ses import FILMS

from usbrec.chat import Request
from usbrec.crs.agents import Roles, Side
from usbrec.crs.ses import SearchOptions, search
from usbrec.extras import pages
from usbrec.extras.pages import write_report_page, write_trace
from usbrec.extras.report import build_report, format_report, interval
from usbrec.runs import read_json

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>\"'&"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
EMPTY = {"meta", "br", "img", "link"}  # elements without an end tag
ROOT = talk("Something dark & <b>old</b>?")


class Page(HTMLParser):
    """An element tree: (name, attributes, texts, children) each; asserts that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root: dict[str, Any] = {"name": "", "children": [], "texts": [], "class": ""}
        self.open, self.all = [self.root], []
        self.feed(text)
        self.close()
        assert [x["name"] for x in self.open] == [""], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        element = {"name": tag, "children": [], "texts": [], "class": "", **dict(attrs)}
        self.open[-1]["children"].append(element)
        self.all.append(element)
        if tag not in EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["name"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["texts"].append(data)

    def of(self, name: str, kind: str = "") -> list[dict[str, Any]]:
        """Return the elements of a name and class, in order."""
        return [x for x in self.all if x["name"] == name and kind in x["class"].split()[:1] + [""]]


def text(element: dict[str, Any]) -> str:
    return " ".join(" ".join(element["texts"]).split())


def searched(mode: str = "chain", turns: int = 2, *, drawn: str = "Try Heat (1995).") -> Any:
    """Return a row whose search has three candidates, two of them equal."""
    replies = iter([drawn, "Try Up (2009).", drawn])

    def reply(request: Request) -> str:
        if role_of(request) == "recommender" and len(request.messages) == 2:
            return next(replies)
        return "Well, Alien (1979)." if role_of(request) == "recommender" else HOSTILE

    llm = Scripted(reply)
    roles = Roles(Side(llm), Side(llm), FILMS)
    [found] = search(roles, [ROOT], [1], SearchOptions(samples=3, turns=turns, mode=mode))
    tokens = {"calls": 4, "reused_tokens": 70.5, "computed_tokens": 30, "decoded_tokens": 12}
    return {
        "reply": found.reply, "items": ["Heat (1995)"], "gold": ["Up (2009)"],
        "seconds": 1.25, "tokens": tokens, "search": found.record(),
    }  # fmt: skip


def page(tmp_path: Path, *rows: Any) -> Page:
    write_trace(tmp_path / "search.html", [(ROOT, row) for row in rows], FILMS)
    return Page((tmp_path / "search.html").read_text("utf-8"))


def test_a_page_shows_profile_candidates_cards_votes_and_costs(tmp_path: Path) -> None:
    found = page(tmp_path, searched())
    assert len(found.of("details", "answer")) == 1
    assert text(found.of("p", "profile")[0]) == f"Profile: {HOSTILE}"
    [first, _, second, _] = found.of("details", "node")  # a candidate, then its leaf
    assert text(first["children"][0]) == "* 1.00 x2 Try Heat (1995)."
    assert text(second["children"][0]) == "1.00 Try Up (2009)."
    assert "Heat (1995): crime, 1990s, with Al Pacino" in text(first)
    assert "judge: label 1, digit probability 1" in text(first)
    assert "Alien (1979): horror, 1970s" in text(first)
    assert [text(x) for x in found.of("b", "value")] == ["* 1.00 x2"]
    assert [text(x) for x in found.of("span", "value")] == ["1.00"] * 3
    assert found.of("b", "value")[0]["style"] == "--part: 50%"
    whole = text(found.root)
    for told in ("gold title: Up (2009)", "1.25 s", "70.5 reused and 30 computed", "drawn"):
        assert told in whole


def test_a_page_shows_what_the_judge_has_written_of_a_title(tmp_path: Path) -> None:
    row = searched()
    for candidate in row["search"]["candidates"]:
        for leaf in candidate["leaves"]:
            leaf["known"] = HOSTILE
    first = page(tmp_path, row).of("details", "node")[0]
    assert f"digit probability 1, by its memory: {HOSTILE}" in text(first)


def test_a_tree_of_three_turns_is_a_tree_on_the_page(tmp_path: Path) -> None:
    """Two different candidates, each with one reply (three equal draws), and one below it."""
    found = page(tmp_path, searched("tree", 3))
    nodes = found.of("details", "node")
    assert len(nodes) == 2 * 3
    below = [[x for x in node["children"] if x["name"] == "details"] for node in nodes]
    assert [len(x) for x in below] == [1, 1, 0] * 2
    assert [text(x) for x in found.of("span", "value")] == ["1.00 x9", "1.00", "1.00 x9"]


def test_no_text_breaks_out_of_its_place(tmp_path: Path) -> None:
    """Every text that can be hostile is: the seeker's line, profile, replies, titles."""
    row = searched(drawn=HOSTILE)
    row |= {"items": [HOSTILE], "gold": [HOSTILE], "ranked": [{"title": HOSTILE, "logprob": -1.0}]}
    plain, hostile = page(tmp_path, searched()), page(tmp_path, row)
    for found in (plain, hostile):
        names = {x["name"] for x in found.all}
        assert names.isdisjoint({"script", "img", "iframe", "link", "object", "form", "a"})
        assert (
            found.of("title")[0]["texts"]
            == found.of("h1")[0]["texts"]
            == ["Replies and their searches"]
        )
    shape = [(x["name"], x["class"]) for x in plain.all if x["name"] != "p"]
    assert [(x["name"], x["class"]) for x in hostile.all if x["name"] != "p"] == shape
    assert text(hostile.root).count(HOSTILE) > 8


def test_a_page_fetches_nothing_and_says_so(tmp_path: Path) -> None:
    found = page(tmp_path, searched())
    for element in found.all:
        assert {"src", "href", "srcset", "data", "action", "background"}.isdisjoint(element)
        assert not [name for name in element if name.startswith("on")]
    [style] = found.of("style")
    assert "url(" not in "".join(style["texts"]) and "@import" not in "".join(style["texts"])
    assert "prefers-color-scheme: dark" in "".join(style["texts"])
    [policy] = [x["content"] for x in found.of("meta") if "http-equiv" in x]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_one_answer_is_open_and_of_several_none(tmp_path: Path) -> None:
    plain = {**searched(), "search": None}
    for rows, opened in (([searched()], [True]), ([searched(), plain], [False, False])):
        found = page(tmp_path, *rows)
        assert ["open" in x for x in found.of("details", "answer")] == opened
    assert "Profile" not in text(found.of("details", "answer")[1])


def test_records_are_the_rows_with_their_dialogues(tmp_path: Path) -> None:
    row = searched()
    expected = json.loads(json.dumps({"dialogue": [["seeker", ROOT[0].text]], **row}))
    write_trace(tmp_path / "some.json", [(ROOT, row), (ROOT, row)], FILMS)
    assert read_json(tmp_path / "some.json") == {"answers": [expected] * 2}


def test_an_empty_reply_and_lost_costs_are_shown_as_such(tmp_path: Path) -> None:
    llm = Scripted(lambda request: "")
    [found] = search(Roles(Side(llm), Side(llm), FILMS), [ROOT], [1], SearchOptions())
    row = {"reply": "", "items": [], "search": found.record()}
    shown = page(tmp_path, row)
    [node] = shown.of("details", "node")
    assert text(node["children"][0]) == "* none x3 (empty)"
    assert "→ (nothing)" in text(shown.of("summary")[0])


# --- the report -------------------------------------------------------------------------------


@pytest.fixture
def report() -> dict[str, Any]:
    """The report of test_report.py: methods B/L and RL+SES, of which one was searched."""
    methods = {"B/L": PLAIN, "RL+SES": [{**x, "searches": [SEARCH]} for x in TUNED]}
    baselines = {"copy-last": [x["labels"] for x in PLAIN]}
    return build_report(methods, baselines, JUDGE, seed=0) | FACTS


def report_page(tmp_path: Path, report: dict[str, Any], rows: list[Any]) -> Page:
    write_report_page(tmp_path / "report.html", report, rows, FILMS)
    return Page((tmp_path / "report.html").read_text("utf-8"))


def test_the_page_of_a_report_is_its_text(tmp_path: Path, report: dict[str, Any]) -> None:
    found = report_page(tmp_path, report, [])
    blocks = ["".join(x["texts"]) for x in found.of("pre")]
    assert "\n\n".join(blocks) == format_report(report)
    assert "<" not in format_report(report) and found.of("div") == []


def test_intervals_are_drawn_on_one_scale_per_column(tmp_path: Path, report: Any) -> None:
    """RL+SES against B/L in iEval: +1.25 [-0.83, +2.00]: 0 of the scale is the low end."""
    report["differences"]["RL+SES - B/L"]["ieval"] = {"mean": 0.5, "low": -0.5, "high": 1.5, "n": 2}
    report["search"]["RL+SES"]["different_titles"] = {"mean": 8.0, "low": 7.0, "high": 9.0, "n": 3}
    found = report_page(tmp_path, report, [])
    styles = {text(x): x["style"] for x in found.of("span", "bar")}
    assert styles["+0.500 [-0.500, +1.500]"] == "--mean: 50.0%; --low: 0.0%; --high: 100.0%"
    means = report["methods"]
    most = max(x["ieval"]["high"] for x in means.values())
    for row in means.values():
        drawn = interval(row["ieval"]).split(" n ")[0]
        part = float(drawn.split()[0]) / round(most, 3)
        assert styles[drawn].startswith(f"--mean: {part:.1%}; ")
    assert "8.000 [7.000, 9.000]" not in styles
    report = {**report, "counts": {"notes": ["such as 'Waiting... [1, 2]' or '. [1, 2]'"]}}
    told = " ".join(map(text, report_page(tmp_path, report, []).of("pre")))
    assert "such as 'Waiting... [1, 2]' or '. [1, 2]'" in told


def test_a_page_tells_when_a_budget_dropped_a_candidate(tmp_path: Path) -> None:
    row = searched()
    row["search"]["candidates"][1]["dropped"] = 2
    told = [text(x) for x in page(tmp_path, row).of("span", "value")]
    assert [x for x in told if "dropped" in x] == ["1.00, dropped at turn 2"]


def test_a_page_tells_a_reply_that_no_judge_was_asked_about(tmp_path: Path) -> None:
    """As when the clock ends a search before its first judgement."""
    row = searched()
    leaf = row["search"]["candidates"][1]["leaves"][0]
    leaf |= dict.fromkeys(("value", *pages.VOTES))
    told = [text(x) for x in page(tmp_path, row).of("p", "note")]
    assert [x for x in told if x.startswith("judge: ")][-1] == "judge: not asked"


@pytest.mark.parametrize(("turn", "before"), [(1, 1), (2, 3)])
def test_a_report_shows_one_search_of_its_last_method(
    tmp_path: Path, report: dict[str, Any], turn: int, before: int
) -> None:
    """A talk of two turns: its first search began after one line, its second after three.

    The talk before it had ended when the searches began.
    """
    record = {"turn": turn, **searched()["search"]}
    said = [["seeker", "a"], ["recommender", "b"], ["seeker", "c"], ["recommender", "d"]]
    talk = {"searches": [record], "transcript": said, "replies": ["b", "d"]}
    short = {**talk, "searches": []}
    rows = [{"B/L": {}}, {"RL+SES": short}, {"RL+SES": talk}, {"RL+SES": None}]
    found = report_page(tmp_path, report, rows)
    [shown] = found.of("div", "answer")
    assert [text(x) for x in shown["children"] if x["name"] == "p"][:-1] == list("abc")[:before]
    assert len(found.of("details", "node")) == 4


# --- a browser --------------------------------------------------------------------------------


def browse(page: Path, *more: str) -> str:
    """Return what a headless browser prints about a page; without a browser the test is skipped."""
    found = [x for x in map(shutil.which, BROWSERS) if x]
    if not found:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here to look at the pages")
    profile = f"--user-data-dir={page.parent / 'browser'}"
    command = [found[0], "--headless", "--no-sandbox", "--disable-gpu", profile, *more]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_browser_sees_the_elements_that_were_written(tmp_path: Path) -> None:
    """And no script has run: the title is the page's own."""
    row = searched(drawn=HOSTILE)
    written = page(tmp_path, row)
    seen = Page(browse(tmp_path / "search.html", "--dump-dom"))
    assert text(seen.of("title")[0]) == "Replies and their searches"
    names = [x["name"] for x in seen.all if x["name"] not in ("head", "body")]
    assert names == [x["name"] for x in written.all]
    assert text(seen.root) == text(written.root)


def test_a_browser_paints_the_page_light_or_dark(tmp_path: Path) -> None:
    """A corner of the page is painted, its background alone."""
    image = pytest.importorskip("matplotlib.image")
    page(tmp_path, searched())
    corners = []
    for scheme in (1, 0):  # light, dark
        shot = tmp_path / f"{scheme}.png"
        settings = f"--blink-settings=preferredColorScheme={scheme}"
        browse(tmp_path / "search.html", f"--screenshot={shot}", settings)
        corners.append(image.imread(shot)[2, 2, :3].mean())
    assert corners[0] > 0.9 and corners[1] < 0.2
