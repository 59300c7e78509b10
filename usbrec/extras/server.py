"""An OpenAI-compatible server of the recommender: chat completions, streamed or not, and models.

    python infer.py --serve                        # at http://127.0.0.1:8000/v1

The model `recommender` gives plain replies, `recommender-ses` searched ones. The messages are the
dialogue: user is the seeker, assistant the recommender. System messages are refused, because the
recommender has its own instructions, and so is every field that would shape a reply elsewhere and
has no effect here. `user`, `metadata`, `store` and `stream_options` are accepted without effect.
What a request leaves out is as infer.py's flags say, so `infer.py --dialogue` gives the same reply.
`seed` takes the place of --seed.

    a handler per client --Job--> waiting --a chunk--> the one thread that asks the models
                         <------ the text so far, the text so far, ..., the reply ---'

The jobs that wait when the thread is free share its calls, whatever their samplings, and the prefix
cache; searches share theirs where their options are equal. A reply depends on its own request
alone. A searched reply is streamed in one piece, and has no counts of tokens: what the searches of
a call share belongs to none of them.
"""

import asyncio
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from usbrec.answering import Recommender, ReplyOptions
from usbrec.chat import Reply, Request, Sampling
from usbrec.crs import agents, datasets, ses
from usbrec.crs.catalogue import parse_json
from usbrec.crs.dialogue import Dialogue, format_dialogue
from usbrec.options import UserError, from_flags, seed_for
from usbrec.runs import dump, read_json

try:
    import uvicorn
    from starlette import applications, exceptions, requests, responses, routing
except ImportError as error:
    raise UserError("--serve needs two packages: pip install starlette uvicorn") from error

WAITING = 256  # jobs; further ones are turned away
SEARCHED = "recommender-ses"
# fields of a request: those that are read, those at values that change nothing, and our names of
# those that shape a reply
FIELDS = read_json(Path(__file__).with_name("openai.json"))
OURS, SHAPES = FIELDS["ours"], ("temperature", *FIELDS["ours"])
SERVED = {"recommender": (*SHAPES, "top_p", "top_k", "min_p", "stop"), SEARCHED: SHAPES}


class Job(NamedTuple):
    """A client's request, which is searched unless `searching` is None.

    `put` gets the text so far each time that it may have grown, if the reply is streamed, and at
    the end the reply or the fault.
    """

    model: str
    dialogue: Dialogue
    asked: Request
    searching: ses.SearchOptions | None
    streamed: bool
    put: Callable[[str | Reply | Exception], object]


def read_job(body: Any, recommender: Recommender, put: Callable[..., object]) -> Job:
    """Return the job of a request's body.

    Raises UserError for a field that has no effect or a wrong value, HTTPException (404) for a
    model that is not there.
    """
    if not isinstance(body, dict):
        raise UserError(f"the body must be an object, got {body!r:.60}")
    given, model = {x: y for x, y in body.items() if y is not None}, str(body.get("model"))
    if model not in SERVED:
        raise exceptions.HTTPException(404, f"no model {model!r:.60}, only {' and '.join(SERVED)}")
    set_here = {x for x, y in given.items() if y != FIELDS["unset"].get(x)}
    if idle := set_here.difference(FIELDS["read"], SERVED[model]):
        raise UserError(f"{min(idle)} has no effect on {model}: leave it out")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    flags = Namespace(**{OURS.get(name, name): value for name, value in given.items()})
    options = from_flags(ReplyOptions, flags, defaults=vars(recommender.options))
    sampling = from_flags(Sampling, flags, defaults=vars(recommender.sampling))
    searching = from_flags(ses.SearchOptions, flags, defaults=vars(recommender.searching))
    messages = given.get("messages", ())
    dialogue = datasets.read_messages(messages if isinstance(messages, list) else None)
    if any(str(x.get("role")).strip().lower() == "system" for x in messages if isinstance(x, dict)):
        raise UserError("a message of role 'system' has no effect here: leave it out")
    seed = seed_for(options.seed, "reply", format_dialogue(dialogue))
    prompt, adapter = agents.recommender_prompt(dialogue), recommender.roles.recommender.adapter
    asked = Request(prompt, sampling, seed, adapter)
    how = searching if model == SEARCHED else None
    return Job(model, dialogue, asked, how, given.get("stream") is True, put)


