"""An OpenAI-compatible server of the recommender: chat completions, streamed or not, and models.

    python infer.py --serve                        # at http://127.0.0.1:8000/v1

The model `recommender` gives plain replies, `recommender-ses` searched ones. The messages are the
dialogue: user is the seeker, assistant the recommender. System messages are refused, because the
recommender has its own instructions, and so is every field that would shape a reply elsewhere and
has no effect here. `user`, `metadata` and `store` may stand there unread. What a request leaves out
is as infer.py's flags say: `infer.py --dialogue` gives the same reply. `seed` takes the place of
--seed.

    a handler per client --Job--> waiting --a chunk--> the one thread that owns the engines
                         <------ the text so far, the text so far, ..., the reply ---'

The jobs that wait when the thread is free share its calls, whatever their samplings, and the prefix
cache; searches share theirs where their options are equal. A reply depends on its own request
alone. A streamed search comes in one piece. `usage` has the tokens of the recommender's prompt and
of the reply; a search's own are left out. A stream has it in its last chunk.
"""

import asyncio
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from usbrec.answering import Recommender
from usbrec.chat import Reply, Request, Row, Sampling
from usbrec.crs.agents import recommender_prompt
from usbrec.crs.catalogue import parse_json
from usbrec.crs.datasets import read_messages
from usbrec.crs.dialogue import Dialogue, format_dialogue
from usbrec.crs.ses import SearchOptions, search
from usbrec.options import UserError, from_flags, seed_for
from usbrec.runs import dump

try:
    import uvicorn
    from starlette import applications, requests, responses, routing
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise UserError("--serve needs two packages: pip install starlette uvicorn") from error

WAITING = 256  # jobs; further ones are turned away
OURS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
SEARCHED, SHAPES = "recommender-ses", ("temperature", *OURS)
SERVED = {"recommender": (*SHAPES, "top_p", "stop"), SEARCHED: SHAPES}  # what shapes a reply
READ = ("model", "messages", "seed", "stream", "stream_options", "user", "metadata", "store")
IDLE = {"n": 1, "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0}


@dataclass(frozen=True)
class Job:
    """A dialogue that awaits a reply, and how it is drawn: a Sampling, or a search's options.

    `head` is what all chunks of the reply begin with.
    `put` gets the text so far each time that it may have grown, if the reply is streamed, and at
    the end the reply or the fault.
    """

    head: Row
    dialogue: Dialogue
    seed: int
    how: Any
    streamed: bool
    put: Callable[[str | Reply | Exception], Any]


def read_job(body: Any, recommender: Recommender, put: Callable[..., Any]) -> Job:
    """Return the job of a request's body.

    Raises UserError for a field that has no effect or a wrong value, HTTPException (404) for a
    model that is not there.
    """
    if not isinstance(body, dict):
        raise UserError(f"the body must be an object, got {body!r:.60}")
    given = {x: y for x, y in body.items() if y is not None and y != IDLE.get(x)}
    model = str(given.get("model"))
    if model not in SERVED:
        raise HTTPException(404, f"there is no model {model!r:.60}, only {' and '.join(SERVED)}")
    if unread := [name for name in given if name not in READ + SERVED[model]]:
        raise UserError(f"{unread[0]} has no effect on {model}: leave it out")
    dialogue = read_messages(given.get("messages"))
    usual = recommender.searching if model == SEARCHED else recommender.sampling
    values = {OURS.get(name, name): given[name] for name in SERVED[model] if name in given}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    how = from_flags(type(usual), Namespace(**values), defaults=vars(usual))
    seed = seed_for(given.get("seed", recommender.options.seed), "reply", format_dialogue(dialogue))
    head = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time()), "model": model}
    return Job(head, dialogue, seed, how, bool(given.get("stream")), put)


def draw(recommender: Recommender, jobs: Sequence[Job]) -> Sequence[Reply | Exception]:
    """Return the replies to jobs that are all plain, or all searched with the same options.

    If a call fails, each job is asked alone, so that a fault is the reply to its own job only.
    """
    roles, engine, how = recommender.roles, recommender.engines[0], jobs[0].how
    try:
        if isinstance(how, SearchOptions):
            found = search(roles, [x.dialogue for x in jobs], [x.seed for x in jobs], how)
            return [Reply(x.reply, tuple(engine.tokenizer.encode(x.reply)), True) for x in found]
        engine.listeners = {i: x.put for i, x in enumerate(jobs) if x.streamed}
        prompts, adapter = (recommender_prompt(x.dialogue) for x in jobs), roles.recommender.adapter
        asked = zip(prompts, jobs, strict=True)
        return engine.generate([Request(p, x.how, x.seed, adapter) for p, x in asked])
    except Exception as error:
        for each in recommender.engines:
            each.clear_cache()  # it may hold tokens that were not computed
        return [error] if len(jobs) == 1 else [y for x in jobs for y in draw(recommender, [x])]


