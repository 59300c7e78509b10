"""The state of a training run: the files from which a killed run resumes, and its metrics.

The folder of a run holds `options.json` (all that decides the result), `state.safetensors` (the
adapter, AdamW's moments, the best adapter; in its header the step and the length of the metrics)
and `metrics.jsonl`. The state is replaced as a whole. Metrics after the state are cut off before a
run resumes.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from usbrec import parallel
from usbrec.options import UserError
from usbrec.runs import append_rows, claim, write_whole

FALL_OF_CHOSEN = 0.5  # nats per token: an average token has become 1.6 times less likely
RISE_OF_REPETITION = 0.1


class State:
    """The state of a run and the run's files; a killed run resumes from the last `save`."""

    def __init__(
        self, folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.path, self.metrics = folder / "state.safetensors", folder / "metrics.jsonl"
        self.parameters = parameters
        self.step = self.best_step = 0
        self.best_loss = math.inf
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
        remedy = "start with a new folder or with --fresh"
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


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
