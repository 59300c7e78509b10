"""Claim: train.py killed at any moment and started again ends with the same bytes.

    python benchmarks/kill.py [--kills 20] [--model default]

A handful of rows through all five stages, once left alone and then killed (SIGKILL) at a random
moment of each stage, started anew with the same command each time; when a run has finished, another
begins until all kills are spent. Every file is compared, `timings.jsonl` alone left out. The model
is a small random one; `--model default` takes the real default model.
"""

import argparse
import collections
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small_run import STAGE_FLAGS, bytes_of, flags, write_small_data, write_small_model  # noqa: E402

OFTEN = {"--save-every": 1, "--batch-size": 1, "--epochs": 4}
ENDS = (  # what stands in a run folder when a stage is over
    ("simulator", "simulator/adapter_model.safetensors"),
    ("sft", "sft/adapter_model.safetensors"),
    ("pairs", "pairs.jsonl"),
    ("simpo", "rl/adapter_model.safetensors"),
    ("report", "report.json"),
)
STAGES = (*(stage for stage, _ in ENDS), "finished")


def command_for(work: Path, model: str) -> list[str]:
    """Return train.py's command line without its run folder."""
    base = [sys.executable, "-u", str(ROOT / "train.py")]
    if model != "default":
        base += ["--model", str(write_small_model(work / "model"))]
    data = write_small_data(work / "data")
    return [*base, "--data", str(data), *flags(STAGE_FLAGS | OFTEN), "--run-dir"]


def stage_of(folder: Path) -> str:
    """Return the stage that a run folder is in."""
    return next((stage for stage, end in ENDS if not (folder / end).exists()), STAGES[-1])


def run(command: list[str], folder: Path) -> None:
    """Run until the end."""
    log = folder.with_suffix(".log")
    with log.open("ab") as out:
        code = subprocess.run([*command, str(folder)], stdout=out, stderr=out).returncode
    if code:
        raise SystemExit(f"train.py ended with {code}:\n{log.read_text()[-3000:]}")


def run_and_kill(command: list[str], folder: Path, stage: str, seconds: float) -> str | None:
    """Kill the run `seconds` after `stage` began or went on; None if it had ended before.

    Returns the stage that was under way.
    """
    before = begun(folder)
    with folder.with_suffix(".log").open("ab") as out:
        child = subprocess.Popen([*command, str(folder)], stdout=out, stderr=out)
        while child.poll() is None and (
            begun(folder) == before or STAGES.index(stage_of(folder)) < STAGES.index(stage)
        ):
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        met = stage_of(folder) if child.poll() is None else None
        child.kill()
        child.wait()
    return met


def begun(folder: Path) -> int:
    """Return a number that changes when train.py has read its options and begins to work."""
    log = folder.with_suffix(".log")
    return log.stat().st_size if log.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """Return the files that differ between two run folders."""
    first, second = bytes_of(one), bytes_of(other)
    return sorted(name for name in first | second if first.get(name) != second.get(name))


def kill_test(work: Path, kills: int, seed: int, model: str = "small") -> dict[str, object]:
    """Return how many kills fell in which stage, and which files differed in the end."""
    command = command_for(work, model)
    run(command, work / "whole")
    lines = (work / "whole" / "timings.jsonl").read_text().splitlines()
    seconds = {row["stage"]: row["seconds"] for row in map(json.loads, lines)}
    draw = random.Random(seed)
    met: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    runs = 0
    while met.total() < kills:
        runs += 1
        folder = work / f"killed{runs}"
        for stage in STAGES[:-1]:
            if met.total() < kills:
                where = run_and_kill(command, folder, stage, seconds[stage] * draw.random())
                met.update([where] if where else [])
        run(command, folder)
        wrong += [f"{folder.name}/{name}" for name in differences(work / "whole", folder)]
    return {"kills": met.total(), "stages": dict(met), "runs": runs, "different": wrong}


def main() -> None:
    """Print one line of JSON; exit 1 when bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=("small", "default"), default="small")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = kill_test(Path(work), arguments.kills, arguments.seed, arguments.model)
    print(json.dumps({"claim": "the same bytes after kills", **result}))
    sys.exit(bool(result["different"]))


if __name__ == "__main__":
    main()
