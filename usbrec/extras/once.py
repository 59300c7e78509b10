"""Equal requests are computed once: methods that differ in one step share all the others.

Two searches of one recommender rank the same titles, all methods read the same summaries, and a
reply that two methods give is explained and judged alike. `Endpoint` does the same for servers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from usbrec.chat import Ranked, Ranks, Reply, Requests, Texts
from usbrec.crs.agents import Roles, Side

SIDES = ("recommender", "simulator", "external")  # of `Roles`


class Once:
    """A language model that ranks, and that remembers its answers as long as this object lives."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.known = llm, dict[Any, Any]()

    def generate(self, requests: Requests) -> list[Reply]:
        """Return one reply per request."""
        return self.ask("generate", requests)

    def choice_logprobs(self, requests: Requests, choices: Sequence[str]) -> list[list[float]]:
        """Return the unnormalised log-probability of each choice as the reply, per request."""
        return self.ask("choice_logprobs", requests, tuple(choices))

    def best_texts(self, requests: Requests, texts: Texts, *limits: int) -> list[Ranked]:
        """Return per request the most probable texts as its reply's beginning; see `Ranks`."""
        return self.ask("best_texts", requests, tuple(texts), *limits)

    def ask(self, call: str, requests: Requests, *others: Any) -> list[Any]:
        """Return the answers of a call, computed where no equal request of it was answered."""
        keys = [(call, request, *others) for request in requests]
        if new := [key for key in dict.fromkeys(keys) if key not in self.known]:
            made = getattr(self.llm, call)([request for _, request, *_ in new], *others)
            self.known.update(zip(new, made, strict=True))
        return [self.known[key] for key in keys]


def share_answers(roles: Mapping[str | None, Roles]) -> dict[str | None, Roles]:
    """Return the same roles, with equal requests to a model of this process computed once."""
    shared: dict[int, Once] = {}

    def once(side: Any) -> Any:
        own = isinstance(side, Side) and isinstance(side.llm, Ranks)  # no server's, and not None
        return replace(side, llm=shared.setdefault(id(side.llm), Once(side.llm))) if own else side

    return {k: replace(r, **{x: once(getattr(r, x)) for x in SIDES}) for k, r in roles.items()}
