"""What gpu.py measures on: random models of real shapes, ours and transformers' in one memory."""

import gc
import importlib.metadata
import itertools
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from contest import product_peak, quickest
from race import WORDS, Endless, medians
from ses import TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from usbrec.crs import agents
from usbrec.crs.datasets import ROOT
from usbrec.crs.lessons import LessonOptions
from usbrec.llm.checkpoint import empty_decoder
from usbrec.llm.engine import Engine, default_kv_bytes
from usbrec.llm.fast import accelerate
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.llm.model import Decoder
from usbrec.llm.model_config import load_config
from usbrec.llm.tokenizer import ChatTokenizer

ADAPTERS = ("recommender", "simulator")
LLAMA: dict[str, Any] = {  # Llama-3.1-8B's config.json
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
SMALL: dict[str, Any] = LLAMA | {  # SmolLM2-135M's
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rope_theta": 100000.0, "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = SMALL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The sizes of all measurements."""

    large: dict[str, Any]
    small: dict[str, Any]
    prompt: int = 256
    long_prompt: int = 512
    new_tokens: int = 64
    reply: int = TOKENS  # of every text of a search
    dialogues: int = 32
    pair: tuple[int, int] = (207, 22)  # prompt and response: ReDial's mean shape
    long_pair: tuple[int, int] = (1500, 22)
    steps: int = 4  # of a training, the first to warm up
    lessons: LessonOptions = LessonOptions()
    rows: int = 200  # of the sample set
    rounds: int = 2


WHOLE = Size(LLAMA, SMALL)
REHEARSAL = Size(
    TINY | {"tie_word_embeddings": False}, TINY, prompt=24, long_prompt=48, new_tokens=4, reply=4,
    dialogues=3, pair=(9, 3), long_pair=(15, 3), steps=2,
    lessons=LessonOptions(sft_chats=1, simulator_chats=1), rows=12, rounds=1,
)  # fmt: skip


def reason(error: Exception) -> str:
    """Return in a few words why something failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def beside(run: Callable[[], Any]) -> Any:
    """Return what a peer measured, or why it did not: ours stands in either case."""
    try:
        return run()
    except Exception as error:
        return reason(error)
    finally:
        free()


def free() -> None:
    """Give memory back, and start the count of its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@cache
def known_words() -> list[str]:
    """Return the bytes, then the words of the sample set, the prompts and the benchmarks."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    paths = [ROOT / "sample" / name for name in ("items.json", "valid.jsonl")]
    paths += sorted(Path(agents.__file__).parent.glob("prompts/*.md"))
    texts = [path.read_text("utf-8") for path in paths] + [" ".join(WORDS)]
    found = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(split.alphabet())
    return [*alphabet, *sorted(found - {*alphabet})]


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Write config.json and a tokenizer of whole words; return the folder, which has no weights.

    Made-up words fill the vocabulary, so that any drawn id is a text that is read as one token.
    """
    words, control = known_words(), ("<|im_start|>", "<|im_end|>")
    size = config["vocab_size"] - len(control)
    made_up = ("Ġ" + "".join(x) for x in itertools.product(ascii_lowercase, repeat=4))
    spare = itertools.filterfalse({*words}.__contains__, made_up)
    vocabulary = {
        word: i for i, word in enumerate(itertools.islice(itertools.chain(words, spare), size))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"bos_token_id": size, "eos_token_id": size + 1}
    (folder / "config.json").write_text(json.dumps(config | ends))
    return folder


@torch.no_grad()
def random_model(
    folder: Path, dtype: torch.dtype, device: torch.device, std: float = 0.02
) -> Decoder:
    """Return a decoder of the folder's shape, its random weights made on the device."""
    model = empty_decoder(load_config(folder)).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.fill_(1)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def copied(device: torch.device) -> float:
    """Return the bytes that a copy of a large tensor reads and writes a second."""
    size = 2**32 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / quickest(lambda: target.copy_(source))


class Bench:
    """The large model with an adapter for either side, its folder, and the card's own speed."""

    def __init__(self, size: Size, device: torch.device, work: Path) -> None:
        self.size, self.device, self.work = size, device, work
        self.copy, self.product = copied(device), product_peak(device)
        self.folder = write_folder(work / "large", size.large)
        self.model = random_model(self.folder, torch.bfloat16, device)
        accelerate(self.model)
        for name in ADAPTERS:
            add_adapter(self.model, name, LoraConfig(r=8), seed=0)

    def facts(self) -> dict[str, Any]:
        """Return the names of card and driver, versions, and the card's own speed."""
        card, driver = platform.processor() or platform.machine(), "none"
        if self.device.type == "cuda":
            card = torch.cuda.get_device_name(self.device)
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            told = beside(lambda: subprocess.run(asked, capture_output=True, text=True).stdout)
            driver = told.partition("\n")[0]
        names = ("torch", "transformers", "peft")
        versions = {name: beside(partial(importlib.metadata.version, name)) for name in names}
        speed = {"copy_TB_per_s": self.copy / 1e12, "product_TFLOP_per_s": self.product / 1e12}
        rounded = {name: round(value, 3) for name, value in speed.items()}
        count = sum(x.numel() for name, x in self.model.named_parameters() if "lora_" not in name)
        model = {"billions": round(count / 1e9, 2), "weights": str(self.model.dtype)}
        return {"card": card, "driver": driver, **versions, **rounded, **model}

    def engine(self) -> Engine:
        """Return an engine whose replies have the asked length."""
        tokenizer: Any = Endless(ChatTokenizer.from_folder(self.folder))
        return Engine(self.model, tokenizer, default_kv_bytes(self.model))

    def peer(self, adapted: bool) -> Any:
        """Return transformers' model over the memory of our weights, and peft's adapter on it."""
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.model.dtype)
        weights = {name: x for name, x in self.model.state_dict().items() if "lora_" not in name}
        model.load_state_dict(weights, assign=True)
        with self.device:  # the angles are computed, and no weights
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        if not adapted:
            return model.eval()
        kind = PeftConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        return get_peft_model(model, kind)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return the median of some rounds after one to warm up."""
        return medians({"": run}, self.size.rounds)[""]
