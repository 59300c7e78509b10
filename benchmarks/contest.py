"""What simpo.py, sft.py and gpu.py share: pairs, a timed training, the machine's own speed.

In simpo.py and sft.py both contestants have the same start, each in a process of its own.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.extras.default_model import find_model  # noqa: E402
from usbrec.llm.adapter_files import save_adapter  # noqa: E402
from usbrec.llm.checkpoint import load_model  # noqa: E402
from usbrec.llm.fast import accelerate  # noqa: E402
from usbrec.llm.lora import LoraConfig, add_adapter  # noqa: E402
from usbrec.llm.loss import Objective  # noqa: E402
from usbrec.llm.model import Decoder, ModelConfig  # noqa: E402
from usbrec.llm.packing import Tree, visibility  # noqa: E402
from usbrec.llm.training import TrainingJob, TrainingOptions, peak_memory, step_items, train  # noqa: E402

LEARNING_RATE = 1e-4


def random_ids(generator: torch.Generator, length: int) -> list[int]:
    """Ids of ordinary tokens; their times are those of words, and no data set is needed."""
    return torch.randint(20, 49000, (length,), generator=generator).tolist()


def wait() -> None:
    """Wait until a GPU, if there is one, has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quickest(run: Callable[[], Any]) -> float:
    """Return the least seconds of ten runs."""
    best = float("inf")
    for _ in range(10):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


@cache
def product_peak(device: torch.device | str = "cpu") -> float:
    """Return the FLOP/s of a large bf16 matrix product on this device, measured once a run."""
    size = 8192 if torch.device(device).type == "cuda" else 2048
    a = torch.randn(size, size, device=device).bfloat16()
    return 2 * size**3 / quickest(lambda: a @ a)


def model_flops(config: ModelConfig, trees: Sequence[Tree]) -> float:
    """Return the products of one training pass: forward and input gradient, none for weights.

    Attention's are counted for the tokens that see each other, two forward and four backward: 6% of
    the rest at 250 tokens, 35% at 1,500. Adapters and everything recomputed are not counted.
    """
    tokens = sum(map(len, trees))
    supervised = sum(weight > 0 for tree in trees for b in tree.branches for weight in b.weights)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_attention_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * (attention + mlp)
    linear = 4.0 * (tokens * layers + supervised * config.vocab_size * config.hidden_size)
    seen = config.num_hidden_layers * sum(int(visibility(tree).sum()) for tree in trees)
    return linear + 12.0 * seen * config.num_attention_heads * config.head_dim


def options_for(steps: int, batch: int, recomputing: bool = False) -> TrainingOptions:
    """AdamW at a constant rate, gradients clipped to 1, as for the other contestant."""
    return TrainingOptions(
        learning_rate=LEARNING_RATE,
        steps=steps,
        batch_size=batch,
        warmup=0,
        schedule="constant",
        save_every=steps,
        checkpointing=recomputing,
    )


def in_our_order(items: Sequence[Any], steps: int, batch: int) -> list[Any]:
    """Return the items one after the other as our steps take them."""
    options = options_for(steps, batch)
    return [items[i] for step in step_items(options, len(items)) for i in step]


def run_ours(
    trees: Sequence[Tree],
    objective: Objective,
    steps: int,
    batch: int,
    adapter: Path,
    rank: int = 8,
    recomputing: bool = False,
) -> dict[str, Any]:
    """Train a new adapter "a", which is written to `adapter` first; return what `learn` does."""
    base = find_model(None)
    model = load_model(base, torch.bfloat16)
    accelerate(model)
    add_adapter(model, "a", LoraConfig(r=rank), seed=0)
    save_adapter(model, "a", adapter, str(base))
    return learn(model, trees, objective, options_for(steps, batch, recomputing))


def learn(
    model: Decoder, trees: Sequence[Tree], objective: Objective, options: TrainingOptions
) -> dict[str, Any]:
    """Train the adapter "a"; return seconds, tokens and losses by step, and the peak memory.

    A step ends when the training loop tells `model.ops` that the weights have changed. `share` is
    the FLOP/s of the timed steps, the first left out if there are more, over those of a large
    product in the same process.
    """
    clear, ends = model.ops.clear, [time.perf_counter()]

    def clear_and_note() -> None:
        clear()
        ends.append(time.perf_counter())

    model.ops.clear = clear_and_note
    with tempfile.TemporaryDirectory() as folder:
        train(model, "a", trees, TrainingJob(options, objective, Path(folder), "ours"))
        losses = [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").open()]
    memory, steps, batch = peak_memory(model.device), options.steps, options.batch_size
    seconds = [end - start for start, end in itertools.pairwise(ends[: steps + 1])]
    learned = in_our_order(trees, steps, batch)
    tokens = [sum(map(len, learned[i * batch : (i + 1) * batch])) for i in range(steps)]
    warm = 1 if steps > 1 else 0
    flops = model_flops(model.config, learned[warm * batch :])
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens": tokens,
        "memory": memory,
        "share": flops / sum(seconds[warm:]) / product_peak(model.device),
    }


def run_trl(
    make_trainer: Callable[..., Any],
    steps: int,
    batch: int,
    adapter: Path,
    settings: dict,
    as_it_comes: bool,
) -> dict[str, Any]:
    """The same with a trainer of trl's over peft's adapter, which starts from our file.

    `as_it_comes` leaves trl's own defaults: activations are recomputed and products autocast to
    bf16. Without them trl is quicker and takes more memory; the weights are bf16 in either case.
    """
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    folder = find_model(None)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        common = {
            "output_dir": work,
            "per_device_train_batch_size": batch,
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        if not as_it_comes:
            common |= {"bf16": False, "gradient_checkpointing": False}
        trainer = make_trainer(
            model, AutoTokenizer.from_pretrained(folder), common | settings, clock
        )
        trainer._get_train_sampler = lambda *a, **k: SequentialSampler(trainer.train_dataset)
        trainer.train()
    return {
        "losses": [float(row["loss"]) for row in trainer.state.log_history if "loss" in row],
        "seconds": [b - a for a, b in zip(clock.began, clock.ended, strict=True)],
        "memory": peak_memory(base.device),
    }


def in_own_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run the script anew, so that each contestant has memory of its own; read its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_step(result: dict[str, Any]) -> float:
    """Return the fastest step's seconds, the first one (warm-up) left out when there are more."""
    return min(result["seconds"][1:] or result["seconds"])


def table_row(title: str, result: dict[str, Any], batch: int) -> list[object]:
    """Return a contestant's row: seconds an item, GiB, losses, share of the product peak."""
    return [
        title,
        f"{best_step(result) / batch:.2f}",
        f"{result['memory'] / 2**30:.2f}",
        " ".join(f"{loss:.3f}" for loss in result["losses"]),
        f"{result['share']:.2f}" if "share" in result else "",
    ]


def show(rows: Sequence[Sequence[object]], header: Sequence[str]) -> None:
    """Print a table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
