"""Adapters in peft's files: adapter_config.json and adapter_model.safetensors, both ways.

Written under peft's key names, so that peft, transformers and vLLM read them as they are; read
back strictly. A setting of adapter_config.json that would change what the adapter computes and is
not honoured here is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from usbrec.llm.checkpoint import compare_shapes, stored_module
from usbrec.llm.files import file_in, read_json
from usbrec.llm.lora import LoraConfig, LoraLinear, remove_adapter
from usbrec.llm.model import Decoder
from usbrec.llm.model_config import Settings
from usbrec.llm.weights import SafetensorsWeights, load_tensor
from usbrec.options import UserError
from usbrec.runs import write_json, write_whole

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
HONOURED = ("r", "lora_alpha", "target_modules", "use_rslora")
# Settings that say nothing about what a trained adapter computes, or only with another one set.
WITHOUT_EFFECT = (
    "alora_invocation_tokens", "auto_mapping", "base_model_name_or_path", "inference_mode",
    "layers_pattern", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "task_type",
)  # fmt: skip


def save_adapter(model: Decoder, name: str, folder: Path, base_name: str) -> None:
    """Write the adapter `name` to `folder` as peft would; `base_name` names the base in it.

    Each file is written whole or not at all, the weights last: where they stand, all is there.
    """
    layers = {p: layer for p, layer in linear_layers(model).items() if name in layer.lora_A}
    assert layers, f"the model has no adapter {name!r} to save"
    tensors = {
        f"{KEY_PREFIX}{path}.{half}.weight": getattr(layer, half)[name].detach().cpu().contiguous()
        for path, layer in layers.items()
        for half in ("lora_A", "lora_B")
    }
    write_json(folder / CONFIG_FILE, peft_settings(model, name, layers, base_name))
    write_whole(folder / WEIGHTS_FILE, save(tensors, {"format": "pt"}))


def linear_layers(model: Decoder) -> dict[str, LoraLinear]:
    """Return the checkpoint's module name -> layer for every layer that can have an adapter."""
    return {
        stored_module(model.config, path): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def peft_settings(
    model: Decoder, name: str, layers: Mapping[str, LoraLinear], base_name: str
) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    config = next(iter(layers.values())).configs[name]
    alpha = config.lora_alpha
    last_names = {path.rpartition(".")[2] for path in layers}
    covered = {p for p in linear_layers(model) if p.rpartition(".")[2] in last_names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(last_names if covered == set(layers) else layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def load_adapter(model: Decoder, folder: Path, name: str) -> LoraConfig:
    """Put the adapter in `folder` beside the model's weights under `name` and return its settings.

    An adapter that has the name already is replaced. Raises UserError as `read_adapter` does; the
    model then stays as it was.
    """
    config, matrices = read_adapter(model, folder)
    remove_adapter(model, name)
    generator = torch.Generator().manual_seed(0)
    layers = linear_layers(model)
    for path, (lora_A, lora_B) in matrices.items():
        layers[path].add(name, config, generator)
        layers[path].lora_A[name].data.copy_(lora_A)
        layers[path].lora_B[name].data.copy_(lora_B)
    return config


def read_adapter(
    model: Decoder, folder: Path
) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return an adapter's settings and, by the checkpoint's module name, its A (r, in), B (out, r).

    The model tells which layers there are; its weights are not read (they may lie on the meta
    device). Raises UserError for a setting that is not honoured and for a key that is missing, too
    many or of another shape, as of an adapter made for another base.
    """
    if not folder.is_dir():
        raise UserError(f"no such adapter folder: {folder}")
    source = file_in(folder, CONFIG_FILE)
    settings = read_json(source)
    config = lora_config(settings, source)
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists():
        raise UserError(
            f"{folder / PICKLE_FILE} is a pickle, which is never opened since it can run code: "
            "convert it to safetensors"
        )
    weights = SafetensorsWeights(file_in(folder, WEIGHTS_FILE))
    layers = targeted(linear_layers(model), settings["target_modules"], source)
    compare_shapes(key_shapes(layers, config.r), weights.shapes, weights.path)

    def matrix(path: str, half: str) -> torch.Tensor:
        return load_tensor(weights, f"{KEY_PREFIX}{path}.{half}.weight", torch.float32)

    return config, {path: (matrix(path, "lora_A"), matrix(path, "lora_B")) for path in layers}


def key_shapes(layers: Mapping[str, LoraLinear], r: int) -> dict[str, tuple[int, ...]]:
    """Return the keys that an adapter of rank r over these layers has, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in layers.items():
        shapes[f"{KEY_PREFIX}{path}.lora_A.weight"] = (r, layer.in_features)
        shapes[f"{KEY_PREFIX}{path}.lora_B.weight"] = (layer.out_features, r)
    return shapes


def lora_config(settings: Mapping[str, Any], source: Path) -> LoraConfig:
    """Return peft's settings as ours; raises UserError naming one that is not honoured."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{source}: peft_type must be LORA, got {settings.get('peft_type')!r}")
    for name, value in settings.items():
        neutral = not value or value == "none"
        if name == "init_lora_weights":  # the others (PiSSA, OLoRA, ...) change the base as well
            neutral = value in (True, False, "gaussian")
        if name not in HONOURED and name not in WITHOUT_EFFECT and not neutral:
            raise UserError(f"{source}: the setting {name} = {value!r} is not supported")
    r, alpha = Settings(settings, source).size("r"), settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise UserError(f"{source}: lora_alpha must be a number, got {alpha!r}")
    targets = settings.get("target_modules")
    is_list = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    if not is_list and not (isinstance(targets, str) and targets):
        raise UserError(f"{source}: target_modules must be names, got {targets!r}")
    names = tuple(targets) if isinstance(targets, list) else (str(targets),)
    return LoraConfig(r, float(alpha), names, bool(settings.get("use_rslora")))


def targeted(
    layers: Mapping[str, LoraLinear], targets: list[str] | str, source: Path
) -> dict[str, LoraLinear]:
    """Return the layers that peft's `target_modules` names: ends of paths, or one pattern."""
    if targets == "all-linear":
        return dict(layers)
    if isinstance(targets, str):
        try:
            found = {p: layer for p, layer in layers.items() if re.fullmatch(targets, p)}
        except re.error as error:
            raise UserError(f"{source}: target_modules is no valid pattern: {error}") from error
        unused = [] if found else [targets]
    else:
        ends = {t: [p for p in layers if p == t or p.endswith(f".{t}")] for t in targets}
        wanted = {path for paths in ends.values() for path in paths}
        found = {path: layer for path, layer in layers.items() if path in wanted}
        unused = [target for target, paths in ends.items() if not paths]
    if unused:
        raise UserError(
            f"{source}: target_modules names {unused[0]!r}, which is no linear layer of this model"
        )
    return found
