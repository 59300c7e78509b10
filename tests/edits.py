"""Random edits of what users hand over: each ends in an answer or in one sentence.

    python tests/edits.py --count 1000000 --seed 0  # 1 h
    python tests/edits.py --count 1 --seed 4711     # that edit again, with its traceback

Edited are the rows of a dataset, catalogues, texts about films, dialogues, pairs, the notes of a
run, adapter_config.json, a model's config.json and tokenizer files, and results files: bytes, and
the structure of the JSON. The readers are called as train.py and infer.py call them, and what they
return is put to use. Edit n of a run is drawn from seed + n alone.

A sentence is a UserError, or an error of the system, as `run_together` prints both. It has one
line, and a UserError's is of a bounded length. Everything else is a fault, and so is an edit
without an end. test_edits.py runs some of the edits. Left out: the bytes of weights
(test_hostile_files.py).
"""

import json
import random
import re
import signal
import sys
import tempfile
import traceback
from argparse import ArgumentParser, RawTextHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from small_run import write_small_model  # noqa: E402

import infer  # noqa: E402
from usbrec import loading, runs  # noqa: E402
from usbrec.chat import Message  # noqa: E402
from usbrec.crs import agents, datasets, lessons, wishes  # noqa: E402
from usbrec.crs.catalogue import LONGEST_TITLE, Catalogue, Item, read_item  # noqa: E402
from usbrec.crs.dialogue import Example, format_dialogue  # noqa: E402
from usbrec.crs.evaluation import gold_labels, titles_in  # noqa: E402
from usbrec.crs.wishes import describe, rewrite  # noqa: E402
from usbrec.llm.adapter_files import load_adapter, save_adapter  # noqa: E402
from usbrec.llm.checkpoint import empty_decoder, load_model  # noqa: E402
from usbrec.llm.endpoint import is_server  # noqa: E402
from usbrec.llm.lora import LoraConfig, add_adapter  # noqa: E402
from usbrec.llm.model_config import load_config  # noqa: E402
from usbrec.llm.packing import pair_tree  # noqa: E402
from usbrec.llm.tokenizer import ChatTokenizer, fit_prompt  # noqa: E402
from usbrec.options import UserError, seed_for  # noqa: E402
from usbrec.settings import ADAPTERS  # noqa: E402

