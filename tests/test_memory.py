"""What siblings over one prompt hold: the prompt once, and each token of their own once."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from conftest import TINY, random_decoder
from test_engine import LetterTokenizer, chat, drawing
from torch.utils._python_dispatch import TorchDispatchMode

from usbrec.chat import Sampling
from usbrec.llm.cache import PrefixCache, token_bytes
from usbrec.llm.engine import Engine

PROMPT, SIBLINGS, NEW = 512, 32, 64
CONFIG = replace(TINY, num_hidden_layers=8)
TOKEN_BYTES = token_bytes(CONFIG, torch.float32)


class Held(TorchDispatchMode):
    """Counts the bytes of keys and values: what is written in the arena, and all live tensors."""

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__()
        self.cache = cache
        cache.k.fill_(torch.nan)
        self.arena = {x.untyped_storage()._cdata for x in (cache.k, cache.v)}
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 2 and out.shape[-1] == CONFIG.head_dim:
            self.note(out.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        """Follow a tensor's memory until it is freed."""
        key = storage._cdata
        if key in self.arena or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self.sizes.pop, key, None)
        if storage.nbytes() > TOKEN_BYTES:  # the arena is looked at where something large is made
            written = int((~self.cache.k[..., 0].isnan()).any(1).sum())  # of all layers
            in_arena = written * TOKEN_BYTES // CONFIG.num_hidden_layers
            self.most = max(self.most, in_arena + sum(self.sizes.values()))


def test_siblings_hold_little_more_than_their_prompt_and_their_own_tokens() -> None:
    """At every moment, also while tails grow and while they are moved into the memory."""
    tokenizer: Any = LetterTokenizer()
    tokenizer.stop_ids = frozenset()
    needed = PROMPT + SIBLINGS * NEW
    e = Engine(random_decoder(CONFIG), tokenizer, 2 * needed * TOKEN_BYTES)
    asked = chat("y" * (PROMPT - 3))
    how = Sampling(max_new_tokens=NEW, temperature=1.5)
    with Held(e.cache) as held:
        replies = e.generate(drawing([asked] * SIBLINGS, how, range(SIBLINGS)))
    assert {len(reply.token_ids) for reply in replies} == {NEW}
    assert e.cache.capacity - len(e.cache.free) > 0.9 * needed
    assert 0.9 * needed * TOKEN_BYTES < held.most <= 1.2 * needed * TOKEN_BYTES


def test_a_batch_that_shrinks_holds_its_prompts_twice_at_most() -> None:
    """In the arena and in its layout: the former layout goes before the next one comes."""
    tokenizer: Any = LetterTokenizer()
    tokenizer.stop_ids = frozenset()
    e = Engine(random_decoder(CONFIG), tokenizer, 12 * 2 * PROMPT * TOKEN_BYTES)
    asked = [chat(letter + "y" * (PROMPT - 4)) for letter in "abcdefghijkl"]
    how = [Sampling(max_new_tokens=1 + i // 3, temperature=0) for i in range(12)]
    with Held(e.cache) as held:
        replies = e.generate(drawing(asked, how, range(12)))
    assert [len(reply.token_ids) for reply in replies] == [1 + i // 3 for i in range(12)]
    rows = 12 * PROMPT * TOKEN_BYTES
    assert 1.9 * rows < held.most < 2.2 * rows
