"""Types shared by the language model (llm) and the recommender (crs): requests and replies.

Both packages import this module and never each other. Nothing here knows of tensors or films.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from usbrec.options import Options, option

ROLES = ("system", "user", "assistant")
Row = dict[str, Any]  # of a file of rows, in JSON's own types


@dataclass(frozen=True)
class Message:
    """One message of a chat, its role one of ROLES; `weight` > 0 makes it a training target.

    The weight multiplies the loss of each token of the message, the end-of-turn token included.
    """

    role: str
    content: str
    weight: float = 0.0


Messages = Sequence[Message]
Lesson = Sequence[Messages]  # chats that are learned together
Texts = Sequence[str]


@dataclass(frozen=True)
class Sampling(Options):
    """Sampling of a reply: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 keep all tokens.

    The steps follow transformers' order: temperature, top_k, top_p, min_p. min_p is a share of the
    likeliest token's probability. `stop` strings and the model's own end tokens end a reply and are
    left out of it.
    """

    max_new_tokens: int = option(64, "longest reply, in tokens", low=1)
    temperature: float = option(1.0, "of a plain reply (a search: --ses-temperature)", low=0)
    top_k: int = option(0, "tokens are drawn from so many, the likeliest; 0: all", low=0)
    top_p: float = option(1.0, "from the likeliest that make up this share", above=0, high=1)
    min_p: float = option(0.0, "from those with this share of the likeliest's", low=0, high=1)
    stop: tuple[str, ...] = option((), "texts that end a reply")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be strings that are not empty, got {self.stop!r:.60}")


@dataclass(frozen=True)
class Request:
    """A request for the assistant's next message: the chat, sampling, seed and adapter (or None).

    The reply depends on its request alone, never on other requests of the call. In bf16 and fp16
    the rounding does depend on them, and may decide between two almost equally likely tokens.
    `seed` decides the draws. `begin` is the given beginning of the reply, which its text includes.
    """

    messages: Messages
    sampling: Sampling = Sampling()
    seed: int = 0
    adapter: str | None = None
    begin: str = ""


Requests = Sequence[Request]


@dataclass(frozen=True)
class Reply:
    """A drawn reply: its text, its token ids without the end token, and whether it is `finished`.

    A finished reply ended by an end token or a stop string, not by the limit of tokens.
    `prompt_tokens` counts the tokens that it answers, 0 where `token_ids` are not known either.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Ranked:
    """The best texts, best first: (place among the texts, log-probability), equals in their order.

    The first `proven` are certainly the best, in this order. After them, a search that was cut
    short may have missed better texts.
    """

    texts: list[tuple[int, float]]
    proven: int


class LanguageModel(Protocol):
    """The two calls that crs makes to a language model or a server."""

    def generate(self, requests: Requests) -> list[Reply]:
        """Return one reply per request."""

    def choice_logprobs(self, requests: Requests, choices: Sequence[str]) -> list[list[float]]:
        """Return the unnormalised log-probability of each choice as the reply, per request.

        The row of a request is empty if the model does not tell all of them.
        """


@runtime_checkable
class Ranks(Protocol):
    """A third call, which a language model may have: the ranking of thousands of given replies."""

    def best_texts(self, requests: Requests, texts: Texts, k: int, tokens: int) -> list[Ranked]:
        """Return per request the k most probable texts as its reply's beginning.

        `tokens` limits a request's search; 0: until its result is exact.
        """