def draw(recommender: Recommender, jobs: Sequence[Job]) -> Sequence[Reply | Exception]:
    """Return the replies to jobs that are all plain, or all searched with the same options.

    If a call fails, each job is asked alone, so that a fault is the reply to its own job only.
    """
    roles, llm, how = recommender.roles, recommender.engines[0], jobs[0].searching
    try:
        if how is None:
            llm.listeners = {i: x.put for i, x in enumerate(jobs) if x.streamed}
            return llm.generate([x.asked for x in jobs])
        found = ses.search(roles, [x.dialogue for x in jobs], [x.asked.seed for x in jobs], how)
        return [Reply(x.reply, (), True) for x in found]
    except Exception as error:
        return [error] if len(jobs) == 1 else [y for x in jobs for y in draw(recommender, [x])]


async def heard(got: asyncio.Queue[Any]) -> Any:
    """Return the next text or the reply; raises the fault that comes in its place."""
    if isinstance(now := await got.get(), Exception):
        raise now
    return now


async def written(job: Job, now: Any, got: asyncio.Queue[Any]) -> AsyncIterator[str]:
    """Yield a job's completion, or the events of a streamed one, in JSON.

    An event has the growth of the text from `now` on, the last one the end and the tokens too.
    """
    part, kind = ("delta", ".chunk") if job.streamed else ("message", "")
    head = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time()), "model": job.model}
    role, sent, reply = {"role": "assistant"}, 0, None
    while reply is None:
        reply = now if isinstance(now, Reply) else None
        text = (now if reply is None else reply.text).strip()
        ended = None if reply is None else "stop" if reply.finished else "length"
        choice = {"index": 0, part: {**role, "content": text[sent:]}, "finish_reason": ended}
        row = {**head, "object": f"chat.completion{kind}", "choices": [choice]}
        if reply is not None and reply.prompt_tokens:
            n, m = reply.prompt_tokens, len(reply.token_ids)
            row["usage"] = {"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m}
        yield f"data: {dump(row)}\n\n" if job.streamed else dump(row)
        role, sent, now = {}, max(sent, len(text)), reply or await heard(got)
    if job.streamed:
        yield "data: [DONE]\n\n"


class Api:
    """The handlers, the jobs that wait, and the one thread that answers them."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.waiting: list[Job] = []
        self.thread = ThreadPoolExecutor(1)
        listed = [{"id": x, "object": "model", "created": 0, "owned_by": "usbrec"} for x in SERVED]
        models = responses.JSONResponse({"object": "list", "data": listed})
        chat = routing.Route("/v1/chat/completions", self.chat, methods=["POST"])
        routes = [routing.Route("/v1/models", models), chat]
        # a client that leaves in the middle of its request is no fault of ours, and not logged
        told = (UserError, exceptions.HTTPException, requests.ClientDisconnect, Exception)
        faults = dict.fromkeys(told, refuse)
        self.app = applications.Starlette(routes=routes, exception_handlers=faults)

    async def chat(self, request: requests.Request) -> responses.Response:
        """Return a completion, or the stream of one once its first text is there.

        Raises UserError as `read_job`, HTTPException (503) if too many wait already.
        """
        got, soon = asyncio.Queue[Any](), asyncio.get_running_loop().call_soon_threadsafe
        body = parse_json((await request.body()).decode(errors="replace"))
        job = read_job(body, self.recommender, lambda x: soon(got.put_nowait, x))
        if len(self.waiting) >= WAITING:
            raise exceptions.HTTPException(503, f"{WAITING} requests wait", {"Retry-After": "1"})
        self.waiting.append(job)
        self.thread.submit(self.answer_waiting)
        text = written(job, await heard(got), got)  # a fault up to here has a status of its own
        kind = "text/event-stream" if job.streamed else "application/json"
        return responses.StreamingResponse(text, media_type=kind)

    def answer_waiting(self) -> None:
        """Answer the jobs that wait, at most a chunk: plain ones together, and equal searches."""
        taken = self.waiting[: self.recommender.options.chunk_size]
        del self.waiting[: len(taken)]  # others may have come since
        for how in dict.fromkeys(x.searching for x in taken):
            jobs = [x for x in taken if x.searching == how]
            for job, reply in zip(jobs, draw(self.recommender, jobs), strict=True):
                job.put(reply)
            self.recommender.spent()


async def refuse(request: requests.Request, error: Exception) -> responses.Response:
    """Return an error in OpenAI's form: 400 for a user's fault, 500 for one of ours.

    An error with a code of its own, as one of the server that recommends, keeps it.
    """
    status = getattr(error, "status_code", 400 if isinstance(error, UserError) else 500)
    kind = "invalid_request_error" if status < 500 else "server_error"
    facts = {"message": getattr(error, "detail", str(error)), "type": kind, "param": None}
    return responses.JSONResponse({"error": facts}, status, getattr(error, "headers", None))


def serve(recommender: Recommender, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Answer requests until Ctrl-C; `tell` gets the address, with the port that 0 has found.

    Ctrl-C lets the accepted requests end; a second one only those that the models are at.
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
