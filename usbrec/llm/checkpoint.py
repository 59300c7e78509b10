"""A model's folder or GGUF file -> Decoder, its weights streamed tensor by tensor.

The decoder is built without memory (meta device); each weight is then allocated once, in the
target dtype and on the target device, and filled from the mapped file. Every parameter must be
there in its shape, and nothing else may be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from usbrec.llm.gguf_file import GgufFile
from usbrec.llm.model import Decoder, ModelConfig
from usbrec.llm.model_config import config_from, load_config
from usbrec.llm.weights import SafetensorsWeights, Weights, load_tensor
from usbrec.options import UserError
from usbrec.parallel import part_of, shard

# ChatGLM3's own names; {} is the layer. What is not listed is called as in Hugging Face's Llama.
CHATGLM_NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "model.layers.{}.input_layernorm": "transformer.encoder.layers.{}.input_layernorm",
    "model.layers.{}.self_attn.qkv_proj": (
        "transformer.encoder.layers.{}.self_attention.query_key_value"
    ),
    "model.layers.{}.self_attn.o_proj": "transformer.encoder.layers.{}.self_attention.dense",
    "model.layers.{}.post_attention_layernorm": (
        "transformer.encoder.layers.{}.post_attention_layernorm"
    ),
    "model.layers.{}.mlp.gate_up_proj": "transformer.encoder.layers.{}.mlp.dense_h_to_4h",
    "model.layers.{}.mlp.down_proj": "transformer.encoder.layers.{}.mlp.dense_4h_to_h",
}


def stored_module(config: ModelConfig, module: str) -> str:
    """Return what the checkpoint calls the module that the decoder calls `module`."""
    if config.model_type != "chatglm":
        return module
    layer = re.search(r"\.(\d+)\.", module)
    number = layer[1] if layer else ""
    return CHATGLM_NAMES[re.sub(r"\.\d+\.", ".{}.", module)].format(number)


def stored_name(config: ModelConfig, name: str) -> str:
    """Return what the checkpoint calls the parameter that the decoder calls `name`."""
    module, _, kind = name.rpartition(".")
    return f"{stored_module(config, module)}.{kind}"


class WithoutInit(TorchFunctionMode):
    """Leaves initial values out, which on the meta device cost 70 MB and a second of imports."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the tensor as it is where `func` would fill it with random numbers."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder without memory (meta device)."""
    with torch.device("meta"), WithoutInit():
        return Decoder(config)


def open_model(path: Path) -> tuple[ModelConfig, Weights]:
    """Open a folder or a GGUF file, whose vocabulary alone takes seconds to read: only once."""
    if path.suffix == ".gguf":
        file = GgufFile(path)
        return config_from(file.config(), path), file
    return load_config(path), SafetensorsWeights.from_folder(path)


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sharded: bool = False,
) -> Decoder:
    """Return the decoder of a folder or GGUF file, its weights in `dtype` on `device`.

    `sharded` leaves this process its part of each layer's weights alone (parallel.py); nowhere does
    more than a tensor beyond that part come to lie in memory.
    Raises UserError for unsupported settings, damaged files, and a parameter that is missing, too
    many, of another shape, or not finite; the first is named.
    """
    config, weights = open_model(path)
    model = empty_decoder(config)
    names = parameter_names(model, weights)
    if sharded:
        shard(model, model.model.layers, torch.device(device))
        model.sharded = True
    for ours, theirs in names.items():
        set_parameter(model, ours, load_tensor(weights, theirs, dtype, device))
    if config.tie_word_embeddings:
        check_tied(model, weights)
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def parameter_names(model: Decoder, weights: Weights) -> dict[str, str]:
    """Return the decoder's name -> the checkpoint's name for all weights, checked both ways."""
    config = model.config
    parameters = dict(model.named_parameters())  # a tied head is not listed a second time
    names = {name: stored_name(config, name) for name in parameters}
    compare_shapes(
        {names[name]: tuple(parameter.shape) for name, parameter in parameters.items()},
        weights.shapes,
        weights.path,
        spare=[stored_name(config, "lm_head.weight")] if config.tie_word_embeddings else [],
    )
    return names


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: Path,
    spare: Collection[str] = (),
) -> None:
    """Raise UserError naming the first tensor that is missing, of another shape, or too many."""
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{source} lacks the tensor {name} of shape {list(shape)}")
        if found[name] != shape:
            raise UserError(
                f"{source}: the tensor {name} has shape {list(found[name])}, expected {list(shape)}"
            )
    extra = sorted(found.keys() - expected.keys() - set(spare))
    if extra:
        raise UserError(f"{source} holds the tensor {extra[0]}, which this model does not have")


def check_tied(model: Decoder, weights: Weights) -> None:
    """Raise UserError if a stored head differs from the embeddings to which it is to be tied."""
    head = stored_name(model.config, "lm_head.weight")
    if head in weights.shapes and isinstance(weights, SafetensorsWeights):
        embeddings = weights.mapped(stored_name(model.config, "model.embed_tokens.weight"))
        if not torch.equal(weights.mapped(head), embeddings):
            raise UserError(
                f"{weights.path}: tie_word_embeddings is on, but {head} is another matrix"
            )


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a frozen parameter, or this process's part, in the place of the one without memory."""
    module, _, kind = name.rpartition(".")
    owner = model.get_submodule(module)
    own = part_of(value, getattr(owner, kind))
    setattr(owner, kind, nn.Parameter(own, requires_grad=False))
