"""The training loop: a LoRA adapter learns an objective on packed trees.

A step takes `batch_size` trees, lays them into rows of at most `tokens_per_pass` tokens and divides
the summed loss by the whole step's total. So cutting a step into passes, or spreading its passes
over the processes of `torchrun`, changes nothing but rounding. The base never changes.

A run can be killed at any moment. Started again with the same arguments, it resumes from its last
state (training_state.py) and ends with the bytes of an uninterrupted run on the same machine.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from usbrec import parallel
from usbrec.llm.lora import AdapterSpan, adapter_parameters
from usbrec.llm.loss import Objective, TokenLogps, token_logps
from usbrec.llm.model import Decoder
from usbrec.llm.packing import Packed, Tree, Trees, pack, pack_rows, tree_paths
from usbrec.llm.training_state import State, copies, digest, refuse_infinite
from usbrec.options import Options, UserError, option, seed_for


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Length, learning rate, batches and validation of a training run."""

    learning_rate: float = option(3e-4, "peak rate of AdamW", above=0)
    epochs: float = option(1.0, "passes over the items", above=0)
    steps: int = option(0, "stop after so many steps; 0: by epochs", low=0)
    batch_size: int = option(16, "items a step", low=1)
    tokens_per_pass: int = option(1024, "tokens laid into one row", low=1)
    warmup: float = option(0.1, "share of the steps that warm up", low=0, high=1)
    schedule: Literal["constant", "cosine"] = option("cosine", "of the rate, after the warm-up")
    weight_decay: float = option(0.0, "AdamW's decay", low=0)
    max_grad_norm: float = option(1.0, "clip to this norm; 0: never", low=0)
    checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    shuffle: bool = option(True, "a new order every epoch; off: the order given")
    seed: int = option(0, "decides the order of the items")
    save_every: int = option(20, "steps between two saved states", low=1)
    eval_every: int = option(0, "steps between two validations; 0: a tenth of all", low=0)


class TrainingJob(NamedTuple):
    """A training run: options, objective, the folder of its files, its label, validation trees."""

    options: TrainingOptions
    objective: Objective
    folder: Path
    label: str
    validation: Trees = ()


class Trained(NamedTuple):
    """The adapter's weights after the last step, and those with the lowest validation loss."""

    last: dict[str, Tensor]
    best: dict[str, Tensor]
    best_step: int


def usable(trees: Trees, limit: int, objective: Objective) -> tuple[list[Tree], dict[str, int]]:
    """Return the trees that an objective can learn from, and the number dropped per reason.

    A conversation of more than `limit` tokens is dropped before the objective is asked.
    """
    kept, dropped = [], Counter[str]()
    for tree in trees:
        too_long = any(len(path) > limit for path in tree_paths(tree))
        if reason := "dropped as too long" if too_long else objective.fault(tree):
            dropped[reason] += 1
        else:
            kept.append(tree)
    return kept, dict(sorted(dropped.items()))


