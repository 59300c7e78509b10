"""A small random model's folder and a few rows of a dataset, for tests of the commands."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from usbrec.crs.datasets import ROOT
from usbrec.llm.checkpoint import empty_decoder
from usbrec.llm.model_config import load_config

CONTROL = ("<|im_start|>", "<|im_end|>")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
STAGE_FLAGS = {  # a handful of rows through every stage
    "--max-simulator": 2, "--max-summaries": 2, "--max-cards": 1, "--max-sft": 2,
    "--max-profiles": 2,
    "--max-pairs": 4, "--max-eval": 3,
    "--max-agreement": 2, "--chunk-size": 2, "--pairs-turns": 1, "--pairs-max-new-tokens": 6,
    "--eval-turns": 1, "--eval-max-new-tokens": 6, "--ses-samples": 2, "--ses-turns": 1,
    "--ses-max-new-tokens": 6, "--ses-summary-tokens": 6,
}  # fmt: skip


def flags(options: dict[str, Any]) -> list[str]:
    """Return options as a command line's words."""
    return [str(word) for pair in options.items() for word in pair]


def write_small_model(folder: Path, **changed: Any) -> Path:
    """Write a random two-layer Llama with a byte-level tokenizer and ChatML's control tokens.

    `changed` are settings of its config.json.
    """
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (ROOT / "sample" / "valid.jsonl").read_text("utf-8").splitlines()
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": end}
    settings = {**CONFIG, **sizes, **changed}
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in empty_decoder(load_config(folder)).named_parameters()}
    weights = {
        name: torch.randn(shape, generator=generator) * 0.2 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_small_data(folder: Path, rows: int = 12, test_word: str = "") -> Path:
    """Write the first rows of the sample set's splits; `test_word` into each line of test."""
    folder.mkdir(parents=True)
    (folder / "items.json").write_bytes((ROOT / "sample" / "items.json").read_bytes())
    for split in ("train", "valid", "test"):
        lines = (ROOT / "sample" / f"{split}.jsonl").read_text("utf-8").splitlines()[:rows]
        kept = [json.loads(line) for line in lines]
        if split == "test" and test_word:
            for row in kept:
                row["context"] = [f"{x} {test_word}" if x else x for x in row["context"]]
                row["resp"] += f" {test_word}"
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (folder / f"{split}.jsonl").write_text(text, "utf-8")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return every file's content by its path in the folder, times left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("timings.jsonl")
    }
