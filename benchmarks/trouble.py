"""Claim: whatever stops train.py and infer.py, they end in one sentence, and nothing is lost.

    python benchmarks/trouble.py [--kills 20] [--only full read-only ...]

A handful of rows, not all of them ASCII, through all five stages of train.py, and through infer.py
into a results file; the model is a small random one. First both run undisturbed. Then each runs
into a trouble, which is taken away, and the same command runs again:

    kill         SIGKILL at a random moment of each stage, until all --kills are spent
    stop         Ctrl-C in the same way
    full         a disk that has a tenth, two tenths ... of the room that the results need
    read-only    a disk that cannot be written, empty or with the results of half of the work
    closed       no standard output, no error output, neither, a reader that leaves, /dev/full
    twice        the same command twice at the same time
    homeless     no HOME, one that does not exist, one that cannot be written
    locale       the C locale, and terminals that know ASCII alone

A row of the table tells how often each exit code came, and what was said last. `same` counts the
runs that ended with the bytes of the undisturbed run, `timings.jsonl` left out. A traceback, a
sentence of several lines or another byte is a fault, and exit code 1. The disks need Linux's mount
namespaces (`unshare`); where they are forbidden those rows say so.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small_run import STAGE_FLAGS, bytes_of, flags, write_small_data, write_small_model  # noqa: E402

from usbrec import settings  # noqa: E402

OFTEN = {"--save-every": 1, "--batch-size": 1, "--epochs": 2, "--dtype": "float32"}
# what stands in a run folder when a stage is over
ENDS = [(stage, made["makes"][0]) for stage, made in settings.STAGES.items()]
STAGES = (*(stage for stage, _ in ENDS), "finished")
WORD = "née 東京"  # in each line of the test dialogues
SPACE = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-r", "-m"]
# a disk of its own, in a namespace of its own: what $KEPT holds is copied to $DISK, which
# $NARROW makes full or read-only; the command runs, $WIDEN mends the disk, the command runs again
DISK = r"""
mount -t tmpfs -o size=1g none "$DISK" && cp -a "$KEPT/." "$DISK" && eval "$NARROW" || exit 99
"$@" > "$LOG.out" 2> "$LOG.err"; echo $? > "$LOG.code"
eval "$WIDEN" || exit 98
"$@" >> "$LOG.out" 2> "$LOG.again"; code=$?
cp -a "$DISK/." "$COPY"
exit $code
"""


class NoDiskError(Exception):
    """The system lets nobody mount a disk here."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, the path at the end of its words that it writes, and the undisturbed result."""

    name: str
    command: tuple[str, ...]
    result: str
    whole: Path

    def words(self, folder: Path) -> list[str]:
        """Return the command line that writes its result below `folder`."""
        return [*self.command, str(folder / self.result)]

    def same(self, folder: Path) -> bool:
        """Return whether a folder holds the bytes of the undisturbed run, and nothing else."""
        return bytes_of(folder) == bytes_of(self.whole)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a disturbed run ended, what it said last, and the bytes after the next run."""

    code: int
    told: str
    same: bool

    @property
    def wrong(self) -> bool:
        """A traceback, more than a sentence, an unknown exit code, or other bytes."""
        known = self.code in (0, 2, 130, 141, -signal.SIGINT, -signal.SIGKILL)
        return not (known and self.same) or "Traceback" in self.told or "\n" in self.told


def last_words(errors: str) -> str:
    """Return what a command said on its error output after its bars: its last lines."""
    bare = [line.split("\r")[-1].strip() for line in errors.splitlines()]
    if "Traceback" in errors:
        return errors[errors.index("Traceback") :]
    said = [x for x in bare if x.startswith(("train.py: ", "infer.py: "))]
    return "\n".join(said)


def once(words: list[str], **options: object) -> tuple[int, str]:
    """Run to the end; return the exit code and the last words."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    ended = subprocess.run(words, **streams)
    return ended.returncode, last_words(ended.stderr.decode("utf-8", "replace"))


def ended(job: Job, folder: Path, code: int, told: str, again: tuple[int, str]) -> Ended:
    """Return how a disturbed run and the next one, `again`, ended in this folder."""
    later = f"\nand then: {again[1]}" if again[0] else ""
    return Ended(code, told + later, job.same(folder))


def mended(job: Job, folder: Path, code: int, told: str) -> Ended:
    """Run the same command undisturbed, and compare what stands there then."""
    return ended(job, folder, code, told, once(job.words(folder)))


# --- the troubles ---


def stage_of(folder: Path) -> str:
    """Return the stage that a run folder is in."""
    return next((stage for stage, end in ENDS if not (folder / end).exists()), STAGES[-1])


