"""Claim: SFT on dialogues with several training turns takes a quarter of the time of trl's or less.

    python benchmarks/sft.py [--quick]          # needs requirements-dev.txt

The same dialogues, adapter (rank 8 on all seven linear layers, the same start) and bf16 weights,
four dialogues a step, in trl's SFTTrainer over peft and in ours; each contestant in a process of
its own. Dialogues have ReDial's mean shape: seven utterances of each speaker, loss on the seven of
the recommender. trl gets our ids and masks, in two layouts: `rows`, a row a recommender turn after
all that was said before (how iEvaLM's files and common recipes have it), and `whole`, a row a
dialogue, padded. All three learn the same tokens; the losses of one step agree to bf16's rounding.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from contest import best_step, in_our_order, in_own_process, random_ids, run_ours, run_trl, show

from usbrec.llm.objectives import Sft
from usbrec.llm.packing import Branch, Tree

TURNS, UTTERANCE = 7, 20
REACH = {"dialogues_per_s": 4.0}


def make_dialogues(count: int) -> list[Tree]:
    """Dialogues whose utterances vary by half around their mean length, in turns with loss."""
    generator = torch.Generator().manual_seed(0)
    dialogues = []
    for _ in range(count):
        ids: list[int] = []
        weights: list[float] = []
        for turn in range(2 * TURNS):
            spread = torch.randint(-UTTERANCE // 2, UTTERANCE // 2 + 1, (1,), generator=generator)
            utterance = random_ids(generator, UTTERANCE + int(spread))
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


def contestant(name: str, steps: int, batch: int, adapter: Path) -> dict[str, Any]:
    """Return what one contestant measured."""
    dialogues = make_dialogues(steps * batch)
    if name == "ours":
        return run_ours(dialogues, Sft(), steps, batch, adapter, rank=8)
    lay = by_turn if name == "rows" else as_whole
    rows = [row for dialogue in in_our_order(dialogues, steps, batch) for row in lay(dialogue)]
    settings = {"max_length": None, "completion_only_loss": True, "packing": False}
    if name == "rows":
        # A step is the same dialogues as ours: its rows are accumulated, four at a time.
        settings |= {"gradient_accumulation_steps": TURNS}
    return run_trl(trl_trainer(rows), steps, batch, adapter, settings)


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two steps of two dialogues")
    parser.add_argument("--contestant", choices=("ours", "rows", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps, batch = (2, 2) if arguments.quick else (4, 4)
    if arguments.contestant:
        print(json.dumps(contestant(arguments.contestant, steps, batch, Path(arguments.adapter))))
        return
    flags = ["--quick"] if arguments.quick else []
    with tempfile.TemporaryDirectory() as adapter:
        results = {
            name: in_own_process(__file__, f"--contestant={name}", f"--adapter={adapter}", *flags)
            for name in ("ours", "rows", "whole")
        }
    table = [
        [
            name if name == "ours" else f"trl + peft, {name}",
            f"{best_step(result) / batch:.2f}",
            f"{result['memory'] / 2**30:.2f}",
            " ".join(f"{loss:.3f}" for loss in result["losses"]),
        ]
        for name, result in results.items()
    ]
    show(table, ["contestant", "seconds a dialogue", "peak GiB", "losses"])
    ours = results["ours"]
    ratios = {
        "dialogues_per_s": best_step(results["rows"]) / best_step(ours),
        "dialogues_per_s_whole": best_step(results["whole"]) / best_step(ours),
        "peak_memory": ours["memory"] / results["rows"]["memory"],
    }
    ratios = {key: round(value, 3) for key, value in ratios.items()}
    print(json.dumps({"benchmark": "sft", "ratios": ratios, "reach": REACH}))


if __name__ == "__main__":
    main()
