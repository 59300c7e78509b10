"""Claim: the best 50 of thousands of titles take a second or two a dialogue on two cores.

    python benchmarks/rank.py [--data-dir FOLDER] [--quick]

The default model in bf16, without an adapter, and ReDial's titles, if FOLDER (data/redial) has
them; else as many made of the sample set's words. Brute force scores every title as a row of
`Engine.prefill`, which shares the prompt and all beginnings, too; it is timed on some of the titles
and extrapolated by their count. `kept10` and `kept50` are the shares of the best 10 and 50 of the
exact search that the default one, which ends after a number of tokens, has found.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from contest import show
from race import finish, our_engine, request_of

from usbrec.chat import Request
from usbrec.crs.agents import announce
from usbrec.llm.engine import Engine
from usbrec.llm.ranking import TOKENS, Ranking

DATA = Path(__file__).parents[1] / "data"
TITLES, PROMPT, BEST = 6583, 200, 50
REACH = {"over_brute_force": 20.0, "over_brute_force8": 20.0, "kept10": 1.0, "kept50": 0.8}


def read_titles(folder: Path) -> list[str]:
    """ReDial's titles, or as many that are made of the sample set's."""
    path = folder / "items.json"
    there = path.exists()
    items = json.loads((path if there else DATA / "sample" / "items.json").read_text("utf-8"))
    titles = [entry["name"].strip() for entry in items.values()]
    if there:
        return titles
    words = sorted({word for title in titles for word in title.split()[:-1]})
    rng = random.Random(0)
    return [
        f"{' '.join(rng.sample(words, rng.randint(1, 4)))} ({rng.randint(1950, 2017)})"
        for _ in range(TITLES)
    ]


@torch.no_grad()
def brute_force(engine: Engine, request: Request, texts: list[str]) -> None:
    """Score the texts, each as a row of its own."""
    engine.clear_cache()
    prompt = engine.prompt(request, 64)
    rows = [[*prompt, *engine.tokenizer.beginning(text)[:-1]] for text in texts]
    for at in range(0, len(rows), 64):
        some = [(request.adapter, row) for row in rows[at : at + 64]]
        _, states = engine.prefill(some, [len(prompt) - 1] * len(some))
        for state in states:
            engine.model.logits(state).float().log_softmax(-1)


def main() -> None:
    """Print the table and the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=DATA / "redial", help="ReDial's folder")
    parser.add_argument("--quick", action="store_true", help="fewer dialogues and titles")
    flags = parser.parse_args()
    engine = our_engine()
    texts = [announce(title) for title in read_titles(flags.data_dir)]
    scored, many = (32, 2) if flags.quick else (512, 8)
    ranking = Ranking(engine, texts)
    requests = [request_of(engine, PROMPT, seed) for seed in range(many)]

    def timed(count: int, tokens: int = TOKENS) -> tuple[float, list[int]]:
        """Return the seconds a dialogue, and the first one's best texts."""
        engine.clear_cache()
        start = time.perf_counter()
        ranked = ranking.best(requests[:count], BEST, tokens)
        return (time.perf_counter() - start) / count, [i for i, _ in ranked[0].texts]

    timed(1)  # warms up
    (alone, found), (together, _) = timed(1), timed(many)
    exact, best = timed(1, 0)
    start = time.perf_counter()
    brute_force(engine, requests[0], random.Random(1).sample(texts, scored))
    brute = (time.perf_counter() - start) * len(texts) / scored
    show(
        [
            ["one dialogue", f"{alone:.2f}"],
            [f"{many} dialogues in a call", f"{together:.2f}"],
            ["one dialogue, exact", f"{exact:.2f}"],
            [f"brute force, from {scored} titles", f"{brute:.1f}"],
        ],
        [f"best {BEST} of {len(texts)}, {TOKENS} tokens a search", "seconds a dialogue"],
    )
    ratios = {
        "over_brute_force": brute / alone,
        "over_brute_force8": brute / together,
        "kept10": len(set(found[:10]) & set(best[:10])) / 10,
        "kept50": len(set(found) & set(best)) / BEST,
    }
    finish("rank", ratios, REACH)


if __name__ == "__main__":
    main()
