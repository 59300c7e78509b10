"""What decides a stage's result, which rows it learns from, what is deleted: without any model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted
from small_run import write_small_data

import train
from usbrec.crs.agents import Side
from usbrec.options import UserError
from usbrec.settings import ADAPTERS, STAGES, read_settings
from usbrec.work import Work

BOTH = ["pairs", "simpo", "report"]  # what needs the recommender and the simulator


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("inputs") / "data")


def find(name: str | None) -> Path:
    raise AssertionError("no model is needed")


def work(data: Path, *words: Any) -> Work:
    flags = train.build_parser().parse_args(["--data", str(data), *map(str, words)])
    return Work(read_settings(flags), data.parent / "run", find)


def changed(one: Work, other: Work) -> list[str]:
    """Return the stages that were made with other facts."""
    return [stage for stage in STAGES if one.facts(stage) != other.facts(stage)]


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["--seed", 1], list(STAGES)),
        (["--lora-r", 3], list(STAGES)),
        (["--dtype", "float16"], list(STAGES)),
        (["--max-valid", 3], list(STAGES)),
        (["--lesson-line-weight", 0.7], list(STAGES)),
        (["--max-train", 5], list(STAGES)),
        (["--max-simulator", 7], ["simulator", *BOTH]),
        (["--max-summaries", 7], ["simulator", *BOTH]),
        (["--simulator-epochs", 7], ["simulator", *BOTH]),
        (["--max-sft", 7], list(STAGES)),
        (["--max-profiles", 7], list(STAGES)),
        (["--sft-epochs", 7], list(STAGES)),
        (["--max-pairs", 7], BOTH),
        (["--pairs-samples", 7], BOTH),
        (["--chunk-size", 7], BOTH),
        (["--simpo-epochs", 7], ["simpo", "report"]),
        (["--rounds", 7], ["simpo", "report"]),
        (["--simpo-loss-beta", 7], ["simpo", "report"]),
        (["--max-eval", 7], ["report"]),
        (["--ses-turns", 7], ["report"]),
        (["--eval-turns", 7], ["report"]),
        (["--methods", "B/L"], ["report"]),
        (["--kv-memory", 1], []),
    ],
    ids=lambda x: str(x[0])[2:] if x and x[0] not in STAGES else "",
)
def test_an_option_decides_its_stage_and_those_that_use_its_result(
    data: Path, words: list[Any], stages: list[str]
) -> None:
    assert changed(work(data), work(data, *words)) == stages


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("train", list(STAGES)),
        ("items", list(STAGES)),
        ("valid", list(STAGES)),
        ("test", ["report"]),
    ],
)
def test_contents_decide_the_stages_that_read_them(
    data: Path, tmp_path: Path, name: str, stages: list[str]
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    before = work(folder, "--max-valid", 3)
    path = folder / (f"{name}.jsonl" if name != "items" else "items.json")
    path.write_text(path.read_text("utf-8").replace(" (19", " (20"), "utf-8")
    assert changed(before, work(folder, "--max-valid", 3)) == stages


def test_another_simulator_takes_the_place_of_what_would_train_one(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    other = work(data, "--simulator", tmp_path)
    assert changed(work(data), other) == ["simulator", *BOTH]
    assert changed(other, work(data, "--simulator", tmp_path, "--max-simulator", 7)) == []
    (tmp_path / "adapter_model.safetensors").write_bytes(b"2")
    assert changed(other, work(data, "--simulator", tmp_path)) == BOTH


def test_the_simulator_learns_from_rows_with_reactions_where_there_are_any(
    data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    rows = list(map(json.loads, (folder / "train.jsonl").read_text("utf-8").splitlines()))
    for row in rows[::2]:
        del row["reactions"]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    made = work(folder)
    stages = ("simulator", "summaries", "cards", "sft")
    assert [len(made.rows(stage)) for stage in stages] == [6, 6, 12, 12]
    assert all(x.accept for x in made.rows("simulator"))
    few = work(folder, "--max-train", 4, "--max-sft", 9)
    assert len(few.rows("sft")) == len(few.rows("pairs")) == 4
    assert few.rows("sft") != few.rows("pairs") and few.rows("sft") == few.rows("sft")
    assert few.rows("sft") != work(folder, "--max-train", 4, "--seed", 1).rows("sft")


@pytest.mark.parametrize(
    ("dialogues", "profiles", "shared"), [(5, 1, 0), (8, 2, 2), (2, 8, 2), (0, 1, 6)]
)
def test_pairs_take_rows_that_sft_has_not_learned_while_there_are_any(
    data: Path, dialogues: int, profiles: int, shared: int
) -> None:
    """Of 12 rows six are wanted; the profiles are first those of the dialogues."""
    limits = ("--max-sft", dialogues, "--max-profiles", profiles, "--max-pairs", 6)
    made = work(data, *limits)
    learned, pairs = made.rows("sft") + made.rows("profiles"), made.rows("pairs")
    assert made.rows("profiles")[: len(made.rows("sft"))] == made.rows("sft")[:profiles]
    assert len(pairs) == 6 and sum(x in learned for x in pairs) == shared
    assert all(x in learned for x in pairs[6 - shared :])  # those come last


def test_other_weights_at_the_same_place_decide_every_stage(data: Path, tmp_path: Path) -> None:
    flags = train.build_parser().parse_args(["--data", str(data), "--model", str(tmp_path)])
    made = []
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        made.append(Work(read_settings(flags), data.parent / "run", lambda _: tmp_path))
    assert changed(*made) == list(STAGES)


def test_a_kind_of_lessons_may_be_left_out(data: Path) -> None:
    kinds = ["simulator", "summaries", "cards", "sft", "profiles"]
    made = work(data, "--max-train", 9, *(y for x in kinds for y in (f"--max-{x}", -1)))
    assert [made.rows(x) for x in kinds] == [[]] * 5
    assert len(made.rows("pairs")) == 9  # none of them is learned
    for kind in ("pairs", "eval", "agreement", "valid", "train"):
        with pytest.raises(UserError, match="must be at least 0, got -1"):
            work(data, f"--max-{kind}", -1)


@pytest.mark.parametrize(("most", "taken"), [(5, 5), (0, 12), (30, 12)])
def test_no_round_has_fewer_rows_than_another(data: Path, most: int, taken: int) -> None:
    """Of 12 rows the third round of five has the last two and the first three again."""
    made = work(data, "--max-pairs", most)
    rows = [made.rows("pairs", part) for part in range(3)]
    everything = work(data, "--max-pairs", 0).rows("pairs")
    assert [len(x) for x in rows] == [taken] * 3
    assert sum(rows, []) == (everything * 3)[: 3 * taken]


def test_a_result_may_be_of_another_chunk_size_or_simulator_but_of_no_other_options(
    data: Path, tmp_path: Path
) -> None:
    one, two = (("--simulator", f"http://localhost:9/v1#{name}") for name in ("one", "two"))
    made = work(data, *one)
    made.folder = tmp_path / "run"
    made.claim(["pairs"], False)
    path = made.folder / STAGES["pairs"]["makes"][0]
    path.write_text("made")
    for words in (one, [*one, "--chunk-size", 7], two, []):
        later = work(data, *words)
        later.folder = made.folder
        assert later.need("pairs") == path
    other = work(data, *one, "--pairs-samples", 7)
    other.folder = made.folder
    with pytest.raises(UserError, match="--fresh"):
        other.need("pairs")


def test_a_server_has_the_recommenders_adapters_and_not_the_simulators(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work(data, "--recommender", "http://localhost:9/v1#BASE")
    server, own = Scripted(str), Scripted(str)
    monkeypatch.setattr(made.models, "side", lambda path, name: Side(server, "BASE"))
    monkeypatch.setattr(made, "adapted", lambda stage, name: Side(own, name))
    assert made.side(None) == Side(server, "BASE")
    assert made.side("sft") == Side(server, ADAPTERS["sft"])
    assert made.side("simulator") == Side(own, ADAPTERS["simulator"])


def test_validation_rows_are_drawn_by_the_seed(data: Path) -> None:
    drawn = [work(data, "--max-valid", 3, "--seed", seed).valid for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3
    assert work(data).valid == []


def test_a_stage_is_done_if_its_result_is_there_and_a_fresh_start_leaves_nothing_of_it(
    data: Path,
) -> None:
    made = work(data)
    stages = list(STAGES)
    assert made.claim(stages, False) == stages
    for stage in ("sft", "pairs"):
        for name in STAGES[stage]["makes"]:
            path = made.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.is_dir() or path.write_text("made")
    assert made.claim(stages, False) == ["simulator", "simpo", "report"]
    assert made.claim(["pairs"], True) == ["pairs"]
    assert not any((made.folder / name).exists() for name in STAGES["pairs"]["makes"])
    assert made.claim(stages, False) == ["simulator", "pairs", "simpo", "report"]
