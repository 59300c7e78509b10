"""What crosses the joint between the language model and the recommender: chats and replies.

Both sides import this module and never each other. Nothing here knows of tensors or films.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One message of a chat; `weight` > 0 makes an assistant's message a training target.

    The weight multiplies the loss of each of its tokens, its end-of-turn token included.
    """

    role: str
    content: str
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a message's role is one of {', '.join(ROLES)}, got {self.role!r}")
        if self.weight and self.role != "assistant":
            raise ValueError(f"only an assistant's message can be trained on, got {self.role!r}")


@dataclass(frozen=True)
class Chat:
    """Messages that await the assistant's next one, and the adapter that shall write it."""

    messages: tuple[Message, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class Lesson:
    """A conversation to train on: every branch continues the trunk and sees no other branch."""

    trunk: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 leave all tokens in.

    The steps are transformers', in its order: `repetition_penalty` weighs down the tokens of prompt
    and reply so far (greedy too), then temperature, then top_k, top_p, and min_p, the least share
    of the likeliest token's probability. `stop` strings and `stop_ids` end a reply, as the model's
    own end tokens do, and are left out of it. `logprobs` asks for `Reply.logprobs`.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")


@dataclass(frozen=True)
class Reply:
    """A drawn reply: its text, its tokens, and whether it ended by itself within the limit.

    `logprobs`, where asked for, holds a natural log-probability a token of `token_ids`: the model's
    own, before penalty, temperature and truncation, so that replies drawn in other ways compare.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] | None = None


class LanguageModel(Protocol):
    """The two calls by which the recommender's side reaches any model or server."""

    def generate(
        self, chats: Sequence[Chat], sampling: Sampling | Sequence[Sampling], seeds: Sequence[int]
    ) -> list[Reply]:
        """Return one reply a chat; a row depends on its own chat, sampling and seed alone.

        `sampling` is one for all chats or one for each.
        """
        ...

    def choice_logprobs(self, chats: Sequence[Chat], choices: Sequence[str]) -> list[list[float]]:
        """Return for each chat the unnormalised log-probability of each choice as its reply."""
        ...