def train(model: Decoder, adapter: str, trees: Trees, job: TrainingJob) -> Trained:
    """Train the adapter on the trees; return its last and its best weights.

    An interrupted run is resumed. The model keeps the best weights: those with the lowest loss on
    `job.validation`, or without it the last. Raises UserError without trees, for a folder of
    another run, a broken state, a full disk, and a loss or metric that is not finite.
    """
    if not trees:
        raise UserError(f"{job.label}: there is nothing to train on")
    options, batches = job.options, step_items(job.options, len(trees))
    steps, tenth = len(batches), max(len(batches) // 10, 1)
    model.checkpointing = options.checkpointing
    parameters = trainable(model, adapter)
    facts = {"adapter": adapter, "objective": repr(job.objective), **asdict(options)}
    facts |= {"items": digest(trees), "validation": digest(job.validation)}
    decay = options.weight_decay
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=decay, fused=True)
    state = State(job.folder, parameters, optimizer)
    state.resume({**facts, "weights": digest(copies(parameters))})
    todo = range(state.step, steps)
    bar = tqdm(todo, job.label, steps, initial=todo.start, disable=parallel.rank() != 0)
    for step in bar:
        found = measure(model, adapter, [trees[i] for i in batches[step]], job)
        for parameter in parameters.values():
            assert parameter.grad is not None, "every pass reaches every layer"
            parallel.total(parameter.grad)
        norm = clip_grad_norm_(parameters.values(), options.max_grad_norm or math.inf).item()
        refuse_infinite(f"step {step + 1}", {**found, "grad_norm": norm})
        rate = optimizer.param_groups[0]["lr"] = learning_rate(options, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        model.ops.clear()
        state.step, last = step + 1, step + 1 == steps
        state.log({"loss": found["loss"], "learning_rate": rate, "grad_norm": norm, **found})
        bar.set_postfix(loss=f"{found['loss']:.3f}")

        if job.validation and (last or state.step % (options.eval_every or tenth) == 0):
            with torch.no_grad():
                found = measure(model, adapter, job.validation, job)
            state.validated(found)
        if last or state.step % tenth == 0:
            state.warn()
        if last or state.step % options.save_every == 0:
            state.save()
    model.requires_grad_(False)
    final = copies(parameters)
    put_weights(model, adapter, state.best or final)
    return Trained(final, state.best or final, state.best_step or steps)


def measure(model: Decoder, adapter: str, trees: Trees, job: TrainingJob) -> dict[str, float]:
    """Return the loss and the metrics of the trees over all processes, computed pass by pass.

    With gradients enabled, each pass adds to the adapter's gradients, which hold this process's
    passes alone. Numbers are read once, after the last pass: reading from a GPU waits for it.
    """
    size = sum(map(job.objective.size, trees))
    share = math.ceil(sum(map(len, trees)) / parallel.world())
    sums = []
    for row, weight in own_rows(pack_rows(trees, min(share, job.options.tokens_per_pass))):
        packed = pack(row, model)
        loss, metrics = job.objective(run_pass(model, adapter, packed), packed)
        if torch.is_grad_enabled():
            (loss * (weight / size)).backward()
        values = {"loss": loss.detach()[None], **metrics}
        pairs = [torch.stack([x.double(), torch.ones_like(x).double()]) for x in values.values()]
        sums.append(weight * torch.stack([pair.sum(1) for pair in pairs]))  # (metrics, 2)
    totals = parallel.total(torch.stack(sums).sum(0)).tolist()
    means = {name: part / max(n, 1) for name, (part, n) in zip(values, totals, strict=True)}
    return {**means, "loss": totals[0][0] / size}


def run_pass(model: Decoder, adapter: str, packed: Packed) -> TokenLogps:
    """Return the log-probabilities of a packed row's labels, with the adapter on all of the row."""
    span = AdapterSpan(adapter, 0, len(packed.input_ids))
    hidden = model(packed.input_ids, packed.position_ids, packed.attention, [span])
    return token_logps(hidden[packed.label_positions], model.lm_head.weight, packed.targets)


def own_rows(rows: Sequence[list[Tree]]) -> list[tuple[list[Tree], float]]:
    """Return the rows of this process, each with weight 1.

    All processes take the same number of passes, since each pass gathers sharded weights. A process
    that has a row fewer repeats the shortest row with weight 0.
    """
    own = [(row, 1.0) for row in rows[parallel.rank() :: parallel.world()]]
    return own if len(own) * parallel.world() >= len(rows) else [*own, (rows[-1], 0.0)]


def step_items(options: TrainingOptions, items: int) -> list[list[int]]:
    """Return the places of the items of each step; each epoch has its own order."""
    size = options.batch_size
    count = options.steps * size or math.ceil(options.epochs * items)
    order: list[int] = []
    for epoch in range(math.ceil(count / items)):
        generator = torch.Generator().manual_seed(seed_for("order", options.seed, epoch))
        drawn = torch.randperm(items, generator=generator).tolist()
        order += drawn if options.shuffle else range(items)
    return [order[i : min(i + size, count)] for i in range(0, count, size)]


def learning_rate(options: TrainingOptions, step: int, steps: int) -> float:
    """Return the rate of step `step` of `steps`: a linear warm-up, then flat or half a cosine."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    if options.schedule == "constant":
        return options.learning_rate
    share = (step - warm) / max(steps - warm, 1)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def trainable(model: Decoder, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name; from now on they alone need gradients."""
    parameters = adapter_parameters(model, adapter)
    assert parameters, f"the model has no adapter {adapter!r} to train"
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_()
        parameter.grad = None  # a run that was stopped may have left one
    return parameters


def put_weights(model: Decoder, adapter: str, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights`, named as in `Trained`, into the adapter."""
    for name, parameter in adapter_parameters(model, adapter).items():
        parameter.data.copy_(weights[name])
    model.ops.clear()
