"""A conversation in the terminal. A line that begins with a slash is a command:

    /why             draw the last search
    /profile         show the profile of the last search
    /profile TEXT    give later searches this profile; "/profile auto" ends that
    /top [N]         the N titles likeliest to be recommended where the last reply stands (10)
    /undo            take back the last line and its reply
    /save FILE       write the dialogue to a file that --dialogue reads
    /ses on|off      search for the next replies, or not
    /help            show these commands

An empty line or the end of the input ends the conversation. A reply without a search is printed
while it is drawn. Commands, /why aside, print to stderr. A line that cannot be answered does not
end the conversation.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from usbrec.answering import Recommender
from usbrec.chat import Row
from usbrec.crs.dialogue import Dialogue, add_turn
from usbrec.options import UserError, tell
from usbrec.runs import write_json

Answered = list[tuple[Dialogue, Row]]  # dialogues that awaited a reply, and their rows


@dataclass
class Chat:
    """A conversation: its turns, its dialogue, and the profile that later searches are given.

    `show(dialogue, row, as_json, printed)` prints a row, whose reply may be `printed` already.
    """

    recommender: Recommender
    show: Callable[[Dialogue, Row, bool, bool], None]
    as_json: bool
    turns: Answered = field(default_factory=list)
    dialogue: Dialogue = ()
    profile: str = ""

    def converse(self) -> Answered:
        """Read lines until an empty one, the end of the input or Ctrl-C; return the turns."""
        typed = sys.stdin.isatty() and sys.stdout.isatty() and not self.as_json
        if typed:  # into a pipe readline may print escape codes
            with suppress(ImportError):  # where Python has none, lines are not edited or recalled
                import readline  # noqa: F401
        tell("Say what you would like to watch; an empty line ends the conversation, /help helps.")
        with suppress(EOFError, KeyboardInterrupt):
            while line := input("Seeker: " if typed else "").strip():
                try:
                    (self.obey if line.startswith("/") else self.say)(line)
                except ValueError as error:  # a UserError, or a file's name that is none
                    tell(str(error))
        return self.turns

    def say(self, line: str) -> None:
        """Answer a line of the seeker's."""
        asked = add_turn(self.dialogue, "seeker", line)
        streamed = not (self.as_json or self.recommender.options.ses)
        self.recommender.engines[0].listeners = {0: printer()} if streamed else {}
        row = self.recommender.answer_one(asked, self.profile)
        self.turns.append((asked, row))
        self.dialogue = add_turn(asked, "recommender", row["reply"])
        # a search is drawn by /why
        self.show((), row if self.as_json else {**row, "search": None}, self.as_json, streamed)

    def obey(self, line: str) -> None:
        """Carry out a command; raises UserError if it is unknown or cannot be carried out now."""
        name, _, rest = line.partition(" ")
        searched = [row for _, row in self.turns if row.get("search")]
        match name, rest.strip():
            case "/help", "":
                tell((__doc__ or "").split("\n\n")[1])
            case "/ses", "on" | "off" as state:
                self.recommender.options = replace(self.recommender.options, ses=state == "on")
            case "/profile", text if text:
                self.profile = "" if text == "auto" else text
            case "/profile", _ if self.profile or searched:
                tell(self.profile or searched[-1]["search"]["profile"])
            case "/why", "" if searched:
                self.show((), searched[-1], self.as_json, False)
            case "/why" | "/profile", "":
                raise UserError("nothing has been searched yet: /ses on, then say something")
            case "/top" | "/undo" | "/save", _ if not self.turns:
                raise UserError(f"{name} has nothing to act on yet: say something first")
            case "/top", count if count.lstrip("0").isdecimal() or not count:
                self.rank(int(count or 10))
            case "/undo", "":
                self.turns.pop()
                self.dialogue = self.dialogue[:-2]
            case "/save", file if file:
                self.save(Path(os.path.expanduser(file)))
            case _:
                raise UserError(f"there is no command {line!r:.60}: /help lists them")

    def rank(self, count: int) -> None:
        """Tell the titles that the recommender is likeliest to name in place of its last reply."""
        roles, tokens = self.recommender.roles, self.recommender.options.rank_tokens
        [ranked] = roles.rank([self.turns[-1][0]], count, tokens)
        for place, (number, logprob) in enumerate(ranked.texts, 1):
            tell(f"  {place:>3}. {roles.catalogue.items[number].title}  {logprob:.2f}")

    def save(self, path: Path) -> None:
        """Write the dialogue up to the seeker's last line, and beside it the last reply."""
        if os.path.exists(path):
            raise UserError(f"{path} is there already: name another file")
        dialogue, row = self.turns[-1]
        write_json(path, {"messages": [asdict(x) for x in dialogue], "reply": row["reply"]})
        tell(f"saved in {path}")


def printer() -> Callable[[str], None]:
    """Return a function that prints a reply in one line, given its text so far again and again."""
    shown = ""

    def hear(text: str) -> None:
        nonlocal shown
        line = f"Recommender: {' '.join(text.split())}"  # a longer text only extends it
        print(line.removeprefix(shown), end="", flush=True)
        shown = line

    return hear
