"""A model's folder (config.json, safetensors) -> Decoder, its weights streamed tensor by tensor.

The decoder is built without memory (meta device). Each weight is then allocated once, in the target
dtype and on the target device, and filled from the mapped file. Every parameter must be present in
its shape, and no other tensor may be. Headers are checked before they are used, file names in an
index must stay inside the folder, and a pickle is never opened. `write_shards` is the way back, for
models that are converted or merged.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from usbrec.llm.model import Decoder
from usbrec.llm.model_config import CHATGLM3, ModelConfig, file_in, load_config
from usbrec.options import UserError
from usbrec.parallel import part_of, shard
from usbrec.runs import read_json, without_duplicates, write_json, write_whole

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30  # of a shard that is written
Device = torch.device | str
DTYPES = ("F64", "F32", "F16", "BF16")
# Tensors that older checkpoints store and the decoder computes itself.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope.inv_freq")


def stored_name(config: ModelConfig, name: str) -> str:
    """Return the checkpoint's name of the decoder's module or parameter `name`.

    ChatGLM3 has names of its own; all others have those of Hugging Face's Llama, as the decoder.
    """
    for ours, theirs in CHATGLM3["modules"].items() if config.chatglm else ():
        name = name.replace(ours, theirs)
    return name


def empty_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder without memory (meta device)."""
    with torch.device("meta"):
        return Decoder(config)


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: Device = "cpu", sharded: bool = False
) -> Decoder:
    """Return the decoder of a folder, its frozen weights in `dtype` on `device`.

    With `sharded` this process keeps only its part of each layer's weights (parallel.py), and holds
    at most one whole tensor besides.

    Raises UserError for unsupported settings, damaged files, and naming the first parameter that is
    missing, unexpected, of another shape, or not finite.
    """
    model = empty_decoder(load_config(folder))
    weights = SafetensorsWeights.from_folder(folder)
    names = parameter_names(model, weights)
    if sharded:
        shard(model, model.model.layers, torch.device(device))
        model.sharded = True
    for name, stored in names.items():
        module, _, kind = name.rpartition(".")
        owner = model.get_submodule(module)
        own = part_of(weights.load(stored, dtype, device), getattr(owner, kind))
        setattr(owner, kind, nn.Parameter(own, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def parameter_names(model: Decoder, weights: "SafetensorsWeights") -> dict[str, str]:
    """Return {the decoder's name: the checkpoint's name} of all weights, checked both ways."""
    # a tied head is not listed a second time
    names = {name: stored_name(model.config, name) for name, _ in model.named_parameters()}
    expected = {names[name]: parameter.shape for name, parameter in model.named_parameters()}
    compare_shapes(expected, weights)
    head = stored_name(model.config, "lm_head.weight")  # the embeddings' equal if they are tied
    for name in sorted(weights.tensors.keys() - expected.keys() - {head}):
        raise UserError(f"{weights.path} holds the tensor {name}, which this model does not have")
    if head in weights.tensors.keys() - expected.keys():
        embeddings = stored_name(model.config, "model.embed_tokens.weight")
        if not torch.equal(weights.tensors[head], weights.tensors[embeddings]):
            raise UserError(f"{weights.path}: tie_word_embeddings is on, {head} another matrix")
    return names


class SafetensorsWeights:
    """The tensors of a safetensors file, or of the shards that an index names, as mapped views."""

    def __init__(self, path: Path, index: Mapping[str, Path] | None = None) -> None:
        """`index` maps tensors to files; raises UserError unless each is in its file alone."""
        self.path = path
        files = sorted(set(index.values())) if index else [path]
        found = {(name, file): x for file in files for name, x in mapped_tensors(file).items()}
        index = index or {name: path for name, _ in found}
        for name, file in sorted(index.items() - found.keys()):
            raise UserError(f"{file} lacks the tensor {name} that the index promises")
        for name, file in sorted(found.keys() - index.items()):
            raise UserError(f"{file} holds the tensor {name}, which the index does not put there")
        self.tensors = {name: found[name, file] for name, file in index.items()}

    @classmethod
    def from_folder(cls, folder: Path) -> "SafetensorsWeights":
        """Open model.safetensors, or the shards that its index names."""
        if (folder / "model.safetensors").exists() or not (folder / INDEX_FILE).exists():
            return cls(weights_file(folder, "model.safetensors"))
        index = file_in(folder, INDEX_FILE)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map")
        files = {name: file_in(folder, str(file)) for name, file in weight_map.items()}
        return cls(index, {name: files[name] for name in files if not name.endswith(COMPUTED)})

    def load(self, name: str, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        """Return a tensor in memory of its own; raises UserError if it is not finite."""
        tensor = self.tensors[name].to(device, dtype, copy=True)
        for piece in tensor.view(-1).split(1 << 22):  # in pieces, to spare a copy
            if piece.numel() and not torch.stack(torch.aminmax(piece)).isfinite().all():
                raise UserError(f"{self.path}: {name} holds NaN or infinite values in {dtype}")
        return tensor


def weights_file(folder: Path, name: str) -> Path:
    """Return a safetensors file of the folder; a pickle in its place is refused by its name."""
    for path in [] if (folder / name).exists() else sorted(folder.iterdir()):
        if path.suffix in (".bin", ".pt", ".pth"):
            raise UserError(f"{path} is a pickle, which can run code: convert it to safetensors")
    return file_in(folder, name)


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor that views the mapped file} of a safetensors file.

    The package checks shapes, lengths, overlaps and gaps. Duplicate names, which it accepts, are
    refused here.
    """
    try:
        with safe_open(path, framework="pt") as mapped, path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
            names = [x for x in header if x != "__metadata__" and not x.endswith(COMPUTED)]
            for name in names:
                if (kind := header[name]["dtype"]) not in DTYPES:
                    raise ValueError(f"{name} is of type {kind}, expected F32, F16 or BF16")
            return {name: mapped.get_tensor(name) for name in names}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, truncated or no safetensors file: {error}") from error


def compare_shapes(expected: Mapping[str, Sequence[int]], weights: SafetensorsWeights) -> None:
    """Raise UserError naming the first tensor that is missing or of another shape."""
    for name, shape in expected.items():
        if name not in weights.tensors:
            raise UserError(f"{weights.path} lacks the tensor {name} of shape {list(shape)}")
        if (found := list(weights.tensors[name].shape)) != list(shape):
            raise UserError(f"{weights.path}: {name} has shape {found}, expected {list(shape)}")


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
