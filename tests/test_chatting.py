"""The chat: its commands, what a fault costs, and what a pipe gets to read."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import role_of, roles_of
from test_ses import FILMS, Ranking

from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Request, Row, Sampling
from usbrec.crs.agents import Roles, Side
from usbrec.crs.datasets import read_dialogues
from usbrec.crs.dialogue import Dialogue, format_dialogue
from usbrec.crs.ses import SearchOptions
from usbrec.extras import chatting
from usbrec.extras.chatting import Chat
from usbrec.llm.engine import Usage
from usbrec.options import UserError

PROFILE = "Likes: crime. Dislikes: nothing said."


class Model(Ranking):
    """A scripted model with an engine's counts and listeners."""

    def __init__(self, reply: Callable[[Request], str]) -> None:
        super().__init__(reply)
        self.usage, self.listeners = Usage(), {}


def by_role(request: Request) -> str:
    """The recommender counts the messages that it has seen."""
    return f"Reply {len(request.messages)}." if role_of(request) == "recommender" else PROFILE


def chat(
    monkeypatch: pytest.MonkeyPatch, *lines: str, ses: bool = True, model: Model | None = None
) -> tuple[Chat, Model, list[tuple[Row, bool]]]:
    """Hold a conversation of these lines; return it, the model, and what was shown."""
    model, shown = model or Model(by_role), []
    roles = Roles(Side(model), Side(model), FILMS)
    searching = SearchOptions(samples=2, turns=1)
    recommender = Recommender(
        roles, [model], ReplyOptions(ses=ses), Sampling(temperature=0.0), searching, False
    )

    def show(dialogue: Dialogue, row: Row, as_json: bool, printed: bool) -> None:
        shown.append((row, printed))

    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    held = Chat(recommender, show, False)
    assert held.converse() is held.turns
    return held, model, shown


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what stderr got after the greeting; nothing but replies goes to stdout."""
    said = capsys.readouterr()
    assert "\033" not in said.out + said.err and "Seeker:" not in said.out
    return said.err.splitlines()[1:]


def test_a_conversation_goes_on_from_its_replies_until_an_empty_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, _, shown = chat(monkeypatch, "Hello.", "More.", "", "never read", ses=False)
    assert [row["reply"] for row, _ in shown] == ["Reply 2.", "Reply 4."]
    expected = "Seeker: Hello.\nRecommender: Reply 2.\nSeeker: More."
    assert format_dialogue(held.turns[-1][0]) == expected


def test_ctrl_c_ends_a_conversation_and_its_turns_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(request: Request) -> str:
        if len(request.messages) > 2:
            raise KeyboardInterrupt
        return by_role(request)

    held, _, shown = chat(monkeypatch, "Hello.", "More.", "Again.", ses=False, model=Model(reply))
    assert [row["reply"] for row, _ in shown] == ["Reply 2."]
    assert [row["reply"] for _, row in held.turns] == ["Reply 2."]


def test_why_shows_the_last_search_which_the_reply_itself_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, shown = chat(monkeypatch, "/why", "Hello.", "/ses off", "More.", "/why")
    assert told(capsys)[0].startswith("nothing has been searched yet")
    (searched, _), (plain, printed), (why, again) = shown
    assert searched["search"] is None and plain["search"] is None and printed
    assert why["search"]["profile"] == PROFILE and why["reply"] == "Reply 2." and not again


def test_only_a_plain_reply_is_heard_as_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = []

    class Told(Model):
        def generate(self, requests: Any) -> Any:
            heard.append(bool(self.listeners))
            return super().generate(requests)

    chat(monkeypatch, "One.", "/ses off", "Two.", "/ses on", "Three.", model=Told(by_role))
    assert heard == [False, True, False]
    assert capsys.readouterr().out == ""  # the show is a stub, the pieces none


def test_a_mended_profile_is_searched_by_and_the_summary_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = "Likes: horror. Dislikes: war."
    lines = ["/profile", "One.", "/profile", f"/profile {mine}", "/profile", "Two."]
    held, model, _ = chat(monkeypatch, *lines, "/profile auto", "Three.", "/profile")
    first, *rest = told(capsys)
    assert first.startswith("nothing has been searched yet")
    assert rest == [PROFILE, mine, PROFILE]
    assert [row["search"]["profile"] for _, row in held.turns] == [PROFILE, mine, PROFILE]
    asked = [call.count("summariser") for call in roles_of(model.generated)]
    assert asked == [1, 0, 1]
    assert all(mine.rstrip(".") in x.messages[-1].content for x in model.scored[1])


def test_top_ranks_titles_where_the_last_reply_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Noted(Model):
        def best_texts(self, requests: Any, *rest: Any) -> Any:
            asked.append((requests[0].messages[-1].content, *rest[1:]))
            return super().best_texts(requests, *rest)

    lines = ["/top", "Hello.", "/top 2", "/top", "/top 0", "/top x", "/top -1"]
    chat(monkeypatch, *lines, ses=False, model=Noted(by_role))
    before, *ranked = told(capsys)
    assert before == "/top has nothing to act on yet: say something first"
    assert ranked[:2] == ["    1. Up (2009)  -1.00", "    2. Alien (1979)  -1.00"]
    assert ranked[4] == "    3. Heat (1995)  -1.00"
    assert all(line.startswith("there is no command '/top ") for line in ranked[5:])
    assert [(x, k) for x, k, _ in asked] == [("Hello.", 2), ("Hello.", 3)]


def test_undo_takes_a_line_and_its_reply_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held, _, _ = chat(monkeypatch, "One.", "Two.", "/undo", "Three.")
    text = format_dialogue(held.turns[-1][0])
    assert text == "Seeker: One.\nRecommender: Reply 2.\nSeeker: Three."


def test_a_saved_dialogue_is_one_that_dialogue_reads_and_no_file_is_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "said.json"
    lines = [f"/save {path}", "One.", "Two.", f"/save {path}", f"/save {path}"]
    lines += [f"/save {tmp_path}/no\0name", f"/save {tmp_path}", "/save", "Three."]
    held, _, _ = chat(monkeypatch, *lines)
    assert read_dialogues(path) == [held.turns[1][0]]
    assert json.loads(path.read_text("utf-8"))["reply"] == "Reply 4."
    said = told(capsys)
    assert said[1] == f"saved in {path}"
    assert said[2] == f"{path} is there already: name another file"
    assert len(said) == 6 and len(held.turns) == 3


def test_the_folder_of_an_unknown_user_ends_no_conversation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    held, _, _ = chat(monkeypatch, "One.", "/save ~no user of this name/said.json", "Two.")
    assert len(held.turns) == 2
    assert read_dialogues(Path("~no user of this name/said.json")) == [held.turns[0][0]]


def test_an_unknown_command_and_help_are_told_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, model, _ = chat(monkeypatch, "/sing", "/help", "Hello.", "/sing", "/ses maybe", "/undo 3")
    said = told(capsys)
    for name in ("/why", "/profile", "/top", "/undo", "/save", "/ses", "/help"):
        assert any(line.strip().startswith(name) for line in said)
    for line in ("/sing", "/ses maybe", "/undo 3"):
        assert f"there is no command '{line}': /help lists them" in said
    assert len(held.turns) == 1 and len(model.generated) == 1


def test_a_line_that_cannot_be_answered_costs_no_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(request: Request) -> str:
        if len(request.messages[-1].content) > 1000:
            raise UserError("a prompt of 2000 tokens, which cannot be shortened")
        return by_role(request)

    long = "x" * 100_000
    lines = ["One.", "/ses off", long, f"/{long}", "/ses on", "Two."]
    held, _, _ = chat(monkeypatch, *lines, model=Model(reply))
    assert [row["reply"] for _, row in held.turns] == ["Reply 2.", "Reply 4."]
    said = capsys.readouterr()
    assert "\na prompt of 2000 tokens, which cannot be shortened\n" in said.err and not said.out


def test_a_terminal_gets_a_prompt_and_its_lines_can_be_edited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def read(prompt: str = "") -> str:
        prompts.append(prompt)
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chatting.sys, "stdout", Terminal())
    monkeypatch.setattr(chatting.sys, "stdin", Terminal())
    asked = []
    plain = __import__
    monkeypatch.setattr("builtins.__import__", lambda x, *y: asked.append(x) or plain(x, *y))
    monkeypatch.setitem(sys.modules, "readline", None)  # as where Python has none
    for as_json in (False, True):
        model = Model(by_role)
        roles = Roles(Side(model), Side(model), FILMS)
        recommender = Recommender(
            roles, [model], ReplyOptions(), Sampling(), SearchOptions(), False
        )
        Chat(recommender, lambda *row: None, as_json).converse()
        assert ("readline" in asked) == (not as_json)
        asked.clear()
    assert prompts == ["Seeker: ", ""]
