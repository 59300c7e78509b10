"""A language model behind an OpenAI-compatible server, addressed as URL#MODEL.

    http://localhost:8000/v1#HuggingFaceTB/SmolLM2-135M-Instruct

A server offers an adapter as a separate model, so a request's adapter names a model of the server:

    vllm serve BASE --enable-lora --lora-modules sft=runs/sample/sft rl=runs/sample/rl

The client is the package openai; its retries and time-outs are used as they are. Each answer is
appended to a file before it is used, under a digest of the server's URL and the request. So a
request that was answered is never paid for twice: not in the same call, nor after a kill. Left out:
the ranking of texts (`Ranks`), replies with a given beginning, and token ids.
"""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from usbrec.chat import Reply, Request, Requests, Row, Sampling
from usbrec.llm.engine import Usage
from usbrec.options import UserError
from usbrec.runs import append_rows

TOP = 20  # log-probabilities per answer; servers give no more
ADDRESS = re.compile(r"(https?://(?:\[[^]\s]+]|[^/:?#@\s]+)(?::\d+)?(?:/[^?#\s]*)?)#(.+)")


def is_server(name: str) -> bool:
    """Return whether a model's name is the address of a server."""
    return name.startswith(("http://", "https://"))


def split_address(name: str) -> tuple[str, str]:
    """Return the URL of a server and the name of its model; raises UserError for another form."""
    if not (found := ADDRESS.fullmatch(name)):  # what was given is not shown: it may hold a key
        told = "expected URL#MODEL, as http://localhost:8000/v1#NAME, without user, key or query"
        raise UserError(f"the address of a server is malformed: {told} (key: OPENAI_API_KEY)")
    return found[1], found[2]


class Unanswered(UserError):
    """A server's fault, and its code if our own server (infer.py --serve) passes it on."""

    status_code = 502


class Endpoint:
    """`usbrec.chat.LanguageModel` over a server; a request's adapter is the name of its model."""

    def __init__(self, url: str, answers: Path, in_flight: int) -> None:
        """Read the file `answers`, which new answers are appended to.

        At most `in_flight` requests wait for the server at a time. Raises UserError if the package
        openai is missing, or cannot use the address.
        """
        self.url, self.answers, self.in_flight = url, answers, in_flight
        # white space and typographic quotes are no part of a key; the client wants one in any case
        self.key = re.sub("[^!-~]", "", os.environ.get("OPENAI_API_KEY", "")) or "no-key-given"
        try:
            import openai

            self.client: Any = openai.OpenAI(base_url=url, api_key=self.key)
        except Exception as error:  # no package, or a host or a proxy's address that none can be
            raise UserError(f"{url} is asked by openai (pip install openai): {error}") from error
        self.failure, self.lock = openai.APIError, Lock()
        self.known, self.usage, self.warned = read_answers(answers), Usage(), False
        # request's place in the next call -> who hears its whole reply
        self.listeners: Mapping[int, Callable[[str], object]] = {}

    def clear_cache(self) -> None:
        """Do nothing: the server keeps keys and values by itself."""

    def generate(self, requests: Requests) -> list[Reply]:
        """Return one reply per request; `token_ids` are not known and stay empty."""
        listeners, self.listeners = self.listeners, {}
        answers = self.ask([self.body(request) for request in requests])
        for place, hear in listeners.items():
            hear(answers[place]["text"])
        return [Reply(answer["text"], (), answer["finished"]) for answer in answers]

    def choice_logprobs(self, requests: Requests, choices: Sequence[str]) -> list[list[float]]:
        """Return per request the log-probability of each choice as the first token of its reply.

        Tokens that are equal without their spaces add up. A row is empty if the server refuses to
        tell, or leaves a choice out; a warning says so once.
        """
        asked = [self.body(replace(x, sampling=Sampling(1, 0.0))) for x in requests]
        found = self.ask([{**body, "logprobs": True, "top_logprobs": TOP} for body in asked])
        scores = [sum_choices(answer["top"], choices) for answer in found]
        if [] in scores and not self.warned:
            warnings.warn(f"{self.url} lacks log-probabilities: votes are sampled", stacklevel=2)
            self.warned = True
        return scores

    def body(self, request: Request) -> Row:
        """Return the arguments of the client's call."""
        o = request.sampling
        assert request.adapter and not request.begin, "a server has named models, which cannot rank"
        messages = [{"role": x.role, "content": x.content} for x in request.messages]
        body: Row = {"model": request.adapter, "messages": messages, "max_tokens": o.max_new_tokens}
        body |= {"temperature": o.temperature, "top_p": o.top_p}
        body |= {"seed": request.seed % 2**31} if o.temperature else {}  # some read 32 bits
        body |= {"stop": list(o.stop)} if o.stop else {}
        extra = {name: getattr(o, name) for name in ("top_k", "min_p") if getattr(o, name)}
        return body | ({"extra_body": extra} if extra else {})

    def ask(self, bodies: Sequence[Row]) -> list[Row]:
        """Return one answer per body, in order; equal bodies are asked once, known ones never."""
        self.usage.calls += bool(bodies)
        texts = [json.dumps([self.url, body], sort_keys=True) for body in bodies]
        keys = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
        new = {k: x for k, x in zip(keys, bodies, strict=True) if k not in self.known}
        with ThreadPoolExecutor(self.in_flight) as pool:
            list(pool.map(self.pay, new, new.values()))  # a failure withdraws those that wait
        return [self.known[key] for key in keys]

    def pay(self, key: str, body: Row) -> None:
        """Ask the server, append its answer to the file, and count its tokens.

        Raises Unanswered with the server's words if it refuses, or if the client has given up. A
        refusal to tell log-probabilities counts as an answer without them, and is not kept.
        """
        try:
            answer = read_answer(self.client.chat.completions.create(**body))
        except self.failure as error:
            if "logprobs" in body and getattr(error, "status_code", 0) in (400, 403, 422):
                self.known[key] = {"top": []}  # votes will show any other cause
                return
            words = " ".join(f"{error} {error.__cause__ or ''}".split())
            told = words.replace(self.key, "KEY")[:300]  # some servers repeat the key
            raise Unanswered(f"{self.url} does not answer as {body['model']}: {told}") from None
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise Unanswered(f"{self.url}: expected a chat completion, got a broken one") from error
        with self.lock:
            append_rows(self.answers, [{"key": key, **answer}])
            self.known[key] = answer
            self.usage.computed_tokens += answer["tokens"][0]
            self.usage.decoded_tokens += answer["tokens"][1]


