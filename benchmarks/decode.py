"""Claim: decoding is several times as fast as transformers' `generate`, at any batch.

    python benchmarks/decode.py [--quick]          # needs requirements-dev.txt

The default model in bf16, equal prompts of 71 tokens, 64 new ones each, sampled at temperature 1;
whole calls are timed, prefill included. `read_bandwidth_share` is the bytes of weights that a step
at batch 1 reads a second, over what a sum over a large tensor reads a second in the same run.
"""

import argparse
import time

import torch
from contest import show
from race import finish, medians, our_engine, ours, request_of, their_model, theirs

PROMPT = 71
REACH = {
    "batch1": 2.0,
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
    show(rows, ["batch", "transformers, tokens/s", "ours, tokens/s", "ratio"])
    print(f"batch 1 reads weights at {share:.2f} of the memory's speed")
    finish("decode", ratios, REACH)


if __name__ == "__main__":
    main()
