"""benchmarks/serve.py rehearsed on a small random model."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from small_run import write_small_model  # noqa: E402

import usbrec  # noqa: E402

sys.path.append(str(Path(usbrec.__file__).parents[1] / "benchmarks"))
import serve  # noqa: E402


def test_every_load_has_a_rate_and_the_clients_share_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One round to warm up and one that is timed, each of 1 + 8 + 8 replies."""
    model = write_small_model(tmp_path / "model")
    monkeypatch.setattr(serve, "find_model", lambda name: model)
    monkeypatch.setattr(serve, "CLIENTS", 8)
    serve.main(["--quick"])
    *table, calls, last = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| one", "| clients32", "| streamed"]
    assert all(float(line.split(" | ")[1]) > 0 for line in table[2:])
    claim = json.loads(last)
    assert claim["benchmark"] == "serve" and claim["ratios"].keys() == {"clients32", "streamed"}
    assert claim["reach"].keys() <= claim["ratios"].keys()
    assert 6 <= int(calls.split()[0]) < 2 * (1 + 8 + 8)
