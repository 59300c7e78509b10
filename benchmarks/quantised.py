"""Claim: rounded to 4 bits, the base loses less than 1% of perplexity.

    python benchmarks/quantised.py [DATA] [--rows 200] [--adapter DIR --simulator DIR]

DATA is a folder with ReDial's files (default ../shared/data/redial). The default model predicts the
recommender's gold responses of test rows after our prompt, a row a dialogue; perplexity is over
tokens, differences are of log-perplexity, paired, with 95% intervals over dialogues. With --adapter
a recommender's adapter, trained over bf16 on the sample set, is evaluated on its test dialogues
over each of the bases, by the simulator. The default model was published in 4 bits (Q4_1, groups of
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
from usbrec.crs.agents import Roles, Side, recommender_prompt  # noqa: E402
from usbrec.crs.datasets import ROOT, load_catalogue, load_split  # noqa: E402
from usbrec.crs.dialogue import Example  # noqa: E402
from usbrec.crs.evaluation import EvaluationOptions, evaluate_method  # noqa: E402
from usbrec.extras.intervals import mean_interval, paired_difference  # noqa: E402
from usbrec.llm.adapter_files import load_adapter  # noqa: E402
from usbrec.llm.engine import Engine  # noqa: E402
from usbrec.llm.loss import token_logps  # noqa: E402
from usbrec.llm.packing import Branch, Tree, pack  # noqa: E402
from usbrec.loading import ModelOptions, load_engine, load_simulator, pick_rows  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data" / "redial"
KINDS = {"bf16": False, "int4": True}
SEED = 0
WORSE = 0.01  # of log-perplexity: 1% of perplexity


@torch.no_grad()
def gold_logps(engine: Engine, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """Return each gold response's log-probability, end of turn included, and its tokens."""
    found = []
    for example in examples:
        prompt = engine.tokenizer.prompt(recommender_prompt(example.history))
        response = engine.tokenizer.reply(example.response)
        tree = Tree(
            [Branch(prompt, [0.0] * len(prompt)), Branch(response, [1.0] * len(response), 0)]
        )
        row = pack([tree], engine.model)
        hidden = engine.model(row.input_ids, row.position_ids, row.attention)[row.label_positions]
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
        engine = load_engine(ModelOptions(dtype="bfloat16", int4=KINDS[kind]))
        found = gold_logps(engine, examples)
        seconds = time.perf_counter() - start
        weights = [float(n) for _, n in found]
        losses[kind] = [-logp / n for logp, n in found]
        perplexity = math.exp(mean_interval(losses[kind], SEED, weights)["mean"])
        gap = paired_difference(losses[kind], losses["bf16"], SEED, weights)
        grown[kind] = gap["mean"]
        rows.append([kind, f"{perplexity:.3f}", told(gap), f"{seconds:.0f}"])
        gc.collect()
    show(rows, ["weights", "perplexity", "log-perplexity less bf16's", "s"])
    print(f"{len(examples)} gold responses of ReDial, {sum(weights):.0f} tokens\n")
    return grown


def compare_ieval(adapter: Path, simulator: str, count: int) -> None:
    """Print the table of iEval, and of the rules' grade that no judge touches."""
    catalogue = load_catalogue("sample", ROOT / "sample")
    test = load_split("sample", "test", ROOT / "sample").examples
    examples = pick_rows(test, count, SEED, apart=True)
    scores: dict[str, list[float | None]] = {}
    grades: dict[str, list[float]] = {}
    rows = []
    for kind in KINDS:
        start = time.perf_counter()
        options = ModelOptions(dtype="bfloat16", int4=KINDS[kind])
        engine = load_engine(options)
        load_adapter(engine.model, adapter, "rl")
        side, _ = load_simulator(simulator, engine, options)
        roles = Roles(Side(engine, "rl"), side, catalogue)
        talks = evaluate_method(roles, examples, SEED, EvaluationOptions())
        scores[kind] = [talk.score for talk in talks]
        grades[kind] = [float(talk.grade) for talk in talks]
        mean = mean_interval([s for s in scores[kind] if s is not None], SEED)["mean"]
        rows.append(
            [
                kind,
                f"{mean:.3f}",
                told(paired_difference(scores[kind], scores["bf16"], SEED)),
                f"{sum(grades[kind]) / len(grades[kind]):.3f}",
                told(paired_difference(grades[kind], grades["bf16"], SEED)),
                f"{time.perf_counter() - start:.0f}",
            ]
        )
        gc.collect()
    header = ["weights", "iEval", "less bf16's", "rules' grade", "less bf16's", "s"]
    show(rows, header)
    print(f"{len(examples)} test dialogues of the sample set\n")


def told(gap: dict[str, float]) -> str:
    """Return a difference with its interval."""
    return f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"


def main() -> None:
    """Print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=DATA, help="ReDial's folder")
    parser.add_argument("--rows", type=int, default=200, help="test rows (0: all)")
    parser.add_argument("--adapter", type=Path, help="a recommender's adapter, for iEval")
    parser.add_argument("--simulator", default="none", help="the simulator's adapter, for iEval")
    parser.add_argument("--dialogues", type=int, default=64, help="test dialogues of iEval")
    options = parser.parse_args()
    grown = compare_perplexity(options.data, options.rows)
    if options.adapter is not None:
        compare_ieval(options.adapter, options.simulator, options.dialogues)
    claim = f"log-perplexity grows by less than {WORSE}"
    holds = all(gap < WORSE for gap in grown.values())
    gaps = {kind: round(gap, 4) for kind, gap in grown.items() if kind != "bf16"}
    print(json.dumps({"claim": claim, "holds": holds} | gaps))


if __name__ == "__main__":
    main()
