"""A model's weights as safetensors files, written a shard at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from usbrec.llm.checkpoint import INDEX_FILE
from usbrec.runs import write_json, write_whole

SHARD_BYTES = 1 << 30


def write_shards(folder: Path, sizes: Mapping[str, int], make: Callable[[str], Tensor]) -> None:
    """Write model.safetensors, or shards and their index, of the tensors that `make` returns.

    `sizes` holds their names and bytes. A shard holds at most SHARD_BYTES, or one tensor. At most
    one shard is in memory, as tensors and as bytes. Raises UserError for a full disk.
    """
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        write_whole(folder / file, save({name: make(name) for name in names}, {"format": "pt"}))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": weight_map})
