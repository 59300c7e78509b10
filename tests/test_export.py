"""pairs.jsonl as trl's trainer takes it, and converted for LLaMA-Factory."""

import json

import pytest
import torch

from usbrec.chat import Message
from usbrec.crs.conversion import main
from usbrec.llm.tokenizer import ChatTokenizer

SYSTEM = ("system", "Recommend a film.")


def pair_of(prompt, chosen, rejected):
    """A line of pairs.jsonl, without the scores and origins of the sides."""
    told = {"chosen": [("assistant", chosen)], "rejected": [("assistant", rejected)]}
    sides = {"prompt": prompt, **told}
    return {x: [{"role": who, "content": text} for who, text in sides[x]] for x in sides}


PAIRS = [
    pair_of(
        [SYSTEM, ("user", "Hello"), ("assistant", "Hi."), ("user", "Sci-fi?")],
        *("Try Alien.", "What do you like?"),
    ),
    pair_of(
        [SYSTEM, ("assistant", "Welcome"), ("user", "Noir?")],
        *("Try Laura.", "Try Heat."),
    ),
]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def test_trls_trainer_takes_the_file_as_it_is(pairs_file, tmp_path, default_model_folder):
    """A conversational preference dataset whose prompts trl lays out in our ids, and a step."""
    import transformers as hf
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=49152,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    options = CPOConfig(
        str(tmp_path / "trl"),
        loss_type="simpo",
        cpo_alpha=0.0,
        per_device_train_batch_size=2,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = CPOTrainer(
        model=hf.LlamaForCausalLM(config),
        args=options,
        train_dataset=Dataset.from_json(str(pairs_file), cache_dir=str(tmp_path / "cache")),
        processing_class=hf.AutoTokenizer.from_pretrained(default_model_folder),
    )
    ours = ChatTokenizer.from_folder(default_model_folder)
    rows = list(trainer.train_dataset)
    assert len(rows) == len(PAIRS)
    for row, pair in zip(rows, PAIRS, strict=True):
        prompt = ours.prompt([Message(**message) for message in pair["prompt"]])
        for side in ("chosen", "rejected"):
            ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
            reply = ours.encode(pair[side][0]["content"])
            assert ids[: len(prompt) + len(reply)] == prompt + reply
            assert labels[: len(prompt)] == [-100] * len(prompt)
            assert labels[len(prompt) :][: len(reply)] == reply
    assert trainer.train().training_loss > 0


def as_llama_factory_reads(row, columns):
    """The checks of its `sharegpt` converter: human and gpt in turns, ending with the human."""
    turns = row[columns["messages"]]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) + ["human"]
    assert all(row[columns[side]]["from"] == "gpt" for side in ("chosen", "rejected"))
    return row[columns["system"]], [turn["value"] for turn in turns]


def test_one_flag_converts_to_llama_factorys_format(pairs_file, tmp_path, capsys):
    folder = tmp_path / "data"
    assert main(["export", str(pairs_file), str(folder)]) == 0
    assert main(["export", str(pairs_file), str(folder)]) == 0
    assert "2 pairs" in capsys.readouterr().out
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["pairs"]["ranking"] is True
    rows = json.loads((folder / info["pairs"]["file_name"]).read_text())
    columns = info["pairs"]["columns"]
    assert [as_llama_factory_reads(row, columns) for row in rows] == [
        ("Recommend a film.", ["Hello", "Hi.", "Sci-fi?"]),
        ("Recommend a film.", ["", "Welcome", "Noir?"]),
    ]
    assert [row["chosen"]["value"] for row in rows] == ["Try Alien.", "Try Laura."]
    assert [row["rejected"]["value"] for row in rows] == ["What do you like?", "Try Heat."]


def test_a_description_of_other_datasets_is_never_replaced(pairs_file, tmp_path, capsys):
    (tmp_path / "dataset_info.json").write_text('{"alpaca": {}}')
    assert main(["export", str(pairs_file), str(tmp_path)]) == 2
    assert "dataset_info.json describes other datasets: name a new" in capsys.readouterr().err
    assert (tmp_path / "dataset_info.json").read_text() == '{"alpaca": {}}'
    assert not (tmp_path / "pairs.json").exists()


@pytest.mark.parametrize(
    "prompt",
    [
        [("user", "Hi")],
        [SYSTEM],
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
        [SYSTEM, ("user", "Hi"), ("user", "Noir?")],
        [SYSTEM, ("user", "Hi"), SYSTEM, ("user", "Noir?")],
    ],
)
def test_a_prompt_that_no_run_writes_is_refused_with_its_roles(prompt, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair_of(prompt, "a", "b")) + "\n")
    assert main(["export", str(path), str(tmp_path / "data")]) == 2
    told = capsys.readouterr().err
    assert "line 1: expected a prompt as train.py writes it, got " in told
    assert " ".join(role for role, _ in prompt) in told and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"prompt": ', "line 2: not JSON"),
        ("[]", "line 2: prompt"),
        ('{"prompt": [{"role": "user"}]}', "line 2: prompt"),
        ('{"prompt": [{"role": "user", "content": "a"}], "chosen": []}', "line 2: chosen"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(
    pairs_file, tmp_path, capsys, line, named
):
    lines = pairs_file.read_text().splitlines()
    pairs_file.write_text("\n".join([lines[0], line, lines[1]]))
    assert main(["export", str(pairs_file), str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert f"{pairs_file}, {named}" in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_an_empty_file_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("")
    flags = ["export", str(tmp_path / "pairs.jsonl"), str(tmp_path / "d")]
    assert main(flags) == 2
    assert "holds no pair" in capsys.readouterr().err


def test_a_missing_file_is_one_clear_error(tmp_path, capsys):
    assert main(["export", str(tmp_path / "x"), str(tmp_path / "d")]) == 2
    assert "is missing" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(pairs_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "pairs.json").mkdir(parents=True)
    for place in ("file", "file/below", "folder", "x" * 300):
        assert main(["export", str(pairs_file), str(tmp_path / place)]) == 2
        told = capsys.readouterr().err
        assert place in told and told.count("\n") == 1 and "Traceback" not in told
    assert main(["export", str(pairs_file), ""]) == 2
    assert "must not be empty" in capsys.readouterr().err
