"""Claim: SFT on dialogues with several training turns takes a quarter of the time of trl's or less.

    python benchmarks/sft.py [--quick]          # needs requirements-dev.txt

The same dialogues, adapter (rank 8 on all seven linear layers, the same start) and bf16 weights,
four dialogues a step, in trl's SFTTrainer over peft and in ours; each contestant in a process of
its own. Dialogues have ReDial's mean shape: seven utterances of each speaker, loss on the seven of
the recommender; in the full run also long ones, whose last reply follows 1,500 tokens, one dialogue
a step. trl gets our ids and masks, in two layouts: `rows`, a row a recommender turn after all that
was said before (how iEvaLM's files and common recipes have it), and `whole`, a row a dialogue,
padded; the latter also as trl comes (`defaults`), recomputing activations. All learn the same
tokens; the losses of one step agree to bf16's rounding.
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

from usbrec.llm.loss import Sft
from usbrec.llm.packing import Branch, Tree

TURNS = 7
MEAN, LONG = 20, 115  # tokens of an utterance; 13 long ones before the last reply are 1,500
REACH = {"dialogues_per_s": 4.0}
CONTESTANTS = {
    "ours": "ours",
    "rows": "trl + peft, rows",
    "whole": "trl + peft, whole",
    "defaults": "trl + peft, whole, as it comes",
}


def make_dialogues(count: int, mean: int) -> list[Tree]:
    """Dialogues whose utterances vary by half around their mean length, in turns with loss."""
    generator = torch.Generator().manual_seed(0)
    dialogues = []
    for _ in range(count):
        ids: list[int] = []
        weights: list[float] = []
        for turn in range(2 * TURNS):
            spread = torch.randint(-mean // 2, mean // 2 + 1, (1,), generator=generator)
            utterance = random_ids(generator, mean + int(spread))
            ids += utterance
            weights += [float(turn % 2)] * len(utterance)
        dialogues.append(Tree([Branch(ids, weights)]))
    return dialogues


def by_turn(dialogue: Tree) -> list[dict[str, list[int]]]:
    """Return a row for each recommender turn: all up to its end, the mask on itself alone."""
    (branch,) = dialogue.branches
    mask = [int(weight) for weight in branch.weights]
    ends = [i for i in range(1, len(mask) + 1) if mask[i - 1] and (mask + [0])[i] == 0]
    starts = [max(i for i in range(end) if not mask[i]) + 1 for end in ends]
    return [
        {"input_ids": list(branch.ids[:end]), "completion_mask": [0] * start + [1] * (end - start)}
        for start, end in zip(starts, ends, strict=True)
    ]


def as_whole(dialogue: Tree) -> list[dict[str, list[int]]]:
    """Return the dialogue as one row."""
    (branch,) = dialogue.branches
    mask = [int(weight) for weight in branch.weights]
    return [{"input_ids": list(branch.ids), "completion_mask": mask}]


def trl_trainer(rows: list[dict[str, list[int]]]) -> Any:
    """Return a function that makes trl's trainer over our ids and masks."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def make(model: Any, tokenizer: Any, settings: dict, clock: Any) -> Any:
        return SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )

    return make


def contestant(name: str, steps: int, batch: int, tokens: int, adapter: Path) -> dict[str, Any]:
    """Return what one contestant measured."""
    dialogues = make_dialogues(steps * batch, tokens)
    if name == "ours":
        return run_ours(dialogues, Sft(), steps, batch, adapter)
    lay = by_turn if name == "rows" else as_whole
    rows = [row for dialogue in in_our_order(dialogues, steps, batch) for row in lay(dialogue)]
    settings = {"max_length": None, "completion_only_loss": True, "packing": False}
    if name == "rows":
        # A step is the same dialogues as ours: its rows are accumulated, `batch` at a time.
        settings |= {"gradient_accumulation_steps": TURNS}
    return run_trl(trl_trainer(rows), steps, batch, adapter, settings, name == "defaults")


def compare(
    title: str, suffix: str, steps: int, batch: int, tokens: int
) -> tuple[list[list[object]], dict[str, float]]:
    """Return table rows and ratios of ours against trl for one shape of dialogues."""
    shape = [f"--steps={steps}", f"--batch={batch}", f"--tokens={tokens}"]
    with tempfile.TemporaryDirectory() as adapter:
        found = {
            name: in_own_process(__file__, f"--contestant={name}", f"--adapter={adapter}", *shape)
            for name in CONTESTANTS
        }
    table = [table_row(f"{title}, {CONTESTANTS[x]}", result, batch) for x, result in found.items()]
    ours, ratios = found["ours"], {}
    for name, end in (("rows", ""), ("whole", "_whole"), ("defaults", "_defaults")):
        ratios["dialogues_per_s" + suffix + end] = best_step(found[name]) / best_step(ours)
        ratios["peak_memory" + suffix + end] = ours["memory"] / found[name]["memory"]
    return table, ratios


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two steps of two mean dialogues")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    for name in ("steps", "batch", "tokens"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    x = parser.parse_args()
    if x.contestant:
        print(json.dumps(contestant(x.contestant, x.steps, x.batch, x.tokens, Path(x.adapter))))
        return
    steps, batch = (2, 2) if x.quick else (4, 4)
    table, ratios = compare("mean ReDial dialogue", "", steps, batch, MEAN)
    reach = dict(REACH)
    if not x.quick:
        more, long = compare("1,500-token dialogue", "_1500", 3, 1, LONG)
        table, ratios = table + more, ratios | long
        reach |= {f"{name}_1500": bound for name, bound in REACH.items()}
    show(table, ["dialogues", "seconds a dialogue", "peak GiB", "losses", "product share"])
    ratios = {key: round(value, 3) for key, value in ratios.items()}
    print(json.dumps({"benchmark": "sft", "ratios": ratios, "reach": reach}))


if __name__ == "__main__":
    main()
