"""Low-rank adapters (LoRA, arXiv 2106.09685): several by name over one frozen base.

    y = W x + scaling * B (A x),   scaling = lora_alpha / r   (rsLoRA: lora_alpha / sqrt(r))

A (r, in) starts random and B (out, r) at zero, so a new adapter changes nothing. The `AdapterSpan`s
of a call assign the rows of a pass to adapters. One pass may mix adapters, and a row without one is
the base to the last bit. Adapters stay in fp32 over a base of any dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usbrec.options import Options, UserError, option

ALL_LINEAR, HEAD = "all-linear", "lm_head"  # in peft too, all layers are those without the head


class AdapterSpan(NamedTuple):
    """Rows `start` to `stop` (exclusive) of a pass belong to the adapter `adapter`."""

    adapter: str
    start: int
    stop: int


@dataclass(frozen=True)
class LoraConfig(Options):
    """Rank, scale and layers of an adapter, in peft's names; `target_modules` are last names."""

    r: int = option(8, "rank of an adapter", low=1, high=1 << 16)
    lora_alpha: float = option(16.0, "its scale is lora_alpha / r")
    target_modules: tuple[str, ...] = option((ALL_LINEAR,), "layers by their last name")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Linear):
    """A frozen linear layer with any number of named adapters beside it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoraConfig] = {}

    def forward(self, x: Tensor, spans: Sequence[AdapterSpan] = ()) -> Tensor:
        """Return W x, plus on the rows of each span scaling * B (A x): (T, in) -> (T, out)."""
        out = F.linear(x, self.weight, self.bias)
        for name, start, stop in spans:
            if name in self.lora_A:
                A, B = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
                low = F.linear(x[start:stop], A)  # (stop - start, r)
                out[start:stop] += self.configs[name].scaling * F.linear(low, B)
        return out

    def add(self, name: str, config: LoraConfig, A: Tensor, B: Tensor) -> None:
        """Add the adapter `name`, of the matrices A (r, in) and B (out, r) in fp32."""
        self.lora_A[name] = nn.Parameter(A.to(self.weight.device))
        self.lora_B[name] = nn.Parameter(B.to(self.weight.device))
        self.configs[name] = config


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return {module path: layer} of every layer that can have an adapter: all but the head."""
    return {key: x for key, x in model.named_modules() if isinstance(x, LoraLinear) and key != HEAD}


def add_adapter(model: nn.Module, name: str, config: LoraConfig, seed: int) -> None:
    """Add a fresh adapter `name` to the model: A uniform as in peft, B zero; equal for a seed."""
    rng, wanted = torch.Generator().manual_seed(seed), {*config.target_modules}
    layers = lora_layers(model)
    if missing := wanted - {path.rpartition(".")[2] for path in layers} - {ALL_LINEAR}:
        raise UserError(f"target_modules names no linear layer of this model: {sorted(missing)}")
    for path, layer in layers.items():
        if wanted & {ALL_LINEAR, path.rpartition(".")[2]}:
            assert name not in layer.lora_A, f"the model already has an adapter {name!r} at {path}"
            bound = 1 / math.sqrt(layer.in_features)  # kaiming_uniform with a = sqrt(5), as peft
            A = torch.empty(config.r, layer.in_features).uniform_(-bound, bound, generator=rng)
            layer.add(name, config, A, torch.zeros(layer.out_features, config.r))


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from the model, if it is there."""
    for layer in lora_layers(model).values():
        if name in layer.lora_A:
            del layer.lora_A[name], layer.lora_B[name], layer.configs[name]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters: "<module path>.lora_A.weight" and "...lora_B.weight"."""
    own = (f".lora_A.{name}", f".lora_B.{name}")
    named = model.named_parameters()
    return {path.removesuffix(name) + "weight": x for path, x in named if path.endswith(own)}
