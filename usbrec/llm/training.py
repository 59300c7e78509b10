"""The one training loop: packed trees and an objective in, a trained LoRA adapter out.

A step takes `batch_size` trees, lays them into rows of at most `tokens_per_pass` tokens and divides
the summed loss by the whole step's total, so that cutting a step into passes, or spreading its
passes over the processes of `torchrun`, changes nothing but rounding. The base never changes.

A run can be killed at any moment: started again with the same arguments it goes on from its last
state and ends with the bytes of an uninterrupted run on the same machine. The folder holds
`state.safetensors` (adapter, AdamW's moments, best adapter; in its header the step and the length
of the metrics), `metrics.jsonl`, and `timings.jsonl`, which alone differs from run to run.
"""

import hashlib
import json
import math
import resource
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from usbrec import parallel
from usbrec.llm.lora import Route, adapter_parameters, forget_adapter
from usbrec.llm.loss import token_logps
from usbrec.llm.model import Decoder
from usbrec.llm.objectives import Mean, Objective
from usbrec.llm.packing import Tree, pack, plain_layout
from usbrec.llm.run_state import load_state, save_state
from usbrec.options import UserError, check, option, seed_for
from usbrec.runs import append_rows, write_whole

FALL_OF_CHOSEN = 0.5  # nats a token: an average token has become 1.6 times less likely
RISE_OF_REPETITION = 0.1


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast an adapter learns; what it learns is the objective's matter."""

    learning_rate: float = option(3e-4, "peak rate of AdamW", above=0)
    epochs: float = option(1.0, "passes over the items", above=0)
    steps: int = option(0, "stop after so many steps; 0: by epochs", low=0)
    batch_size: int = option(16, "items a step", low=1)
    tokens_per_pass: int = option(1024, "tokens laid into one row", low=1)
    packing: bool = option(True, "lay a shared beginning out once; off: once a branch")
    warmup: float = option(0.1, "share of the steps that warm up", low=0, high=1)
    schedule: Literal["constant", "cosine"] = option("cosine", "of the rate, after the warm-up")
    weight_decay: float = option(0.0, "AdamW's decay", low=0)
    max_grad_norm: float = option(1.0, "clip to this norm; 0: never", low=0)
    checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    shuffle: bool = option(True, "a new order every epoch; off: the order given")
    seed: int = option(0, "decides the order of the items")
    save_every: int = option(20, "steps between two saved states", low=1)
    eval_every: int = option(0, "steps between two validations; 0: a tenth of all", low=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class Progress:
    """How far a run is: part of its state."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf


@dataclass(frozen=True)
class Trained:
    """The adapter after the last step, and the one with the lowest validation loss."""

    last: dict[str, Tensor]
    best: dict[str, Tensor]
    best_step: int


def train(
    model: Decoder,
    adapter: str,
    items: Sequence[Tree],
    objective: Objective,
    options: TrainingOptions,
    folder: Path,
    label: str,
    validation: Sequence[Tree] = (),
    board: Path | None = None,
) -> Trained:
    """Train the adapter on `items`, going on where an earlier call was cut off.

    Leaves the best adapter in the model: the one with the lowest loss on `validation`, or without
    it the last. `label` names the progress bar; TensorBoard's files go to the folder `board`.
    Raises UserError without items, for a folder that belongs to another run, a broken state, a full
    disk, and a loss or metric that is not finite.
    """
    if not items:
        raise UserError(f"{label}: there is nothing to train on")
    run = _Run(model, adapter, objective, options, folder, items, validation)
    try:
        run.resume()
        if board is not None and parallel.rank() == 0:
            run.draw_on(board)
        steps = range(run.progress.step, step_count(options, len(items)))
        bar = tqdm(steps, label, steps.stop, initial=steps.start, disable=parallel.rank() != 0)
        for step in bar:
            bar.set_postfix(loss=f"{run.step(step):.3f}")
        return run.finish()
    finally:
        run.release()


def step_count(options: TrainingOptions, items: int) -> int:
    """Return the number of steps a run over so many items takes."""
    by_epochs = math.ceil(options.epochs * items / options.batch_size)
    return options.steps or by_epochs


def step_items(options: TrainingOptions, items: int, step: int) -> list[int]:
    """Return which items step number `step` learns from; each epoch has an order of its own."""
    start = step * options.batch_size
    stop = start + options.batch_size
    if not options.steps:
        stop = min(stop, math.ceil(options.epochs * items))
    chosen = []
    for epoch in range(start // items, (stop - 1) // items + 1):
        generator = torch.Generator().manual_seed(seed_for("order", options.seed, epoch))
        order = list(range(items))
        if options.shuffle:
            order = torch.randperm(items, generator=generator).tolist()
        chosen += order[max(start - epoch * items, 0) : stop - epoch * items]
    return chosen


def learning_rate(options: TrainingOptions, step: int, steps: int) -> float:
    """Return the rate of step `step` of `steps`: a linear warm-up, then flat or half a cosine."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    if options.schedule == "constant":
        return options.learning_rate
    share = (step - warm) / max(steps - warm, 1)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def passes(trees: Sequence[Tree], tokens_per_pass: int) -> list[list[Tree]]:
    """Share the trees out over rows of at most `tokens_per_pass` tokens, the longest first.

    A tree that is longer than that has a row of its own.
    """
    rows: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=len, reverse=True):
        for index, free in enumerate(room):
            if len(tree) <= free:
                rows[index].append(tree)
                room[index] -= len(tree)
                break
        else:
            rows.append([tree])
            room.append(tokens_per_pass - len(tree))
    return rows


