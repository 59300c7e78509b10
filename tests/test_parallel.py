"""Several processes do what one does: training, chunks of dialogues, faults, sharded weights."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import STAGE_FLAGS, bytes_of, flags, write_small_data, write_small_model
from test_training import QUICK, pairs, rows
from torch.distributed import TCPStore

from usbrec.llm.checkpoint import load_model
from usbrec.llm.lora import LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.loss import Simpo
from usbrec.llm.training import TrainingJob, train
from usbrec.runs import read_rows

ROOT = Path(__file__).parents[1]
GUARD = 600  # seconds: only against a test that hangs
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SUMMED = {  # what sums over two processes, in another order than one does, have made
    "rl/adapter_model.safetensors", "rl/training/metrics.jsonl", "rl/training/state.safetensors",
}  # fmt: skip

FAULTY = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train
from usbrec.options import UserError

whole, calls = train.build_pairs, []

def build_pairs(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        exec(sys.argv[2])
    return whole(*arguments)

train.build_pairs = build_pairs
sys.exit(train.main(sys.argv[3:]))
"""

SHARDED = """
import sys
from pathlib import Path

sys.path[:0] = sys.argv[1:3]
import torch
from dataclasses import replace
import test_training as t
from usbrec import parallel
from usbrec.llm.checkpoint import load_model
from usbrec.llm.training import TrainingJob

model_folder, folder = Path(sys.argv[3]), Path(sys.argv[4])

def job():
    torch.set_num_threads(1)
    model = load_model(model_folder, sharded=True)
    held = sum(p.to_local().nbytes for p in model.model.layers.parameters())
    t.add_adapter(model, "one", t.LoraConfig(r=2), seed=1)
    options = replace(t.QUICK, checkpointing=sys.argv[5] == "True")
    job_of_one = TrainingJob(options, t.Simpo(), folder / "run", "simpo", t.pairs(3, 9))
    t.train(model, "one", t.pairs(), job_of_one)
    assert held == sum(
        p.to_local().nbytes for n, p in model.model.layers.named_parameters() if "lora" not in n
    )
    torch.save((held, t.weights(model)), folder / f"result{parallel.rank()}")

sys.exit(parallel.run_together("sharded", job))
"""


def two_processes(command: list[str]) -> tuple[list[int], list[str]]:
    """Run a command as torchrun would in two processes; return exit codes and error texts.

    The test holds the meeting place, as torchrun does: it outlives either process.
    """
    place = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(place.port), "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**ONE_THREAD, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [child.communicate(timeout=GUARD)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], errors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The small model and dataset as flags; a chunk is one dialogue, so that there are rounds."""
    place = tmp_path_factory.mktemp("inputs")
    named = {"--model": write_small_model(place / "model"), "--dtype": "float32"}
    named |= {"--data": write_small_data(place / "data"), "--device": "cpu"}
    return flags({**named, **STAGE_FLAGS, "--chunk-size": 1})


@pytest.fixture(scope="module")
def alone(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--run-dir", str(folder), *inputs]
    subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True, timeout=GUARD)
    return folder


@pytest.fixture
def half_done(alone: Path, tmp_path: Path) -> Path:
    """A run whose next stage is pairs."""
    run = tmp_path / "run"
    for stage in ("simulator", "sft"):
        shutil.copytree(alone / stage, run / stage)
    shutil.copytree(alone / "options", run / "options")
    return run


def rounded(value: Any) -> Any:
    """Return the content of rows with short numbers, and without the checksums of their lines."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items() if name != "check"}
    if isinstance(value, list):
        return list(map(rounded, value))
    return round(value, 5) if isinstance(value, float) else value


def check_same(run: Path, alone: Path, sharded: bool = False) -> None:
    """All bytes are one process's, but for what is summed over processes: to rounding.

    With sharded weights a token is decoded without the quicker kernels, and what the judge has
    decoded is read again in its question.
    """
    found, expected = bytes_of(run), bytes_of(alone)
    assert found.keys() == expected.keys() and expected.keys() > SUMMED
    for name in expected.keys() - SUMMED:
        same = found[name] == expected[name]
        assert same or (sharded and name == "rows.jsonl"), name
    assert rounded(read_rows(run / "rows.jsonl")) == rounded(read_rows(alone / "rows.jsonl"))
    lines = zip(
        read_rows(run / "rl" / "training" / "metrics.jsonl"),
        read_rows(alone / "rl" / "training" / "metrics.jsonl"),
        strict=True,
    )
    for got, wanted in lines:
        assert got == pytest.approx(wanted, abs=1e-5)
    adapters = [load_file(f / "rl" / "adapter_model.safetensors") for f in (run, alone)]
    torch.testing.assert_close(*adapters, atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [[], ["--shard"]])
def test_torchrun_goes_through_all_stages_as_one_process_does(
    inputs: list[str], alone: Path, tmp_path: Path, extra: list[str]
) -> None:
    """Two processes, each with all weights and chunks of its own, or with half of the weights."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(ROOT / "train.py"), *inputs, *extra]
    made = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        env=ONE_THREAD, capture_output=True, text=True, timeout=GUARD,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    check_same(tmp_path / "run", alone, sharded=bool(extra))
    assert made.stdout.count(" is ready: ") == 1
    assert made.stderr.count("report: 100%") <= 2 and "report:" in made.stderr


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ("raise UserError('the fourth row is wrong')", 2, "train.py: the fourth row is wrong"),
        (
            "raise KeyboardInterrupt",
            130,
            "train.py: stopped; the same command resumes what is kept",
        ),
    ],
)
def test_a_fault_in_one_process_ends_both_with_one_sentence(
    inputs: list[str], half_done: Path, fault: str, code: int, told: str
) -> None:
    command = ["-c", FAULTY, str(ROOT), fault, "--run-dir", str(half_done), *inputs]
    codes, errors = two_processes([*command, "--stages", "pairs"])
    assert codes == [code, code], errors
    assert "".join(errors).count("train.py: ") == 1
    assert errors[1].strip() == told
    assert "Traceback" not in "".join(errors)
    assert len(read_rows(half_done / "samples.jsonl")) == 2


