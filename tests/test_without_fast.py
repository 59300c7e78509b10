"""Without fast/ and the line that calls it, results are the same: greedy ids, choices, in fp32."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import write_small_model

import usbrec

PACKAGE = Path(usbrec.__file__).parent
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from usbrec.chat import Message, Request, Sampling
from usbrec.llm.lora import LoraConfig, adapter_parameters, add_adapter
from usbrec.loading import ModelOptions, load_engine

torch.set_num_threads(1)
options = ModelOptions(model=sys.argv[1], dtype="float32", device="cpu")
engine = load_engine(options, find=Path)
add_adapter(engine.model, "one", LoraConfig(r=4), seed=0)
for parameter in adapter_parameters(engine.model, "one").values():
    parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
texts = ["A film, please.", "Something tense from the nineties, not too long?", "A film, or two"]
asked = [
    Request((Message("user", text),), Sampling(24, temperature=0), adapter=adapter)
    for text in texts for adapter in (None, "one")
]
print(json.dumps({
    "quick": "usbrec.llm.fast" in sys.modules,
    "ids": [reply.token_ids for reply in engine.generate(asked)],
    "choices": engine.choice_logprobs(asked, ["0", "1", "2"]),
}))
"""


def answers(folder: Path, model: Path) -> dict[str, Any]:
    """Return the greedy replies and choices of the package in `folder`, in its own process."""
    command = [sys.executable, "-c", SCRIPT, str(model)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_program_without_the_fast_operations_gives_the_same_results(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    copy = tmp_path / "usbrec"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("fast", "__pycache__"))
    loading = copy / "loading.py"
    lines = loading.read_text("utf-8").splitlines()
    kept = [line for line in lines if "accelerate" not in line]
    assert len(lines) - len(kept) == 2  # the import and the call
    loading.write_text("\n".join(kept) + "\n", "utf-8")
    quick, plain = answers(PACKAGE.parent, model), answers(tmp_path, model)
    assert quick["quick"] and not plain["quick"]
    assert quick["ids"] == plain["ids"] and all(len(ids) > 4 for ids in plain["ids"])
    for ours, theirs in zip(quick["choices"], plain["choices"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
