"""Chats in token ids: the published templates' layout, weights beside it, and text that stays text.

The oracle of the layouts is transformers' `apply_chat_template` with each family's own template
over hundreds of generated conversations. Over-long prompts lose whole turns, from the left, the
same in training and inference. Families whose tokenizer cannot be had here get a small
one, trained on the spot, with the family's pre-tokenizer and control tokens.
"""

import json
import random
import unicodedata
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from usbrec.chat import Message, Request, Sampling
from usbrec.llm.engine import BatchRow
from usbrec.llm.loss import Sft, Simpo
from usbrec.llm.packing import lesson_tree, pair_tree
from usbrec.llm.tokenizer import (
    FORMATS,
    REPLY_ROOM,
    ChatTokenizer,
    fit_prompt,
    prompt_room,
    shorten,
)
from usbrec.llm.training import usable
from usbrec.options import UserError

CONTROL = {
    "qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<tool_call>"],
    "llama3.1": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ],
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATES = {"qwen2.5": "qwen2_5.jinja", "llama3.1": "llama3_1.jinja"}
LETTERS = [
    *"abcdefghijklmnopqrstuvwxyzABCXYZ0123456789.,!?'\"()<>|_-",
    *"  \n\n\t\u00a0\u2003éüßñ\u0301中文字日本語ひらがな한국어",
    *"русскийعربية🙂🎬👩‍🚀🇫🇷\u200d\ufeff\x00\x1c",
    " the ",
    " film ",
    "'s",
    " 1999",
]


def random_text(rng, length=40):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(length)))


def random_chat(rng, text=random_text):
    """A chat with or without a system prompt, perhaps empty, turns of any order and length."""
    chat = []
    if rng.random() < 0.5:
        chat.append(Message("system", text(rng) if rng.random() < 0.8 else ""))
    for number in range(rng.randrange(1, 7)):
        role = ("user", "assistant")[number % 2] if rng.random() < 0.9 else "system"
        content = text(rng, 400 if rng.random() < 0.05 else 40)
        chat.append(Message(role, content.lstrip() if role == "assistant" else content))
    return chat


def plain(chat):
    return [{"role": message.role, "content": message.content} for message in chat]


def family_folder(name, folder):
    """Write a model folder with a small tokenizer of the family `name`."""
    split = LLAMA3_SPLIT if name == "llama3.1" else LLAMA3_SPLIT.replace("{1,3}", "")
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3.1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2.5":
        tokenizer.normalizer = normalizers.NFC()
    rng = random.Random(0)
    corpus = [random_text(rng, 400) for _ in range(200)]
    corpus += ["user\n\nassistant\n\nsystem\n\n Today is a film. You are a helpful assistant."] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL[name]])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in CONTROL[name]}
    ends = [ids["<|end_of_text|>"], ids["<|eom_id|>"]] if name == "llama3.1" else ids["<|im_end|>"]
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    first_end = ids["<|endoftext|>"] if name == "qwen2.5" else ends
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first_end}))
    template = Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / TEMPLATES[name]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL[name][0] if name == "llama3.1" else None,
        "eos_token": CONTROL[name][1],
        "chat_template": template.read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=["smollm2", "qwen2.5", "llama3.1"])
def family(request, tmp_path_factory):
    """(our tokenizer, transformers' tokenizer) of a family."""
    from transformers import AutoTokenizer

    if request.param == "smollm2":
        folder = request.getfixturevalue("default_model_folder")
    else:
        folder = family_folder(request.param, tmp_path_factory.mktemp(request.param))
    ours = ChatTokenizer.from_folder(folder)
    assert ours.chat_format.name == request.param
    return ours, AutoTokenizer.from_pretrained(folder)


def normalized(ours, text):
    """Qwen2.5's tokenizer composes accents first (NFC); the others keep the text as it is."""
    return unicodedata.normalize("NFC", text) if ours.chat_format.name == "qwen2.5" else text


def template_ids(oracle, chat, **options):
    return oracle.apply_chat_template(plain(chat), return_dict=False, **options)


def test_render_and_prompt_equal_apply_chat_template(family):
    ours, oracle = family
    for seed in range(300):
        chat = random_chat(random.Random(seed))
        assert ours.render(chat)[0] == template_ids(oracle, chat), chat
        expected = template_ids(oracle, chat, add_generation_prompt=True)
        assert ours.prompt(chat) == expected, chat


