"""Hub names against a local stand-in of the hub: needed files only, once, continued when cut."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_checkpoint import oracle_of

from usbrec.llm.hub import find_model
from usbrec.options import UserError

NAME = "someone/tiny-model"
SHA = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[1]
FETCH = f"""
from usbrec.llm.hub import find_model
from usbrec.llm.checkpoint import load_model
path = find_model({NAME!r})
load_model(path)
print(path)
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that fetching a snapshot needs."""

    protocol_version = "HTTP/1.1"
    folder: Path
    log: list[tuple[str, str, str | None]]
    cut: set[str]  # files whose first download breaks off in the middle

    def log_message(self, *args):
        pass

    def answer(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.log.append((self.command, path, self.headers.get("Range")))
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith(f"/api/models/{NAME}/tree/"):
            return self.send_json([self.tree_entry(name) for name in names])
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in names]
            return self.send_json({"id": NAME, "sha": SHA, "siblings": siblings})
        if path.startswith(f"/{NAME}/resolve/") and path.rsplit("/", 1)[1] in names:
            return self.send_file(path.rsplit("/", 1)[1])
        return self.answer(b"", 404, [("X-Error-Code", "RepoNotFound")])

    def tree_entry(self, name):
        content = (self.folder / name).read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def send_json(self, content):
        self.answer(json.dumps(content).encode(), headers=[("Content-Type", "application/json")])

    def send_file(self, name):
        content = (self.folder / name).read_bytes()
        headers = [
            ("ETag", f'"{hashlib.sha1(content).hexdigest()}"'),
            ("X-Repo-Commit", SHA),
            ("Accept-Ranges", "bytes"),
        ]
        requested = self.headers.get("Range")
        if requested and self.command == "GET":
            start = int(requested.removeprefix("bytes=").split("-")[0])
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(content[start:], 206, [*headers, ("Content-Range", span)])
        if self.command == "GET" and name in self.cut:
            self.cut.remove(name)
            self.send_response(200)
            for key, value in [*headers, ("Content-Length", str(len(content)))]:
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self.answer(content, headers=headers)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    oracle_of("llama-3.1").save_pretrained(folder, max_shard_size="60KB")
    for name in ("pytorch_model.bin", "README.md", "consolidated.00.pth", "modeling_x.py"):
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(model_files, tmp_path):
    """A running stand-in, and the environment in which a fetch meets it."""
    handler = type("Handler", (Hub,), {"folder": model_files, "log": [], "cut": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, environment(f"http://127.0.0.1:{server.server_port}", tmp_path)
    server.shutdown()
    server.server_close()


def environment(endpoint, home):
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **own, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(environment, code=FETCH):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def downloads(log):
    return [
        path.rsplit("/", 1)[1] for command, path, _ in log if command == "GET" and "resolve" in path
    ]


def test_needed_files_are_fetched_once_and_load(hub, model_files):
    handler, surroundings = hub
    done = run(surroundings)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(surroundings["HF_HOME"])
    needed = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    needed |= {path.name for path in model_files.glob("model-*.safetensors")}
    assert sorted(downloads(handler.log)) == sorted(needed)
    assert {path.name for path in folder.iterdir()} == needed
    handler.log.clear()
    assert run(surroundings).stdout == done.stdout
    assert downloads(handler.log) == []


def test_a_download_that_breaks_off_is_continued(hub, tmp_path):
    """30 MB, of which 15 arrive: the client writes down 10 MB at a time and asks for the rest."""
    handler, surroundings = hub
    handler.folder = tmp_path / "large"
    handler.folder.mkdir()
    content = os.urandom(30_000_000)
    (handler.folder / "model.safetensors").write_bytes(content)
    handler.cut.add("model.safetensors")
    code = FETCH.replace("load_model(path)\n", "")
    done = run(surroundings, code)
    if done.returncode:  # a version that does not try again by itself: the user does
        done = run(surroundings, code)
    assert done.returncode == 0, done.stderr
    assert not handler.cut
    asked = [value for command, _, value in handler.log if command == "GET" and value]
    assert 10_000_000 <= int(asked[0].removeprefix("bytes=").split("-")[0]) <= 15_000_000
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == content


def test_what_is_in_the_cache_is_found_offline(hub):
    _, surroundings = hub
    done = run(surroundings)
    offline = run({**surroundings, "HF_HUB_OFFLINE": "1"})
    assert offline.stdout == done.stdout != ""


ERROR = f"""
from usbrec.options import UserError
from usbrec.llm.hub import find_model
try:
    find_model({NAME!r})
except UserError as error:
    print(error)
"""


def test_offline_the_error_says_which_folder_to_give(tmp_path):
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run({**environment("http://127.0.0.1:9", tmp_path), **extra}, ERROR)
        assert done.stdout.startswith(f"{NAME} is no folder here and cannot be fetched"), (
            done.stderr
        )
        assert "config.json and safetensors with --model FOLDER" in done.stdout
        assert done.stdout.count("\n") == 1


def test_an_unknown_name_is_one_clear_error(hub):
    _, surroundings = hub
    done = run(surroundings, ERROR.replace(NAME, "someone/else"))
    assert done.stdout.startswith("someone/else is no folder here"), done.stderr


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert find_model("org/model") == Path("org/model")
    assert find_model(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="neither a model's folder nor a GGUF file"):
        find_model(tmp_path / "file")
    with pytest.raises(UserError, match="--model ./missing/model: no such folder"):
        find_model("./missing/model")
