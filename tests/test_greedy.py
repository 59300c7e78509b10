"""Greedy replies are those of transformers' `generate`, for every family and the default model."""

import pytest
import torch
from test_chatglm3 import glm, write_folder
from test_checkpoint import FAMILIES, oracle_of, random_ids

from usbrec.chat import Message, Request, Sampling
from usbrec.llm.checkpoint import load_model
from usbrec.llm.engine import Engine
from usbrec.llm.tokenizer import ChatTokenizer

CHATGLM_ROPE_RATIOS = {"chatglm3": 1, "chatglm3-32k": 50, "chatglm3-128k": 500}


class NumberTokenizer:
    """A message is its token ids, written as numbers; a reply ends at 2."""

    stop_ids = frozenset({2})

    def encode(self, text, continued=False):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def prompt(self, messages):
        return [i for message in messages for i in self.encode(message.content)]


def greedy(oracle, ids, new_tokens, **options):
    """transformers' greedy continuation of one prompt, without the end token."""
    with torch.no_grad():
        row = oracle.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )[0]
    return row[len(ids) :].tolist()


def family(name, folder):
    if name in CHATGLM_ROPE_RATIOS:
        ratio = CHATGLM_ROPE_RATIOS[name]
        oracle = glm(ratio)
        write_folder(folder, oracle, rope_ratio=ratio)
        return oracle
    oracle = oracle_of(name)
    oracle.save_pretrained(folder)
    return oracle


@pytest.mark.parametrize("name", [*FAMILIES, *CHATGLM_ROPE_RATIOS])
def test_greedy_continuations_of_a_batch_equal_generate_one_by_one(name, tmp_path):
    oracle = family(name, tmp_path)
    engine = Engine(load_model(tmp_path), NumberTokenizer())
    ids = random_ids(60)
    prompts = [ids[:20], ids[:50], ids[30:37], ids[:20] + ids[55:]]
    how = Sampling(max_new_tokens=24, temperature=0)
    asked = [Request((Message("user", " ".join(map(str, p))),), how) for p in prompts]
    replies = engine.generate(asked)
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = greedy(oracle, prompt, 24, eos_token_id=2)
        assert list(reply.token_ids) == [i for i in expected if i != 2]
        assert reply.finished == (2 in expected)


def test_the_default_models_greedy_replies_equal_generate(default_model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    oracle = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    tokenizer = ChatTokenizer.from_folder(default_model_folder)
    engine = Engine(load_model(default_model_folder), tokenizer)
    asked = [
        [Message("user", "What is the capital of France?")],
        [Message("system", "Answer in one word."), Message("user", "Is water wet?")],
        [
            Message("user", "I like Alien."),
            Message("assistant", "Who does not?"),
            Message("user", "Name a film with 3 words."),
        ],
    ]
    sampling = Sampling(max_new_tokens=20, temperature=0)
    replies = engine.generate([Request(tuple(messages), sampling) for messages in asked])
    for messages, reply in zip(asked, replies, strict=True):
        chat = [{"role": m.role, "content": m.content} for m in messages]
        ids = their_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        expected = greedy(oracle, ids, 20)
        assert list(reply.token_ids) == [i for i in expected if i != 2]
        assert reply.finished == (2 in expected)
        assert reply.text == their_tokenizer.decode(expected, skip_special_tokens=True)
