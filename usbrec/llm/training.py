"""The training loop: a LoRA adapter learns an objective on packed trees.

A step takes `batch_size` trees, lays them into rows of at most `tokens_per_pass` tokens and divides
the summed loss by the whole step's total. So cutting a step into passes, or spreading its passes
over the processes of `torchrun`, changes nothing but rounding. The base never changes. An adapter's
B, which begins at zero, may have a higher rate than its A (LoRA+, arXiv 2402.12354).

A run can be killed at any moment. Started again with the same arguments, it resumes from its last
state and ends with the bytes of an uninterrupted run on the same machine.

The folder of a run holds `options.json` (the options, and digests of what is learned from and of
the adapter at the start), `state.safetensors` (the adapter, AdamW's moments, the best adapter; in
its header the step and the length of the metrics) and `metrics.jsonl`. The state is replaced as a
whole. Metrics after the state are cut off before a run resumes.
"""

import hashlib
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from usbrec import parallel
from usbrec.llm.lora import AdapterSpan, adapter_parameters
from usbrec.llm.loss import Objective, TokenLogps, token_logps
from usbrec.llm.model import Decoder
from usbrec.llm.packing import Packed, Tree, Trees, pack, pack_rows, tree_paths
from usbrec.options import Options, UserError, option, seed_for
from usbrec.runs import append_rows, claim, write_whole

Tensors = Mapping[str, Tensor]  # of an adapter, by name
FALL_OF_CHOSEN = 0.5  # nats per token: an average token has become 1.6 times less likely
RISE_OF_REPETITION = 0.1


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Length, learning rate, batches and validation of a training run."""

    learning_rate: float = option(3e-4, "peak rate of AdamW", above=0)
    loraplus_lr_ratio: float = option(1.0, "rate of B over that of A (LoRA+)", above=0)
    epochs: float = option(1.0, "passes over the items", above=0)
    steps: int = option(0, "stop after so many steps; 0: by epochs", low=0)
    batch_size: int = option(16, "items a step", low=1)
    tokens_per_pass: int = option(0, "tokens in a row; 0: 1024, GPU 4096", low=0)
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


def usable(trees: Trees, limit: int, objective: Objective) -> tuple[list[Tree], dict[str, int]]:
    """Return the trees that an objective can learn from, and the number dropped per reason.

    A conversation of more than `limit` tokens is dropped before the objective is asked.
    """
    told = "dropped as too long"
    long = [any(len(path) > limit for path in tree_paths(tree)) for tree in trees]
    faults = [told if y else objective.fault(x) for x, y in zip(trees, long, strict=True)]
    kept = [tree for tree, fault in zip(trees, faults, strict=True) if not fault]
    return kept, dict(sorted(Counter(filter(None, faults)).items()))


def train(model: Decoder, adapter: str, trees: Trees, job: TrainingJob) -> int:
    """Train the adapter on the trees; return the step whose weights the model keeps.

    An interrupted run is resumed. The weights with the lowest loss on `job.validation` are kept, or
    without it the last. Raises UserError without trees, for a folder of another run, a broken
    state, a full disk, and a loss or metric that is not finite.
    """
    if not trees:
        raise UserError(f"{job.label}: there is nothing to train on")
    options, batches = job.options, step_items(job.options, len(trees))
    steps, tenth = len(batches), max(len(batches) // 10, 1)
    model.checkpointing = options.checkpointing
    parameters = trainable(model, adapter)
    facts = {"adapter": adapter, "objective": repr(job.objective), **asdict(options)}
    facts |= {"items": digest(trees), "validation": digest(job.validation)}
    optimizer = adamw(parameters, options.weight_decay)
    of_A, of_B = optimizer.param_groups
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
        rate = of_A["lr"] = learning_rate(options, step, steps)
        of_B["lr"] = rate * options.loraplus_lr_ratio
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
    for name in state.best:
        parameters[name].data.copy_(state.best[name])
    model.ops.clear()
    return state.best_step or steps


def measure(model: Decoder, adapter: str, trees: Trees, job: TrainingJob) -> dict[str, float]:
    """Return the loss and the metrics of the trees over all processes, computed pass by pass.

    With gradients enabled, each pass adds to the adapter's gradients, which hold this process's
    passes alone. Numbers are read once, after the last pass: reading from a GPU waits for it.
    """
    size = sum(map(job.objective.size, trees))
    share = math.ceil(sum(map(len, trees)) / parallel.world())
    most = job.options.tokens_per_pass or (1024 if model.device.type == "cpu" else 4096)
    sums = []
    for row, weight in own_rows(pack_rows(trees, min(share, most))):
        packed = pack(row, model)
        loss, metrics = job.objective(run_pass(model, adapter, packed), packed)
        if torch.is_grad_enabled():
            (loss * (weight / size)).backward()
        values = {"loss": loss.detach()[None], **metrics}
        del loss, metrics  # and with them the pass's graph: the next pass may be recorded
        pairs = [torch.stack([x.double(), torch.ones_like(x).double()]) for x in values.values()]
        sums.append(weight * torch.stack([pair.sum(1) for pair in pairs]))  # (metrics, 2)
    totals = parallel.total(torch.stack(sums).sum(0)).tolist()
    means = {name: part / max(n, 1) for name, (part, n) in zip(values, totals, strict=True)}
    return {**means, "loss": totals[0][0] / size}


def run_pass(model: Decoder, adapter: str, packed: Packed) -> TokenLogps:
    """Return the log-probabilities of a packed row's labels, with the adapter on all of the row."""
    span = AdapterSpan(adapter, 0, len(packed.input_ids))
    forward = model.ops.learn or model
    hidden = forward(packed.input_ids, packed.position_ids, packed.attention, [span])
    return token_logps(hidden[packed.label_positions], model.lm_head.weight, packed.targets)


