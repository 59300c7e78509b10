"""What decode.py, prefix.py, ses.py and gpu.py share: both engines in one process, by turns."""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contest import wait

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.chat import Message, Request, Sampling  # noqa: E402
from usbrec.extras.default_model import find_model  # noqa: E402
from usbrec.llm.checkpoint import load_model  # noqa: E402
from usbrec.llm.engine import (
    Engine,  # noqa: E402
    default_kv_bytes,  # noqa: E402
)
from usbrec.llm.fast import accelerate  # noqa: E402
from usbrec.llm.tokenizer import ChatTokenizer  # noqa: E402

WORDS = [
    *("film", "comedy", "drama", "war", "love", "night", "star", "heat", "good"),
    *("old", "with", "from", "the", "a", "of", "and", "in"),
]


class Endless:
    """A tokenizer whose replies never end by themselves, so that all have the asked length."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer, self.stop_ids = tokenizer, frozenset[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def our_engine() -> Engine:
    """The default model in bf16, behind our engine."""
    folder = find_model(None)
    model = load_model(folder, torch.bfloat16)
    accelerate(model)
    tokenizer: Any = Endless(ChatTokenizer.from_folder(folder))
    return Engine(model, tokenizer, default_kv_bytes(model))


def their_model() -> Any:
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(find_model(None), dtype=torch.bfloat16)


def request_of(engine: Engine, tokens: int, seed: int = 0) -> Request:
    """A request whose prompt has exactly so many tokens."""
    rng, words = random.Random(seed), ["film"]
    while True:
        request = Request((Message("user", " ".join(words)),))
        length = len(engine.tokenizer.prompt(request.messages))
        if length >= tokens:
            assert length == tokens, "a word is one token"
            return request
        words.append(rng.choice(WORDS))


def ours(engine: Engine, requests: Sequence[Request], new_tokens: int) -> None:
    """Draw `new_tokens` tokens for each request, from an empty memory."""
    engine.cache.clear()  # the adapters' layouts stay, as they do between the calls of a search
    how = Sampling(new_tokens, 1.0)
    asked = enumerate(requests)
    engine.generate([replace(request, sampling=how, seed=seed) for seed, request in asked])


def theirs(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, samples: int = 1) -> None:
    """The same by transformers' `generate`."""
    ids = torch.tensor(prompts, device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        num_return_sequences=samples,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )


def medians(runs: Mapping[str, Callable[[], None]], times: int) -> dict[str, float]:
    """Run the contestants by turns, `times` rounds after one to warm up; median seconds each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(times + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def finish(name: str, ratios: Mapping[str, float], reach: Mapping[str, float]) -> None:
    """Print the last line: the claim in JSON."""
    rounded = {row: round(value, 3) for row, value in ratios.items()}
    print(json.dumps({"benchmark": name, "ratios": rounded, "reach": dict(reach)}))