def test_ids_of_plain_text_equal_transformers_and_decode_to_the_text(family):
    ours, oracle = family
    for seed in range(500):
        text = random_text(random.Random(seed), 120)
        ids = ours.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == normalized(ours, text)


def test_control_text_differs_from_the_template_exactly_by_staying_text(family):
    """The text is the template's, but only the layout's own control tokens are control tokens."""
    ours, oracle = family
    control = ours.vocabulary.control
    tokens = sorted(control)

    def hostile(rng, length=40):
        return random_text(rng, 20) + rng.choice(tokens) + random_text(rng, 20) + "x"

    for seed in range(200):
        chat = random_chat(random.Random(seed), hostile)
        ids, _ = ours.render(chat)
        text = oracle.apply_chat_template(plain(chat), tokenize=False)
        assert oracle.decode(ids, skip_special_tokens=False) == normalized(ours, text)
        harmless = [Message(m.role, "word" if m.content else "") for m in chat]
        controls = [i for i in ids if i in control.values()]
        assert controls == [i for i in ours.render(harmless)[0] if i in control.values()]
        assert ids != template_ids(oracle, chat)


def test_control_text_round_trips_as_text(family):
    ours, _ = family
    for token in ours.vocabulary.control:
        ids = ours.encode(f"a {token}b")
        assert not set(ids) & set(ours.vocabulary.control.values())
        assert ours.decode(ids) == f"a {token}b"


def test_a_turns_prompt_and_reply_begin_the_next_turns_prompt(family):
    ours, _ = family
    end = ours.vocabulary.control[ours.chat_format.marks[1]]  # <|im_end|> or <|eot_id|>
    for seed in range(100):
        rng = random.Random(seed)
        chat = [Message("system", random_text(rng))] if rng.random() < 0.5 else []
        so_far = []
        for _ in range(rng.randrange(2, 6)):
            chat.append(Message("user", random_text(rng)))
            prompt = ours.prompt(chat)
            assert prompt[: len(so_far)] == so_far
            chat.append(Message("assistant", random_text(rng).strip()))
            so_far = prompt + ours.encode(chat[-1].content) + [end]
            assert ours.render(chat)[0][: len(so_far)] == so_far


def test_a_conversation_begins_with_what_its_beginning_alone_would_be(family):
    """Ids and weights: chats that begin with the same messages share their tokens."""
    ours, _ = family
    for seed in range(100):
        chat = random_chat(random.Random(seed))
        whole = ours.render(chat)
        for cut in range(1, len(chat)):
            begun = ours.render(chat[:cut])
            assert [x[: len(begun[0])] for x in whole] == [*begun]


def test_weights_lie_on_the_content_and_the_end_of_turn_alone(family):
    ours, _ = family
    chat = [
        Message("user", "Hello"),
        Message("assistant", "One more film"),
        Message("user", "No"),
        Message("assistant", "Alien 3, then?", weight=0.5),
        Message("system", "Score"),
        Message("assistant", "2", weight=2.0),
    ]
    ids, weights = ours.render(chat)
    assert len(ids) == len(weights)
    end = ours.vocabulary.control[ours.chat_format.marks[1]]  # <|im_end|> or <|eot_id|>
    for weight, content in ((0.5, "Alien 3, then?"), (2.0, "2")):
        weighted = [i for i, w in zip(ids, weights, strict=True) if w == weight]
        assert weighted == ours.encode(content) + [end]
    assert set(weights) == {0.0, 0.5, 2.0}


def test_a_replys_tokens_never_merge_with_the_header(default_model_folder):
    """The template's text has one newline token more; merged, no reply could reach those ids."""
    ours = ChatTokenizer.from_folder(default_model_folder)
    chat = [Message("user", "Hi"), Message("assistant", "\n\nHello", weight=1.0)]
    ids, weights = ours.render(chat)
    start = weights.index(1.0)
    assert ids[:start] == ours.prompt(chat[:1])
    assert ids[start:-1] == ours.encode("\n\nHello") + [2]


