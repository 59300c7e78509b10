"""Adapters in peft's files: adapter_config.json and adapter_model.safetensors, both ways.

They are written under peft's key names, so that peft, transformers and vLLM read them unchanged.
Reading is strict: a setting of adapter_config.json that would change the adapter's result and is
not honoured here is refused by name. So is a tensor beside LoRA's, except a weight of the base as
it is, which peft saves for `modules_to_save` and beside embeddings of another size.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from usbrec.llm.checkpoint import SafetensorsWeights, compare_shapes, stored_name, weights_file
from usbrec.llm.lora import LoraConfig, LoraLinear, adapter_parameters, lora_layers, remove_adapter
from usbrec.llm.model import Decoder
from usbrec.llm.model_config import OFF, CheckedSettings, file_in
from usbrec.options import LEAST, UserError
from usbrec.runs import read_json, write_json, write_whole

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of peft's keys, before a parameter's name in the checkpoint
Matrices = dict[str, tuple[Tensor, Tensor]]  # by the layer's path
# Settings of adapter_config.json: those `written` with every adapter; the values of two others that
# are `honoured` (PiSSA and OLoRA initialise the base as well); and those that may have `any` value,
# since they are read here, or never change a trained adapter's result, or only beside another one.
PEFT = read_json(Path(__file__).with_name("peft.json"))


def save_adapter(model: Decoder, name: str, folder: Path, base_name: str) -> None:
    """Write the adapter `name` to `folder` in peft's format; `base_name` is noted as its base.

    Each file is written whole or not at all, the weights last: a folder with weights is complete.
    """
    layers = {path: x for path, x in linear_layers(model).items() if name in x.lora_A}
    assert layers, f"the model has no adapter {name!r} to save"
    config = next(iter(layers.values())).configs[name]
    last_names = sorted({path.rpartition(".")[2] for path in layers})
    named_so = targeted(model, last_names, folder)
    settings = {**PEFT["written"], "base_model_name_or_path": base_name, "r": config.r}
    settings |= {"lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    settings["target_modules"] = last_names if named_so.keys() == layers.keys() else sorted(layers)
    own = adapter_parameters(model, name)
    tensors = {PREFIX + stored_name(model.config, x): own[x].data.cpu().contiguous() for x in own}
    write_json(folder / CONFIG_FILE, settings)
    write_whole(folder / WEIGHTS_FILE, save(tensors, {"format": "pt"}))


def linear_layers(model: Decoder) -> dict[str, LoraLinear]:
    """Return {the checkpoint's module name: layer} of every layer that can have an adapter."""
    return {stored_name(model.config, path): layer for path, layer in lora_layers(model).items()}


def load_adapter(model: Decoder, folder: Path, name: str) -> None:
    """Load the adapter in `folder` into the model as `name`.

    An adapter of that name is replaced. Raises UserError as `read_adapter` does, with the model
    unchanged.
    """
    config, matrices = read_adapter(model, folder)
    remove_adapter(model, name)
    layers = linear_layers(model)
    for path, (lora_A, lora_B) in matrices.items():
        layers[path].add(name, config, lora_A, lora_B)
    model.ops.clear()


def read_adapter(model: Decoder, folder: Path) -> tuple[LoraConfig, Matrices]:
    """Return an adapter's settings and, by the checkpoint's module name, its A (r, in), B (out, r).

    The model gives the layers' names and shapes, and the base's weights for comparison with any in
    the file; on the meta device it has none. Raises UserError for a setting that is not honoured,
    for a key that is missing, unexpected or of another shape, as in an adapter of another base, and
    for a model into which an adapter of the same base is merged.
    """
    source = file_in(folder, CONFIG_FILE)
    settings = read_json(source)
    if str(settings.get("base_model_name_or_path")) == model.config.merged_base:
        told = f"was trained on {model.config.merged_base}, and the model has an adapter of that"
        raise UserError(f"{folder} {told} merged into it already: name the base with --model")
    config = lora_config(settings, source)
    weights = SafetensorsWeights(weights_file(folder, WEIGHTS_FILE))
    layers = targeted(model, settings["target_modules"], source)
    keys = {path: [f"{PREFIX}{path}.lora_{half}.weight" for half in "AB"] for path in layers}
    shapes = {A: (config.r, layers[path].in_features) for path, (A, _) in keys.items()}
    shapes |= {B: (layers[path].out_features, config.r) for path, (_, B) in keys.items()}
    compare_shapes(shapes, weights)
    refuse_changed(model, weights, shapes.keys())
    return config, {path: (weights.load(A), weights.load(B)) for path, (A, B) in keys.items()}


def refuse_changed(model: Decoder, weights: SafetensorsWeights, lora: Collection[str]) -> None:
    """Raise UserError for a tensor of the file beside `lora`, unless it is a weight of the base.

    It must be known to equal the base's, in the base's dtype; a decoder on the meta device, or a
    sharded one, knows no values.
    """
    weight_of = {stored_name(model.config, path): x for path, x in model.state_dict().items()}
    for name in sorted(weights.tensors.keys() - lora):
        own = weight_of.get(name.removeprefix(PREFIX), torch.empty(0))
        unknown = own.is_meta or hasattr(own, "device_mesh")
        if unknown or not torch.equal(weights.tensors[name].to(own), own):
            told = "neither LoRA of a linear layer of attention or MLP, nor a weight as in the base"
            raise UserError(f"{weights.path} holds the tensor {name}, {told}")


def lora_config(values: Mapping[str, Any], source: Path) -> LoraConfig:
    """Return peft's settings as a LoraConfig; raises UserError naming one not honoured."""
    settings = CheckedSettings(values, source)
    settings.refuse_others(PEFT["honoured"])
    settings.refuse_others({x: (*OFF, "none", "", [], {}) for x in values if x not in PEFT["any"]})
    r = settings.size("r", limit=1 << 16)  # as of LoraConfig
    alpha, targets = values.get("lora_alpha"), values.get("target_modules")
    if type(alpha) not in (int, float) or (alpha and not LEAST <= abs(alpha) < 1e9):
        raise UserError(f"{source}: lora_alpha must be a number, got {alpha!r:.60}")
    names: list[Any] = targets if isinstance(targets, list) else [targets]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{source}: target_modules must be names, got {targets!r:.60}")
    return LoraConfig(r, float(alpha or 0), tuple(names), bool(values.get("use_rslora")))


def targeted(model: Decoder, targets: list[str] | str, source: Path) -> dict[str, LoraLinear]:
    """Return the layers that peft's `target_modules` names: ends of paths, or one pattern."""
    layers = linear_layers(model)
    if targets == "all-linear":
        return layers
    ends = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(x)}" for x in targets]
    try:
        found = {x: layer for x, layer in layers.items() if re.fullmatch("|".join(ends), x)}
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{source}: target_modules is no valid pattern: {error}") from error
    if not found:
        raise UserError(f"{source}: target_modules {targets!r:.60} names no linear layer here")
    return found
