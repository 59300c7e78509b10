"""Vocabularies: text <-> token ids by tokenizer.json or sentencepiece, never control tokens.

`<|im_end|>` typed by a person is a handful of ordinary tokens; the control token of that name is
available by its id alone (`control`). Both classes offer `control`, `encode`, `decode`,
`byte_level` (tokens are made of bytes), and `last_plain` (the plain token of the highest id).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from usbrec.llm.model_config import CHATGLM3
from usbrec.options import UserError
from usbrec.runs import read_json

SPACE = "\u2581"  # a space in sentencepiece's pieces


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


def mended(text: str) -> str:
    """Return the text with U+FFFD for lone surrogates, which JSON may hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
