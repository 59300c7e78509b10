"""ChatGLM3 from its own layout: weights, adapters and chats.

Oracles: transformers' Glm class with the same weights under Llama's names, peft around a small
module with ChatGLM3's names, and sentencepiece itself for the published way of building a chat.
"""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from test_adapter_files import adapted_logits, randomise
from test_checkpoint import logits_of, random_ids
from test_tokenizer import LETTERS, plain, random_chat, random_text

from usbrec.chat import Message, Request, Sampling
from usbrec.extras.merge import merge
from usbrec.llm.adapter_files import load_adapter, save_adapter
from usbrec.llm.checkpoint import load_model
from usbrec.llm.engine import BatchRow
from usbrec.llm.lora import LoraConfig, adapter_parameters, add_adapter
from usbrec.llm.model_config import load_config
from usbrec.llm.packing import lesson_tree
from usbrec.llm.tokenizer import ChatTokenizer
from usbrec.options import UserError

SETTINGS = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 80,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 48,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 6,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": 96,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float16",
}


def glm(rope_ratio=1):
    """transformers' Glm in ChatGLM3's settings, with random weights in fp32."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GlmConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * rope_ratio,
            "partial_rotary_factor": 0.5,
        },
        attention_bias=True,
        initializer_range=0.3,
        pad_token_id=None,
    )
    model = hf.GlmForCausalLM(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return model


def chatglm_tensors(model):
    """The weights of `glm()` under ChatGLM3's names: q, k and v in one matrix."""
    state = dict(model.state_dict())
    tensors = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    same = ("input_layernorm", "post_attention_layernorm")
    renamed = {
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        **{name: name for name in same},
    }
    for number in range(3):
        hf, ours = f"model.layers.{number}.", f"transformer.encoder.layers.{number}."
        for theirs, name in renamed.items():
            tensors[f"{ours}{name}.weight"] = state[f"{hf}{theirs}.weight"]
        for kind in ("weight", "bias"):
            qkv = [state[f"{hf}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{ours}self_attention.query_key_value.{kind}"] = torch.cat(qkv)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_folder(folder, model, **settings):
    """Write ChatGLM3's files: two shards, their index and config.json."""
    tensors = chatglm_tensors(model)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= {name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("chatglm3"), glm())


@pytest.mark.parametrize("rope_ratio", [1, 50])
def test_logits_equal_transformers_glm(tmp_path, rope_ratio):
    oracle = glm(rope_ratio)
    write_folder(tmp_path, oracle, rope_ratio=rope_ratio)
    ids = random_ids()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(load_model(tmp_path), ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bias_linear": True},
        {"add_qkv_bias": False},
        {"rmsnorm": False},
        {"multi_query_attention": False},
        {"post_layer_norm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"quantization_bit": 4},
        {"pre_seq_len": 128},
        {"original_rope": False},
    ],
)
def test_a_setting_that_is_not_honoured_is_refused_by_name(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({**SETTINGS, **changes}))
    with pytest.raises(UserError, match=next(iter(changes))):
        load_config(tmp_path)


class SmallChatGlm(torch.nn.Module):
    """A module with ChatGLM3's names around its linear layers, for peft to work on."""

    prepare_inputs_for_generation = None  # peft asks for it and does not call it here

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            parent = self
            *path, layer, kind = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            if kind == "weight" and tensor.dim() == 2 and layer != "word_embeddings":
                bias = tensors.get(name.replace(".weight", ".bias"))
                linear = torch.nn.Linear(*reversed(tensor.shape), bias=bias is not None)
                linear.weight.data.copy_(tensor)
                if bias is not None:
                    linear.bias.data.copy_(bias)
                parent.add_module(layer, linear)


TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def small_peft(tensors, **options):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options)
    return peft.get_peft_model(SmallChatGlm(tensors), config)


def test_pefts_adapter_on_the_fused_names_loads_and_merges_the_same(base, tmp_path):
    """peft merges into its module; the merged matrices and our adapted logits must agree."""
    oracle = small_peft(chatglm_tensors(glm()))
    randomise(p for key, p in oracle.named_parameters() if "lora_" in key)
    oracle.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter", "theirs")
    ids = random_ids(40)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    reloaded = load_model(tmp_path / "merged")
    expected = adapted_logits(model, ids, "theirs")
    torch.testing.assert_close(logits_of(reloaded, ids), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits_of(model, ids)).abs().max() > 0.1
    theirs = oracle.merge_and_unload().state_dict()
    layer = "transformer.encoder.layers.1."
    for ours, name in (
        (reloaded.model.layers[1].self_attn.qkv_proj, "self_attention.query_key_value"),
        (reloaded.model.layers[1].self_attn.o_proj, "self_attention.dense"),
        (reloaded.model.layers[1].mlp.gate_up_proj, "mlp.dense_h_to_4h"),
        (reloaded.model.layers[1].mlp.down_proj, "mlp.dense_4h_to_h"),
    ):
        torch.testing.assert_close(ours.weight.data, theirs[f"{layer}{name}.weight"])


