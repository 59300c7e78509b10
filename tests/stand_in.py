"""A stand-in for an OpenAI-compatible server: answers by rule, with the faults of real ones."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Body = dict[str, Any]
Fault = Callable[["Handler"], None]


def completion(text: str, top: list[tuple[str, float]] | None = None) -> Body:
    """Return a chat completion as servers send it, with the likeliest first tokens if given."""
    told = [{"token": token, "logprob": p, "bytes": None} for token, p in top or []]
    logprobs = {"content": [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": told}]}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": logprobs if top else None,
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    facts = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return {**facts, "choices": [choice], "usage": usage}


class StandIn:
    """The server: `answer(body)` is a completion, `asked` and `keys` what came, in order.

    Each of `faults` answers one request in place of `answer`.
    """

    def __init__(self, answer: Callable[[Body], Body]) -> None:
        self.answer = answer
        self.asked: list[Body] = []
        self.keys: set[str] = set()
        self.faults: list[Fault] = []
        self.url = ""
        self.lock = Lock()


class Handler(BaseHTTPRequestHandler):
    """One request; `self.server.stand_in` tells what to answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        stand_in: StandIn = self.server.stand_in  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stand_in.lock:
            stand_in.asked.append(body)
            stand_in.keys.add(self.headers["Authorization"])
            fault = stand_in.faults.pop(0) if stand_in.faults else None
        if fault:
            fault(self)
        else:
            self.send(200, json.dumps(stand_in.answer(body)))

    def send(self, code: int, text: str, kind: str = "application/json", lost: int = 0) -> None:
        """Send a response, without its last `lost` bytes; an error asks for another try at once."""
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data[: len(data) - lost])
        if lost:
            self.drop()

    def drop(self) -> None:
        """Close the connection."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Say nothing on stderr."""


def refusal(code: int, words: str) -> Fault:
    """Return the fault of a server that refuses with a status code."""
    return lambda handler: handler.send(code, json.dumps({"error": {"message": words}}))


PARTS, NO_LIST = completion("x"), completion("x")
PARTS["choices"][0]["message"]["content"] = [{"type": "text", "text": "x"}]
NO_LIST["choices"][0]["logprobs"] = {"content": {"x": 0}}
FAULTS: dict[str, Fault] = {  # the client tries these again
    "busy": refusal(429, "slow down"),
    "failed": refusal(500, "out of memory"),
    "dropped": Handler.drop,
    "cut": lambda handler: handler.send(200, json.dumps(completion("cut")), lost=40),
}
LAST: dict[str, tuple[Fault, str]] = {  # and these it does not
    "no key": (refusal(401, "bad key"), "bad key"),
    "no model": (refusal(404, "no such model"), "no such model"),
    "too long": (refusal(400, "maximum context length"), "maximum context length"),
    "broken": (lambda handler: handler.send(200, '{"choices": ['), "a chat completion"),
    "a page": (lambda handler: handler.send(200, "<p>Hi</p>", "text/html"), "a chat completion"),
    "empty": (lambda handler: handler.send(200, "{}"), "a chat completion"),
    "parts": (lambda handler: handler.send(200, json.dumps(PARTS)), "a chat completion"),
    "no list": (lambda handler: handler.send(200, json.dumps(NO_LIST)), "a chat completion"),
}


@contextmanager
def serving(answer: Callable[[Body], Body]) -> Iterator[StandIn]:
    """Serve on a free port until the block ends."""
    stand_in, server = StandIn(answer), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.stand_in = stand_in  # type: ignore[attr-defined]
    stand_in.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
