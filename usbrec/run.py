"""A run folder, and the language model behind it: what train.py and infer.py have in common.

runs/sample/
    options.json     each stage's options, as they decided what it made
    simulator/ sft/ rl/    adapters under peft's file names; training/ inside holds the state
    samples.jsonl    what PODCS tried, a line an example      pairs.jsonl    the pairs
    rows.jsonl       the evaluation, a line a dialogue        report.json, report.txt
    metrics.jsonl    the training stages' metrics             timings.jsonl  times, memory, tokens
"""

import ctypes
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from usbrec import parallel
from usbrec.crs.dialogue import Example
from usbrec.llm.adapter_files import load_adapter
from usbrec.llm.checkpoint import load_model
from usbrec.llm.default_model import ensure_default_model
from usbrec.llm.engine import Engine
from usbrec.llm.files import read_json
from usbrec.llm.hub import find_model
from usbrec.llm.tokenizer import LLAMA31_DATE, ChatTokenizer
from usbrec.llm.training import peak_memory
from usbrec.options import UserError, option, seed_for
from usbrec.runs import append_rows, write_json

RUNS = Path(__file__).resolve().parents[1] / "runs"
ADAPTERS = {"rl": "simpo", "sft": "sft", "simulator": "simulator"}  # each with its stage


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, and what they compute in."""

    model: str | None = option(None, "folder, GGUF file or hub name (default: SmolLM2-135M)")
    chat_format: str | None = option(None, "chat layout, where the tokenizer does not tell it")
    chat_date: str = option(LLAMA31_DATE, "what Llama 3.1's system prompt calls today")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "auto: bfloat16 where the processor has it"
    )
    max_length: int = option(
        0, "tokens of a prompt and its reply; longer ones lose their oldest turns; 0: the model's"
    )
    device: str = option("auto", "cpu, cuda, ...; auto: a GPU when there is one")
    quantise: Literal["none", "int8", "int4"] = option(
        "none", "round the base weights: quicker replies one at a time on the CPU, no training"
    )
    order_weights: bool = option(
        True, "keep the base weights once more in the CPU's own order: quicker, twice the memory"
    )


def pick_device(name: str) -> torch.device:
    """Return the device of this name; auto is the process's own GPU when there is one."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # unknown, or not built into this torch
            raise UserError(f"--device {name}: no such device here") from error
        return device
    count = torch.cuda.device_count()
    if parallel.local_rank() >= count > 0:
        raise UserError(
            f"there are more processes than this machine's {count} GPUs: start one for each GPU, "
            "or add --device cpu"
        )
    return torch.device("cuda" if count else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; auto is bfloat16 where it is quicker than float32."""
    if name != "auto":
        named: torch.dtype = getattr(torch, name)
        return named
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_engine(options: ModelOptions, sharded: bool = False) -> Engine:
    """Load the base weights and their tokenizer; what has to be fetched is fetched once."""
    device = pick_device(options.device)
    name = options.model
    path = parallel.one_then_all(ensure_default_model if name is None else lambda: find_model(name))
    model = load_model(path, pick_dtype(options.dtype, device), device, sharded)
    if options.quantise != "none":
        model.quantise_weights(options.quantise)
    tokenizer = ChatTokenizer.from_folder(path, options.chat_format, options.chat_date)
    if options.order_weights:
        model.order_weights()
    return Engine(model, tokenizer, max_length=options.max_length)


def shortened_line(engine: Engine) -> str:
    """Return how many prompts lost their oldest turns, as a line for people; "" if none did."""
    count, limit = engine.usage.shortened, engine.max_length
    told = f"{count} prompts were too long for {limit} tokens and lost their oldest turns"
    return told if count else ""


def pick_rows(
    examples: Sequence[Example], count: int, seed: int, one_a_dialogue: bool = False
) -> list[Example]:
    """Return `count` examples (0: all), drawn by a hash that no other example bears on."""
    order = sorted(examples, key=lambda x: seed_for(seed, "pick", x.dialog_id, x.turn_id))
    if one_a_dialogue:
        order = list({x.dialog_id: x for x in reversed(order)}.values())[::-1]
    return order[:count] if count else order


class Run:
    """A run folder in use: which stages it has finished, and with which options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes = folder / "options.json"
        self.stages = read_json(self.notes) if self.notes.exists() else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the folder; a kill opens it again."""
        if parallel.rank() > 0:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            place = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.folder} is in use by another train.py: wait for it, or give --run-dir"
            ) from error
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            os.close(place)

    def claim(self, stage: str, options: Mapping[str, Any], made: Sequence[str]) -> None:
        """Note that `stage` runs with these options; refuse if it made anything with others."""
        wanted = json.loads(json.dumps(options))
        found = self.stages.get(stage)
        if found is not None and found != wanted and any((self.folder / m).exists() for m in made):
            name, old, new = first_difference(found, wanted)
            raise UserError(
                f"{self.folder}: stage {stage} was made with {name} {old!r}, got {new!r}; "
                "add --fresh to start it over, or give another --run-dir"
            )
        self.stages[stage] = wanted
        write_json(self.notes, self.stages)

    def discard(self, stage: str, made: Sequence[str]) -> None:
        """Delete what a stage made."""
        for name in made:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.stages.pop(stage, None)

    def need(self, name: str, stage: str) -> Path:
        """Return a file that an earlier stage must have left."""
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{path} is missing: run the stage {stage} first (--stages {stage})")
        return path

    @contextmanager
    def timed(self, stage: str, engine: Engine, verbose: bool) -> Iterator[None]:
        """Append a stage's seconds, peak memory and generated tokens to timings.jsonl."""
        start, before = time.perf_counter(), replace(engine.usage)
        yield
        if parallel.rank() > 0:
            return
        spent = engine.usage.since(before)
        if verbose:
            print(f"{stage}: {costs(spent)}", file=sys.stderr)
        row = {
            "stage": stage,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_memory_bytes": peak_memory(engine.model.device),
            **spent,
        }
        append_rows(self.folder / "timings.jsonl", [row])

    def load_adapters(self, engine: Engine, names: Sequence[str]) -> None:
        """Put the run's adapters of these names beside the base weights."""
        for name in names:
            load_adapter(engine.model, self.need(name, name), name)
        engine.forget()


def costs(spent: Mapping[str, int]) -> str:
    """Return the engine's figures as one line of text."""
    return (
        f"{spent['calls']} calls, prompt tokens {spent['reused_tokens']} reused and "
        f"{spent['computed_tokens']} computed, {spent['decoded_tokens']} tokens decoded"
    )


def give_back_memory() -> None:
    """Return to the system what has been freed and glibc keeps: over 1 GB after training."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def first_difference(found: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any]:
    """Return where two nested option dicts first differ, and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                inner = f"{name}-{key}".strip("-").replace("_", "-")
                return first_difference(found.get(key), wanted.get(key), inner)
    return name, found, wanted


def finished_adapters(folder: Path) -> list[str]:
    """Return the adapters that a run has, the best recommender first."""
    return [name for name in ADAPTERS if (folder / name / "adapter_model.safetensors").exists()]


def newest_run(runs: Path) -> Path:
    """Return the run folder that was written to last and holds an adapter."""
    ready = [notes for notes in runs.glob("*/options.json") if finished_adapters(notes.parent)]
    if not ready:
        raise UserError(
            f"there is no finished run in {runs}: make one with `python train.py`, "
            "or go round it with --model and --adapter"
        )
    return max(ready, key=lambda notes: notes.stat().st_mtime).parent


def read_run(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return a run's adapters by role, the best recommender it has, and what they were made with.

    Raises UserError where it has none yet, or its options.json is not train.py's.
    """
    there = finished_adapters(folder)
    if not there:
        raise UserError(f"{folder} has no finished adapter: go on with `python train.py`")
    roles = {"simulator" if x == "simulator" else "recommender": x for x in reversed(there)}
    run = Run(folder)
    try:
        made_with = run.stages[ADAPTERS[there[0]]]
        ModelOptions(**made_with["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.notes} is not as train.py writes it") from error
    return {role: folder / name for role, name in roles.items()}, made_with


def as_json(**groups: Any) -> dict[str, Any]:
    """Return option dataclasses as nested dicts."""
    return {name: asdict(group) for name, group in groups.items()}
