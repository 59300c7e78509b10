"""Low-rank adapters (LoRA, arXiv 2106.09685): several by name over one frozen base.

    y = W x + scaling * B (A x),   scaling = lora_alpha / r   (rsLoRA: lora_alpha / sqrt(r))

A (r, in) starts random, B (out, r) starts at zero, so a new adapter changes nothing. Which rows of
a pass an adapter applies to is said with every call (`Route`), so one pass may mix adapters and a
row without one is the base to the last bit. Adapters stay in fp32 over a base of any dtype.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usbrec.llm.kernels import adapted_product, ordered, ordered_product
from usbrec.llm.quantised import Kind, QuantisedWeight, quantised
from usbrec.settings import option

ALL_LINEAR = "all-linear"
FEW_ROWS = 64
ORDERED_ROWS = 256  # of more rows a product reads a weight as quickly in its usual order
QUANTISED_ROWS = 4  # with more rows the kernels for rounded weights are the slower ones


class Route(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of the flat row belong to the adapter `adapter`."""

    adapter: str
    start: int
    stop: int


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and place of an adapter, in peft's names; `target_modules` are last names."""

    r: int = option(8, "rank of an adapter")
    lora_alpha: float = option(16.0, "its scale is lora_alpha / r")
    target_modules: tuple[str, ...] = option((ALL_LINEAR,), "layers by their last name")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"the rank r of an adapter must be at least 1, got {self.r}")

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class FrozenLinear(nn.Linear):
    """A linear layer without gradients of its own, quick at products of few rows.

    The fewer the rows, the more a product's time is that of reading the weight; so the weight may
    lie here in further forms, and a product reads the form that is quickest for its rows.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.requires_grad_(False)
        self.ordered: Tensor | None = None
        self.quantised: QuantisedWeight | None = None

    def order(self) -> None:
        """Keep a copy of the weight in the processor's own order, where it has one."""
        self.ordered = ordered(self.weight)

    @torch.no_grad()
    def quantise(self, kind: Kind) -> None:
        """Round the weight for good, and keep a copy of it in the rounded form.

        The weight itself becomes what the rounded form stands for: all products see the same one.
        """
        assert self.ordered is None, "a weight is rounded before it is ordered"
        self.quantised, rounded = quantised(self.weight, kind)
        self.weight.copy_(rounded)

    def product(self, x: Tensor) -> Tensor:
        """Return W x + b. x (T, in) -> (T, out)."""
        if not torch.is_grad_enabled():
            if self.quantised is not None and len(x) <= QUANTISED_ROWS:
                out = self.quantised.product(x)
                return out if self.bias is None else out.add_(self.bias)
            if self.ordered is not None and len(x) <= ORDERED_ROWS:
                return ordered_product(x, self.ordered, self.bias)
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        return self.product(x)


class LoraLinear(FrozenLinear):
    """A frozen linear layer with any number of named adapters beside it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoraConfig] = {}

    def forward(self, x: Tensor, routes: Sequence[Route] = ()) -> Tensor:
        """Return W x + b, and on each route's rows its adapter's part. x (T, in) -> (T, out)."""
        present = [Route(*route) for route in routes if route[0] in self.lora_A]
        if torch.is_grad_enabled():
            return self.differentiable(x, present)
        out = self.product(x)
        for name, start, stop in present:
            # a few rows times a thin matrix are quicker in fp32, many in the base's dtype
            dtype = torch.float32 if stop - start <= FEW_ROWS else x.dtype
            A, B = self.lora_A[name].to(dtype), self.lora_B[name].to(dtype)
            low = F.linear(x[start:stop].to(dtype), A)  # (t, r)
            if dtype == x.dtype:
                out[start:stop].addmm_(low, B.T, alpha=self.configs[name].scaling)
            else:
                out[start:stop].add_(F.linear(low, B), alpha=self.configs[name].scaling)
        return out

    def differentiable(self, x: Tensor, routes: Sequence[Route]) -> Tensor:
        """The same, piece by piece, with gradients for the adapters and for x."""
        pieces, at = [], 0
        for name, start, stop in routes:
            if at < start:
                pieces.append(self.product(x[at:start]))
            adapter = self.lora_A[name], self.lora_B[name], self.configs[name].scaling
            pieces.append(adapted_product(x[start:stop], self.weight, self.bias, *adapter))
            at = stop
        if at < len(x):
            pieces.append(self.product(x[at:]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def add(self, name: str, config: LoraConfig, generator: torch.Generator) -> None:
        """Put the fresh adapter `name` beside the weight: A uniform as in peft, B zero."""
        device = self.weight.device
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform with a = sqrt(5), peft's choice
        lora_A = torch.empty(config.r, self.in_features).uniform_(
            -bound, bound, generator=generator
        )
        self.lora_A[name] = nn.Parameter(lora_A.to(device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, config.r, device=device))
        self.configs[name] = config

    def delta_weight(self, name: str) -> Tensor:
        """Return scaling * B A in fp32, (out, in): what merging adds to the weight."""
        return self.lora_B[name].data @ self.lora_A[name].data * self.configs[name].scaling


def lora_layers(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (module path, layer) of each layer that an adapter of this config covers."""
    wanted = set(config.target_modules)
    found = set()
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        if isinstance(module, LoraLinear) and (ALL_LINEAR in wanted or last in wanted):
            found.add(last)
            yield path, module
    missing = wanted - found - {ALL_LINEAR}
    if missing:
        raise ValueError(f"target_modules names no linear layer of this model: {sorted(missing)}")


def add_adapter(model: nn.Module, name: str, config: LoraConfig, seed: int) -> None:
    """Give the model a fresh adapter called `name`; the same seed makes the same weights."""
    generator = torch.Generator().manual_seed(seed)
    for path, layer in lora_layers(model, config):
        if name in layer.lora_A:
            raise ValueError(f"the model already has an adapter {name!r} at {path}")
        layer.add(name, config, generator)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter `name` away; without it the model is its base again."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and name in module.lora_A:
            del module.lora_A[name], module.lora_B[name], module.configs[name]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters: "<module path>.lora_A.weight" and "...lora_B.weight"."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) and name in module.lora_A:
            found[f"{path}.lora_A.weight"] = module.lora_A[name]
            found[f"{path}.lora_B.weight"] = module.lora_B[name]
    return found