def own_rows(rows: Sequence[list[Tree]]) -> list[tuple[list[Tree], float]]:
    """Return the rows of this process with their weights, which are 1.

    All processes take the same number of passes, since each pass gathers sharded weights. A process
    that has a row fewer repeats the last row with weight 0.
    """
    own = [(row, 1.0) for row in rows[parallel.rank() :: parallel.world()]]
    return own if len(own) * parallel.world() >= len(rows) else [*own, (rows[-1], 0.0)]


def adamw(parameters: Tensors, decay: float) -> torch.optim.Optimizer:
    """Return AdamW over an adapter in two groups, A and B, whose rates may differ (LoRA+)."""
    groups = [{"params": [x for k, x in parameters.items() if f".lora_{y}." in k]} for y in "AB"]
    return torch.optim.AdamW(groups, weight_decay=decay, fused=True)


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
    if step < warm or options.schedule == "constant":
        return options.learning_rate * min((step + 1) / max(warm, 1), 1)
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


# --- the state of a run -----------------------------------------------------------------------


class State:
    """The state of a run and the run's files; a killed run resumes from the last `save`."""

    def __init__(self, folder: Path, parameters: Tensors, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.metrics = folder / "state.safetensors", folder / "metrics.jsonl"
        self.parameters = parameters
        self.step, self.best_step, self.best_loss = 0, 0, math.inf
        self.best: dict[str, Tensor] = {}  # none before a validation
        self.live: dict[str, Tensor] = {}  # the tensors in use, by their names in the state
        for name, weight in parameters.items():
            moments = {part: torch.zeros_like(weight) for part in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": weight.new_zeros(()), **moments}
            for part, tensor in {"last": weight.detach(), **optimizer.state[weight]}.items():
                self.live[f"{part}.{name}"] = tensor

    def save(self) -> None:
        """Replace the folder's state; the metrics up to this step are on the disk before."""
        if parallel.rank() == 0:
            facts = {"step": self.step, "best_step": self.best_step, "best_loss": self.best_loss}
            facts["metrics_bytes"] = self.metrics.stat().st_size
            tensors = self.live | {f"best.{name}": tensor for name, tensor in self.best.items()}
            on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
            write_whole(self.path, save(on_cpu, {"facts": json.dumps(facts)}))

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Load the folder's state, if there is one, and cut off newer metrics.

        Raises UserError for a state that was made with other `facts`, and for metrics that are too
        short.
        """
        remedy = f"delete {self.path.parent} to start over, or name a new folder"
        claim(self.path.with_name("options.json"), facts, [self.path], remedy)
        length = 0
        if self.path.exists():
            tensors, told = load_state(self.path)
            for name, tensor in self.live.items():
                tensor.copy_(tensors[name])
            self.step, length = told["step"], told["metrics_bytes"]
            self.best_step, self.best_loss = told["best_step"], told["best_loss"]
            if self.best_step:  # copies: Windows replaces no file that a tensor still maps
                self.best = {name: tensors[f"best.{name}"].clone() for name in self.parameters}
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        if len(content) < length:
            size = f"{self.metrics} holds {len(content)} bytes, the state beside it counts {length}"
            raise UserError(f"{size}; delete the state to train from the beginning")
        if parallel.rank() == 0:
            write_whole(self.metrics, content[:length])

    def log(self, row: Mapping[str, float]) -> None:
        """Append `row`, with the number of the step, to the metrics."""
        if parallel.rank() == 0:
            append_rows(self.metrics, [{"step": self.step, **row}])

    def validated(self, found: Mapping[str, float]) -> None:
        """Log a validation's results, and keep the adapter if its loss is the lowest so far."""
        named = {f"eval/{name}": value for name, value in found.items()}
        refuse_infinite(f"the validation after step {self.step}", named)
        self.log(named)
        if found["loss"] < self.best_loss:
            self.best_loss, self.best_step = found["loss"], self.step
            self.best = copies(self.parameters)

    def warn(self) -> None:
        """Warn of a degenerating policy, by the metrics so far."""
        if parallel.rank() == 0:
            rows = [json.loads(line) for line in self.metrics.read_bytes().splitlines()]
            for text in collapse_warnings([row for row in rows if "logps/chosen" in row]):
                warnings.warn(f"step {self.step}: {text}", stacklevel=3)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a saved state; raises UserError for a broken file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole training state ({error}); delete it") from error


def copies(parameters: Tensors) -> dict[str, Tensor]:
    """Return the parameters as they are now, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def collapse_warnings(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Return warnings of a degenerating policy: the last tenth of `history` against the first."""
    window = max(1, len(history) // 10)
    ends = list(zip(history[:window], history[-window:], strict=True))

    def change(name: str) -> float:
        return sum(last[name] - first[name] for first, last in ends) / window

    found, fall, rise = [], -change("logps/chosen"), change("repetition")
    if fall > FALL_OF_CHOSEN:
        found.append(f"chosen log-probability a token fell by {fall:.2f}: learn slower, add NLL")
    if rise > RISE_OF_REPETITION:
        found.append(f"predictions that repeat a recent token grew by {rise:.2f}: learn slower")
    return found


def refuse_infinite(what: str, numbers: Mapping[str, float]) -> None:
    """Raise UserError for a number that is not finite, before it is written or learned from."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            told = f"{what} has {name} {value}; the last state is kept"
            raise UserError(f"{told}; lower the learning rate")


def digest(content: Any) -> str:
    """Return a short hash of trees or of an adapter's weights."""
    data = save(content) if isinstance(content, dict) else repr(list(content)).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, else of the process.

    It is 0 on Windows, which does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0
