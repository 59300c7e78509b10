"""An adapter merged into its base: a Hugging Face folder that other programs load as it is.

    python -m usbrec.llm.merge --model models/smollm2-135m-instruct --adapter runs/.../rl --out rl

The sum W + scaling * B A is taken in fp32 and written in the dtype of W (bf16 for a GGUF file), a
shard at a time. A folder that has an adapter merged into it takes no second one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from usbrec.llm.adapter_files import read_adapter
from usbrec.llm.checkpoint import empty_decoder, open_model, parameter_names
from usbrec.llm.files import file_in, read_json
from usbrec.llm.gguf_file import GgufFile
from usbrec.llm.hub import find_model
from usbrec.llm.weights import Weights, load_tensor
from usbrec.options import UserError
from usbrec.runs import write_json

MERGED = "merged_adapter"  # the key in config.json that tells of a merge
SHARD_BYTES = 4 << 30
# A model's other files, which a merge does not change (ChatGLM3's own code among them).
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "unpacked.json")


def merge(base: Path, adapter: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `base` with `adapter` merged into it to the new folder `out`, whole or not at all.

    Raises UserError if `out` exists, if `base` is merged already, or if the adapter does not fit.
    """
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder to merge into")
    config, weights = open_model(base)
    files: dict[str, dict[str, Any]] = {}  # to be written beside the weights
    if isinstance(weights, GgufFile):
        settings, files = weights.config(), weights.tokenizer_files()
    else:
        settings = read_json(base / "config.json")
    if MERGED in settings:
        raise UserError(
            f"{base} has the adapter {settings[MERGED]} merged into it already; merge into the "
            "base that the adapter was trained on"
        )
    model = empty_decoder(config)
    parameter_names(model, weights)  # the base itself must be whole
    lora_config, matrices = read_adapter(model, adapter)
    files["config.json"] = {**settings, MERGED: str(adapter)}
    deltas = {f"{path}.weight": pair for path, pair in matrices.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        made = Path(work) / out.name
        made.mkdir()
        write_shards(made, weights, deltas, lora_config.scaling, shard_bytes)
        for name, content in files.items():
            write_json(made / name, content)
        if base.is_dir():
            copy_other_files(base, made)
        made.rename(out)


def merged_tensor(
    weights: Weights, name: str, deltas: Mapping[str, tuple[Tensor, Tensor]], scaling: float
) -> Tensor:
    """Return one tensor of the base, with the adapter's part if it has one."""
    dtype = weights.dtypes[name]
    if name not in deltas:
        return load_tensor(weights, name, dtype)
    lora_A, lora_B = deltas[name]
    return torch.addmm(load_tensor(weights, name, torch.float32), lora_B, lora_A, alpha=scaling).to(
        dtype
    )


def shards_of(weights: Weights, shard_bytes: int) -> Iterator[list[str]]:
    """Cut the tensors' names into runs of at most `shard_bytes`, at least one tensor each."""
    names: list[str] = []
    size = 0
    for name, shape in weights.shapes.items():
        own = weights.dtypes[name].itemsize * math.prod(shape)
        if names and size + own > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def write_shards(
    folder: Path,
    weights: Weights,
    deltas: Mapping[str, tuple[Tensor, Tensor]],
    scaling: float,
    shard_bytes: int,
) -> None:
    """Write model.safetensors, or shards and their index."""
    shards = list(shards_of(weights, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model" if single else f"model-{number:05d}-of-{len(shards):05d}"
        tensors = {name: merged_tensor(weights, name, deltas, scaling) for name in names}
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        weight_map |= {name: f"{file}.safetensors" for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def copy_other_files(base: Path, folder: Path) -> None:
    """Carry the base's tokenizer and other small files over."""
    for path in sorted(base.iterdir()):
        if path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED:
            shutil.copyfile(file_in(base, path.name), folder / path.name)


def main(arguments: list[str] | None = None) -> int:
    """Merge as the flags say; a user's fault is printed as one sentence and ends with 2."""
    parser = argparse.ArgumentParser(description="Merge an adapter into its base model.")
    parser.add_argument("--model", required=True, help="the base: folder, GGUF file or hub name")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    options = parser.parse_args(arguments)
    try:
        merge(find_model(options.model), options.adapter, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"merged into {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
