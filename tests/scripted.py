"""A language model that answers by rule and keeps every call, for tests of the agents."""

import math
from collections.abc import Callable, Sequence

from usbrec.chat import Reply, Request
from usbrec.crs.agents import prompt_text
from usbrec.crs.dialogue import Dialogue, Utterance

SURE = {score: [math.log(0.8 if i == score else 0.1) for i in range(3)] for score in range(3)}


class Scripted:
    """Answers `reply(request)`; scores `logprobs(request)`; records all calls."""

    def __init__(
        self,
        reply: Callable[[Request], str],
        logprobs: Callable[[Request], list[float]] = lambda request: SURE[1],
    ) -> None:
        self.reply, self.logprobs = reply, logprobs
        self.generated: list[list[Request]] = []
        self.scored: list[list[Request]] = []

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        self.generated.append(list(requests))
        return [Reply(request.begin + self.reply(request), (), True) for request in requests]

    def choice_logprobs(
        self, requests: Sequence[Request], choices: Sequence[str]
    ) -> list[list[float]]:
        assert tuple(choices) == ("0", "1", "2")
        self.scored.append(list(requests))
        return [self.logprobs(request) for request in requests]


def role_of(request: Request) -> str:
    """Tell by the prompts' wordings who is asked: a role's name, or "explainer"."""
    names = ("recommender", "seeker", "internal_seeker", "summariser", "judge_cards")
    first = request.messages[0].content
    name = next(n for n in names if first.startswith(prompt_text(n).split("{")[0]))
    asked = request.messages[-1].content == prompt_text("explain")
    if name == "judge_cards":
        return "card_judge" if request.messages[-1].role == "system" else "memory"
    if request.messages[-1].role == "system":
        return "internal_judge" if name == "internal_seeker" else "judge"
    return "explainer" if name == "recommender" and asked else name


def roles_of(calls: Sequence[Sequence[Request]]) -> list[list[str]]:
    """Return who was asked, per call and request."""
    return [[role_of(request) for request in requests] for requests in calls]


def talk(*lines: str) -> Dialogue:
    """Return a dialogue whose first line is the seeker's."""
    speakers = ("seeker", "recommender")
    return tuple(Utterance(speakers[i % 2], line) for i, line in enumerate(lines))