def test_our_adapter_loads_in_peft_on_the_fused_names(base, tmp_path):
    import peft

    model = load_model(base)
    add_adapter(model, "sft", LoraConfig(r=4, lora_alpha=6.0), seed=0)
    randomise(adapter_parameters(model, "sft").values())
    save_adapter(model, "sft", tmp_path, "chatglm3")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(TARGETS)
    oracle = peft.PeftModel.from_pretrained(SmallChatGlm(chatglm_tensors(glm())), tmp_path)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    theirs = oracle.base_model.model.transformer.encoder.layers
    for number, layer in enumerate(model.model.layers):
        actual = layer.self_attn.qkv_proj(x, [("sft", 0, 5)])
        expected = getattr(theirs, str(number)).self_attention.query_key_value(x)
        torch.testing.assert_close(actual, expected)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(our tokenizer, the sentencepiece model) of a small ChatGLM3 folder."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    lines = [random_text(rng, 60).replace("\n", " ") for _ in range(300)]
    (folder / "corpus.txt").write_text("\n".join([*lines, "a film, the film"] * 2), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    config = folder / "config.json"
    config.write_text(json.dumps({**SETTINGS, "padded_vocab_size": 508}))
    with pytest.raises(UserError, match=r"<\|observation\|>' has id 508, but vocab_size is 508"):
        ChatTokenizer.from_folder(folder)
    config.write_text(json.dumps({**SETTINGS, "padded_vocab_size": 509}))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return ChatTokenizer.from_folder(folder), pieces


ROLES = {"system": 5, "user": 6, "assistant": 7, "observation": 8}  # after [MASK] .. eop


def published_ids(pieces, messages):
    """ChatGLM3's `build_chat_input`: `[gMASK] sop`, then role, newline and text, encoded apart."""
    size = pieces.vocab_size()
    ids = [size + 1, size + 3]
    for message in messages:
        ids += [size + ROLES[message["role"]]] + pieces.encode("\n")
        ids += pieces.encode(message["content"])
    return ids


def test_chats_are_laid_out_as_published(chat):
    ours, pieces = chat
    assert ours.chat_format.name == "chatglm3"
    for seed in range(300):
        messages = random_chat(random.Random(seed))
        expected = published_ids(pieces, plain(messages))
        assert ours.render(messages)[0] == expected
        header = [pieces.vocab_size() + ROLES["assistant"]] + pieces.encode("\n")
        assert ours.prompt(messages) == expected + header


def test_a_turns_prompt_and_reply_begin_the_next_turns_prompt(chat):
    ours, _ = chat
    for seed in range(100):
        rng = random.Random(seed)
        messages, so_far = [Message("system", random_text(rng))], []
        for _ in range(rng.randrange(2, 6)):
            messages.append(Message("user", random_text(rng)))
            prompt = ours.prompt(messages)
            assert prompt[: len(so_far)] == so_far
            messages.append(Message("assistant", random_text(rng).strip()))
            so_far = prompt + ours.encode(messages[-1].content)


def test_the_control_tokens_have_chatglm3s_numbers():
    """Its sentencepiece model has 64789 pieces; the control tokens are numbered after them."""
    from usbrec.llm.model_config import CHATGLM3

    ids = {token: 64789 + i for i, token in enumerate(CHATGLM3["control_tokens"])}
    assert (ids["[gMASK]"], ids["sop"]) == (64790, 64792)
    assert (ids["<|user|>"], ids["<|observation|>"]) == (64795, 64797)


def test_a_reply_ends_where_the_next_user_would_stand(chat):
    ours, pieces = chat
    size = pieces.vocab_size()
    user, observation = size + ROLES["user"], size + ROLES["observation"]
    assert ours.stop_ids == {2, user, observation}
    asked = [Message("user", "Hi")]
    closed = [*asked, Message("assistant", "a film", weight=0.5)]
    ids, weights = ours.render(closed)
    reply = ours.encode("a film")
    assert ids == ours.prompt(asked) + reply + [user]
    assert [w for w in weights if w] == [0.5] * (len(reply) + 1)
    longer, more = ours.render([*closed, Message("user", "no")])
    assert longer[: len(ids)] == ids and more[: len(weights)] == weights
    assert longer.count(user) == 2


def test_chats_of_a_lesson_share_the_user_token_that_ends_a_reply(chat):
    ours, _ = chat
    learned = (Message("user", "Hi"), Message("assistant", "a film", weight=1.0))
    said = (learned[0], Message("assistant", "a film"))
    going_on = (*said, Message("user", "no"), Message("assistant", "bye", weight=1.0))
    first, second = lesson_tree(ours, [learned, going_on]).branches
    assert (first.ids, first.weights) == ours.render(learned)
    assert second.shared == len(first.ids) and second.parent == 0
    assert [*first.ids, *second.ids] == ours.render(going_on)[0]


def test_an_unweighted_reply_is_not_closed(chat):
    ours, pieces = chat
    ids, weights = ours.render([Message("user", "Hi"), Message("assistant", "a film")])
    assert ids[-1] < pieces.vocab_size() and not any(weights)


def test_control_text_stays_text(chat):
    ours, pieces = chat
    for token in ours.vocabulary.control:
        text = f"a {token} b"
        ids = ours.encode(text)
        assert max(ids) < pieces.vocab_size()
        assert ours.decode(ids) == text
        rendered, _ = ours.render([Message("user", text)])
        assert sum(i >= pieces.vocab_size() for i in rendered) == 3


def test_a_stream_says_the_whole_text_with_its_spaces(chat):
    ours, _ = chat
    for seed in range(100):
        text = "a " + random_text(random.Random(seed)) + " film 👩‍🚀"
        said: list[str] = []
        reply = BatchRow(ours, Request((), Sampling(1000)), [], [], said.append)
        for i in ours.encode(text):
            reply.append(i)
        assert not any("\ufffd" in part for part in said)
        reply.append(min(ours.stop_ids))
        assert reply.text == said[-1] == text


def test_letters_of_the_tests_need_byte_fallback(chat):
    _, pieces = chat
    assert any(pieces.is_byte(i) for i in pieces.encode("".join(LETTERS)))
