"""Claim: rounded to 8 or 4 bits, the base loses less than 1% of perplexity.

    python benchmarks/quantised.py [DATA] [--rows 200] [--run-dir RUN --dialogues 64]

DATA is a folder with ReDial's files (default ../shared/data/redial). The default model predicts the
recommender's gold responses of test rows after our prompt, a row a dialogue; perplexity is over
tokens, differences are of log-perplexity, paired, with 95% intervals over dialogues. With --run-dir
the recommender of that run (its RL adapter, trained over bf16) is evaluated on test dialogues of
the run's dataset over each of the bases. The default model was published in 4 bits (Q4_1, groups of
32, as ours): int4 costs less here than it would of weights that were never rounded.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from contest import show

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.crs.agents import Cast, recommender_prompt  # noqa: E402
from usbrec.crs.datasets import load_catalogue, load_split  # noqa: E402
from usbrec.crs.dialogue import Example  # noqa: E402
from usbrec.crs.evaluation import EvaluationOptions, evaluate_method  # noqa: E402
from usbrec.crs.intervals import mean_interval, paired_difference  # noqa: E402
from usbrec.llm.engine import Engine  # noqa: E402
from usbrec.llm.loss import token_logps  # noqa: E402
from usbrec.llm.packing import Branch, Tree, pack  # noqa: E402
from usbrec.run import ModelOptions, Run, load_engine, pick_rows  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data" / "redial"
KINDS = ("none", "int8", "int4")
SEED = 0
WORSE = 0.01  # of log-perplexity: 1% of perplexity


@torch.no_grad()
def gold_logps(engine: Engine, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """Return each gold response's log-probability, end of turn included, and its tokens."""
    found = []
    for example in examples:
        prompt = engine.tokenizer.prompt(recommender_prompt(example.history))
        response = engine.tokenizer.reply(example.response)
        row = pack([Tree([Branch(prompt, [0.0] * len(prompt)),
                          Branch(response, [1.0] * len(response), 0)])])  # fmt: skip
        hidden = engine.model(row.input_ids, row.position_ids, row.attention)[row.sources]
        logps = token_logps(hidden, engine.model.lm_head.weight, row.targets).logps
        found.append((float(logps.sum()), len(logps)))
    return found


def compare_perplexity(folder: Path, count: int) -> dict[str, float]:
    """Print the table; return by how much log-perplexity grows."""
    examples = pick_rows(load_split("redial", "test", folder).examples, count, SEED, True)
    losses: dict[str, list[float]] = {}  # a token, by row
    weights: list[float] = []
    rows, grown = [], {}
    for kind in KINDS:
        start = time.perf_counter()
        found = gold_logps(load_engine(ModelOptions(dtype="bfloat16", quantise=kind)), examples)
        seconds = time.perf_counter() - start
        weights = [float(n) for _, n in found]
        losses[kind] = [-logp / n for logp, n in found]
        perplexity = math.exp(mean_interval(losses[kind], SEED, weights)["mean"])
        gap = paired_difference(losses[kind], losses["none"], SEED, weights)
        grown[kind] = gap["mean"]
        rows.append([name_of(kind), f"{perplexity:.3f}", told(gap), f"{seconds:.0f}"])
        gc.collect()
    show(rows, ["weights", "perplexity", "log-perplexity less bf16's", "s"])
    print(f"{len(examples)} gold responses of ReDial, {sum(weights):.0f} tokens\n")
    return grown


def compare_ieval(folder: Path, count: int) -> None:
    """Print the table of iEval, and of the rules' grade that no judge touches."""
    run = Run(folder)
    made_with = run.stages["simpo"]
    place = made_with["data"], made_with["data-dir"]
    catalogue = load_catalogue(*place)
    test = load_split(place[0], "test", place[1]).examples
    examples = pick_rows(test, count, SEED, one_a_dialogue=True)
    scores: dict[str, list[float | None]] = {}
    grades: dict[str, list[float]] = {}
    rows = []
    for kind in KINDS:
        start = time.perf_counter()
        engine = load_engine(ModelOptions(**{**made_with["model"], "quantise": kind}))
        run.load_adapters(engine, ("simulator", "rl"))
        talks = evaluate_method(
            engine, Cast("rl", "simulator"), catalogue, examples, SEED, EvaluationOptions()
        )
        scores[kind] = [talk.score for talk in talks]
        grades[kind] = [float(talk.grade) for talk in talks]
        mean = mean_interval([s for s in scores[kind] if s is not None], SEED)["mean"]
        rows.append(
            [
                name_of(kind),
                f"{mean:.3f}",
                told(paired_difference(scores[kind], scores["none"], SEED)),
                f"{sum(grades[kind]) / len(grades[kind]):.3f}",
                told(paired_difference(grades[kind], grades["none"], SEED)),
                f"{time.perf_counter() - start:.0f}",
            ]
        )
        gc.collect()
    header = ["weights", "iEval", "less bf16's", "rules' grade", "less bf16's", "s"]
    show(rows, header)
    print(f"{len(examples)} test dialogues of {place[0]}\n")


def name_of(kind: str) -> str:
    """Return the table's name of a kind of weights."""
    return "bf16" if kind == "none" else kind


def told(gap: dict[str, float]) -> str:
    """Return a difference with its interval."""
    return f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"


def main() -> None:
    """Print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=DATA, help="ReDial's folder")
    parser.add_argument("--rows", type=int, default=200, help="test rows (0: all)")
    parser.add_argument("--run-dir", type=Path, help="a run of train.py, for iEval")
    parser.add_argument("--dialogues", type=int, default=64, help="test dialogues of iEval")
    options = parser.parse_args()
    grown = compare_perplexity(options.data, options.rows)
    if options.run_dir is not None:
        compare_ieval(options.run_dir, options.dialogues)
    claim = f"log-perplexity grows by less than {WORSE}"
    holds = all(gap < WORSE for gap in grown.values())
    gaps = {kind: round(gap, 4) for kind, gap in grown.items() if kind != "none"}
    print(json.dumps({"claim": claim, "holds": holds} | gaps))


if __name__ == "__main__":
    main()
