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
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from usbrec.errors import UserError
from usbrec.llm.files import file_in, read_json, without_duplicates
from usbrec.llm.gguf_file import GgufFile

HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What older checkpoints store beside the weights and the decoder computes itself.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope.inv_freq")


class Entry(NamedTuple):
    """A tensor in a safetensors header: `start` and `stop` count bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Weights(Protocol):
    """Tensors by the names that the checkpoint gives them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Copy a tensor into one of its shape, of any dtype, on any device."""
        ...


class GgufWeights:
    """The tensors of a GGUF file under Hugging Face's names; torch knows their like as bf16."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.settings = self._file.config()  # what config.json would hold
        self.shapes = {name: self._file.shape(name) for name in self._file.names}
        self.dtypes = dict.fromkeys(self.shapes, torch.bfloat16)

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Unpack a tensor into one of its shape, of any dtype, on any device."""
        self._file.fill(name, target)


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
    """The tensors of one or several safetensors files; close it to let go of the files."""

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        self.path = path
        self._files = files
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        headers = {file: read_header(file) for file in sorted(set(files.values()))}
        check_index(files, headers)
        entries = {name: headers[file][name] for name, file in files.items()}
        kept = {name: e for name, e in entries.items() if not name.endswith(COMPUTED)}
        self.shapes = {name: entry.shape for name, entry in kept.items()}
        self.dtypes = {name: DTYPES[entry.dtype] for name, entry in kept.items()}

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

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Copy a tensor into one of its shape, of any dtype, on any device."""
        target.copy_(self.mapped(name))

    def mapped(self, name: str) -> torch.Tensor:
        """Return a tensor whose memory is the file's."""
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
    """Return what is in a safetensors file, its header checked against its size."""
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


def check_entries(header: Mapping[str, Any], data_bytes: int) -> dict[str, Entry]:
    """Return the entries; raises ValueError unless the tensors fill the data without overlap."""
    entries = {name: check_entry(name, value) for name, value in header.items()}
    end = 0
    for start, stop in sorted((entry.start, entry.stop) for entry in entries.values()):
        if start != end:
            raise ValueError("tensors overlap or leave gaps")
        end = stop
    if end != data_bytes:
        raise ValueError(f"{data_bytes} bytes of tensors, expected {end}: truncated?")
    return entries


def check_entry(name: str, value: Any) -> Entry:
    """Return one tensor's entry; raises ValueError if it contradicts itself."""
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not (isinstance(dtype, str) and whole_numbers(shape) and whole_numbers(offsets)):
        raise ValueError(f"the entry of {name} is malformed")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the offsets of {name} are malformed")
    entry = Entry(dtype, tuple(shape), *offsets)
    if not name.endswith(COMPUTED):
        if dtype not in DTYPES:
            raise ValueError(f"{name} has the dtype {dtype}, expected F32, F16 or BF16")
        if math.prod(shape) * DTYPES[dtype].itemsize != entry.stop - entry.start:
            raise ValueError(f"{name} has shape {shape} but {entry.stop - entry.start} bytes")
    return entry


def whole_numbers(values: Any) -> TypeGuard[list[int]]:
    """Tell whether `values` is a list of whole numbers from 0 on."""
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )
