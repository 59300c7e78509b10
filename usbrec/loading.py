"""Loaders of train.py and infer.py: the language models of both sides, and rows of a split.

By default one model serves both sides of the conversation, with one adapter per side.
`--recommender`, `--simulator` and `--judge` name others: an adapter, a whole language model, or a
server's. Such a model is loaded beside the base, with the same options and the chat layout of its
own tokenizer.
"""

import ctypes
import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from usbrec import parallel
from usbrec.crs.agents import Side
from usbrec.crs.dialogue import Example, Examples
from usbrec.llm.adapter_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from usbrec.llm.checkpoint import load_model
from usbrec.llm.endpoint import Endpoint, is_server, split_address
from usbrec.llm.engine import Engine, Usage, default_kv_bytes
from usbrec.llm.fast import accelerate
from usbrec.llm.lora import adapter_parameters
from usbrec.llm.model_config import file_in
from usbrec.llm.tokenizer import LLAMA31_DATE, ChatTokenizer
from usbrec.options import Options, UserError, option, place, seed_for

PIECE, STRIDE = 2**16, 2**24  # bytes: so much of a model's weights tells it from others
Find = Callable[[str | None], Path]  # a model's name (None: the default model) -> its folder


@dataclass(frozen=True)
class ModelOptions(Options):
    """The weights, their dtype and device, and the limits of memory."""

    model: str | None = place("folder, GGUF file or hub name (default: SmolLM2-135M)")
    chat_format: str | None = option(None, "chat layout, where the tokenizer does not tell it")
    chat_date: str = option(LLAMA31_DATE, "what Llama 3.1's system prompt calls today")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "auto: the quickest")
    max_length: int = option(0, "longest prompt with its reply, in tokens; 0: the model's")
    device: str = option("auto", "cpu, cuda, ...; auto: a GPU when there is one")
    kv_memory: float = option(0.0, "GB for shared prompts; 0: fits the device", low=0, high=1e6)
    in_flight: int = option(32, "most requests that wait for a server at a time", low=1)

    def facts(self) -> dict[str, Any]:
        """Return the options that decide results."""
        return {k: x for k, x in asdict(self).items() if k not in ("kv_memory", "in_flight")}

    def place(self) -> str:
        """Return the path of the weights; "none" for the default model's, a hub's, missing ones."""
        return self.model if self.model and Path(self.model).exists() else "none"


def pick_device(name: str) -> torch.device:
    """Return the device of this name; auto is the process's own GPU when there is one."""
    if name == "auto":
        count = torch.cuda.device_count()
        if parallel.local_rank() >= count > 0:
            raise UserError(f"more processes than GPUs ({count}): start fewer, or add --device cpu")
        return torch.device("cuda" if count else "cpu")
    try:
        found = torch.zeros(1, device=name)
        found.item()  # the device "meta" holds no numbers
        return found.device
    except (RuntimeError, AssertionError, ImportError) as error:  # or not built into this torch
        raise UserError(f"--device {name}: no such device here") from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; auto is bfloat16 where it is quicker than float32."""
    if name == "auto":
        on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else on_cpu
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def load_engine(options: ModelOptions, find: Find, sharded: bool = False) -> Engine:
    """Return the engine of a model: base weights, tokenizer and memory for keys and values.

    One process per machine finds the folder first, since finding may download or convert.
    """
    device = pick_device(options.device)
    folder = parallel.one_then_all(lambda: find(options.model))
    tokenizer = ChatTokenizer.from_folder(folder, options.chat_format, options.chat_date)
    model = load_model(folder, pick_dtype(options.dtype, device), device, sharded)
    accelerate(model)
    give_back_memory()  # the weights that were laid out anew
    kv_bytes = int(options.kv_memory * 10**9) or default_kv_bytes(model)
    return Engine(model, tokenizer, kv_bytes, options.max_length)


def is_adapter(name: str) -> bool:
    """Return whether a path is an adapter's folder, if only by one of its two files."""
    return any((Path(name) / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE))


@dataclass
class Models:
    """The language models of a run, each loaded when a side first needs it."""

    options: ModelOptions
    find: Find
    answers: Path  # the file of the servers' answers
    sharded: bool = False
    # engines by model, "none" for the base, and endpoints by URL
    engines: dict[str, Any] = field(default_factory=dict)

    def engine(self, name: str) -> Engine:
        """Return the engine of a model, "none" for the base."""
        if name not in self.engines:
            o: Any = {} if name == "none" else {"model": name, "chat_format": None}
            self.engines[name] = load_engine(replace(self.options, **o), self.find, self.sharded)
        return self.engines[name]

    def side(self, name: str, role: str) -> Side:
        """Return the side that a name stands for.

        URL#MODEL is a server's model. An adapter is loaded into the base, as `role`, at its first
        use. "none" is the base alone, and any other name a separate model.
        """
        if is_server(name):
            url, model = split_address(name)
            if self.sharded:  # every process computes every chunk
                raise UserError(f"--shard: each process would ask {url} the same; leave it out")
            if url not in self.engines:
                self.engines[url] = Endpoint(url, self.answers, self.options.in_flight)
            return Side(self.engines[url], model)
        if name == "none" or not is_adapter(name):
            return Side(self.engine(name))
        engine = self.engine("none")
        if not adapter_parameters(engine.model, role):
            load_adapter(engine.model, Path(name), role)
            engine.clear_cache()
        return Side(engine, role)


def weights_digest(name: str, find: Find) -> str:
    """Return a digest, 16 hexadecimal digits, that identifies an adapter or a model in results.

    An adapter, a model's settings and its tokenizer are hashed whole, of a model's weights a PIECE
    in every STRIDE, of a server its URL and the model's name, of "none" nothing.
    """
    if is_server(name):
        return hashlib.blake2b(repr(split_address(name)).encode(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(digest_size=8)
    if own := is_adapter(name):
        file_in(Path(name), WEIGHTS_FILE)  # raises UserError if it is missing
    folder = Path(name) if own or name == "none" else parallel.one_then_all(lambda: find(name))
    files = ("*config.json", "tokenizer.*", "*.safetensors")
    for path in sorted(x for y in files for x in folder.glob(y)):
        step = STRIDE if path.suffix == ".safetensors" and not own else PIECE
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, step):
                digest.update(b"%d" % file.seek(start) + file.read(PIECE))
    return digest.hexdigest()


def usage_of(engines: Collection[Any]) -> Usage:
    """Return the sum of several engines' usage."""
    return Usage(*(sum(getattr(x.usage, item.name) for x in engines) for item in fields(Usage)))


def costs(spent: Mapping[str, int]) -> str:
    """Return the counts of `Usage.since` as one line of text."""
    prompts = "{calls} calls, prompt tokens {reused_tokens} reused and {computed_tokens} computed"
    return (prompts + ", {decoded_tokens} tokens decoded").format(**spent)


def shortened_lines(engines: Collection[Any]) -> list[str]:
    """Return one notice per engine that shortened prompts."""
    told = "{} prompts were too long for {} tokens and lost their oldest turns or words"
    return [told.format(x.usage.shortened, x.max_length) for x in engines if x.usage.shortened]


def pick_rows(examples: Examples, count: int, seed: int, apart: bool = False) -> list[Example]:
    """Return `count` examples (0: all), the first by a seeded hash of their ids.

    So the choice of an example does not depend on the contents of others. `apart` takes at most one
    example per dialogue, and each dialogue is as likely, however many examples it has.
    """
    order = sorted(examples, key=lambda x: seed_for(seed, "pick", x.dialog_id, x.turn_id))
    if apart:
        firsts = {x.dialog_id: x for x in reversed(order)}.values()
        order = sorted(firsts, key=lambda x: seed_for(seed, "pick", x.dialog_id))
    return order[:count] if count else order


def give_back_memory() -> None:
    """Return freed memory that glibc keeps to the system: over 1 GB after training."""
    with suppress(OSError, AttributeError, TypeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