class Api:
    """The handlers, the jobs that wait, and the one thread that answers them."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.waiting: list[Job] = []
        self.thread = ThreadPoolExecutor(1)
        chat = routing.Route("/v1/chat/completions", self.chat, methods=["POST"])
        faults = {kind: refuse for kind in (UserError, HTTPException, Exception)}
        routes = [routing.Route("/v1/models", models), chat]
        self.app = applications.Starlette(routes=routes, exception_handlers=faults)

    async def chat(self, request: requests.Request) -> responses.Response:
        """Return a completion, or the stream of its chunks once the first text is there.

        Raises UserError as `read_job`, HTTPException (503) if too many wait already.
        """
        body = parse_json((await request.body()).decode(errors="replace"))
        loop, got = asyncio.get_running_loop(), asyncio.Queue[Any]()
        job = read_job(
            body, self.recommender, lambda x: loop.call_soon_threadsafe(got.put_nowait, x)
        )
        if len(self.waiting) >= WAITING:
            raise HTTPException(503, f"{WAITING} requests wait already", {"Retry-After": "1"})
        self.waiting.append(job)
        self.thread.submit(self.answer_waiting)
        first = await heard(got)
        if job.streamed:
            events = self.events(job, first, got)
            return responses.StreamingResponse(events, media_type="text/event-stream")
        said = {"role": "assistant", "content": first.text.strip()}
        return responses.JSONResponse(self.completion(job, "message", said, first))

    async def events(self, job: Job, now: Any, got: asyncio.Queue[Any]) -> AsyncIterator[str]:
        """Yield a reply's chunks as events: the growth of its text from `now` on, then its end."""
        sent, role, reply = 0, {"role": "assistant"}, None
        while reply is None:
            reply = now if isinstance(now, Reply) else None
            text = (now if reply is None else reply.text).strip()
            said = {**role, "content": text[sent:]}
            yield f"data: {dump(self.completion(job, 'delta', said, reply))}\n\n"
            sent, role = max(sent, len(text)), {}
            now = reply or await heard(got)
        yield "data: [DONE]\n\n"

    def completion(self, job: Job, part: str, said: Row, reply: Reply | None) -> Row:
        """Return a completion whose message is `said`, or the chunk of one whose delta it is.

        Only the last chunk has the reply, and so what ended it and its tokens.
        """
        ended = None if reply is None else "stop" if reply.finished else "length"
        kind = "chat.completion" if part == "message" else "chat.completion.chunk"
        choice = {"index": 0, part: said, "finish_reason": ended}
        row = {**job.head, "object": kind, "choices": [choice]}
        if reply is not None:
            prompt = self.recommender.engines[0].tokenizer.prompt(recommender_prompt(job.dialogue))
            sizes = {"prompt_tokens": len(prompt), "completion_tokens": len(reply.token_ids)}
            row["usage"] = {**sizes, "total_tokens": sum(sizes.values())}
        return row

    def answer_waiting(self) -> None:
        """Answer the jobs that wait, at most a chunk: plain ones together, and equal searches."""
        taken = self.waiting[: self.recommender.options.chunk_size]
        del self.waiting[: len(taken)]  # others may have come since
        alike: dict[Any, list[Job]] = {}
        for job in taken:
            alike.setdefault(None if isinstance(job.how, Sampling) else job.how, []).append(job)
        for jobs in alike.values():
            for job, reply in zip(jobs, draw(self.recommender, jobs), strict=True):
                job.put(reply)
        self.recommender.spent()


async def heard(got: asyncio.Queue[Any]) -> Any:
    """Return the next text or the reply; raises the fault that comes in its place."""
    if isinstance(now := await got.get(), Exception):
        raise now
    return now


async def models(request: requests.Request) -> responses.Response:
    """Return the models, as OpenAI lists them."""
    data = [{"id": x, "object": "model", "created": 0, "owned_by": "usbrec"} for x in SERVED]
    return responses.JSONResponse({"object": "list", "data": data})


async def refuse(request: requests.Request, error: Exception) -> responses.Response:
    """Return an error in OpenAI's form: 400 for a user's fault, 500 for one of ours."""
    status = 400 if isinstance(error, UserError) else getattr(error, "status_code", 500)
    kind = "invalid_request_error" if status < 500 else "server_error"
    facts = {"message": getattr(error, "detail", str(error)), "type": kind, "param": None}
    return responses.JSONResponse({"error": facts}, status, getattr(error, "headers", None))


def serve(recommender: Recommender, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Answer requests until Ctrl-C; `tell` gets the address, with the port that 0 has found.

    Ctrl-C lets the accepted requests end; a second one only those that the engines are at.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be 0 (any that is free) to 65535, got {port}")
    api = Api(recommender)
    with socket.create_server((host, port)) as door:
        tell(f"{' and '.join(SERVED)} at http://{host}:{door.getsockname()[1]}/v1 until Ctrl-C")
        try:
            uvicorn.Server(uvicorn.Config(api.app, log_level="warning")).run([door])
        finally:
            api.thread.shutdown(cancel_futures=True)
