"""Pages: what they show, that no text breaks out of its place, that nothing is fetched.

A browser looks at them too where playwright finds one (`CHROMIUM` names another).
"""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from scripted import Scripted, role_of, talk
from test_ses import FILMS

from usbrec.chat import Request
from usbrec.crs.agents import Roles, Side
from usbrec.crs.ses import SearchOptions, search
from usbrec.extras.pages import write_trace
from usbrec.runs import read_json, read_rows

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>\"'&"
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
    assert text(first["children"][0]) == "1.00 x2 Try Heat (1995)."
    assert text(second["children"][0]) == "1.00 Try Up (2009)."
    assert "Heat (1995): crime, 1990s, with Al Pacino" in text(first)
    assert "judge: label 1, digit probability 1" in text(first)
    assert "Alien (1979): horror, 1970s" in text(first)
    assert [x["class"] for x in found.of("b", "value")] == ["value chosen", *["value"] * 3]
    assert found.of("b", "value")[0]["style"] == "--part: 50%"
    whole = text(found.root)
    for told in ("gold title: Up (2009)", "1.25 s", "70.5 reused and 30 computed", "drawn"):
        assert told in whole


def test_a_tree_of_three_turns_is_a_tree_on_the_page(tmp_path: Path) -> None:
    """Two different candidates, each with one reply (three equal draws), and one below it."""
    found = page(tmp_path, searched("tree", 3))
    nodes = found.of("details", "node")
    assert len(nodes) == 2 * 3
    below = [[x for x in node["children"] if x["name"] == "details"] for node in nodes]
    assert [len(x) for x in below] == [1, 1, 0] * 2
    assert [text(x) for x in found.of("b", "value")] == ["1.00 x2", "1.00 x9", "1.00", "1.00 x9"]


def test_no_text_breaks_out_of_its_place(tmp_path: Path) -> None:
    """Every text that can be hostile is: the seeker's line, profile, replies, titles."""
    row = searched(drawn=HOSTILE)
    row |= {"items": [HOSTILE], "gold": [HOSTILE], "ranked": [{"title": HOSTILE, "logprob": -1.0}]}
    plain, hostile = page(tmp_path, searched()), page(tmp_path, row)
    for found in (plain, hostile):
        names = {x["name"] for x in found.all}
        assert names.isdisjoint({"script", "img", "iframe", "link", "object", "form", "a"})
        assert found.of("title")[0]["texts"] == found.of("h1")[0]["texts"] == ["Replies: 1"]
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
    for name in ("some.jsonl", "some.json"):
        write_trace(tmp_path / name, [(ROOT, row), (ROOT, row)], FILMS)
    assert read_rows(tmp_path / "some.jsonl") == [expected] * 2
    assert read_json(tmp_path / "some.json") == {"answers": [expected] * 2}


def test_an_empty_reply_and_lost_costs_are_shown_as_such(tmp_path: Path) -> None:
    llm = Scripted(lambda request: "")
    [found] = search(Roles(Side(llm), Side(llm), FILMS), [ROOT], [1], SearchOptions())
    row = {"reply": "", "items": [], "seconds": None, "tokens": None, "search": found.record()}
    shown = page(tmp_path, row)
    [node] = shown.of("details", "node")
    assert text(node["children"][0]) == "none x3 (empty)"
    assert "→ (nothing)" in text(shown.of("summary")[0])
