"""The processes of one run: `torchrun --nproc-per-node N train.py`, or a single process.

Without torchrun there is one process, and every function here reduces to the plain operation. With
torchrun the first process (rank 0) alone prints, shows bars, writes the run's files, and sends its
decisions to the others. Training spreads the passes of a step over the processes; the stages that
ask the model spread chunks of dialogues (runs.py). Results and saved options do not depend on the
number of processes, except for the rounding of sums.

A model that one GPU cannot hold is sharded (`shard`, train.py's --shard). Each process keeps a part
of every layer's frozen weights, and a layer is gathered while it computes. So every pass needs all
processes. In training, a process with no row left repeats a row with weight 0. In decoding, the
number of passes depends on the longest reply, so no process can have dialogues of its own: all
compute the same chunk, and the first draws each token. Sharding saves memory, not time: without
it, where the model fits on one GPU, N chunks run at a time. Adapters are small: each process
holds them whole, and their gradients are summed as without --shard.
"""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from io import TextIOWrapper
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from usbrec.options import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # a process may wait for another's chunk; torchrun ends lost ones


def run_together(program: str, job: Callable[[], None]) -> int:
    """Run `job` in every process that torchrun started; return the exit code.

    A UserError or an error of the system (code 2) or Ctrl-C (130) in one process ends all; so does
    an output that its reader, as head, has closed (141). The first process to fail prints the
    reason; the others lose their connection and end with the same code. The streams replace what
    their encoding lacks, and a warning is one line.
    """
    store, code = _join(), 0
    # else a file that is opened next would have the number of a closed stream, and its messages
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # noqa: SIM115
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"warning: {message}", sys.stderr)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        if rank() > 0:
            warnings.simplefilter("ignore")
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        job()
        print(end="", flush=True)  # an output that is full fails here, not at the exit
        meet()
    except (OSError, UserError) as error:
        code = _end(store, f"{program}: {error}", 141 if isinstance(error, BrokenPipeError) else 2)
    except KeyboardInterrupt:
        code = _end(store, f"\n{program}: stopped; the same command resumes what is kept", 130)
    except RuntimeError as error:
        # torch: "can't allocate memory", "CUDA out of memory. Tried to allocate"
        if "allocate" not in str(error) and not store.check(["end"]):
            raise
        code = _end(store, f"{program}: out of memory: lower --kv-memory or --tokens-per-pass", 2)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # in an ordinary end torch's own threads now and then abort the process
    return code


def _join() -> dist.Store:
    """Join the process group of torchrun; return the key-value store that all processes share."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return dist.HashStore()
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpu and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store, own, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=own, world_size=size)
    return dist.PrefixStore("usbrec", store)


def _end(store: dist.Store, text: str, code: int) -> int:
    """Print `text` unless another process has failed before; return the first one's code."""
    own = f"{rank()} {code}"
    first = store.compare_set("end", "", own).decode()
    if first == own:
        with suppress(OSError):  # of a full error output
            print(text, file=sys.stderr)
    return int(first.split()[1])


def rank() -> int:
    """Return the rank of this process, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the rank of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def meet() -> None:
    """Wait until all processes have reached this call."""
    gather(None)


def gather(value: T) -> list[T]:
    """Return the `value` of every process, ordered by rank."""
    found = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """Return the result of `make` in the first process, which alone calls it."""
    return gather(make() if rank() == 0 else None)[0]  # type: ignore[return-value]


def one_then_all(make: Callable[[], T]) -> T:
    """Return the result of `make`, called in one process per machine first, then in the others.

    So the others find the files that the first call made.
    """
    made = make() if local_rank() == 0 else None
    meet()
    return make() if made is None else made


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def as_first(tensor: Tensor) -> Tensor:
    """Replace a tensor by that of the first of several processes, in place, and return it."""
    dist.broadcast(tensor, 0)
    return tensor


def shard(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Shard the layers' present parameters over the processes; all other parameters stay whole.

    Parameters that are added to a layer later (an adapter's) are not sharded. The model may be on
    the meta device; each parameter is then filled with `part_of` its value.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world(),))
    outside = set(model.parameters()) - set(layers.parameters())
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=outside)  # fetches a layer while another computes


def part_of(value: Tensor, place: Any) -> Tensor:
    """Return this process's part of `value` for the parameter `place`; all of it unless sharded."""
    if not hasattr(place, "device_mesh"):  # no DTensor
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
