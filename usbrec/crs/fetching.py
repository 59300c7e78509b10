"""Downloads of ReDial and OpenDialKG: `python -m usbrec.crs.datasets fetch redial`.

sources.json names the files: iEvaLM's, at one commit of its repository, so their bytes never
change. The commit itself lists a checksum of each file, git's: SHA-1 of "blob SIZE\\0" and the
bytes. A download goes to FILE.part, where the next one goes on, and becomes FILE when its checksum
is right.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from usbrec.crs.datasets import ROOT
from usbrec.options import UserError

SOURCES = json.loads(Path(__file__).with_name("sources.json").read_text("utf-8"))
PATIENCE = 60  # seconds without a byte


def fetch(name: str, data_dir: str | None) -> Iterator[str]:
    """Fetch a dataset's missing files into its folder; yield a sentence for each of its files.

    Raises UserError for a file that cannot be fetched or written, and for a wrong checksum.
    """
    folder = Path(data_dir or ROOT / name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, source in SOURCES[name].items():
        path, part = folder / file, folder / f"{file}.part"
        if not path.exists():
            download(source["url"], part)
        arrived = path if path.exists() else part
        if git_checksum(arrived) != source["git_sha1"]:
            part.unlink(missing_ok=True)
            told = f"{source['url']} has another: fetch it again, and move away what is there"
            raise UserError(f"{arrived} has a wrong checksum, {told}")
        os.replace(arrived, path)
        yield f"{path}: {path.stat().st_size} bytes, the checksum is right"


def download(url: str, part: Path) -> None:
    """Download a file into `part`, which may hold its beginning.

    Raises UserError; what has arrived stays in `part`.
    """
    part.touch()
    try:
        with part.open("r+b") as file:
            # the last byte is asked for again: a server refuses to send none
            start = max(file.seek(0, os.SEEK_END) - 1, 0)
            request = Request(url, headers={"Range": f"bytes={start}-"})
            with urlopen(request, timeout=PATIENCE) as answer:
                start = start if answer.status == 206 else 0
                size = start + int(answer.headers["Content-Length"])
                file.truncate(file.seek(start))
                with tqdm(None, part.stem, size, initial=start, unit="B", unit_scale=True) as bar:
                    while block := answer.read(1 << 16):
                        bar.update(file.write(block))
            if file.tell() < size:
                raise HTTPException(f"the answer ended after {file.tell()} of {size} bytes")
    except (OSError, HTTPException) as error:
        reason = str(error).strip("<>") or type(error).__name__
        told = "the same command goes on from what has arrived"
        raise UserError(f"{url} cannot be fetched into {part} ({reason}): {told}") from error


def git_checksum(path: Path) -> str:
    """Return git's checksum of a file, as `git hash-object` prints it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