def test_a_wrong_flag_is_said_once(tmp_path: Path) -> None:
    codes, errors = two_processes([str(ROOT / "train.py"), "--no-such-flag"])
    assert codes == [2, 2]
    assert "".join(errors).count("train.py: unrecognized arguments: --no-such-flag") == 1


OUTPUT = "import sys; from usbrec.parallel import run_together as run; sys.exit(run('p', {}))"


@pytest.mark.parametrize(
    ("job", "encoding", "code", "told"),
    [
        ("lambda: print('Amélie \\u2028')", "ascii", 0, ""),
        ("lambda: open('x' * 300)", "utf-8", 2, "p: [Errno 36] File name too long: 'xx"),
        ("lambda: print(input())", "ascii", 0, ""),
        ("lambda: __import__('torch').empty(10**15)", "utf-8", 2, "p: out of memory: lower --kv-"),
    ],
)
def test_streams_and_the_system_end_in_no_traceback(
    job: str, encoding: str, code: int, told: str
) -> None:
    env = {**ONE_THREAD, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OUTPUT.format(job)]
    ended = subprocess.run(command, env=env, capture_output=True, input=b"caf\xe9\n")
    assert ended.returncode == code
    assert ended.stderr.decode().startswith(told) and ended.stderr.count(b"\n") == bool(told)


def test_without_an_error_output_the_work_is_done_and_a_full_one_is_no_traceback(
    tmp_path: Path,
) -> None:
    """A file that takes the number of the closed stream must not get its messages."""
    job = f"[open({str(tmp_path / 'f')!r}, 'w').write('x'), print('told', file=sys.stderr)]"
    words = [sys.executable, "-c", OUTPUT.format(f"lambda: {job}")]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    for shape, code in (('"$@" 2>&-', 0), ('"$@" >&- 2>&-', 0), ('"$@" 2> /dev/full', 2)):
        ended = subprocess.run(["bash", "-c", shape, "bash", *words], env=env)
        assert ended.returncode == code
        assert (tmp_path / "f").read_text() == "x"


@pytest.mark.parametrize(("closed", "code"), [(False, 2), (True, 141)])
def test_an_output_that_is_full_or_closed_is_one_sentence(closed: bool, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", OUTPUT.format("lambda: print('x')")]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=env, stdout=writer if closed else full, stderr=subprocess.PIPE
    )
    assert ended.returncode == code
    assert ended.stderr.startswith(b"p: ") and ended.stderr.count(b"\n") == 1


def test_a_killed_process_costs_one_round_and_the_run_goes_on(
    inputs: list[str], alone: Path, half_done: Path
) -> None:
    fault = "os.kill(os.getpid(), signal.SIGKILL)"
    arguments = ["--run-dir", str(half_done), *inputs]
    codes, _ = two_processes(["-c", FAULTY, str(ROOT), fault, *arguments])
    assert codes[1] == -9 and codes[0] > 0
    assert len(read_rows(half_done / "samples.jsonl")) == 2
    assert two_processes([str(ROOT / "train.py"), *arguments])[0] == [0, 0]
    check_same(half_done, alone)


def test_shard_without_torchrun_is_refused() -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--shard"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=GUARD)
    assert ended.returncode == 2
    assert "torchrun --nproc-per-node" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_weights_give_the_curve_and_the_adapter_of_whole_ones(
    tmp_path: Path, checkpointing: bool
) -> None:
    """Each process holds half of the layers, before training and after it.

    Among the steps and validations are some whose passes two processes cannot share evenly.
    """
    folder = write_small_model(tmp_path / "model")
    arguments = [str(ROOT), str(ROOT / "tests"), str(folder), str(tmp_path), str(checkpointing)]
    codes, errors = two_processes(["-c", SHARDED, *arguments])
    assert codes == [0, 0], errors
    model = load_model(folder)
    whole = sum(p.nbytes for p in model.model.layers.parameters())
    add_adapter(model, "one", LoraConfig(r=2), seed=1)
    job = TrainingJob(QUICK, Simpo(), tmp_path / "alone", "simpo", pairs(3, 9))
    train(model, "one", pairs(), job)
    both, alone = rows(tmp_path / "run"), rows(tmp_path / "alone")
    for got, expected in zip(both, alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for rank in range(2):
        held, adapter = torch.load(tmp_path / f"result{rank}")
        assert held == whole / 2
        torch.testing.assert_close(
            adapter, dict(adapter_parameters(model, "one")), atol=1e-5, rtol=0
        )
