"""Claim: 32 samples of one long prompt cost a tenth of transformers' `num_return_sequences=32`.

    python benchmarks/prefix.py [--quick]          # needs requirements-dev.txt

The default model in bf16, a prompt of 512 tokens, 32 samples of 64 tokens each.
"""

import argparse

from contest import show
from race import finish, medians, our_engine, ours, request_of, their_model, theirs

PROMPT, SAMPLES = 512, 32
REACH = {"siblings32": 10.0}


def main() -> None:
    """Print the table and the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 tokens and one round")
    quick = parser.parse_args().quick
    new_tokens, rounds = (8, 1) if quick else (64, 3)
    engine, model = our_engine(), their_model()
    request = request_of(engine, PROMPT)
    ids = engine.tokenizer.prompt(request.messages)
    seconds = medians(
        {
            "transformers": lambda: theirs(model, [ids], new_tokens, SAMPLES),
            "ours": lambda: ours(engine, [request] * SAMPLES, new_tokens),
        },
        rounds,
    )
    rates = {name: SAMPLES * new_tokens / taken for name, taken in seconds.items()}
    show(
        [[name, f"{seconds[name]:.1f}", f"{rates[name]:.0f}"] for name in seconds],
        ["", "seconds", "tokens/s"],
    )
    finish("prefix", {"siblings32": seconds["transformers"] / seconds["ours"]}, REACH)


if __name__ == "__main__":
    main()