def own_rows(rows: Sequence[list[Tree]], sharded: bool) -> list[tuple[list[Tree], float]]:
    """Return the rows of this process, each with weight 1.

    Over sharded weights all processes take the same number of passes: one that has a row fewer than
    others takes the shortest once more, with weight 0.
    """
    rank, world = parallel.rank(), parallel.world()
    own = [(row, 1.0) for row in rows[rank::world]]
    if sharded and len(own) * world < len(rows):
        own.append((rows[-1], 0.0))
    return own


def plain_rows(trees: Sequence[Tree]) -> list[Tree]:
    """Return the trees in the plain layout, in which nothing is shared."""
    return [plain_layout(tree) for tree in trees]


def run_pass(
    model: Decoder, adapter: str, objective: Objective, trees: Sequence[Tree]
) -> tuple[Tensor, list[Mean]]:
    """Return the objective's summed loss over one packed row, and its metrics."""
    packed = pack(trees, model.device)
    route = Route(adapter, 0, len(packed.input_ids))
    hidden = model(packed.input_ids, packed.position_ids, packed.attention, [route])
    tokens = token_logps(hidden[packed.sources], model.lm_head.weight, packed.targets)
    return objective(tokens, packed, trees)


def collapse_warnings(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Say what looks like a degenerating policy, comparing the first tenth with the last."""
    window = max(1, len(history) // 10)

    def change(name: str) -> tuple[float, float]:
        ends = history[:window], history[-window:]
        first, last = (sum(row.get(name, 0.0) for row in end) / window for end in ends)
        return first, last

    found = []
    first, last = change("logps/chosen")
    if first - last > FALL_OF_CHOSEN:
        found.append(
            f"the chosen responses' log-probability a token fell from {first:.2f} to {last:.2f}: "
            "the policy unlearns what it should prefer; lower the learning rate or add NLL"
        )
    first, last = change("repetition")
    if "logps/chosen" in history[-1] and last - first > RISE_OF_REPETITION:
        found.append(
            f"predictions that repeat a recent token grew from {first:.2f} to {last:.2f}: "
            "the policy may be degenerating; lower the learning rate"
        )
    return found


def refuse_infinite(what: str, numbers: Mapping[str, float]) -> None:
    """Raise UserError for a number that is not finite, before it is written or learned from."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UserError(
                f"{what} has {name} {value}; the last state is kept; lower the learning rate"
            )


def put_weights(model: Decoder, adapter: str, weights: Mapping[str, Tensor]) -> None:
    """Give the adapter these weights, named as in `Trained`."""
    for name, parameter in adapter_parameters(model, adapter).items():
        parameter.data.copy_(weights[name])


