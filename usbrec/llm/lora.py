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

from usbrec.llm.kernels import adapted_product, has_order, ordered, quick_form, quick_product
from usbrec.llm.quantised import Kind, QuantisedWeight, quantised
from usbrec.options import check, option

ALL_LINEAR = "all-linear"
QUANTISED_ROWS = 4  # with more rows the kernels for rounded weights are the slower ones


class Route(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of the flat row belong to the adapter `adapter`."""

    adapter: str
    start: int
    stop: int


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and place of an adapter, in peft's names; `target_modules` are last names."""

    r: int = option(8, "rank of an adapter", low=1)
    lora_alpha: float = option(16.0, "its scale is lora_alpha / r")
    target_modules: tuple[str, ...] = option((ALL_LINEAR,), "layers by their last name")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")

    def __post_init__(self) -> None:
        check(self)

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class FrozenLinear(nn.Linear):
    """A linear layer without gradients of its own."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.requires_grad_(False)
        self.ordered: Tensor | None = None

    def order(self) -> None:
        """Keep a copy of the weight in the processor's own order, where it has one."""
        self.ordered = ordered(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        if self.ordered is None or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return quick_product(x, self.ordered, self.bias)


class LoraLinear(nn.Linear):
    """A frozen linear layer with any number of named adapters beside it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoraConfig] = {}

    def forward(self, x: Tensor, routes: Sequence[Route] = ()) -> Tensor:
        """Return W x + b, and on each route's rows its adapter's part. x (T, in) -> (T, out)."""
        present = [Route(*route) for route in routes if route[0] in self.lora_A]
        if torch.is_grad_enabled():
            return self.differentiable(x, present)
        out = F.linear(x, self.weight, self.bias)
        for name, start, stop in present:
            A, B = self.lora_A[name].to(x.dtype), self.scaled_B(name).to(x.dtype)
            out[start:stop].addmm_(F.linear(x[start:stop], A), B.T)
        return out

    def differentiable(self, x: Tensor, routes: Sequence[Route]) -> Tensor:
        """The same, piece by piece, with gradients for the adapters and for x."""
        pieces, at = [], 0
        for name, start, stop in routes:
            if at < start:
                pieces.append(F.linear(x[at:start], self.weight, self.bias))
            adapter = self.lora_A[name], self.lora_B[name], self.configs[name].scaling
            pieces.append(adapted_product(x[start:stop], self.weight, self.bias, *adapter))
            at = stop
        if at < len(x):
            pieces.append(F.linear(x[at:], self.weight, self.bias))
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

    def scaled_B(self, name: str) -> Tensor:
        """Return scaling * B in fp32, (out, r)."""
        return self.lora_B[name].data * self.configs[name].scaling

    def delta_weight(self, name: str) -> Tensor:
        """Return scaling * B A in fp32, (out, in): what merging adds to the weight."""
        return self.scaled_B(name) @ self.lora_A[name].data


class Siblings:
    """Layers that read the same input: in inference one product instead of several.

    The fewer the rows, the more a product's time is that of reading the weight, and of starting it.
    So the layers' weights may lie here once more, one below the other, in the forms that are quick
    to read; and so may the adapters in use, which `prepare_adapter` lays out and `forget_adapter`
    drops. With gradients, or beside an adapter that is not prepared, each layer works by itself.
    No module: it owns no parameter, and a module's call would take longer than all of its own code.
    """

    def __init__(self, layers: Sequence[LoraLinear], widths: Sequence[int] = ()) -> None:
        """`widths` cuts the output of a single layer, where it is several in one."""
        self.layers = tuple(layers)
        self.widths = list(widths) or [layer.out_features for layer in layers]
        self.ordered: Tensor | None = None
        self.quantised: QuantisedWeight | None = None
        self.bias: Tensor | None = None  # beside either form
        self.adapters: dict[str, tuple[Tensor, Tensor] | None] = {}  # None: does not touch these

    @torch.no_grad()
    def order(self) -> None:
        """Keep a copy of the weights in the processor's own order, where it has one."""
        weights: list[Tensor] = [layer.weight for layer in self.layers]
        if not has_order(weights[0]):
            return
        self.ordered = ordered(torch.cat(weights))
        self.bias = self.biases()

    @torch.no_grad()
    def quantise(self, kind: Kind) -> None:
        """Round the weights for good, and keep a copy of them in the rounded form.

        The weights themselves become what the rounded form stands for: all products see the same.
        """
        assert self.ordered is None, "weights are rounded before they are ordered"
        weights: list[Tensor] = [layer.weight for layer in self.layers]
        self.quantised, rounded = quantised(torch.cat(weights), kind)
        for weight, own in zip(weights, rounded.split([len(w) for w in weights]), strict=True):
            weight.copy_(own)
        self.bias = self.biases()

    def biases(self) -> Tensor | None:
        """Return the layers' biases one after the other, (out,)."""
        found: list[Tensor] = [layer.bias for layer in self.layers if layer.bias is not None]
        return torch.cat(found) if found else None

    @torch.no_grad()
    def prepare(self, name: str) -> None:
        """Lay the adapter out for inference: all A below one another, and each B beside the others.

        B's place is its own layer's outputs and its own A's inputs; elsewhere stands 0.
        """
        if name in self.adapters or (self.ordered is None and self.quantised is None):
            return
        self.adapters[name] = None
        own = [layer for layer in self.layers if name in layer.lora_A]
        if not own:
            return
        A = torch.cat([layer.lora_A[name].data for layer in own])  # (R, in)
        B = torch.zeros(sum(layer.out_features for layer in self.layers), len(A))  # (out, R)
        row = column = 0
        for layer in self.layers:
            if name in layer.lora_A:
                b = layer.scaled_B(name)
                B[row : row + len(b), column : column + b.shape[1]] = b
                column += b.shape[1]
            row += layer.out_features
        dtype = own[0].weight.dtype
        self.adapters[name] = quick_form(A.to(dtype)), quick_form(B.to(dtype))

    def __call__(self, x: Tensor, routes: Sequence[Route]) -> Tensor:
        """Return the outputs of the layers side by side, (T, in) -> (T, out)."""
        out = self.together(x, routes)
        if out is None:
            outs = [layer(x, routes) for layer in self.layers]
            out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return out

    def apart(self, x: Tensor, routes: Sequence[Route]) -> Sequence[Tensor]:
        """Return the outputs one by one, (T, in) -> (T, width) each."""
        out = self.together(x, routes)
        if out is None and len(self.layers) > 1:
            return [layer(x, routes) for layer in self.layers]
        return (self.layers[0](x, routes) if out is None else out).split_with_sizes(self.widths, -1)

    def together(self, x: Tensor, routes: Sequence[Route]) -> Tensor | None:
        """Return the outputs side by side from one product, where a form is at hand."""
        if torch.is_grad_enabled():
            return None
        if routes and not all(route.adapter in self.adapters for route in routes):
            return None
        if self.quantised is not None and len(x) <= QUANTISED_ROWS:
            out = self.quantised.product(x)
            out = out if self.bias is None else out.add_(self.bias)
        elif self.ordered is not None:
            out = quick_product(x, self.ordered, self.bias)
        else:
            return None
        for name, start, stop in routes:
            adapter = self.adapters[name]
            if adapter is not None:
                low = quick_product(x[start:stop], adapter[0])
                out[start:stop] += quick_product(low, adapter[1])
        return out


def siblings(model: nn.Module) -> Iterator[Siblings]:
    """Yield all sets of layers that read the same input."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Siblings))


def prepare_adapter(model: nn.Module, name: str) -> None:
    """Lay the adapter out for inference, until `forget_adapter`."""
    for layers in siblings(model):
        layers.prepare(name)


def forget_adapter(model: nn.Module, name: str) -> None:
    """Drop what `prepare_adapter` laid out: to be called before the adapter's weights change."""
    for layers in siblings(model):
        layers.adapters.pop(name, None)


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
    forget_adapter(model, name)
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