def test_end_ids_come_from_both_settings_files_and_the_format(tmp_path):
    for name, expected in (
        ("qwen2.5", {"<|im_end|>", "<|endoftext|>"}),
        ("llama3.1", {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        ours = ChatTokenizer.from_folder(family_folder(name, folder))
        assert ours.stop_ids == {ours.vocabulary.control[token] for token in expected}


def test_smollm2_ends_at_im_end_and_at_endoftext(default_model_folder):
    ours = ChatTokenizer.from_folder(default_model_folder)
    assert (ours.decode([2]), ours.vocabulary.control["<|endoftext|>"]) == ("", 0)
    assert ours.stop_ids == {0, 2}


def byte_level_folder(folder, control, **settings):
    """Write a folder whose tokenizer has the 256 bytes and, numbered after them, `control`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(control))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    return folder


@pytest.mark.parametrize(
    "control, name, ends",
    [
        (CONTROL["qwen2.5"], "qwen2.5", {"<|im_end|>", "<|endoftext|>"}),
        (["<|im_start|>", "<|im_end|>", "<|end|>"], "chatml", {"<|im_end|>", "<|end|>"}),
        (CONTROL["llama3.1"], "llama3.1", {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}),
        (["<s>", "</s>", "[INST]", "[/INST]", "[EOT]"], "mistral-v3", {"</s>", "[EOT]"}),
    ],
)  # fmt: skip
def test_the_known_end_tokens_end_a_reply_without_being_named(tmp_path, control, name, ends):
    ours = ChatTokenizer.from_folder(byte_level_folder(tmp_path, control), name)
    assert ours.stop_ids == {256 + control.index(token) for token in ends}


@pytest.mark.parametrize(
    "control, rows, named",
    [
        (["<|im_start|>", "<|im_end|>"], 256, r"'<\|im_end\|>' has id 257, but vocab_size is 256"),
        (["<|im_start|>", "<|im_end|>"], 257, "id 257, but vocab_size is 257"),
        (["<|im_start|>", "<|im_end|>"], 258, ""),
        (["<|im_start|>", "<|im_end|>", "[PAD]"], 258, ""),  # no layout needs it
    ],
)
def test_a_token_beyond_the_embeddings_is_refused_if_a_prompt_may_hold_it(
    tmp_path, control, rows, named
):
    folder = byte_level_folder(tmp_path, control, vocab_size=rows)
    with pytest.raises(UserError, match=named) if named else nullcontext():
        ours = ChatTokenizer.from_folder(folder)
        said = ours.decode(ours.prompt([Message("user", "Hello")]))
        assert said == "user\nHello\nassistant\n"


def test_plain_tokens_beyond_the_embeddings_are_refused_too(tmp_path):
    """The control tokens lie low here, and the vocabulary is another model's, longer one."""
    byte_level_folder(tmp_path, ["<|im_start|>", "<|im_end|>"], vocab_size=200)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for place, token in enumerate(content["added_tokens"]):
        token["id"] = place
    names = [token["content"] for token in content["added_tokens"]]
    letters = [letter for letter in content["model"]["vocab"] if letter not in names]
    vocab = {token: i for i, token in enumerate([*names, *letters])}
    content["model"]["vocab"] = vocab
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has id {len(vocab) - 1}, but vocab_size is 200"):
        ChatTokenizer.from_folder(tmp_path)


def test_llama3s_tokens_with_another_beginning_fit_no_format(tmp_path):
    """DeepSeek's distilled Llama: the headers are there, `<|begin_of_text|>` has another name."""
    control = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", *CONTROL["llama3.1"][1:]]
    byte_level_folder(tmp_path, control)
    with pytest.raises(UserError, match="fit no known chat format"):
        ChatTokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match=r"llama3 needs the control token <\|begin_of_text\|>"):
        ChatTokenizer.from_folder(tmp_path, "llama3")


def test_a_byte_level_mistral_is_laid_out_without_spaces(tmp_path):
    byte_level_folder(tmp_path, ["<s>", "</s>", "[INST]", "[/INST]"])
    ours = ChatTokenizer.from_folder(tmp_path, "mistral-v3")
    s, end, inst, close = range(256, 260)
    a, b, c, d = (ours.encode(letter) for letter in "abcd")
    chat = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    begun = [s, inst, *a, close, *b, end, inst, *c, close]
    assert ours.prompt(chat) == begun
    assert ours.prompt(chat) + ours.reply("d") == [*begun, *d, end]
    system = ours.prompt([Message("system", "b"), *chat[:1]])
    assert system == [s, inst, *b, *ours.encode("\n\n"), *a, close]


def test_smollm2_splits_digits_one_by_one(default_model_folder):
    """ " 1999" is a space and four digits; a plain byte-level split would give " 1999" whole."""
    ours = ChatTokenizer.from_folder(default_model_folder)
    assert [ours.decode([i]) for i in ours.encode("in 1999")] == ["in", " ", "1", "9", "9", "9"]


def test_llama_date_line_is_pinned_and_can_be_set(tmp_path):
    family_folder("llama3.1", tmp_path)
    chat = [Message("user", "Hi")]
    pinned = ChatTokenizer.from_folder(tmp_path)
    assert "Today Date: 26 Jul 2024\n" in pinned.decode(pinned.prompt(chat))
    other = ChatTokenizer.from_folder(tmp_path, date="01 Jan 2030")
    assert "Today Date: 01 Jan 2030\n" in other.decode(other.prompt(chat))


def test_a_stream_says_the_whole_text_and_never_half_a_character(family):
    ours, _ = family
    for seed in range(100):
        text = random_text(random.Random(seed)) + "👩‍🚀"
        said: list[str] = []
        heard = BatchRow(ours, Request((), Sampling(1000)), [], [], said.append)
        ids = ours.encode(text)
        for i in ids:
            heard.append(i)
        assert not any("\ufffd" in part for part in said)
        heard.append(min(ours.stop_ids))
        assert heard.text == said[-1] == normalized(ours, text)
        assert all(b.startswith(a) for a, b in pairwise(said))
        assert heard.ended and heard.ids == ids


def test_a_reply_cut_within_a_character_says_so(default_model_folder):
    ours = ChatTokenizer.from_folder(default_model_folder)
    said: list[str] = []
    *ids, last = ours.encode("ok 👩‍🚀")[:-1]
    reply = BatchRow(ours, Request((), Sampling(len(ids) + 1)), [], [], said.append)
    for i in ids:
        reply.append(i)
    assert said[-1].startswith("ok ") and not any("\ufffd" in part for part in said)
    reply.append(last)
    assert reply.text.endswith("\ufffd") and not reply.ended


def test_lone_surrogates_become_replacement_characters(default_model_folder):
    ours = ChatTokenizer.from_folder(default_model_folder)
    assert ours.decode(ours.encode("a\ud83d b")) == "a\ufffd b"


def test_an_unknown_format_names_the_choices(tmp_path, default_model_folder):
    with pytest.raises(UserError, match="unknown chat format 'alpaca'.*smollm2.*llama3.1"):
        ChatTokenizer.from_folder(default_model_folder, chat_format="alpaca")
    with pytest.raises(UserError, match=r"llama3.1 needs the control token <\|start_header_id\|>"):
        ChatTokenizer.from_folder(default_model_folder, chat_format="llama3.1")
    content = json.loads((default_model_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}.*fit no known chat format.*--chat-format"):
        ChatTokenizer.from_folder(tmp_path)


def test_every_format_can_be_chosen_by_name(default_model_folder):
    ours = ChatTokenizer.from_folder(default_model_folder, chat_format="chatml")
    assert ours.prompt([Message("user", "Hi")])[:1] == [1]
    assert "SmolLM" not in ours.decode(ours.prompt([Message("user", "Hi")]))
    assert len({each.name for each in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    "fault", ["missing folder", "no tokenizer", "malformed", "not a tokenizer"]
)
def test_a_faulty_folder_is_one_clear_error(tmp_path, fault):
    folder = tmp_path / "model"
    if fault != "missing folder":
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    if fault == "malformed":
        (folder / "tokenizer.json").write_text('{"model": ')
    if fault == "not a tokenizer":
        (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "X"}}')
    with pytest.raises(UserError, match="model"):
        ChatTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def smollm2(default_model_folder):
    return ChatTokenizer.from_folder(default_model_folder)


def numbered_chat(turns, weight=0.0):
    chat = [Message("system", "Be brief.")]
    for number in range(turns):
        chat.append(Message("user", f"question {number}"))
        chat.append(Message("assistant", f"reply {number}", weight))
    return chat


def test_whole_turns_go_and_the_system_prompt_and_the_last_turn_stay(smollm2):
    chat = numbered_chat(5)[:-1]
    length = len(smollm2.prompt(chat))
    assert shorten(smollm2, chat, length) == chat
    kept = shorten(smollm2, chat, length - 1)
    assert kept == chat[:1] + chat[3:]
    assert len(smollm2.prompt(kept)) <= length - 1
    least = [chat[0], chat[-1]]
    assert shorten(smollm2, chat, len(smollm2.prompt(least))) == least


def test_what_follows_the_last_user_turn_stays(smollm2):
    question = Message("system", "How good was it? 0, 1 or 2.")
    chat = [Message("assistant", "Welcome!"), *numbered_chat(2)[1:-1], question]
    assert shorten(smollm2, chat, len(smollm2.prompt(chat[-2:]))) == chat[-2:]
    assert shorten(smollm2, chat, 1) == [Message("user", ""), question]


def test_a_log_loses_its_oldest_lines_and_the_last_line_its_beginning(smollm2):
    log = Message("user", "\n".join(f"Seeker: line {i}" for i in range(20)))
    chat = [Message("system", "Summarise."), log]
    length = len(smollm2.prompt(chat))
    kept = shorten(smollm2, chat, length - 30)
    assert kept[0] == chat[0]
    assert log.content.endswith(kept[1].content) and kept[1].content.startswith("Seeker: line ")
    assert length - 45 < len(smollm2.prompt(kept)) <= length - 30
    last = [chat[0], Message("user", "Seeker: line 19")]
    length = len(smollm2.prompt(last))
    assert shorten(smollm2, chat, length) == last
    for limit in range(length - 4, length):
        prompt, was_shortened = fit_prompt(smollm2, chat, limit)
        assert was_shortened and limit - 3 < len(prompt) <= limit
    assert shorten(smollm2, chat, length - 1)[1].content in "Seeker: line 19"
    assert shorten(smollm2, chat[:1], 1) == chat[:1]


def test_a_reply_has_room_of_its_own(smollm2):
    assert prompt_room(8192) == 8192 - REPLY_ROOM
    assert prompt_room(100) == 75
    chat = numbered_chat(3)[:-1]
    length = len(smollm2.prompt(chat))
    assert fit_prompt(smollm2, chat, length) == (smollm2.prompt(chat), False)
    ids, was_shortened = fit_prompt(smollm2, chat, length - 1)
    assert was_shortened and ids == smollm2.prompt(chat[:1] + chat[3:])


def test_a_chat_that_is_too_long_costs_its_lesson_no_other_chat(smollm2):
    first, long, last = (
        (Message("user", "why"), Message("assistant", text, 1.0))
        for text in ("so", "so " * 60, "no")
    )
    tree = lesson_tree(smollm2, [first, long, last], 50)
    assert tree == lesson_tree(smollm2, [first, last]) != lesson_tree(smollm2, [first, long, last])
    kept, dropped = usable([lesson_tree(smollm2, [long], 50)], 50, Sft())
    assert not kept and dropped == {"dropped with nothing to learn": 1}


def test_a_prompt_as_long_as_the_limit_and_a_reply_beyond_it_are_dropped_and_counted(smollm2):
    """No reply is ever cut: not to nothing, and not to a beginning that nobody wrote."""
    question, reply = Message("user", "why " * 30), Message("assistant", "so " * 30, 1.0)
    fits = (Message("user", "why"), Message("assistant", "so", 1.0))
    trees = [lesson_tree(smollm2, [x]) for x in (fits, (question, reply), (fits[0], reply))]
    kept, dropped = usable(trees, 50, Sft())
    assert kept == [lesson_tree(smollm2, [fits])]
    assert dropped["dropped as too long"] == len(trees) - 1 >= 1
    long, short = smollm2.reply("so " * 30), smollm2.reply("so")
    prompt, _ = fit_prompt(smollm2, [question], 50)
    pairs = [
        pair_tree(smollm2.prompt(fits[:1]), long, short),
        pair_tree(prompt, short, smollm2.reply("no")),
        pair_tree(smollm2.prompt(fits[:1]), short, smollm2.reply("")),
        pair_tree(smollm2.prompt(fits[:1]), short, short),
    ]
    kept, dropped = usable(pairs, 50, Simpo())
    assert not kept
    assert list(dropped.values()) == [2, 1, 1]