def struck(job: Job, folder: Path, stage: str, seconds: float, by: int) -> tuple[str, int, str]:
    """Send the signal `by`, `seconds` after `stage` began or went on.

    Returns the stage that was under way ("finished": the run had ended), exit code and last words.
    """
    run, log = folder / job.result, folder.with_suffix(".log")
    with log.open("w+b") as out:
        child = subprocess.Popen(job.words(folder), stdout=subprocess.DEVNULL, stderr=out)
        while child.poll() is None and (
            not log.stat().st_size or STAGES.index(stage_of(run)) < STAGES.index(stage)
        ):
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        met = stage_of(run) if child.poll() is None else STAGES[-1]
        child.send_signal(by)
        code = child.wait()
    return met, code, last_words(log.read_text("utf-8", "replace"))


def signals(job: Job, work: Path, by: int, times: int) -> Iterator[Ended]:
    """Strike in one stage after another; a run that is through is compared, another begins."""
    draw = random.Random(by)
    work.mkdir()
    if job.name == "infer.py":  # it has no stages: at any moment, its start included
        begun = time.monotonic()
        once(job.words(work / "timed"))
        seconds = time.monotonic() - begun
        for k in range(max(1, times // 5)):
            child = subprocess.Popen(
                job.words(work / str(k)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds * draw.random())
            child.send_signal(by)
            told = last_words(child.communicate()[1].decode("utf-8", "replace"))
            yield mended(job, work / str(k), child.returncode, told)
        return
    lines = (job.whole / job.result / "timings.jsonl").read_text().splitlines()
    seconds_of = {row["stage"]: row["seconds"] for row in map(json.loads, lines)}
    left, run = times, 0
    while left:
        run += 1
        met = []
        for stage in STAGES[:-1]:
            if left > len(met):
                after = seconds_of[stage] * draw.random()
                where, code, told = struck(job, work / str(run), stage, after, by)
                met += [(code, told)] if where != STAGES[-1] else []
        left -= len(met)
        end = mended(job, work / str(run), 0, "")
        yield from (Ended(code, told + end.told, end.same) for code, told in met)


def on_disk(job: Job, work: Path, kept: Path, narrow: str, widen: str) -> Ended:
    """Run on a disk that holds what `kept` holds, `narrow`ed and then `widen`ed by a command."""
    disk, copy, log = (work / name for name in ("disk", "copy", "log"))
    for folder in (disk, copy):
        folder.mkdir(parents=True)
    paths = {"DISK": disk, "COPY": copy, "KEPT": kept, "LOG": log}
    env = {**os.environ, **{k: str(v) for k, v in paths.items()}, "NARROW": narrow, "WIDEN": widen}
    made = subprocess.run([*SPACE, "bash", "-c", DISK, "bash", *job.words(disk)], env=env)
    if made.returncode in (98, 99):
        raise NoDiskError("no disk can be mounted here")
    code = int(Path(f"{log}.code").read_text("utf-8"))
    errors, again = (Path(f"{log}.{x}").read_text("utf-8", "replace") for x in ("err", "again"))
    return ended(job, copy, code, last_words(errors), (made.returncode, last_words(again)))


def full(job: Job, work: Path) -> Iterator[Ended]:
    """Disks with 0 to 9 tenths of the room."""
    need = sum(len(content) + 4096 for content in bytes_of(job.whole).values())
    (work / "nothing").mkdir(parents=True)
    for tenths in range(10):
        room = max(4096, need * tenths // 10)
        narrow = f'mount -o remount,size={room} "$DISK"'
        widen = 'mount -o remount,size=1g "$DISK"'
        yield on_disk(job, work / str(tenths), work / "nothing", narrow, widen)


def read_only(job: Job, work: Path) -> Iterator[Ended]:
    """Disks that cannot be written: empty, half of the work done, all done."""
    (work / "nothing").mkdir(parents=True)
    half = work / "half"
    shutil.copytree(job.whole, half)
    if (half / job.result).is_dir():
        for name in ("rl", "report.json", "report.txt", "report.html", "rows.jsonl"):
            target = half / job.result / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    else:
        lines = (half / job.result).read_bytes().splitlines(keepends=True)
        (half / job.result).write_bytes(b"".join(lines[: len(lines) // 2]))
    for k, kept in enumerate((work / "nothing", half, job.whole)):
        narrow, widen = (f'mount -o remount,{x} "$DISK"' for x in ("ro", "rw"))
        yield on_disk(job, work / str(k), kept, narrow, widen)


def closed(job: Job, work: Path) -> Iterator[Ended]:
    """Streams that are closed, full, or left by their reader."""
    shapes = (
        '"$@" >&-', '"$@" 2>&-', '"$@" >&- 2>&-', '"$@" <&-', '"$@" > /dev/full',
        '"$@" 2> /dev/full', 'set -o pipefail; "$@" | true',
    )  # fmt: skip
    for k, shape in enumerate(shapes):
        words = ["bash", "-c", shape, "bash", *job.words(work / str(k))]
        yield mended(job, work / str(k), *once(words))


def twice(job: Job, work: Path) -> Iterator[Ended]:
    """Two at the same time: one does the work, the other says why not, or finds it done."""
    for k in range(3):
        words = job.words(work / str(k))
        pair = [
            subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        ends = [(x.communicate()[1].decode("utf-8", "replace"), x.returncode) for x in pair]
        if all(code for _, code in ends):
            yield Ended(1, "\n".join(last_words(errors) for errors, _ in ends), False)
        for errors, code in ends:
            yield mended(job, work / str(k), code, last_words(errors))


def surroundings(*changes: dict[str, str | None]) -> Callable[[Job, Path], Iterator[Ended]]:
    """Return the trouble of a changed environment; None removes a variable."""

    def trouble(job: Job, work: Path) -> Iterator[Ended]:
        for k, change in enumerate(changes):
            env = {name: v for name, v in {**os.environ, **change}.items() if v is not None}
            yield mended(job, work / str(k), *once(job.words(work / str(k)), env=env))

    return trouble


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TROUBLES: dict[str, Callable[[Job, Path], Iterator[Ended]]] = {
    "full": full,
    "read-only": read_only,
    "closed": closed,
    "twice": twice,
    "homeless": surroundings({"HOME": None}, {"HOME": "/no/such/home"}, {"HOME": "/proc"}),
    "locale": surroundings(ASCII, {**ASCII, "PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}),
}


# --- the table ---


def jobs(work: Path) -> list[Job]:
    """Return train.py and infer.py on a small model, each run once undisturbed."""
    model = write_small_model(work / "model")
    data = write_small_data(work / "data", test_word=WORD)
    common = ["--model", str(model), "--data", str(data)]
    short = {"--ses-samples": 2, "--ses-turns": 1, "--ses-max-new-tokens": 6}
    train = [*common, *flags(STAGE_FLAGS | OFTEN), "--run-dir"]
    infer = [*common, "--split", "test", "--limit", "12", "--chunk-size", "2", "--ses"]
    asked = [*infer, *flags(short | {"--ses-summary-tokens": 6}), "--json", "--out"]
    made = []
    for name, arguments, result in (("train.py", train, "run"), ("infer.py", asked, "r.jsonl")):
        command = (sys.executable, "-u", str(ROOT / name), *arguments)
        made.append(Job(name, command, result, work / f"whole {name}"))
        code, told = once(made[-1].words(made[-1].whole))
        if code:
            raise SystemExit(f"{name} ended with {code} without a trouble: {told}")
    return made


def line(trouble: str, job: Job, ends: list[Ended], work: Path) -> str:
    """Return a row of the table: what the runs said is shown without the paths of this machine."""
    codes = collections.Counter(end.code for end in ends)
    said = collections.Counter(end.told.replace(f"{work}/", "") for end in ends if end.told)
    told = said.most_common(1)[0][0].replace("\n", " / ") if said else ""
    counts = ", ".join(f"{code}: {n}" for code, n in sorted(codes.items()))
    same = f"{sum(end.same for end in ends)} of {len(ends)}"
    return f"| {trouble} | {job.name} | {counts} | {same} | {told[:120]} |"


def main() -> None:
    """Print the table; exit 1 where something was lost or said badly."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="and a quarter as many of Ctrl-C")
    names = ["kill", "stop", *TROUBLES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TROUBLE")
    arguments = parser.parse_args()
    print("| trouble | command | exit codes | same bytes | said |\n|---|---|---|---|---|")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for job in jobs(work):
            for name in arguments.only:
                place = work / f"{name} {job.name}"
                try:
                    if name in TROUBLES:
                        ends = list(TROUBLES[name](job, place))
                    else:
                        by, k = (signal.SIGKILL, 1) if name == "kill" else (signal.SIGINT, 4)
                        ends = list(signals(job, place, by, -(-arguments.kills // k)))
                except NoDiskError as error:
                    print(f"| {name} | {job.name} | not tried: {error} | | |")
                    continue
                print(line(name, job, ends, place), flush=True)
                wrong += [(name, job.name, end) for end in ends if end.wrong]
    for name, command, end in wrong:
        print(f"\n{name}, {command}: exit code {end.code}, same bytes: {end.same}\n{end.told}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
