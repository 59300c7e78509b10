"""Chats as token ids, laid out piece by piece, with the weight of each token's loss.

No text is rendered and searched again: a control token comes from the format alone, and a message's
content is always encoded as plain text. `<|im_end|>` typed by a person is a handful of ordinary
tokens. The layouts are those of the models' published templates (chat_formats.json has them all),
token for token, with three exceptions. An assistant's content is never merged with the newline of
its header, since a reply's tokens come after that newline one by one. Mistral v0.3's template has
the system prompt in the last user's message; here it is in the first, so that the prompts of a
dialogue's turns begin alike. ChatGLM3 writes the newline behind `<|assistant|>` itself; here the
prompt has it. Control tokens identify a model's format. The user names `zephyr` (TinyLlama),
`llama2`, `mistral` (v0.1, v0.2) and `mistral-v3`, which have the same few control tokens. With a
byte-level vocabulary (Tekken: Mistral Nemo, Ministral) `mistral-v3` is laid out without spaces.

Both vocabularies have `control` (control tokens by name), `encode` and `decode`, `byte_level`
(tokens are made of bytes), and `last_plain` (the plain token of the highest id).

    tokenizer = ChatTokenizer.from_folder(Path("models/smollm2-135m-instruct"))
    ids = tokenizer.prompt([Message("user", "Hello")])

A prompt and its reply may take `max_length` tokens together. A prompt that is longer than the room
beside a reply loses whole turns from the left; its system prompt and its last turn stay:

    max_length 2048, room 1792    system | turn 1 | turn 2 | turn 3     2000 tokens
                                  system          | turn 2 | turn 3     1700 tokens: the prompt
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from usbrec.chat import Message, Messages
from usbrec.llm.model_config import CHATGLM3, file_in
from usbrec.options import UserError
from usbrec.runs import read_json

LLAMA31_DATE = "26 Jul 2024"
REPLY_ROOM = 256  # tokens kept free for a reply; at most a quarter of the limit
SPACE = "\u2581"  # a space in sentencepiece's pieces


# --- vocabularies -----------------------------------------------------------------------------


class TokenizersVocabulary:
    """The vocabulary of a tokenizer.json (the `tokenizers` package)."""

    def __init__(self, path: Path) -> None:
        self._path, content = path, read_json(path)
        try:
            self.control = {token["content"]: token["id"] for token in content["added_tokens"]}
            plain = {**content, "added_tokens": [], "truncation": None, "padding": None}
            plain["post_processor"] = None  # would put BOS before every piece
            self._plain = Tokenizer.from_str(json.dumps(plain))
            self._full = Tokenizer.from_str(json.dumps(content))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of a malformed file: bare Exceptions, and panics in Rust
            raise UserError(f"{path}: no tokenizer that can be read: {str(error)!r:.99}") from error
        self._control_ids = frozenset(self.control.values())
        own = (pair for pair in self._plain.get_vocab().items() if pair[0] not in self.control)
        self.last_plain = max(own, key=lambda pair: pair[1], default=("", 0))
        # Llama 2's tokenizer puts a space before every text, Mistral's newer ones only before the
        # first of a whole conversation, which here is BOS
        self._spaces = "".join(self._plain.encode("a").tokens).startswith(SPACE)
        self.byte_level = not "".join(self._plain.encode(" a").tokens).startswith(SPACE)
        split = content.get("pre_tokenizer") or {}
        self._spaces_first_only = split.get("prepend_scheme") == "first"

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Return the ids of `text`, in which no added token is recognised.

        `continued` text follows other text: no space is put before it.
        """
        text, skip = mended(text), 0
        if self._spaces and (continued or self._spaces_first_only):
            # in these vocabularies no piece joins a line break to other characters
            text, skip = f"\n{text}", len(self._plain.encode("\n").ids)
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids[skip:]
        if not self._control_ids.isdisjoint(ids):
            raise UserError(f"{self._path}: this tokenizer turns plain text into control tokens")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return str(self._full.decode(list(ids), skip_special_tokens=True))


