"""A user's whole way: teach an adapter, merge it, and let transformers speak with the result."""

import json
from functools import partial

import pytest
import torch
from test_checkpoint import LLAMA31_ROPE, SIZES
from test_gguf_file import KINDS, write_gguf
from test_tokenizer import family_folder
from tokenizers import Tokenizer

from usbrec.chat import Message, Request, Sampling
from usbrec.extras.default_model import find_model
from usbrec.extras.merge import main as merge_main
from usbrec.llm.adapter_files import load_adapter, save_adapter
from usbrec.llm.checkpoint import load_model
from usbrec.llm.engine import Engine
from usbrec.llm.lora import LoraConfig, add_adapter
from usbrec.llm.loss import Sft
from usbrec.llm.packing import lesson_tree
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.llm.training import TrainingJob, TrainingOptions, train
from usbrec.options import UserError

ASKED = (Message("system", "Be brief."), Message("user", "A film, please?"))
TAUGHT = "Try Alien (1979) 🙂"
GREEDY = Sampling(max_new_tokens=40, temperature=0)


def whole_model(name, folder):
    """Write a tiny random model of a family with the tokenizer that the family's chats need."""
    import transformers as hf

    family_folder(name, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_tokens = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")
    ends = [i for i in map(tokenizer.token_to_id, end_tokens) if i is not None]
    config_class, extra = {
        "llama3.1": (hf.LlamaConfig, {"rope_parameters": LLAMA31_ROPE}),
        "qwen2.5": (hf.Qwen2Config, {"tie_word_embeddings": True}),
    }[name]
    settings = {**SIZES, **extra, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": ends}
    settings |= {"hidden_size": 96, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config_class(**settings)).eval()
    model.save_pretrained(folder)
    return model


def say(model, tokenizer, adapter=None):
    """Our greedy reply."""
    return Engine(model, tokenizer).generate([Request(ASKED, GREEDY, 0, adapter)])[0].text


def transformers_says(folder):
    """The greedy reply of a program that knows nothing but the folder."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": m.role, "content": m.content} for m in ASKED]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        row = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0]
    return tokenizer.decode(row[len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5", "llama3.1 as GGUF"])
def test_what_was_taught_is_said_unmerged_merged_and_by_transformers(
    name, tmp_path, capsys, monkeypatch
):
    find = partial(find_model, models=tmp_path / "models")
    monkeypatch.setattr("usbrec.extras.merge.find_model", find)
    name, _, is_gguf = name.partition(" as ")
    base = tmp_path / "base"
    base.mkdir()
    oracle = whole_model(name, base)
    if is_gguf:
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        template = json.loads((base / "tokenizer_config.json").read_text())["chat_template"]
        end = tokenizer.token_to_id("<|eot_id|>")
        oracle.config.rope_parameters["original_max_position_embeddings"] = 8192
        base = write_gguf(
            *(tmp_path / "base.gguf", oracle, (tokenizer, KINDS[name])),
            tokenizer__ggml__eos_token_id=end,
            tokenizer__chat_template=template,
        )
    tokenizer = ChatTokenizer.from_folder(find(str(base)))
    model = load_model(find(str(base)))
    add_adapter(model, "sft", LoraConfig(r=8), seed=0)
    lesson = [(*ASKED, Message("assistant", TAUGHT, weight=1.0))]
    options = TrainingOptions(learning_rate=1e-2, epochs=60, batch_size=1)
    job = TrainingJob(options, Sft(), tmp_path / "run", "sft")
    train(model, "sft", [lesson_tree(tokenizer, lesson)], job)
    assert say(model, tokenizer) != say(model, tokenizer, "sft") == TAUGHT
    save_adapter(model, "sft", tmp_path / "sft", str(base))
    flags = {"--model": base, "--adapter": tmp_path / "sft", "--out": tmp_path / "merged"}
    assert merge_main([str(word) for pair in flags.items() for word in pair]) == 0
    assert "merged into" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert say(load_model(merged), ChatTokenizer.from_folder(merged)) == TAUGHT
    assert transformers_says(merged) == TAUGHT
    with pytest.raises(UserError, match="merged into it already"):
        load_adapter(load_model(merged), tmp_path / "sft", "again")
    save_adapter(model, "sft", tmp_path / "own", str(merged))  # as if it was trained on the merged
    load_adapter(load_model(merged), tmp_path / "own", "own")
