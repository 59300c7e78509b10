"""Tensors of a model's folder by name, read one at a time: safetensors, sharded or not, or GGUF.

Headers are checked before anything is read by them: lengths, shapes, offsets and duplicates. Names
in an index stay inside the folder, and a pickle is never opened.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from usbrec.errors import UserError
from usbrec.llm.files import file_in, read_json, without_duplicates
from usbrec.llm.gguf_file import GgufFile

HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What older checkpoints store beside the weights and the decoder computes itself.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope.inv_freq")


class Weights(Protocol):
    """Tensors by the names that the checkpoint gives them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype in which it is stored."""
        ...


class GgufWeights:
    """The tensors of a GGUF file under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.shapes = {name: self._file.shape(name) for name in self._file.names}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, unpacked to fp32."""
        return self._file.read(name)


class SafetensorsWeights:
    """The tensors of one or several safetensors files; close it to let go of the files."""

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        self.path = path
        self._files = files
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        headers = {file: read_header(file) for file in sorted(set(files.values()))}
        check_index(files, headers)
        self.shapes = {
            name: headers[file][name] for name, file in files.items() if not name.endswith(COMPUTED)
        }

    @classmethod
    def from_file(cls, path: Path) -> SafetensorsWeights:
        """Open a single file."""
        return cls(path, {name: path for name in read_header(path)})

    @classmethod
    def from_folder(cls, folder: Path) -> SafetensorsWeights:
        """Open model.safetensors, or the shards that its index names."""
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").exists():
            return cls.from_file(file_in(folder, "model.safetensors"))
        if not index.exists():
            raise no_weights(folder)
        weight_map = read_json(file_in(folder, index.name)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map")
        files = {name: file_in(folder, str(file)) for name, file in weight_map.items()}
        return cls(index, files)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; its memory is the mapped file's."""
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        return tensor


def no_weights(folder: Path) -> UserError:
    """Return the error for a folder without safetensors; a pickle is named, never opened."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return UserError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which is never opened since "
            "it can run code: convert it to safetensors"
        )
    return UserError(f"{folder} has neither model.safetensors nor its index")


def check_index(
    files: Mapping[str, Path], headers: Mapping[Path, Mapping[str, tuple[int, ...]]]
) -> None:
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


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a safetensors file after checking its header against its size."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        header.pop("__metadata__", None)
        return check_entries(header, size - 8 - length)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def check_entries(header: Mapping[str, Any], data_bytes: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape; raises ValueError unless the tensors fill the data without overlap."""
    shapes, spans = {}, []
    for name, entry in header.items():
        shapes[name], span = check_entry(name, entry if isinstance(entry, dict) else {})
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("tensors overlap or leave gaps")
        end = stop
    if end != data_bytes:
        raise ValueError(f"{data_bytes} bytes of tensors, expected {end}: truncated?")
    return shapes


def check_entry(name: str, entry: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return a tensor's shape and where its bytes start and stop; raises ValueError."""
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and whole_numbers(shape) and whole_numbers(offsets)):
        raise ValueError(f"the entry of {name} is malformed")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the offsets of {name} are malformed")
    start, stop = offsets
    if not name.endswith(COMPUTED):
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{name} has the dtype {dtype}, expected F32, F16 or BF16")
        if math.prod(shape) * ITEM_BYTES[dtype] != stop - start:
            raise ValueError(f"{name} has shape {shape} but {stop - start} bytes")
    return tuple(shape), (start, stop)


def whole_numbers(values: Any) -> TypeGuard[list[int]]:
    """Tell whether `values` is a list of whole numbers from 0 on."""
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def refuse_non_finite(tensor: torch.Tensor, name: str, source: Path) -> None:
    """Raise UserError if a weight is NaN or infinite; read in pieces, so with no copy of it."""
    for piece in tensor.reshape(-1).split(1 << 22):
        if piece.numel():
            low, high = torch.aminmax(piece)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise UserError(f"{source}: the tensor {name} holds NaN or infinite values")