Rng = random.Random
PATIENCE = 20.0  # seconds of processor time for an edit, which takes milliseconds
LONG = 100_000  # characters of a very long string
LONGEST_SENTENCE = 1_000  # characters
WORDS = (
    "", " ", "  ", "\n", "\r", "\t", "\0", "\x1b[31m", "\x85", "\u2028", "\ufeff", "\u200b",
    "\u202e", "\ud800", "\udc80", "\U0001f3ac", "e\u0301", "\u0301", "\u0130", "\u00df", "\ufb01",
    "\uff11", "春江花月", "看了", "《", "》", "กรุงเทพ", "바람길을", "カサブランカ", "Ночь", "ΟΔΟΣ",
    "ليلة", "देवदास",
    "(1995)", "(1995/I)", "(٢٠٠١)", "（2001）", "1995", "(", ")", "[", "]", "{", "}", "\"", "'",
    "\\",
    ",", ";", ":", ".", "!", "-", " - ", "/", "|", "*", "+", "#1", "&", "%", "@12", "<|im_end|>",
    "a", "A", "The", ", The", "the ", "It", "Up", "2", "II", " Part Two", "a.k.a. ", "aka", "film",
    "watch ", "Likes: ", "Dislikes: ", "by ", "with ", " mood", "no", "null", "true", "1e999", "-1",
    "..", "/etc/passwd", "http://", "http://localhost:8000/v1#a", "all-linear", "none", "{date}",
    "llama", "chatglm", "mistral", "llama3", "linear", "silu", "full_attention",
    "a{99999999999}", "(.*",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "1024", "1995", "-0.0", "0.5", "1.0", "1e-300", "1e300", "1e999",
    "NaN", "Infinity", "-Infinity", "9" * 18, "9" * 30, "9" * 5000, "-" + "9" * 30, "16777216",
    "16777217", "0x10", "01", "true", "false", "null",
)  # fmt: skip
FACTS = {"model": "small", "seed": 0, "search": {"samples": 3, "cards": False}}
MADE = [
    {"reply": "Try Brass Harbour (1991).", "score": 1.5, "items": ["Brass Harbour (1991)"]},
    {"reply": "", "score": None, "items": []},
    {"reply": "Ночь?", "score": 0.25, "items": [], "search": {"best": 0, "values": [0.5, 1]}},
]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
CONFIGS = {
    "llama": {**SIZES, "attention_bias": False, "sliding_window": None, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}},
    "mistral": {**SIZES, "head_dim": 8, "sliding_window": 4096, "eos_token_id": 2},
    "qwen2": {**SIZES, "layer_types": ["full_attention"] * 2, "use_sliding_window": False,
              "rope_parameters": {"type": "default", "rope_theta": 1e6}},
    "chatglm": {"num_layers": 2, "padded_vocab_size": 64, "hidden_size": 32, "seq_length": 512,
                "ffn_hidden_size": 48, "num_attention_heads": 4, "multi_query_group_num": 2,
                "kv_channels": 8, "layernorm_epsilon": 1e-5, "add_qkv_bias": True,
                "multi_query_attention": True, "rope_ratio": 1.0, "post_layer_norm": True},
}  # fmt: skip
FILMS = {
    "0": {"name": "Brass Harbour (1991)", "year": "1991", "genre": ["horror", "science fiction"],
          "director": ["Ada Prow"], "star": ["Bo Lind", "Cy Ray"], "mood": ["tense"]},
    "1": {"name": "Velvet Orchard (2004)", "year": 2004, "genre": "comedy", "actor": ["Cy Ray"]},
    "2": {"name": "Postman, The (Postino, Il) (1994)", "genre": ["romance film"]},
    "3": {"name": "Up (2009)"},
    "4": {"name": "Night Train (a.k.a. The Late One) (1959/I)", "director": ["Ada Prow"]},
    "5": {"name": "春江花月 (2011)", "genre": ["drama"]},
    "6": {"name": "Night Train - Remastered (2011)", "genre": ["drama"]},
}  # fmt: skip
ROWS = [
    {"dialog_id": "d-0", "turn_id": 3, "rec": ["Brass Harbour (1991)"], "entity": [],
     "context": ["", "Hi! Which films?", "A tense one, please. I saw Velvet Orchard."],
     "resp": "My tip is Brass Harbour (1991), a horror film by Ada Prow.",
     "profile": "Likes: horror, tense mood, with Bo Lind. Dislikes: comedy. Seen: Up (2009).",
     "explanation": "It is a 1991 horror film with Bo Lind.",
     "reactions": {"accept": "Yes, thanks!", "refuse": "No, something tense."}},
    {"dialog_id": 7, "turn_id": "1", "context": ["Something funny?"], "resp": "Velvet Orchard.",
     "rec": ["Velvet Orchard (2004)", "Up (2009)"]},
]  # fmt: skip
SAID = {"messages": [
    {"role": "assistant", "content": "Hi!"}, {"speaker": "Seeker", "text": "春江花月 or Up?"},
]}  # fmt: skip
PAIR = {
    "prompt": [{"role": "system", "content": "You recommend."}, {"role": "user", "content": "Hi"}],
    "chosen": [{"role": "assistant", "content": "Brass Harbour (1991)."}],
    "rejected": [{"role": "assistant", "content": "Up."}],
}


class Hung(BaseException):
    """No answer within the patience; no reader can catch it by mistake."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Hung if the block takes so many seconds of this process's own time."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung(f"no answer within {seconds} seconds of processor time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# --- edits ------------------------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key may come twice."""


class Literal(str):
    """Text that stands in JSON as it is."""