def _flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Give the parameters gradients that are pieces of one vector, and return it."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    pieces = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat


def peak_memory(device: torch.device) -> int:
    """Return the bytes that were in use at the worst moment: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Run:
    """The moving parts of one call of `train`."""

    def __init__(
        self,
        model: Decoder,
        adapter: str,
        objective: Objective,
        options: TrainingOptions,
        folder: Path,
        items: Sequence[Tree],
        validation: Sequence[Tree],
    ) -> None:
        self.model, self.adapter = model, adapter
        self.objective, self.options = objective, options
        lay = list if options.packing else plain_rows
        self.items, self.validation, self.folder = lay(items), lay(validation), folder
        self.steps = step_count(options, len(items))
        self.progress = Progress()
        self.history: list[dict[str, float]] = []
        self.parameters = adapter_parameters(model, adapter)
        if not self.parameters:
            raise UserError(f"the model has no adapter {adapter!r} to train")
        forget_adapter(model, adapter)
        model.requires_grad_(False)
        model.checkpointing = options.checkpointing
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.gradient = _flat_gradient(list(self.parameters.values()))
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.board: Any = None  # TensorBoard's SummaryWriter
        self.best = self.adapter_copy()
        self.identity = self.fingerprint()
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / "metrics.jsonl"

    def adapter_copy(self) -> dict[str, Tensor]:
        """Return the adapter's tensors as they are now, on the CPU."""
        return {
            name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()
        }

    def fingerprint(self) -> str:
        """Return a hash of all that decides the result: settings, items, adapter at the start."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.adapter, self.options, self.objective)).encode())
        for trees in (self.items, self.validation):
            for tree in trees:
                for branch in tree.branches:
                    row = (list(branch.ids), list(branch.weights), branch.parent)
                    digest.update(repr(row).encode())
            digest.update(b"end")
        for name, tensor in self.best.items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def resume(self) -> None:
        """Go on from the folder's state, or start afresh where there is none."""
        path = self.folder / "state.safetensors"
        state = load_state(path)
        offset = 0
        if state is not None:
            tensors, facts = state
            if facts.get("identity") != self.identity:
                raise UserError(
                    f"{path} belongs to a run with other options, data or weights; "
                    "start with a new folder or with --fresh"
                )
            offset = facts["metrics_bytes"]
            self.progress = Progress(**facts["progress"])
            self.restore(tensors)
        if parallel.rank() == 0:
            self.cut_metrics(offset)

    def cut_metrics(self, length: int) -> None:
        """Cut off what was written after the state was saved, and read what stands before."""
        path = self.metrics_path
        content = path.read_bytes() if path.exists() else b""
        if len(content) < length:
            raise UserError(
                f"{path} holds {len(content)} bytes, the state beside it counts {length}; "
                "delete the state to train from the beginning"
            )
        rows = [json.loads(line) for line in content[:length].splitlines()]
        self.history = [row for row in rows if "loss" in row]
        write_whole(path, content[:length])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the state's tensors where they belong."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"last.{name}"])
            if self.progress.best_step:
                self.best[name] = tensors[f"best.{name}"]
            device = parameter.device
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.progress.step), device=device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(device),
            }

    def step(self, step: int) -> float:
        """Take one step of the optimiser and write it down; return its loss."""
        began = time.perf_counter()
        trees = [self.items[i] for i in step_items(self.options, len(self.items), step)]
        loss, means = self.accumulate(trees)
        norm = self.gradient.norm().item()
        refuse_infinite(f"step {step + 1}", {"loss": loss, "grad_norm": norm, **means})
        if self.options.max_grad_norm and norm > self.options.max_grad_norm:
            self.gradient.mul_(self.options.max_grad_norm / norm)
        rate = learning_rate(self.options, step, self.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.progress.step = step + 1
        self.history.append(
            {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm, **means}
        )
        self.write(self.history[-1])
        self.after_step(sum(map(len, trees)), time.perf_counter() - began)
        return loss

    def accumulate(self, trees: Sequence[Tree]) -> tuple[float, dict[str, float]]:
        """Leave the gradient of the trees' loss in `self.gradient`; return loss and metrics."""
        self.gradient.zero_()
        loss, means = self.measure(trees, backward=True)
        parallel.total(self.gradient)
        return loss, means

    def measure(self, trees: Sequence[Tree], backward: bool) -> tuple[float, dict[str, float]]:
        """Return loss and metrics over all processes, whose gradients are left unsummed."""
        size = sum(self.objective.size(tree) for tree in trees)
        names = self.objective.metrics
        sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=self.model.device)
        share = math.ceil(sum(map(len, trees)) / parallel.world())
        rows = passes(trees, min(share, self.options.tokens_per_pass))
        for row, weight in own_rows(rows, self.model.sharded):
            loss, means = run_pass(self.model, self.adapter, self.objective, row)
            if backward:
                (loss * (weight / size)).backward()
            flat = [loss.detach(), *(part for mean in means for part in mean)]
            sums += weight * torch.stack([part.double() for part in flat])
        loss_sum, *parts = parallel.total(sums).tolist()  # read once a step: on a GPU it waits
        pairs = zip(names, parts[::2], parts[1::2], strict=True)
        return loss_sum / size, {name: total / max(number, 1) for name, total, number in pairs}

    def after_step(self, tokens: int, seconds: float) -> None:
        """Validate, warn, save and time, each when it is due."""
        step, options = self.progress.step, self.options
        last, tenth = step == self.steps, max(self.steps // 10, 1)
        if self.validation and (last or step % (options.eval_every or tenth) == 0):
            self.validate()
        if parallel.rank() == 0 and (last or step % tenth == 0):
            for text in collapse_warnings(self.history):
                warnings.warn(f"step {step}: {text}", stacklevel=2)
        if last or step % options.save_every == 0:
            self.save()
        if parallel.rank() == 0:
            row = {
                "step": step,
                "seconds": seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "peak_memory_bytes": peak_memory(self.model.device),
            }
            append_rows(self.folder / "timings.jsonl", [row])

    @torch.no_grad()
    def validate(self) -> None:
        """Measure the validation items and keep the adapter if it is the best so far."""
        loss, means = self.measure(self.validation, backward=False)
        named = {f"eval/{name}": value for name, value in {"loss": loss, **means}.items()}
        refuse_infinite(f"the validation after step {self.progress.step}", named)
        self.write({"step": self.progress.step, **named})
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
            self.best = self.adapter_copy()

    def draw_on(self, folder: Path) -> None:
        """Draw the metrics for TensorBoard too: all anew, as a kill may have cost some points."""
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

        self.board = SummaryWriter(str(folder), purge_step=0)  # hides what earlier starts drew
        for line in self.metrics_path.read_bytes().splitlines():
            self.draw(json.loads(line))

    def draw(self, row: Mapping[str, float]) -> None:
        """Add a point to each curve of a line of the metrics."""
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])

    def write(self, row: Mapping[str, float]) -> None:
        """Append a line to the metrics."""
        if parallel.rank() == 0:
            append_rows(self.metrics_path, [row])
        if self.board is not None:
            self.draw(row)

    def save(self) -> None:
        """Replace the state by the present one; the metrics up to here are on the disk before."""
        if parallel.rank() != 0:
            return
        best = self.best if self.progress.best_step else {}
        tensors = {f"best.{name}": tensor for name, tensor in best.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors[f"last.{name}"] = parameter.detach().contiguous()
            tensors[f"exp_avg.{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
        facts = {
            "identity": self.identity,
            "metrics_bytes": self.metrics_path.stat().st_size,
            "progress": vars(self.progress),
        }
        save_state(self.folder / "state.safetensors", tensors, facts)

    def release(self) -> None:
        """Close what is open; from here on the adapter is as frozen as the base."""
        if self.board is not None:
            self.board.close()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def finish(self) -> Trained:
        """Leave the best adapter in the model."""
        last = self.adapter_copy()
        if not self.progress.best_step:
            return Trained(last, last, self.steps)
        put_weights(self.model, self.adapter, self.best)
        return Trained(last, self.best, self.progress.best_step)
