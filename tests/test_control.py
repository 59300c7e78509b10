"""benchmarks/control.py: sft continued on gold and on chosen replies, beside SFT and RL."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import STAGE_FLAGS, flags, write_small_data, write_small_model

import train
from usbrec.chat import Message
from usbrec.llm import training

sys.path.append(str(Path(train.__file__).parent / "benchmarks"))
import control  # noqa: E402


@pytest.fixture(scope="module")
def tokens() -> Iterator[dict[str, list[int]]]:
    """The tokens of every step, by the adapter that learns."""
    found, measure = defaultdict(list), training.measure

    def noting(model: Any, adapter: str, trees: Any, job: Any) -> dict[str, float]:
        found[adapter].append(sum(map(len, trees)))
        return measure(model, adapter, trees, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure", noting)
        yield found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, list[int]]) -> list[str]:
    """The flags of a small run that has its report."""
    place = tmp_path_factory.mktemp("control")
    model, data = write_small_model(place / "model"), write_small_data(place / "data")
    inputs = {"--model": model, "--data": data, "--dtype": "float32", **STAGE_FLAGS}
    found = ["--run-dir", str(place / "run"), *flags(inputs), "--methods", "SFT", "RL"]
    assert train.main(found) == 0
    return found


def test_a_control_sees_as_many_tokens_as_simpo(
    finished: list[str], tokens: dict[str, list[int]], capsys: Any
) -> None:
    run = Path(finished[1])
    assert control.main(finished) == 0
    table = capsys.readouterr().out
    names = ("SFT", "RL", "SFT + gold", "SFT + chosen", "RL - SFT", "SFT + chosen - SFT + gold")
    for name in names:
        assert f"| {name} | " in table
    assert abs(sum(tokens["rl"]) - sum(tokens["gold"])) < max(tokens["gold"])
    found = json.loads((run / "control/control.json").read_text("utf-8"))
    assert found["methods"]["SFT + gold"]["ieval"]["n"] == 3
    assert control.main(finished) == 0  # all is read from its files
    assert capsys.readouterr().out.endswith(table[table.index("| method") :])


def test_controls_learn_gold_and_chosen_replies() -> None:
    pair = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "chosen": [{"role": "assistant", "content": "better"}],
    }
    [(*prompt, reply)] = control.lesson_of(pair, "better")
    assert reply == Message("assistant", "better", 1.0)
    assert [x.weight for x in prompt] == [0.0, 0.0]


def test_a_run_of_other_options_is_refused(finished: list[str], capsys: Any) -> None:
    assert control.main([*finished, "--eval-temperature", "1"]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert "options/report.json" in told and "the flags of that run" in told
