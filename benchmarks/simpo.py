"""Claim: SimPO over packed pairs takes at most a fifth of the time and half the memory of trl's.

    python benchmarks/simpo.py [--quick]          # needs requirements-dev.txt

The same pairs, adapter (rank 8 on all seven linear layers, the same start) and bf16 weights, four
pairs a step, in trl's CPOTrainer (`simpo`, cpo_alpha 0) over peft and in ours; each contestant in a
process of its own. trl gets our ids and labels. The losses stand side by side: they agree to bf16's
rounding. Pairs have ReDial's mean shape (prompt 207, responses 22 tokens) or, in the full run, long
prompts (1,500), two pairs a step. trl runs twice: as quick as it gets, which the claim is measured
against, and as it comes (`_defaults`), recomputing activations. `product_share` is the model's
FLOP/s over those of a 2048-cubed bf16 product in the same run. The full run also shows how our time
and memory grow with prompt, batch and rank, and what recomputing activations saves.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from contest import (
    best_step,
    in_our_order,
    in_own_process,
    random_ids,
    run_ours,
    run_trl,
    show,
    table_row,
)

from usbrec.llm.loss import Simpo, SimpoOptions
from usbrec.llm.packing import Tree, pair_tree

BETA, RATIO = 2.0, 0.5
REACH = {"pairs_per_s": 5.0, "peak_memory": 0.5, "product_share": 0.5}
CONTESTANTS = {"ours": "ours", "trl": "trl + peft", "defaults": "trl + peft, as it comes"}
USUAL = {"steps": 3, "batch": 4, "prompt": 207, "response": 22, "rank": 8, "recomputing": 0}


def make_pairs(count: int, prompt: int, response: int) -> list[Tree]:
    """Pairs whose prompts and responses vary by a third around their mean lengths."""
    generator = torch.Generator().manual_seed(0)

    def length(mean: int) -> int:
        return mean + int(torch.randint(-(mean // 3), mean // 3 + 1, (1,), generator=generator))

    lengths = [(length(prompt), length(response), length(response)) for _ in range(count)]
    return [pair_tree(*(random_ids(generator, n) for n in three)) for three in lengths]


def trl_trainer(pairs: list[Tree]) -> Any:
    """Return a function that makes trl's trainer over our ids and labels."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class OurIds(CPOTrainer):
        def tokenize_row(self, feature: dict, model: Any = None) -> dict:
            prompt, *sides = (list(branch.ids) for branch in pairs[int(feature["prompt"])].branches)
            row = {}
            for name, side in zip(("chosen", "rejected"), sides, strict=True):
                row[f"{name}_input_ids"] = prompt + side
                row[f"{name}_labels"] = [-100] * len(prompt) + side
                row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(side))
            return row

    def make(model: Any, tokenizer: Any, settings: dict, clock: Any) -> Any:
        texts = [{"prompt": str(i), "chosen": "", "rejected": ""} for i in range(len(pairs))]
        return OurIds(
            model=model,
            args=CPOConfig(**settings),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            callbacks=[clock],
        )

    return make


def contestant(arguments: argparse.Namespace) -> None:
    """Run one contestant and print what it measured."""
    steps, batch = arguments.steps, arguments.batch
    pairs = make_pairs(steps * batch, arguments.prompt, arguments.response)
    adapter = Path(arguments.adapter)
    if arguments.contestant == "ours":
        objective = Simpo(SimpoOptions(beta=BETA, gamma_beta_ratio=RATIO))
        own = {"rank": arguments.rank, "recomputing": bool(arguments.recomputing)}
        result = run_ours(pairs, objective, steps, batch, adapter, **own)
    else:
        settings = {
            "loss_type": "simpo",
            "cpo_alpha": 0.0,
            "beta": BETA,
            "simpo_gamma": RATIO * BETA,
            "max_length": 10_000,
        }
        make = trl_trainer(in_our_order(pairs, steps, batch))
        as_it_comes = arguments.contestant == "defaults"
        result = run_trl(make, steps, batch, adapter, settings, as_it_comes)
    print(json.dumps(result))


def measure(name: str, adapter: str, **shape: int) -> dict[str, Any]:
    """Return what a contestant measured for one shape of pairs."""
    flags = [f"--{key}={value}" for key, value in (USUAL | shape).items()]
    return in_own_process(__file__, f"--contestant={name}", f"--adapter={adapter}", *flags)


def compare(
    title: str, suffix: str = "", **shape: int
) -> tuple[list[list[object]], dict[str, float], dict[str, float]]:
    """Return table rows, ratios and bounds of ours against trl for one shape of pairs."""
    with tempfile.TemporaryDirectory() as adapter:
        found = {name: measure(name, adapter, **shape) for name in CONTESTANTS}
    batch = (USUAL | shape)["batch"]
    rows = [table_row(f"{title}, {CONTESTANTS[x]}", result, batch) for x, result in found.items()]
    ours = found["ours"]
    ratios = {"product_share" + suffix: ours["share"]}
    for name, end in (("trl", suffix), ("defaults", suffix + "_defaults")):
        ratios["pairs_per_s" + end] = best_step(found[name]) / best_step(ours)
        ratios["peak_memory" + end] = ours["memory"] / found[name]["memory"]
    return rows, ratios, {name + suffix: bound for name, bound in REACH.items()}


def growth() -> list[list[object]]:
    """Return table rows of our own time and memory for other shapes."""
    shapes: list[dict[str, int]] = [{"prompt": n} for n in (100, 400, 800, 1500)]
    shapes += [{"batch": n} for n in (1, 8, 16)] + [{"rank": n} for n in (4, 32)]
    shapes += [{"recomputing": 1, "prompt": n} for n in (207, 1500)]
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as adapter:
            result = measure("ours", adapter, **shape)
        title = ", ".join(f"{key} {value}" for key, value in shape.items())
        rows.append(table_row(f"ours, {title}", result, (USUAL | shape)["batch"]))
    return rows


def main() -> None:
    """Print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two steps, mean shape only")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    for name in USUAL:
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments)
        return
    steps = {"steps": 2} if arguments.quick else {}
    rows, ratios, reach = compare("mean ReDial pair", **steps)
    if not arguments.quick:
        more, long, bounds = compare("1,500-token prompt", "_1500", prompt=1500, batch=2)
        rows += more + growth()
        ratios, reach = ratios | long, reach | bounds
    show(rows, ["pairs", "seconds a pair", "peak GiB", "losses", "product share"])
    ratios = {key: round(value, 3) for key, value in ratios.items()}
    print(json.dumps({"benchmark": "simpo", "ratios": ratios, "reach": reach}))


if __name__ == "__main__":
    main()
