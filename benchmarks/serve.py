"""Claim: 32 clients of the server at once get five times the tokens a second of one client.

    python benchmarks/serve.py [--quick]          # needs requirements-dev.txt

The default model in bf16, no adapters, behind the server of `infer.py --serve`. Each client is
OpenAI's own and asks again as soon as it has its reply, for 48 tokens to another dialogue of five
lines, each time a new one: what prompts share is the recommender's instructions. Server and
clients are in one process and share its cores. One client and 32 go by turns; the ratio is that of
the median rates. `streamed` is the same with streamed replies.
"""

import argparse
import asyncio
import itertools
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn
from contest import show
from race import Endless, finish
from ses import dialogue

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.answering import Recommender, ReplyOptions  # noqa: E402
from usbrec.chat import Sampling  # noqa: E402
from usbrec.crs.agents import Roles, Side  # noqa: E402
from usbrec.crs.catalogue import Catalogue  # noqa: E402
from usbrec.crs.dialogue import from_viewpoint  # noqa: E402
from usbrec.crs.ses import SearchOptions  # noqa: E402
from usbrec.extras.default_model import find_model  # noqa: E402
from usbrec.extras.server import Api  # noqa: E402
from usbrec.loading import ModelOptions, load_engine  # noqa: E402

CLIENTS = 32
REACH = {"clients32": 5.0}


@dataclass(frozen=True)
class Work:
    """The tokens of a reply, a client's replies in a round, and the timed rounds."""

    tokens: int = 48
    asks: int = 3
    rounds: int = 3


def base_model() -> Recommender:
    """Return the base model as the recommender; its replies end by their limit alone."""
    engine = load_engine(ModelOptions(dtype="bfloat16"), find_model)
    tokenizer: Any = Endless(engine.tokenizer)
    engine.tokenizer = tokenizer
    side = Side(engine)
    roles = Roles(side, side, Catalogue([]))
    return Recommender(roles, [engine], ReplyOptions(), Sampling(), SearchOptions(), False)


@contextmanager
def served(recommender: Recommender) -> Iterator[str]:
    """Serve on a free port while the block runs; give its address."""
    api = Api(recommender)
    door = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(api.app, log_level="warning"))
    thread = threading.Thread(target=web.run, args=([door],))
    thread.start()
    yield f"http://127.0.0.1:{door.getsockname()[1]}/v1"
    web.should_exit = True
    thread.join()
    api.thread.shutdown()


async def held(url: str, clients: int, work: Work, numbers: Iterator[int], stream: bool) -> float:
    """Return the tokens a second that so many clients get while each asks `work.asks` times."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:

        async def ask() -> int:
            said = from_viewpoint(dialogue(next(numbers)), "recommender")
            messages: Any = [{"role": x.role, "content": x.content} for x in said]
            how: Any = {"model": "recommender", "messages": messages, "max_tokens": work.tokens}
            reply: Any = await client.chat.completions.create(**how, temperature=1, stream=stream)
            if stream:
                reply = [chunk async for chunk in reply][-1]
            return int(reply.usage.completion_tokens)

        async def one() -> int:
            return sum([await ask() for _ in range(work.asks)])

        start = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one() for _ in range(clients))))
        return tokens / (time.perf_counter() - start)


def rates(url: str, work: Work) -> dict[str, list[float]]:
    """Return the rates of every round of each load, the loads by turns, after one to warm up."""
    loads = {"one": (1, False), "clients32": (CLIENTS, False), "streamed": (CLIENTS, True)}
    found: dict[str, list[float]] = {name: [] for name in loads}
    numbers = itertools.count(1)
    for turn in range(work.rounds + 1):
        for name, (clients, stream) in loads.items():
            rate = asyncio.run(held(url, clients, work, numbers, stream))
            found[name] += [rate] if turn else []
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="replies of 8 tokens and one round")
    work = Work(tokens=8, asks=1, rounds=1) if parser.parse_args(arguments).quick else Work()
    recommender = base_model()
    with served(recommender) as url:
        found = rates(url, work)
    medians = {name: statistics.median(rate) for name, rate in found.items()}
    rows = [[x, f"{medians[x]:.0f}", f"{min(y):.0f} to {max(y):.0f}"] for x, y in found.items()]
    show(rows, ["load", "tokens/s, median", "range"])
    calls, asked = recommender.engines[0].usage.calls, sum(map(len, found.values()))
    print(f"{calls} calls of the engine in {asked} timed loads and {len(found)} to warm up")
    ratios = {name: rate / medians["one"] for name, rate in medians.items() if name != "one"}
    finish("serve", ratios, REACH)


if __name__ == "__main__":
    main()