class SentencePieceVocabulary:
    """ChatGLM3's vocabulary: a sentencepiece model and, numbered after it, the control tokens."""

    byte_level, last_plain = False, ("", 0)  # the control tokens' ids are higher

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._pieces = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a sentencepiece model: {error}") from error
        self._size = self._pieces.vocab_size()
        self.control = {token: self._size + i for i, token in enumerate(CHATGLM3["control_tokens"])}

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Return the ids of `text`; the control tokens are unknown to the sentencepiece model.

        ChatGLM3 encodes every text on its own, so `continued` makes no difference.
        """
        return list(self._pieces.encode(mended(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens left out."""
        return str(self._pieces.decode([i for i in ids if i < self._size]))


Vocabulary = TokenizersVocabulary | SentencePieceVocabulary


def mended(text: str) -> str:
    """Return the text with U+FFFD for lone surrogates, which JSON may hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- chats ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """The chat layout of a model family: `begin`, then turn, gap, turn, gap, ...

    A mark in a template stands for the control token of that name, all else for text. A format with
    `user_turn` has no system role: a system prompt goes into the first user's message, and later
    system messages become users'.
    """

    name: str
    marks: Sequence[str]  # control tokens: the templates', and others that identify the format
    turn: str  # {role}, {content}, and the end of turn if the format has one
    gap: str = ""
    begin: str = ""
    default_system: str | None = None  # put first where the chat has no system prompt
    system_prefix: str = ""  # put before the first system prompt's content; {date} is pinned
    trim: bool = False  # the template strips white space around the content
    separate: bool = False  # header and content are encoded apart for every role
    user_turn: str = ""  # `turn` is then the assistant's alone
    system: str = ""  # how a system prompt is written before the first user's content
    reply_prefix: str = ""  # precedes an assistant's content as a part of the reply
    by_name: bool = False  # its marks identify nothing: taken only if the user names it


# `formats`: the first whose marks the tokenizer has is taken. `end_tokens`: each ends a reply; a
# GGUF file names one end id, its readers the others. The last two begin the next turn of ChatGLM3,
# whose replies have no end of their own.
CHATS = read_json(Path(__file__).with_name("chat_formats.json"))
FORMATS = [ChatFormat(**each) for each in CHATS["formats"]]


def pick_format(control: dict[str, int], name: str | None, folder: Path) -> ChatFormat:
    """Return the named format, or else the first whose marks are among the control tokens.

    Raises UserError, naming the tokenizer's folder, if there is none.
    """
    for each in FORMATS:
        told = not each.by_name and control.keys() >= {*each.marks}
        if each.name == name or (name is None and told):
            return each
    fault = f"unknown chat format {name!r}" if name else "tokens that fit no known chat format"
    choices = ", ".join(each.name for each in FORMATS)
    raise UserError(f"{folder}: {fault}: name one of {choices} (--chat-format, for --model alone)")


class ChatTokenizer:
    """A vocabulary and a chat format: messages -> ids and weights, and ids -> text."""

    def __init__(self, vocabulary: Vocabulary, style: ChatFormat, end_ids: frozenset[int]) -> None:
        self.vocabulary, self.chat_format = vocabulary, style
        self.decode = vocabulary.decode  # to plain text
        self.encoded = lru_cache(4096)(vocabulary.encode)  # what prompts share is encoded once
        for mark in style.marks:
            if mark not in vocabulary.control:
                raise UserError(f"the chat format {style.name} needs the control token {mark}")
        self._marks = re.compile(f"({'|'.join(map(re.escape, style.marks))})")
        _, end = self._frame("assistant")
        stops = {vocabulary.control[x] for x in CHATS["end_tokens"] if x in vocabulary.control}
        self.stop_ids = end_ids | stops | {piece for piece in end if isinstance(piece, int)}

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Return the ids of plain text; `continued` text follows other text."""
        return list(self.encoded(text, continued))

    @classmethod
    def from_folder(
        cls, folder: Path, chat_format: str | None = None, date: str = LLAMA31_DATE
    ) -> "ChatTokenizer":
        """Return the tokenizer of a model's folder.

        `chat_format` names one of FORMATS if the control tokens do not identify it. `date` is
        today's date in Llama 3.1's system prompt. Raises UserError for a missing or malformed file,
        for an unknown format, and for a token without a row in the model's embeddings.
        """
        config = read_json(file_in(folder, "config.json"))
        end_ids = end_ids_of(config, folder)
        if (folder / "generation_config.json").exists():
            end_ids |= end_ids_of(read_json(file_in(folder, "generation_config.json")), folder)
        if config.get("model_type") == "chatglm" and not (folder / "tokenizer.json").exists():
            vocabulary: Vocabulary = SentencePieceVocabulary(file_in(folder, "tokenizer.model"))
        else:
            vocabulary = TokenizersVocabulary(file_in(folder, "tokenizer.json"))
        style = pick_format(vocabulary.control, chat_format, folder)
        style = replace(style, system_prefix=style.system_prefix.format(date=date))
        if style.name == "mistral-v3" and vocabulary.byte_level:  # Tekken's layout has no spaces
            style = replace(style, user_turn="[INST]{content}[/INST]", reply_prefix="")
        used = {mark: vocabulary.control.get(mark, 0) for mark in style.marks}
        token, last = max([vocabulary.last_plain, *used.items()], key=lambda pair: pair[1])
        rows = config.get("padded_vocab_size", config.get("vocab_size", last + 1))
        if not isinstance(rows, int) or last >= rows:
            raise UserError(f"{folder}: {token!r} has id {last}, but vocab_size is {rows!r:.60}")
        return cls(vocabulary, style, end_ids)

    def render(self, messages: Messages) -> tuple[list[int], list[float]]:
        """Return the ids of the messages, and the weight of each id's loss.

        The weights are those of the messages on their content and end-of-turn token, and 0
        elsewhere. In a format without an end-of-turn token (ChatGLM3) the next `<|user|>` serves as
        one, and a weighted message at the end of `messages` gets this token.
        """
        style = self.chat_format
        ids = self._ids(self._pieces(style.begin))
        weights, owed = [0.0] * len(ids), 0.0  # owed to the next <|user|>, as a reply's end
        for number, message in enumerate(self._completed(messages)):
            header, end = self._frame(message.role)
            content: list[int | str] = [style.reply_prefix + message.content, *end]
            if message.role != "assistant" and not style.separate:
                header, content = [*header, message.content, *end], []
            opening = self._ids(header, continued=bool(style.gap and number))
            said, gap = self._ids(content, continued=True), self.encode(style.gap)
            ids += opening + said + gap
            weights += [0.0] * len(opening) + [message.weight] * len(said) + [0.0] * len(gap)
            if owed and message.role == "user":
                weights[-len(opening + said + gap)] = owed
            owed = 0.0 if end else message.weight
        if owed:
            ids.append(self.vocabulary.control["<|user|>"])
            weights.append(owed)
        return ids, weights

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a prompt, up to the beginning of the assistant's reply."""
        header, _ = self._frame("assistant")
        return self.render(messages)[0] + self._ids(header, bool(self.chat_format.gap and messages))

    def reply(self, text: str) -> list[int]:
        """Return the ids of a reply and of its end-of-turn token, as they follow `prompt`."""
        ids, weights = self.render([Message("user", ""), Message("assistant", text, 1.0)])
        return [token for token, weight in zip(ids, weights, strict=True) if weight]

    def beginning(self, text: str) -> list[int]:
        """Return the ids of a reply's beginning, as `reply` lays them out."""
        return self.encode(self.chat_format.reply_prefix + text, continued=True)

    def _completed(self, messages: Messages) -> list[Message]:
        """Return the messages as the template sees them: system prompts in place, texts trimmed."""
        style, completed = self.chat_format, list(messages)
        if not _head(completed) and style.default_system is not None:
            completed.insert(0, Message("system", style.default_system))
        if style.user_turn:
            completed = [Message("user", m.content) if m.role == "system" else m for m in messages]
            if _head(messages):
                content = style.system.format(messages[0].content)
                if len(completed) > 1 and completed[1].role == "user":
                    content += completed.pop(1).content
                completed[0] = Message("user", content)
        if style.trim:
            completed = [replace(m, content=m.content.strip()) for m in completed]
        if _head(completed):
            completed[0] = Message("system", style.system_prefix + completed[0].content)
        return completed

    def _frame(self, role: str) -> tuple[list[int | str], list[int | str]]:
        """Return the pieces before and after a message's content."""
        style = self.chat_format
        turn = style.user_turn if role == "user" and style.user_turn else style.turn
        header, _, end = turn.replace("{role}", role).partition("{content}")
        return self._pieces(header), self._pieces(end)

    def _pieces(self, template: str) -> list[int | str]:
        """Return the pieces of a template: the ids of control tokens, and texts."""
        marks, control = self.chat_format.marks, self.vocabulary.control
        parts = filter(None, self._marks.split(template))
        return [control[part] if part in marks else part for part in parts]

    def _ids(self, pieces: Sequence[int | str], continued: bool = False) -> list[int]:
        """Return the ids of control tokens, and of the text between two of them encoded as one."""
        ids: list[int] = []
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            if is_text:
                ids += self.encode("".join(map(str, group)), continued)
            else:
                ids += map(int, group)
            continued = False
        return ids


