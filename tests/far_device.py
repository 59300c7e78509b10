"""A stand-in for a GPU: a device `far` whose tensors the processor holds, and hands out on request.

A GPU refuses what a processor computes in silence, tensors of two devices in one operation, and
waits wherever a number is read back. Here is a device that does the former and counts the latter,
on any machine: everything is computed on the CPU, and to torch the tensors lie elsewhere. It knows
nothing of a GPU's kernels, memory or time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
torch.get_device_module("far").get_amp_supported_dtype = list  # none: checkpointing asks
FAR = torch.device("far", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class FarTensor(torch.Tensor):
    """A tensor that lies on `far`; `near` holds its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "FarTensor":
        with torch.inference_mode(near.is_inference()):  # views of older tensors are none
            return torch.Tensor._make_wrapper_subclass(
                cls,
                near.shape,
                strides=near.stride(),
                storage_offset=near.storage_offset(),
                dtype=near.dtype,
                device=FAR,
            )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    def tolist(self) -> Any:
        """Read it back; torch has no list of a subclass's numbers."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the far device outside of `far_device`")


class FarDevice(TorchDispatchMode):
    """Computes what lies on `far`; counts how often something was sent there or read back."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.sends = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = (tuple(args), dict(kwargs or {}))
        tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, FarTensor)]
        target = next((x for x in tree_leaves(given) if isinstance(x, torch.device)), None)
        if func is aten.copy_.default:
            target = args[0].device
        there = bool(far) if target is None else target.type == FAR.type
        if not far and not there:
            return func(*args, **given[1])
        if func not in MOVES:
            refuse_two_devices(func, args, tensors)
        if func in WAITS or (far and not there) or has_mask(func, args):
            self.reads += 1
        if there and any(x.dim() for x in tensors if not isinstance(x, FarTensor)):
            self.sends += 1
        own = {id(x.near): x for x in far}
        own_here = own if not there else {id(x): x for x in tensors}

        def bring(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) else getattr(x, "near", x)

        def send(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if there and id(x) in own:
                return own[id(x)]  # changed in place: the same tensor as before
            x = x.clone() if id(x) in own_here else x  # moved: never the same memory
            return FarTensor(x) if there else x

        near_args, near_kwargs = tree_map(bring, given)
        return tree_map(send, func(*near_args, **near_kwargs))


def refuse_two_devices(func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
    """Fail as a GPU does, which takes single numbers and indices of the CPU beside its own."""
    if func in INDEXING and isinstance(args[0], FarTensor):
        tensors = [args[0], *args[2:3]] if func is not aten.index.Tensor else [args[0]]
    near = [x for x in tensors if not isinstance(x, FarTensor) and x.dim()]
    if near and len(near) < len(tensors):
        raise RuntimeError(f"{func}: tensors of two devices meet, {[x.device for x in tensors]}")


def has_mask(func: Any, args: Sequence[Any]) -> bool:
    """Tell whether an index is a mask, whose entries must be counted before anything is made."""
    masks = args[1] if func in INDEXING else ()
    return any(x is not None and x.dtype == torch.bool for x in masks)


@contextmanager
def far_device() -> Iterator[FarDevice]:
    """Let the device `far` work inside."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with FarDevice() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def move(module: torch.nn.Module) -> None:
    """Put a module's parameters on `far`."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            there = torch.nn.Parameter(FarTensor(parameter.data), parameter.requires_grad)
            part.register_parameter(name, there)