def mutated(rng: Rng, content: bytes) -> bytes:
    """Return the bytes with some changed, cut, doubled or inserted."""
    edited = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(edited) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(edited):
            edited[at] = rng.randrange(256)
        elif kind == 1:
            del edited[at : at + rng.randrange(20)]
        elif kind == 2:
            edited[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
        else:
            edited[at:at] = edited[at : at + 30]
    return bytes(edited)


def random_text(rng: Rng) -> str:
    """Return a text of a few words, or now and then a very long one."""
    words = [rng.choice(WORDS) for _ in range(rng.randrange(6))]
    if rng.random() < 0.0005:
        unit = "".join(words[:3]) or " "
        return unit * (rng.choice((LONG, LONG // 10)) // len(unit))
    return "".join(words)


def random_value(rng: Rng) -> Any:
    """Return a JSON value of any type; deep ones go beyond what Python parses."""
    kind = rng.randrange(8)
    if kind < 3:
        return random_text(rng)
    if kind < 6:
        return Literal(rng.choice(NUMBERS))
    if kind == 6:
        parts = [random_value(rng) for _ in range(rng.randrange(3))]
        return Pairs((random_text(rng), x) for x in parts) if rng.random() < 0.5 else parts
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"name":', "}]")))
    depth = rng.randrange(1, 1100)
    return Literal(opening * depth + "1" + closing * depth)


def edit_tree(rng: Rng, box: list[Any]) -> None:
    """Edit one place of a JSON value; `box` is a list or Pairs around it."""
    while True:
        at = rng.randrange(len(box))
        inner = box[at][1] if isinstance(box, Pairs) else box[at]
        if not isinstance(inner, list) or not inner or rng.random() < 0.2:
            break
        box = inner
    is_pair, kind = isinstance(box, Pairs), rng.randrange(9)
    key = box[at][0] if is_pair else ""

    def put(value: Any, name: str = key) -> None:
        box[at] = (name, value) if is_pair else value

    if kind == 0:
        del box[at]
    elif kind == 1:
        box.insert(rng.randrange(len(box) + 1), box[at])
    elif kind == 2 and is_pair:
        name = rng.choice([random_text(rng), key.upper(), f"{key} ", rng.choice(box)[0]])
        put(inner, name)
    elif kind == 3:
        put(rng.choice([[inner], Pairs([("a", inner)]), Pairs([(random_text(rng), inner)])]))
    elif kind == 4:
        other = rng.randrange(len(box))
        box[at], box[other] = box[other], box[at]
    elif kind == 5 and isinstance(inner, str):
        place = rng.randrange(len(inner) + 1)
        put(inner[:place] + random_text(rng) + inner[place + rng.choice((0, 0, 1, 5)) :])
    elif kind == 6 and not isinstance(inner, list):
        put(Literal(inner) if isinstance(inner, str) and inner.isdigit() else json.dumps(inner))
    elif kind == 7 and isinstance(inner, int | float):
        put(Literal(rng.choice(NUMBERS)))
    else:
        put(random_value(rng))


def json_of(node: Any, ascii: bool) -> str:
    """Return a tree as JSON text."""
    if isinstance(node, Literal):
        return node
    if isinstance(node, Pairs):
        pairs = (f"{json.dumps(k, ensure_ascii=ascii)}: {json_of(x, ascii)}" for k, x in node)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(node, list):
        return f"[{', '.join(json_of(x, ascii) for x in node)}]"
    return json.dumps(node, ensure_ascii=ascii)


def edited(rng: Rng, content: bytes) -> bytes:
    """Return a file's content edited: its bytes, or the values of its JSON or of its lines."""
    kind = rng.random()
    if kind < 0.15:
        return mutated(rng, content)
    if kind < 0.2:
        at = rng.randrange(len(content) + 1)
        text = content.decode("utf-8")
        noise = random_text(rng).encode("utf-8", "surrogatepass")
        wide, bom, crlf = text.encode("utf-16"), b"\xef\xbb\xbf", content.replace(b"\n", b"\r\n")
        wholes = (content[:at], content * 2, bom + content, wide, crlf, content + noise, noise)
        return rng.choice(wholes)
    lines = content.decode("utf-8").splitlines()
    texts = lines if all(line[:1] == "{" and line[-1:] == "}" for line in lines) else [content]
    trees = [json.loads(x, object_pairs_hook=Pairs) for x in texts]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if trees:
            edit_tree(rng, trees)
    ascii = rng.random() < 0.7
    text = "".join(json_of(x, ascii) + "\n" for x in trees)
    return text.encode("utf-8", "surrogatepass")


# --- what is edited, and how it is read and used ----------------------------------------------


def random_talk(rng: Rng, films: Catalogue) -> str:
    """Return a text that names some of the films among other words."""
    parts = []
    for _ in range(rng.randrange(1, 6)):
        item = rng.choice(films.items) if films.items else Item("x", "x")
        text = rng.choice((item.title, item.name, item.name.lower(), item.name.upper()))
        at = rng.randrange(len(text) + 1)
        parts.append(rng.choice((text, text[:at], text[at:], text[:at] + random_text(rng))))
        parts.append(random_text(rng) if rng.random() < 0.5 else rng.choice((" ", ", ", " and ")))
    return "".join(parts)


def use_films(films: Catalogue, rng: Rng) -> None:
    """Ask all that a run asks of a catalogue about a random text."""
    text, told = random_talk(rng, films), random_talk(rng, films)
    item, other = (rng.choice(films.items) if films.items else Item(x, x) for x in "ab")
    title = rng.choice((item.title, random_text(rng), told))
    titles = [title[:LONGEST_TITLE], other.title]  # rows with a longer one are refused
    found = films.find(text)
    assert all(0 <= x.start < x.end <= len(text) and x.items for x in found), "a span outside"
    titles_in(films, text)
    films.hide(text, titles)
    films.named(rng.choice(titles))
    films.grade(item, titles)
    films.grade_of(text, titles)
    films.mentions(text, titles)
    wishes.fit(item, wishes.read_profile(f"Likes: {text}. Dislikes: {told}.", films))
    rewrite(f"{text} {wishes.card(item)} {describe(item)}", item, other)


def use_example(x: Example, films: Catalogue) -> None:
    """Use a row as the evaluation and the search do."""
    format_dialogue(x.history)
    seed_for(0, x.dialog_id, x.turn_id)
    films.hide(x.response, x.items)
    gold_labels(films, x, [films.first(x.response)])
    wishes.read_profile(x.profile or x.response, films)
    agents.external_judge_prompt(x.history, x.explanation or "", x.items)


@dataclass
class Place:
    """The folder of the original files, and what is read with them."""

    folder: Path

    def __post_init__(self) -> None:
        self.films = Catalogue(map(read_item, FILMS.values()))
        self.known = runs.Results(self.folder / "rows.jsonl", 2, "made", FACTS)
        write = partial(self.write, self.folder)
        for split in datasets.SPLITS:
            write(f"{split}.jsonl", *ROWS)
        write("items.json", FILMS)
        write("said.json", [SAID, SAID["messages"]])
        write("said.jsonl", SAID, SAID)
        write("pairs.jsonl", PAIR, PAIR)
        self.remake()
        self.write_model()
        self.write_run()

    @staticmethod
    def write(folder: Path, name: str, *values: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(x, ensure_ascii=False) + "\n" for x in values)
        (folder / name).write_text("".join(lines), "utf-8")

    def write_model(self) -> None:
        """Write a model's folder with an adapter's beside it, and load both."""
        model = write_small_model(self.folder / "model", num_hidden_layers=1)
        self.write(model, "generation_config.json", {"eos_token_id": [1, 2], "top_p": 0.9})
        self.model, self.tokenizer = load_model(model), ChatTokenizer.from_folder(model)
        for name, settings in CONFIGS.items():
            folder = self.folder / "configs" / name
            self.write(folder, "config.json", {"model_type": name, **settings})
        add_adapter(self.model, "a", LoraConfig(r=2, target_modules=("q_proj",)), seed=0)
        save_adapter(self.model, "a", self.folder / "adapter", "base")

    def write_run(self) -> None:
        """Write a run's notes, beside adapters that only seem to be there."""
        made = {"model": {"model": "small", "dtype": "float32", "device": "cpu"}, "data-dir": None}
        noted = {**made, "data": str(self.folder), "seed": 0, "lora": {"r": 8, "names": ["all"]}}
        for stage, name in ADAPTERS.items():
            self.write(self.folder / "run" / "options", f"{stage}.json", noted)
            self.write(self.folder / "run" / name, "adapter_model.safetensors")
        self.noted = noted
        self.flags = infer.build_parser().parse_args(["--run-dir", str(self.folder / "run")])

    def remake(self) -> list[Any]:
        """Return the rows of the results file: those that it has, the others made anew."""
        with redirect_stderr(StringIO()):  # the bar
            return runs.run_chunks(self.known, MADE, lambda chunk: chunk)

    # --- the readers, each with what follows it ---

    def rows(self, rng: Rng) -> None:
        examples = datasets.read_examples(self.folder / "train.jsonl")
        for x in examples:
            use_example(x, self.films)
        if rng.random() < 0.05:
            options = lessons.LessonOptions()
            draws = lessons.Suggestions(self.films, {x["name"]: 1 for x in FILMS.values()})
            lessons.recommender_lessons(examples, examples, self.films, options)
            lessons.simulator_lessons(examples, draws, 0, options)
            lessons.summary_lessons(examples, self.films, options)
            lessons.card_lessons(examples, draws, 0, options)

    def split(self, rng: Rng) -> None:
        datasets.load_split(str(self.folder), "train")

    def items(self, rng: Rng) -> None:
        use_films(Catalogue.load(self.folder / "items.json"), rng)

    def talk(self, rng: Rng) -> None:
        use_films(self.films, rng)

    def said(self, name: str, rng: Rng) -> None:
        for dialogue in datasets.read_dialogues(self.folder / name):
            prompt = agents.recommender_prompt(dialogue)
            fit_prompt(self.tokenizer, prompt, 512)
            agents.summary_prompt(dialogue)

    def pairs(self, rng: Rng) -> None:
        for _, pair in datasets.read_pairs(self.folder / "pairs.jsonl"):
            messages = [Message(x["role"], x["content"]) for x in pair["prompt"]]
            prompt, _ = fit_prompt(self.tokenizer, messages, 512)
            replies = [self.tokenizer.reply(pair[x][0]["content"]) for x in ("chosen", "rejected")]
            pair_tree(prompt, *replies)

    def notes(self, rng: Rng) -> None:
        setup = infer.set_up(self.flags)
        loading.pick_dtype(setup.model.dtype, loading.pick_device(setup.model.device))
        for name in setup.sides.values():
            is_server(name) or loading.is_adapter(name)
        datasets.load_catalogue(setup.data, setup.data_dir)

    def claims(self, rng: Rng) -> None:
        note = self.folder / "run" / "options" / "simulator.json"
        runs.claim(note, self.noted, [self.folder], "start over")

    def adapter(self, rng: Rng) -> None:
        load_adapter(self.model, self.folder / "adapter", "b")

    def config(self, rng: Rng) -> None:
        for name in CONFIGS:
            config = load_config(self.folder / "configs" / name)
            assert config.head_dim % 2 == 0 and config.num_hidden_layers > 0
            if config.num_hidden_layers < 8 and rng.random() < 0.05:
                empty_decoder(config)
        if rng.random() < 0.1:
            load_model(self.folder / "model")

    def tokens(self, rng: Rng) -> None:
        tokenizer = ChatTokenizer.from_folder(self.folder / "model")
        ids = tokenizer.prompt([Message("system", "Hi"), Message("user", random_text(rng))])
        tokenizer.decode(ids)
        tokenizer.reply("Brass Harbour (1991), 春江花月.")

    def results(self, rng: Rng) -> None:
        assert self.remake() == MADE, "other rows than those that were made"

    def targets(self) -> list["Target"]:
        """Return all that is edited."""
        return [
            Target("rows", 14, ("train.jsonl",), self.rows),
            Target("split", 2, ("train.jsonl", "test.jsonl", "items.json"), self.split),
            Target("items", 14, ("items.json",), self.items),
            Target("texts", 14, (), self.talk),
            Target("dialogues", 6, ("said.json",), partial(self.said, "said.json")),
            Target("dialogue lines", 6, ("said.jsonl",), partial(self.said, "said.jsonl")),
            Target("pairs", 6, ("pairs.jsonl",), self.pairs),
            Target("notes", 8, tuple(f"run/options/{x}.json" for x in ADAPTERS), self.notes),
            Target("claims", 3, ("run/options/simulator.json",), self.claims),
            Target("adapter", 8, ("adapter/adapter_config.json",), self.adapter),
            Target(
                "config", 10,
                ("model/config.json", *(f"configs/{x}/config.json" for x in CONFIGS)), self.config,
            ),
            Target(
                "tokenizer", 4,
                ("model/config.json", "model/generation_config.json", "model/tokenizer.json"),
                self.tokens,
            ),
            Target("results", 3, ("rows.jsonl", "rows.jsonl.options.json"), self.results),
        ]  # fmt: skip


class Target(NamedTuple):
    """A kind of file: its share of the edits, the names of which one is edited, and its reader."""

    name: str
    share: int
    files: Sequence[str]
    read: Callable[[Rng], None]


# --- the run ----------------------------------------------------------------------------------


@dataclass
class Found:
    """What edits ended in: counts by target, of refusals by kind, and the seeds of faults."""

    answers: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)  # by target
    kinds: Counter[str] = field(default_factory=Counter)  # of refusals, by their sentence
    faults: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    traces: dict[str, str] = field(default_factory=dict)  # of the first edit of a fault


def kind_of(sentence: str, folder: Path) -> str:
    """Return a refusal without what was given: names, values, numbers and places."""
    told = sentence.replace(str(folder), "")
    told = re.sub(r"""'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?|\[.*|\{.*|got .*""", "_", told)
    return re.sub(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", "N", told)[:90]


def fault_of(error: BaseException) -> str:
    """Return the type of an error, and the last place in our code that it went through."""
    places = [
        f"{Path(x.filename).relative_to(ROOT)}:{x.lineno} {x.name}"
        for x in traceback.extract_tb(error.__traceback__)
        if Path(x.filename).is_relative_to(ROOT) and "tests" not in Path(x.filename).parts
    ]
    return f"{type(error).__name__} in {places[-1] if places else 'the edit'}: {error!s:.80}"


def try_edit(target: Target, folder: Path, rng: Rng, found: Found, seed: int) -> None:
    """Edit a file, read it, note how that ended, and restore it."""
    path = folder / rng.choice(target.files) if target.files else None
    before = {x: x.read_bytes() for x in [path] if x}
    if path and path.name.startswith("rows.jsonl"):  # the reader completes what was cut off
        before = {x: x.read_bytes() for x in sorted(folder.glob("rows.jsonl*"))}
    try:
        if path:
            path.write_bytes(edited(rng, before[path]))
        with within(PATIENCE):
            target.read(rng)
        found.answers[target.name] += 1
    except (UserError, OSError) as error:
        told = str(error)
        found.refusals[target.name] += 1
        found.kinds[f"{target.name}: {kind_of(told, folder)}"] += 1
        is_long = len(told) > LONGEST_SENTENCE and isinstance(error, UserError)
        if len(told.splitlines()) != 1 or is_long:
            size = "long" if is_long else f"{len(told.splitlines())} lines"
            found.faults[f"no sentence ({size}) in {fault_of(error)}"].append(seed)
        elif path and target.name != "notes" and str(folder) not in told:
            found.faults[f"no place in {fault_of(error)}"].append(seed)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a package in Rust is no Exception
        found.faults[fault_of(error)].append(seed)
        found.traces.setdefault(fault_of(error), "".join(traceback.format_exception(error)))
    finally:
        for place, content in before.items():
            place.write_bytes(content)


def run(count: int, seed: int, folder: Path, targets: Sequence[Target]) -> Found:
    """Return what `count` edits ended in; the n-th is drawn from seed + n."""
    found, shares = Found(), [x.share for x in targets]
    for number in range(seed, seed + count):
        rng = Rng(number)
        [target] = rng.choices(targets, shares)
        try_edit(target, folder, rng, found, number)
    return found


def show(found: Found, kinds: int) -> None:
    """Print the counts, the most frequent kinds of refusals, and every fault."""
    print(f"{'edited':16} {'answers':>8} {'refusals':>8}")
    for name in sorted({*found.answers, *found.refusals}):
        print(f"{name:16} {found.answers[name]:8} {found.refusals[name]:8}")
    print(f"{'all':16} {found.answers.total():8} {found.refusals.total():8}")
    shown = found.kinds.most_common(kinds)
    print(f"\n{len(found.kinds)} kinds of refusals, the {len(shown)} most frequent:")
    for kind, count in shown:
        print(f"{count:8} {kind}")
    print(f"\n{len(found.faults)} faults, in {sum(map(len, found.faults.values()))} edits")
    for fault, seeds in found.faults.items():
        print(f"\n{len(seeds)} times, seeds {seeds[:10]}: {fault}\n{found.traces.get(fault, '')}")


def main() -> int:
    """Edit; return 1 if an edit ended in a fault."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="edits (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first edit (default 0)")
    parser.add_argument("--kinds", type=int, default=40, help="refusals shown (default 40)")
    flags = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what UTF-8 cannot
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder).resolve())
        found = run(flags.count, flags.seed, place.folder, place.targets())
    show(found, flags.kinds)
    return int(bool(found.faults))


if __name__ == "__main__":
    sys.exit(main())
