"""Chats laid out in token ids, piece by piece, together with the weight of each token's loss.

No text is rendered and searched again: a control token comes from the format alone and a message's
content is always encoded as plain text. The layouts are those of the models' published templates
(`smollm2`, `qwen2.5`, `llama3.1`, ...), token for token, with one exception: an assistant's
content is never merged with the newline of its header, since a reply's tokens come after that
newline one by one. Which format a model wants is read off its control tokens; `zephyr` (TinyLlama),
`llama2`, `mistral` (v0.1, v0.2) and `mistral-v3`, which have the same few, are named by the user.

    tokenizer = ChatTokenizer.from_folder(Path("models/smollm2-135m-instruct"))
    ids = tokenizer.prompt([Message("user", "Hello")])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from usbrec.chat import Message
from usbrec.llm.files import file_in, read_json
from usbrec.llm.gguf_file import GgufFile
from usbrec.llm.vocabulary import SentencePieceVocabulary, TokenizersVocabulary
from usbrec.options import UserError

LLAMA31_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class ChatFormat:
    """How a family writes a message: header, content, end. `{role}` stands for the role.

    A piece of `begin`, `header` or `end` that is a control token of the model is that token; any
    other piece is text. A format with `user_header` has no system role: a system prompt stands
    inside the first user's message, and later system messages are users'.
    """

    name: str
    marks: tuple[str, ...]  # the control tokens by which the format is recognised
    header: tuple[str, ...]
    end: tuple[str, ...]  # its control token is the end of turn; empty: the next header ends it
    begin: tuple[str, ...] = ()
    default_system: str | None = None  # put first where the chat has no system prompt
    system_prefix: str = ""  # put before the first system prompt's content; {date} is pinned
    trim: bool = False  # the template strips white space around the content
    separate: bool = False  # header and content are encoded apart for every role
    stops: tuple[str, ...] = ()  # control tokens that end a reply besides the end of turn
    user_header: tuple[str, ...] = ()  # `header` and `end` are then the assistant's alone
    user_end: tuple[str, ...] = ()
    system: str = ""  # how a system prompt is written before the first user's content
    reply_prefix: str = ""  # stands before an assistant's content and is a part of the reply
    by_name: bool = False  # its marks tell nothing: taken only where the user names it


CHATML = ChatFormat(
    name="chatml",
    marks=("<|im_start|>", "<|im_end|>"),
    header=("<|im_start|>", "{role}\n"),
    end=("<|im_end|>", "\n"),
)
LLAMA3 = ChatFormat(
    name="llama3",
    marks=("<|start_header_id|>", "<|eot_id|>"),
    begin=("<|begin_of_text|>",),
    header=("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"),
    end=("<|eot_id|>",),
    trim=True,
    stops=("<|end_of_text|>",),
)
MISTRAL = ChatFormat(
    name="mistral",
    marks=("<s>", "</s>"),
    begin=("<s>",),
    header=(),
    end=("</s>",),
    user_header=(" [INST] ",),
    user_end=(" [/INST]",),
    system="{}\n\n",
    reply_prefix=" ",
    by_name=True,
)
# The first whose marks the tokenizer has is taken.
FORMATS = (
    replace(
        CHATML,
        name="smollm2",
        marks=(*CHATML.marks, "<gh_stars>"),
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    replace(
        CHATML,
        name="qwen2.5",
        marks=(*CHATML.marks, "<|fim_prefix|>"),
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    replace(
        CHATML,
        name="qwen2",
        marks=(*CHATML.marks, "<|endoftext|>"),
        default_system="You are a helpful assistant.",
    ),
    CHATML,
    replace(
        LLAMA3,
        name="llama3.1",
        marks=(*LLAMA3.marks, "<|eom_id|>"),
        default_system="",
        system_prefix="Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n",
        stops=(*LLAMA3.stops, "<|eom_id|>"),
    ),
    LLAMA3,
    ChatFormat(
        name="chatglm3",
        marks=("[gMASK]", "sop", "<|user|>", "<|observation|>"),
        begin=("[gMASK]", "sop"),
        header=("<|{role}|>", "\n"),
        end=(),
        separate=True,
        stops=("<|user|>", "<|observation|>"),
    ),
    ChatFormat(
        name="zephyr",
        marks=("</s>",),
        header=("<|{role}|>\n",),
        end=("</s>", "\n"),
        by_name=True,
    ),
    ChatFormat(
        name="llama2",
        marks=("<s>", "</s>"),
        header=(),
        end=(" ", "</s>"),
        user_header=("<s>", "[INST] "),
        user_end=(" [/INST]",),
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        reply_prefix=" ",
        trim=True,
        by_name=True,
    ),
    MISTRAL,
    replace(
        MISTRAL,
        name="mistral-v3",
        marks=(*MISTRAL.marks, "[INST]", "[/INST]"),
        user_header=("[INST]", " "),
        user_end=("[/INST]",),
    ),
)


@dataclass
class Row:
    """Token ids and the weights of their losses, filled from left to right."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float = 0.0) -> None:
        """Append tokens that share a weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)


class ChatTokenizer:
    """A vocabulary and a chat format: messages -> ids and weights, and ids -> text."""

    def __init__(
        self,
        vocabulary: TokenizersVocabulary | SentencePieceVocabulary,
        chat_format: ChatFormat,
        end_ids: frozenset[int] = frozenset(),
        date: str = LLAMA31_DATE,
    ) -> None:
        self.vocabulary = vocabulary
        self.chat_format = chat_format
        self.date = date
        missing = [mark for mark in chat_format.marks if mark not in vocabulary.control]
        if missing:
            raise UserError(
                f"the chat format {chat_format.name} needs the control token {missing[0]}, "
                "which this tokenizer lacks"
            )
        self._ends_in_text = not {*chat_format.end[-1:]} <= vocabulary.control.keys()
        stops = {*chat_format.end, *chat_format.stops} & vocabulary.control.keys()
        self.stop_ids = end_ids | {vocabulary.control[token] for token in stops}

    @classmethod
    def from_folder(
        cls, path: Path, chat_format: str | None = None, date: str = LLAMA31_DATE
    ) -> ChatTokenizer:
        """Read the tokenizer of a model's folder or GGUF file.

        `chat_format` names one of FORMATS where the control tokens do not tell; `date` is what
        Llama 3.1's system prompt calls today. Raises UserError for a missing or malformed file and
        for an unknown format.
        """
        vocabulary, settings = read_files(path)
        end_ids = frozenset[int]().union(*(end_ids_of(each, path) for each in settings))
        return cls(vocabulary, pick_format(vocabulary.control, chat_format), end_ids, date)

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Return the ids of plain text, `continued` behind other text: never a control token."""
        return self.vocabulary.encode(text, continued)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.vocabulary.decode(ids)

    def render(
        self, messages: Sequence[Message], first: bool = True, closed: bool = True
    ) -> tuple[list[int], list[float]]:
        """Lay the messages out: (ids, weights of each id's loss).

        `first=True` begins a conversation (BOS, default system prompt), `first=False` continues
        one. The weights are those of the messages on their content and end-of-turn token, and 0
        elsewhere. Where the format has no end-of-turn token (ChatGLM3), the next `<|user|>` takes
        its part: a weighted message at the end of `messages` is closed by one, unless `closed` is
        False since more messages will follow.
        """
        row = Row()
        messages = list(messages)
        if first:
            row.add([self.vocabulary.control[token] for token in self.chat_format.begin])
            if not (messages and messages[0].role == "system"):
                default = self.chat_format.default_system
                messages[:0] = [] if default is None else [Message("system", default)]
        if self.chat_format.user_header:
            messages = self._without_system(messages, first)
        prefix = self.chat_format.system_prefix.format(date=self.date) if first else ""
        owed = 0.0  # the weight of a message whose end is the next message's <|user|>
        for number, message in enumerate(messages):
            is_system_prompt = number == 0 and message.role == "system"
            header = self._lay_header(row, message.role, owed, begins=first and number == 0)
            content = message.content.strip() if self.chat_format.trim else message.content
            content = (prefix if is_system_prompt else "") + content
            owed = self._lay_content(row, message, header, content)
        if owed and closed:
            row.add([self.vocabulary.control["<|user|>"]], owed)
        return row.ids, row.weights

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids after which the assistant's reply begins."""
        row = Row(self.render(messages)[0])
        row.add(self.encode(*self._lay_header(row, "assistant", 0.0, begins=not messages)))
        return row.ids

    def reply(self, text: str) -> list[int]:
        """Return the ids of a reply and of what ends it, as they stand after `prompt`."""
        ids, weights = self.render([Message("assistant", text, 1.0)], first=False)
        return [token for token, weight in zip(ids, weights, strict=True) if weight]

    def stream(self) -> StreamDecoder:
        """Return a decoder for tokens that arrive one by one."""
        return StreamDecoder(self)

    def _without_system(self, messages: list[Message], first: bool) -> list[Message]:
        """Hand the text of system messages to users, a leading one to the first user's message."""
        users = [Message("user", m.content) if m.role == "system" else m for m in messages]
        if first and messages and messages[0].role == "system":
            content = self.chat_format.system.format(messages[0].content)
            if len(users) > 1 and users[1].role == "user":
                content += users.pop(1).content
            users[0] = Message("user", content)
        return users

    def _frame(self, role: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the header and the end of a message."""
        if role == "user" and self.chat_format.user_header:
            return self.chat_format.user_header, self.chat_format.user_end
        return self.chat_format.header, self.chat_format.end

    def _lay_header(self, row: Row, role: str, owed: float, begins: bool) -> tuple[str, bool]:
        """Lay out a header up to its last control token.

        Returns the text that stands behind that, and whether it goes on where other text ended.
        """
        control = self.vocabulary.control
        text, continued = "", self._ends_in_text and not begins
        for piece in self._frame(role)[0]:
            piece = piece.replace("{role}", role)
            if piece in control:
                row.add(self.encode(text, continued))
                row.add([control[piece]], owed if piece == "<|user|>" else 0.0)
                text, continued = "", False
            else:
                text += piece
        return text, continued

    def _lay_content(
        self, row: Row, message: Message, header: tuple[str, bool], content: str
    ) -> float:
        """Lay out a content and its end; return the weight that the end of turn is still owed."""
        control = self.vocabulary.control
        text, continued = header
        end = self._frame(message.role)[1]
        at = next((i for i, piece in enumerate(end) if piece in control), len(end))
        content += "".join(end[:at])
        if message.role == "assistant" or self.chat_format.separate:
            row.add(self.encode(text, continued))
            content = self.chat_format.reply_prefix + content
            row.add(self.encode(content, continued=True), message.weight)
        else:
            row.add(self.encode(text + content, continued))
        row.add([control[piece] for piece in end[at : at + 1]], message.weight)
        row.add(self.encode("".join(end[at + 1 :])))
        return 0.0 if end else message.weight


class StreamDecoder:
    """Text of tokens that arrive one by one; never half of a character."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []  # the tokens last said: what follows may depend on them
        self._waiting: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that these tokens complete, perhaps none."""
        self._waiting += ids
        text = self._text()
        if text.endswith("\ufffd"):  # the last character's other bytes are yet to come
            return ""
        self._said, self._waiting = self._waiting or self._said, []
        return text

    def finish(self) -> str:
        """Return what is still held back; an unfinished character becomes U+FFFD."""
        text, self._said, self._waiting = self._text(), [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._said)
        return self._tokenizer.decode(self._said + self._waiting)[len(before) :]


def pick_format(control: dict[str, int], name: str | None) -> ChatFormat:
    """Return the named format, or else the first whose marks are among the control tokens."""
    choices = ", ".join(each.name for each in FORMATS)
    for each in FORMATS:
        told = not each.by_name and control.keys() >= {*each.marks}
        if each.name == name or (name is None and told):
            return each
    if name is not None:
        raise UserError(f"unknown chat format {name!r}; the choices are {choices}")
    raise UserError(
        f"the tokenizer's control tokens fit no known chat format; name one of {choices} "
        "(--chat-format)"
    )


def read_files(
    path: Path,
) -> tuple[TokenizersVocabulary | SentencePieceVocabulary, list[dict[str, Any]]]:
    """Return the vocabulary and the settings that may name end ids."""
    if path.suffix == ".gguf":
        gguf = GgufFile(path)
        content = gguf.tokenizer_files()["tokenizer.json"]
        return TokenizersVocabulary(content, path), [gguf.config()]
    if not path.is_dir():
        raise UserError(f"no such model folder: {path}")
    settings = [read_json(file_in(path, "config.json"))]
    if (path / "generation_config.json").exists():
        settings.append(read_json(file_in(path, "generation_config.json")))
    if (path / "tokenizer.json").exists():
        file = file_in(path, "tokenizer.json")
        return TokenizersVocabulary(read_json(file), file), settings
    if (path / "tokenizer.model").exists() and settings[0].get("model_type") == "chatglm":
        return SentencePieceVocabulary(file_in(path, "tokenizer.model")), settings
    raise UserError(f"{path} has no tokenizer.json (ChatGLM3: tokenizer.model)")


def end_ids_of(settings: dict[str, Any], source: Path) -> frozenset[int]:
    """Return the end ids of a settings file, which gives one number, several, or none."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{source}: eos_token_id must be token ids, got {value!r}")
    return frozenset(ids)
