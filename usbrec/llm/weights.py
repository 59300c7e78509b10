"""Tensors of a model's folder by name, read one at a time: safetensors, sharded or not, or GGUF.

Headers are checked before anything is read by them: lengths, shapes, offsets and duplicates. Names
in an index stay inside the folder, and a pickle is never opened.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from usbrec.llm.files import file_in, read_json, without_duplicates
from usbrec.llm.gguf_file import GgufFile
from usbrec.options import UserError

HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What older checkpoints store beside the weights and the decoder computes itself.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope.inv_freq")


class Entry(NamedTuple):
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def load_tensor(
    weights: Weights, name: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return a tensor in memory of its own, allocated once; raises UserError if not finite."""
    target = torch.empty(weights.shapes[name], dtype=dtype, device=device)
    weights.fill(name, target)
    for piece in target.reshape(-1).split(1 << 22):  # in pieces, so with no copy of it
        if piece.numel():
            low, high = torch.aminmax(piece)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                kind = str(dtype).removeprefix("torch.")
                raise UserError(
                    f"{weights.path}: the tensor {name} holds NaN or infinite values (in {kind})"
                )
    return target


class SafetensorsWeights:
    """The tensors of a safetensors file, or of the shards that an index names, as GgufFile's."""

    def __init__(self, path: Path, index: Mapping[str, Path] | None = None) -> None:
        self.path = path
        self._open: dict[Path, Any] = {}
        files = set(index.values()) if index else {path}
        headers = {file: read_header(file) for file in sorted(files)}
        self._files = index or dict.fromkeys(headers[path], path)
        check_index(self._files, headers)
        entries = {name: headers[file][name] for name, file in self._files.items()}
        kept = {name: e for name, e in entries.items() if not name.endswith(COMPUTED)}
        self.shapes = {name: entry.shape for name, entry in kept.items()}
        self.dtypes = {name: DTYPES[entry.dtype] for name, entry in kept.items()}

    @classmethod
    def from_folder(cls, folder: Path) -> SafetensorsWeights:
        """Open model.safetensors, or the shards that its index names."""
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").exists():
            return cls(file_in(folder, "model.safetensors"))
        if not index.exists():
            raise no_weights(folder)
        weight_map = read_json(file_in(folder, index.name)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map")
        return cls(index, {name: file_in(folder, str(file)) for name, file in weight_map.items()})

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Copy a tensor into one of its shape, of any dtype, on any device."""
        target.copy_(self.mapped(name))

    def mapped(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is the file's."""
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        return tensor


Weights = SafetensorsWeights | GgufFile


def no_weights(folder: Path) -> UserError:
    """Return the error for a folder without safetensors; a pickle is named, never opened."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return UserError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which is never opened since "
            "it can run code: convert it to safetensors"
        )
    return UserError(f"{folder} has neither model.safetensors nor its index")


def check_index(files: Mapping[str, Path], headers: Mapping[Path, Mapping[str, Entry]]) -> None:
    """Raise UserError unless every tensor stands in its own file and in no other."""
    for name, file in files.items():
        if name not in headers[file]:
            raise UserError(f"{file} lacks the tensor {name} that the index promises")
    for file, header in headers.items():
        for name in header:
            if files.get(name) != file:
                raise UserError(
                    f"{file} holds the tensor {name}, which the index does not put there"
                )


def read_header(path: Path) -> dict[str, Entry]:
    """Return what is in a safetensors file, its header checked against its size.

    The package checks shapes, lengths, overlaps and gaps; that no name comes twice, it does not.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            json.loads(file.read(length), object_pairs_hook=without_duplicates)
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            entries = {n: Entry(x.get_dtype(), tuple(x.get_shape())) for n, x in slices.items()}
        for name, entry in entries.items():
            if entry.dtype not in DTYPES and not name.endswith(COMPUTED):
                raise ValueError(f"{name} has the dtype {entry.dtype}, expected F32, F16 or BF16")
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = f"damaged, truncated or no safetensors file: {error}"
        raise UserError(f"{path} is {reason}") from error
    return entries