def prompt_room(max_length: int) -> int:
    """Return the number of tokens that a prompt may have without being shortened.

    It depends on `max_length` alone, so that training and inference shorten a prompt alike.
    """
    return max_length - min(REPLY_ROOM, max_length // 4)


def fit_prompt(tokenizer: ChatTokenizer, messages: Messages, room: int) -> tuple[list[int], bool]:
    """Return the ids of a prompt, shortened if they exceed `room` tokens, and whether they did.

    They still exceed it if the system prompt, or what follows the last user's line, does.
    """
    if len(ids := tokenizer.prompt(messages)) <= room:
        return ids, False
    return tokenizer.prompt(shorten(tokenizer, messages, room)), True


def shorten(tokenizer: ChatTokenizer, messages: Messages, limit: int) -> list[Message]:
    """Return the messages without their oldest turns: a prompt of at most `limit` tokens.

    A turn is a user's message and all up to the next one. The system prompt and the last turn stay.
    If they alone are too long, the last turn loses the first lines of its first message, which may
    be the log of a dialogue. If its last line alone is too long, it loses its first characters.
    """
    head = list(_head(messages))
    rest = list(messages[len(head) :])
    starts = [n for n, message in enumerate(rest) if n == 0 or message.role == "user"]
    if not starts:
        return head
    last, text = starts[-1], rest[starts[-1]].content
    # where the kept part may begin: a message, and a place in its text
    cuts = [(start, 0) for start in starts] + [(last, x.end()) for x in re.finditer("\n", text)]
    whole = len(cuts) - 1  # the last cut between lines; the others are within the last line
    cuts += [(last, place) for place in range(cuts[-1][1] + 1, len(text) + 1)]

    def after(cut: int) -> list[Message]:
        start, at = cuts[cut]
        return [*head, replace(rest[start], content=rest[start].content[at:]), *rest[start + 1 :]]

    def fits(cut: int) -> bool:
        return len(tokenizer.prompt(after(cut))) <= limit

    cut = bisect_left(range(whole), True, key=fits)
    if cut == whole and not fits(whole):
        cut = bisect_left(range(len(cuts) - 1), True, whole, key=fits)
    return after(cut)


def end_ids_of(settings: dict[str, Any], source: Path) -> frozenset[int]:
    """Return the end ids of a settings file, which has one number, several, or none."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{source}: eos_token_id must be token ids, got {value!r:.60}")
    return frozenset(ids)


def _head(messages: Messages) -> Messages:
    """Return the system prompt that leads the messages, as a list of one or none."""
    return messages[:1] if messages and messages[0].role == "system" else []