def read_answer(completion: Any) -> Row:
    """Return {"text", "finished", "top", "tokens"} of a chat completion.

    `top` holds the likeliest first tokens, each with its log-probability, and `tokens` the numbers
    of tokens of prompt and reply. What the server does not tell is empty or 0. Raises TypeError
    for a text that is none.
    """
    choice, usage = completion.choices[0], completion.usage
    first = (choice.logprobs.content or [None])[0] if choice.logprobs else None
    told = ((str(x.token), x.logprob) for x in getattr(first, "top_logprobs", None) or ())
    top = [[x, p] for x, p in told if isinstance(p, float | int) and p > -math.inf]
    tokens = [getattr(usage, f"{name}_tokens", 0) or 0 for name in ("prompt", "completion")]
    text = ("" + (choice.message.content or "")).encode(errors="replace").decode()  # no half letter
    return {"text": text, "finished": choice.finish_reason == "stop", "top": top, "tokens": tokens}


def read_answers(path: Path) -> dict[str, Row]:
    """Return a file's answers by their keys; create the file if it is missing.

    A line that is no answer is left out; one that a kill has torn is ended, so that the next answer
    has its own line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Row] = {}
    with path.open("a+b") as file:
        file.seek(0)
        for line in file.read().split(b"\n"):
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                answer = json.loads(line)
                known[answer.pop("key")] = answer
        file.write(b"\n" if line else b"")
    return known


def sum_choices(top: Sequence[tuple[str, float]], choices: Sequence[str]) -> list[float]:
    """Return the log of each choice's summed probability, or [] if a choice is not in `top`.

    [("1", log .5), (" 1", log .2), ("2", log .1)] gives log .7 for 1 and log .1 for 2.
    """
    sums = [sum(math.exp(p) for token, p in top if token.strip() == x) for x in choices]
    return list(map(math.log, sums)) if all(sums) else []
