"""The processes of one run: `torchrun --nproc-per-node N train.py`, or one alone.

Without torchrun there is one process, and every call here does the plain thing. With it the first
one (rank 0) alone prints, shows bars and writes the run's files; what it decides, the others get
from it. Training spreads the passes of a step, the stages that ask the model spread chunks of
dialogues (chunks.py), and neither a result nor a saved option depends on how many processes there
are, but for the rounding of sums.

A model that one GPU cannot hold is spread too (`shard`, train.py's --shard): each process keeps its
part of every layer's frozen weights, and a layer is put together for as long as it computes. Then
every pass is a meeting of all processes. In training, one that has no row left repeats another's
with weight 0. Decoding takes as many passes as its longest reply, so no process can have dialogues
of its own: all compute the same chunk, each token drawn by the first, and nothing is gained but
the room. Where the model fits on one GPU, leave --shard out and N chunks are done at a time.
Adapters are small: each process has them whole, and their gradients are summed as without --shard.
"""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from usbrec.options import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # one process may wait for another's chunk; torchrun ends lost ones


def run_together(program: str, job: Callable[[], None]) -> int:
    """Do `job` in every process that torchrun started; return the exit code.

    A UserError (2) or Ctrl-C (130) in any process ends all: the one that met it first says so, and
    the others find their connection closed and end with the same code.
    """
    store = _join()
    code = _do(store, program, job)
    if store is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # in an ordinary end torch's own threads now and then abort the process
    return code


def _do(store: dist.Store | None, program: str, job: Callable[[], None]) -> int:
    """Do this process's part and return the exit code of all."""
    try:
        if rank() == 0:
            job()
        else:
            warnings.simplefilter("ignore")
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                job()
        meet()
    except UserError as error:
        return _say_once(store, f"{program}: {error}", 2)
    except KeyboardInterrupt:
        return _say_once(store, f"\n{program}: stopped; the same command goes on from here", 130)
    except RuntimeError:
        if store is None or not store.check(["end"]):
            raise
        return int(store.get("end").split()[1])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _join() -> dist.Store | None:
    """Meet the others that torchrun's environment tells of; None where there are none."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
    store, own, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=own, world_size=size)
    return dist.PrefixStore("usbrec", store)


def _say_once(store: dist.Store | None, text: str, code: int) -> int:
    """Print why this process ends unless another has said so; return the code of the first."""
    own = f"{rank()} {code}"
    first = own if store is None else store.compare_set("end", "", own).decode()
    if first == own:
        print(text, file=sys.stderr)
    return int(first.split()[1])


def rank() -> int:
    """Return this process's number, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return this process's number among those of its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def meet() -> None:
    """Wait until all processes are here."""
    gather(None)


def gather(value: T) -> list[T]:
    """Return what each process gives, in the order of their ranks."""
    found = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` gives in the first process; it is called there alone."""
    if not dist.is_initialized():
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    return box[0]  # type: ignore[return-value]


def one_then_all(make: Callable[[], T]) -> T:
    """Call `make` in one process of each machine, then in the others, who find its work done."""
    if local_rank() == 0:
        made = make()
        meet()
        return made
    meet()
    return make()


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def as_first(tensor: Tensor) -> Tensor:
    """Replace a tensor by the first process's, in place, and return it."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def shard(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Let each process hold a part of the layers' present parameters, and all others whole.

    What is added to a layer later, an adapter, is left alone. The model may still lie on the meta
    device: `part_of` then fills it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    outside = set(model.parameters()) - inside
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=outside)  # fetches a layer while another computes


def part_of(value: Tensor, place: Tensor) -> Tensor:
    """Return of `value` what this process holds of the parameter `place`: all, unless sharded."""
    if not dist.is_initialized():
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(place, DTensor):
        return value
    return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
