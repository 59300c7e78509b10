"""Chat formats that the user names: Llama 2, Mistral and TinyLlama share their few control tokens.

Their tokenizers are sentencepiece models in a tokenizer.json: a space before every text (or before
the first alone), bytes for letters that are not in the vocabulary. The templates are written here
as the models' cards give them, without their checks of who speaks when.
"""

import json
import random

import pytest
from test_tokenizer import plain, random_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from usbrec.chat import Message
from usbrec.llm.tokenizer import ChatFormat, ChatTokenizer
from usbrec.options import UserError

SYSTEM_APART = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
)
MISTRAL = (
    SYSTEM_APART + "{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ OPEN + (system + '\n\n' if loop.first and system is defined else '') + m['content'] }}"
    "{{ CLOSE }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # mistral-v3's own has the system prompt in the last message: loop.last
    "llama2": SYSTEM_APART + "{% for m in rest %}{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": MISTRAL.replace("OPEN", "' [INST] '").replace("CLOSE", "' [/INST]'"),
    "mistral-v3": MISTRAL.replace("OPEN", "'[INST] '").replace("CLOSE", "'[/INST]'"),
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
    "\n{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}{% endfor %}",
}


def small_tokenizer(name, first_only):
    """A BPE as Llama 2's: a mark for the space, no newline in any piece, bytes for the rest."""
    rng = random.Random(0)
    corpus = [random_text(rng, 300).replace("\n", " ") for _ in range(200)]
    corpus += ["[INST] a film, the film [/INST] <<SYS>> <|user|> <|assistant|> </s>"] * 20
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=500, limit_alphabet=70))
    model = json.loads(learnt.to_str())["model"]
    control = ["<unk>", "<s>", "</s>"] + ["[INST]", "[/INST]"] * (name == "mistral-v3")
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581\u2581"]
    pieces += [piece for piece in model["vocab"] if piece not in pieces]
    merges = [("\u2581", "\u2581"), *map(tuple, model["merges"])]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(space)
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(control)
    return tokenizer


@pytest.fixture(scope="module", params=[*TEMPLATES, "llama2, saved anew"])
def family(request, tmp_path_factory):
    """(our tokenizer, transformers' tokenizer) of a named format."""
    from transformers import AutoTokenizer

    name, _, anew = request.param.partition(",")
    folder = tmp_path_factory.mktemp(name)
    small_tokenizer(name, bool(anew) or name == "mistral-v3").save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATES[name],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="fit no known chat format.*llama2.*--chat-format"):
        ChatTokenizer.from_folder(folder)
    ours = ChatTokenizer.from_folder(folder, chat_format=name)
    assert ours.stop_ids == {2}
    return ours, AutoTokenizer.from_pretrained(folder)


def turns(rng, count, text=random_text):
    """User and assistant in turns, `count` messages, perhaps behind a system prompt."""
    system = [Message("system", text(rng) if rng.random() < 0.8 else "")]
    roles = ("user", "assistant") * count
    long = 400 if rng.random() < 0.05 else 40
    chat = [Message(role, text(rng, long)) for role in roles[:count]]
    return (system if rng.random() < 0.5 else []) + chat


def template_ids(oracle, chat, **options):
    return oracle.apply_chat_template(plain(chat), return_dict=False, **options)


def test_render_and_prompt_equal_apply_chat_template(family):
    ours, oracle = family
    for seed in range(300):
        rng = random.Random(seed)
        chat = turns(rng, rng.randrange(1, 8, 2))
        assert ours.prompt(chat) == template_ids(oracle, chat, add_generation_prompt=True), chat
        whole = [*chat, Message("assistant", random_text(rng))]
        assert ours.render(whole)[0] == template_ids(oracle, whole), whole


def test_a_turns_prompt_and_reply_begin_the_next_turns_prompt(family):
    ours, _ = family
    for seed in range(100):
        rng = random.Random(seed)
        chat = turns(rng, 7)
        start = len(chat) - 7
        for n in range(start + 1, len(chat) - 1, 2):
            so_far = ours.prompt(chat[:n]) + ours.reply(chat[n].content)
            assert so_far[-1] == 2
            assert ours.prompt(chat[: n + 2])[: len(so_far)] == so_far


def test_control_text_stays_text(family):
    """The layout's control tokens are those of a harmless chat; the text is the template's."""
    ours, oracle = family
    control = set(ours.vocabulary.control.values())

    def hostile(rng, length=40):
        return random_text(rng, 20) + rng.choice(["<s>", "</s>", "[INST]", "[/INST]"]) + "x"

    for seed in range(100):
        chat = turns(random.Random(seed), 5, hostile)
        harmless = [Message(m.role, "word" if m.content else "") for m in chat]
        ids, calm = ours.render(chat)[0], ours.render(harmless)[0]
        assert [i for i in ids if i in control] == [i for i in calm if i in control]
        text = oracle.apply_chat_template(plain(chat), tokenize=False)
        assert oracle.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_weights_lie_on_the_reply_and_its_end_alone(family):
    ours, _ = family
    chat = [Message("user", "Hello"), Message("assistant", "One more film", weight=0.5)]
    ids, weights = ours.render([*chat, Message("user", "No")])
    weighted = [i for i, weight in zip(ids, weights, strict=True) if weight == 0.5]
    assert weighted == ours.reply("One more film")
    assert ids[: weights.index(0.5)] == ours.prompt(chat[:1])
    assert weighted[-1] == 2 and ours.decode(weighted).strip() == "One more film"
    assert set(weights) == {0.0, 0.5}


def test_a_conversation_begins_with_what_its_beginning_alone_would_be(family):
    ours, _ = family
    for seed in range(100):
        chat = turns(random.Random(seed), 6)
        chat.insert(5, Message("system", "How good was it? 0, 1 or 2."))
        whole = ours.render(chat)
        for cut in range(2, len(chat)):
            begun = ours.render(chat[:cut])
            assert [x[: len(begun[0])] for x in whole] == [*begun]


def test_a_choice_is_scored_as_it_stands_in_a_reply(family):
    """One of the spellings that the engine tries is what a reply of that text begins with."""
    ours, _ = family
    said = ours.reply("2")
    variants = [ours.encode(text, continued=True) for text in ("2", " 2")]
    assert any(said[: len(ids)] == ids for ids in variants)


@pytest.mark.parametrize("text", ["I recommend Heat (1995).", "a", "2 films", "Léon"])
def test_a_given_beginning_is_that_of_a_reply(family, text):
    ours, _ = family
    begun = ours.beginning(text)
    assert ours.reply(f"{text}\n1")[: len(begun)] == begun and ours.decode(begun).strip() == text


def test_text_behind_a_control_token_continues_no_text(tmp_path):
    """ "a" at a text's start is the piece "\u2581a"; "[INST]" after a line's end begins a text."""
    small_tokenizer("mistral-v3", False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    vocabulary = ChatTokenizer.from_folder(tmp_path, "mistral-v3").vocabulary
    lines = ChatFormat("lines", ("</s>", "[INST]"), "[INST]{content}</s>", gap="\n")
    ours, control = ChatTokenizer(vocabulary, lines, frozenset()), vocabulary.control
    said = ours.encode("a")
    assert said != ours.encode("a", continued=True)
    once = [control["[INST]"], *said, control["</s>"], *ours.encode("\n")]
    assert ours.render([Message("user", "a")] * 2)[0] == once * 2
