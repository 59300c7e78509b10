"""A language model that answers by rule and keeps every call, for tests of the agents."""

import math
from collections.abc import Callable, Sequence

from usbrec.chat import Chat, Reply, Sampling
from usbrec.crs.agents import prompt_text
from usbrec.crs.dialogue import Dialogue, Utterance

SURE = {score: [math.log(0.8 if i == score else 0.1) for i in range(3)] for score in range(3)}


class Scripted:
    """Answers `reply(chat, sampling, seed)`; scores `logprobs(chat)`; records all calls."""

    def __init__(
        self,
        reply: Callable[[Chat, Sampling, int], str],
        logprobs: Callable[[Chat], list[float]] = lambda chat: SURE[1],
    ) -> None:
        self.reply, self.logprobs = reply, logprobs
        self.generated: list[list[Chat]] = []
        self.samplings: list[list[Sampling]] = []
        self.seeds: list[list[int]] = []
        self.scored: list[list[Chat]] = []

    def generate(
        self, chats: Sequence[Chat], sampling: Sampling | Sequence[Sampling], seeds: Sequence[int]
    ) -> list[Reply]:
        hows = [sampling] * len(chats) if isinstance(sampling, Sampling) else list(sampling)
        assert len(chats) == len(hows) == len(seeds)
        self.generated.append(list(chats))
        self.samplings.append(hows)
        self.seeds.append(list(seeds))
        rows = zip(chats, hows, seeds, strict=True)
        return [Reply(self.reply(chat, how, seed), (), True) for chat, how, seed in rows]

    def choice_logprobs(self, chats: Sequence[Chat], choices: Sequence[str]) -> list[list[float]]:
        assert tuple(choices) == ("0", "1", "2")
        self.scored.append(list(chats))
        return [self.logprobs(chat) for chat in chats]


def role_of(chat: Chat) -> str:
    """Tell by the prompts' wordings who is asked: a role's name, or "explainer"."""
    names = ("recommender", "seeker", "internal_seeker", "summariser")
    first = chat.messages[0].content
    name = next(n for n in names if first.startswith(prompt_text(n).split("{")[0]))
    asked = chat.messages[-1].content == prompt_text("explain")
    if chat.messages[-1].role == "system":
        return "internal_judge" if name == "internal_seeker" else "judge"
    return "explainer" if name == "recommender" and asked else name


def talk(*lines: str) -> Dialogue:
    """Return a dialogue whose first line is the seeker's."""
    speakers = ("seeker", "recommender")
    return tuple(Utterance(speakers[i % 2], line) for i, line in enumerate(lines))
