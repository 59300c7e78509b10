"""The k most probable of thousands of given replies, with their exact log-probabilities.

The texts form a trie of token runs. A run's first token bounds every text below it, because a
probability only falls as tokens are added. Each pass opens the most promising runs:

    "I recommend" --+-- " Heat" --+-- "."                     -6.1
     (one prefill)  |             +-- " (" -- "199" -- ...    at most -5.0
                    +-- " The" ------ ...
                    +-- " Zod" -- "iac (" -- ...              at most -14.2

The search ends when k texts beat every bound that is left, or when it has run the tokens it may
run. Scores are exact either way, and so is every place whose score beats the best bound left. The
order of opening, best bound less a guess of what the rest costs, decides what a search cut short
has found, not what an exact one finds. Proof is what costs: of ReDial's 6,576 titles (46,000 tokens
of trie) the ten best were found within 900 tokens, and proven after 2,000 to 10,000.

A text is scored as the tokens its tokenizer gives it, as far as they go: what a reply says after
them is left open. So a text that goes on where another ends ("Heat", "Heat (1995)") should be
closed by the caller ("Heat.", "Heat (1995)."), lest the longer one can never win.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from usbrec.chat import Chat
from usbrec.llm.cache import Path, PrefixCache, shared_length
from usbrec.llm.decoding import routes_of
from usbrec.llm.engine import Engine
from usbrec.llm.kernels import fold

TOKENS = 2000  # of a search: about two seconds of two cores with a model of 135M
PASS_TOKENS = 96  # more would open what a better text spares
RUN_TOKENS = 2  # longer runs would be run to their end where their first tokens rule them out
TOKEN_COST = 0.3  # what each token to come is guessed to cost, when runs are put in order


@dataclass(eq=False)
class Run:
    """Some tokens that all texts below share; `texts` are those that end with the last."""

    ids: list[int]
    texts: list[int] = field(default_factory=list)
    children: list["Run"] = field(default_factory=list)

    @cached_property
    def rest(self) -> int:
        """How many tokens follow the first, down to the nearest end of a text."""
        below = 0 if self.texts else 1 + min(child.rest for child in self.children)
        return len(self.ids) - 1 + below

    @property
    def fed(self) -> list[int]:
        """The tokens whose successors are of interest."""
        return self.ids if self.children else self.ids[:-1]


def make_trie(rows: Sequence[tuple[list[int], int]], depth: int = 0) -> Run:
    """Return the trie of (ids, text), sorted by ids, that agree on their first `depth` ids."""
    first, last = rows[0][0], rows[-1][0]
    length = shared_length(first[depth:], last[depth:])  # the outermost rows agree least
    end = depth + min(length, RUN_TOKENS)
    run = Run(first[depth:end], [text for ids, text in rows if len(ids) == end])
    below = itertools.groupby(rows[len(run.texts) :], key=lambda row: row[0][end])
    run.children = [make_trie(list(branch), end) for _, branch in below]
    return run


@dataclass(frozen=True, order=True)
class Open:
    """A run of which the first token is scored; `number` makes the order of equals definite."""

    guess: float  # of the -log p of the best text below
    number: int
    bound: float = field(compare=False)  # log p up to the first token
    run: Run = field(compare=False)
    above: tuple[int, ...] = field(compare=False)  # slots of the tokens between prompt and run


@dataclass(frozen=True)
class Ranked:
    """The best texts, best first: (place among the texts, log-probability), equals in their order.

    The first `proven` are the best there are, in this order; a search that was cut short may have
    missed better ones than the rest.
    """

    texts: list[tuple[int, float]]
    proven: int


class TrieAttention:
    """Every token sees the prompt, which all share, and its own path through the trie.

    Paths lie in an arena of their own and are gathered for each pass; the query heads of one key
    head, and all tokens of the pass, are folded into one product with the prompt.
    """

    def __init__(self, cache: PrefixCache, prompt: Path) -> None:
        slots = prompt.slots.to(cache.k.device)
        self.head_k, self.head_v = (x[:, :, slots] for x in (cache.k, cache.v))  # (L, H_kv, P, d)
        L, H_kv, _, d = cache.k.shape
        self.k = cache.k.new_empty(L, 512, H_kv, d)
        self.v = torch.empty_like(self.k)
        self.used, self.prompt_length = 0, len(slots)

    def begin(self, paths: Sequence[Sequence[int]]) -> None:
        """Take the paths of the next pass's tokens; each ends with the token's own new slot."""
        while self.used + len(paths) > self.k.shape[1]:
            self.k, self.v = (torch.cat([x, torch.empty_like(x)], 1) for x in (self.k, self.v))
        self.new = slice(self.used, self.used + len(paths))
        self.used += len(paths)
        slots = np.zeros((len(paths), max(map(len, paths))), np.int64)
        bias = np.full(slots.shape, -np.inf, np.float32)
        for row, path in enumerate(paths):
            slots[row, : len(path)], bias[row, : len(path)] = path, 0
        device = self.k.device
        self.slots = torch.from_numpy(slots).to(device)  # (T, S)
        self.bias = torch.from_numpy(bias)[:, None, None].to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, H_kv, d) -> (T, H, d)."""
        self.k[layer, self.new], self.v[layer, self.new] = k, v
        T, H_kv, d = k.shape
        P = self.prompt_length
        q = q * d**-0.5
        of_head = fold(q, H_kv) @ self.head_k[layer].transpose(1, 2)  # (H_kv, g T, P)
        of_head = of_head.unflatten(1, (-1, T)).permute(2, 0, 1, 3)  # (T, H_kv, g, P)
        tail_k, tail_v = self.k[layer, self.slots], self.v[layer, self.slots]  # (T, S, H_kv, d)
        of_tail = q.unflatten(1, (H_kv, -1)) @ tail_k.permute(0, 2, 3, 1)  # (T, H_kv, g, S)
        scores = torch.cat([of_head.float(), of_tail.float() + self.bias], -1)
        probs = scores.softmax(-1).to(q.dtype)
        head = fold(probs[..., :P].flatten(1, 2), H_kv) @ self.head_v[layer]  # (H_kv, g T, d)
        head = head.unflatten(1, (-1, T)).permute(2, 0, 1, 3)  # (T, H_kv, g, d)
        return (head + probs[..., P:] @ tail_v.transpose(1, 2)).flatten(1, 2)


class Ranking:
    """Ranks one set of texts, as many times as asked."""

    def __init__(self, engine: Engine, texts: Sequence[str]) -> None:
        self.engine = engine
        rows = sorted((engine.tokenizer.encode(text), i) for i, text in enumerate(texts))
        self.longest = max(len(ids) for ids, _ in rows)
        self.trie = make_trie(rows)

    @torch.inference_mode()
    def best(self, chats: Sequence[Chat], k: int, tokens: int = TOKENS) -> list[Ranked]:
        """Return for each chat the k most probable texts as its reply's beginning.

        Each search ends after so many tokens, or as soon as its result is exact (0: only then). A
        chat's result does not depend on the others.
        """
        engine, beginning = self.engine, self.trie.ids
        prompts = [engine.prompt(chat, self.longest) for chat in chats]
        ranked: list[Ranked] = []
        for wave in engine.waves([len(ids) + len(beginning) for ids in prompts]):
            engine.cache.tick()
            rows = [(chats[i].adapter, prompts[i] + beginning) for i in wave]
            paths, states = engine.prefill(rows, [len(prompts[i]) - 1 for i in wave])
            for (adapter, _), path, state in zip(rows, paths, states, strict=True):
                attention = TrieAttention(engine.cache, path)
                ranked.append(Search(engine, adapter, attention, k, tokens).run(self.trie, state))
        return ranked


Opened = tuple[Open, list[int], tuple[int, ...]]  # its tokens to score, the slots down to its end


class Search:
    """One chat's search: the runs yet to be opened, and the best texts so far."""

    def __init__(
        self, engine: Engine, adapter: str | None, attention: TrieAttention, k: int, tokens: int
    ) -> None:
        self.engine, self.adapter, self.attention = engine, adapter, attention
        self.k, self.tokens = k, tokens or math.inf
        self.open: list[Open] = []
        self.found: list[tuple[float, int]] = []  # (log p, -text) of at most k, the worst on top
        self.numbers = itertools.count()

    def run(self, trie: Run, states: Tensor) -> Ranked:
        """Return the k best texts; the states (1 + n, D) are the prompt's last and the n of `trie`.

        Whoever asks has run the trie's first tokens with the prompt: all texts share them.
        """
        start = Open(0.0, next(self.numbers), 0.0, trie, ())
        self.score([(start, trie.ids, ())], states if trie.children else states[:-1])
        while chosen := self.choose():
            self.score(*self.expand(chosen))
        texts = [(-text, score) for score, text in sorted(self.found, reverse=True)]
        bound = max((left.bound for left in self.open), default=-math.inf)
        return Ranked(texts, sum(score > bound for _, score in texts))

    @property
    def bar(self) -> float:
        """What a text must beat: the k-th best log-probability so far."""
        return self.found[0][0] if len(self.found) == self.k else -math.inf

    def choose(self) -> list[Open]:
        """Return the runs to open next: the most promising of those that beat the bar."""
        chosen: list[Open] = []
        room = min(PASS_TOKENS, self.tokens - self.attention.used)
        while self.open and room > 0:
            best = heapq.heappop(self.open)
            if best.bound > self.bar:
                chosen.append(best)
                room -= len(best.run.fed)
        return chosen

    def expand(self, chosen: Sequence[Open]) -> tuple[list[Opened], Tensor]:
        """Run the chosen runs' tokens in one pass; return what was opened, and the states."""
        opened: list[Opened] = []
        ids: list[int] = []
        paths: list[tuple[int, ...]] = []  # of each token: the slots it sees, its own the last
        for best in chosen:
            path = best.above
            for token in best.run.fed:
                path = (*path, self.attention.used + len(ids))
                ids.append(token)
                paths.append(path)
            opened.append((best, best.run.ids[1:], path))
        model = self.engine.model
        self.attention.begin(paths)
        beyond = [self.attention.prompt_length + len(path) - 1 for path in paths]
        hidden = model(
            torch.tensor(ids, device=model.device),
            torch.tensor(beyond, device=model.device),
            self.attention,
            routes_of([self.adapter], [len(ids)]),
        )
        self.engine.usage.prompt_tokens += len(ids)
        self.engine.usage.computed_tokens += len(ids)
        return opened, hidden

    def score(self, opened: Sequence[Opened], states: Tensor) -> None:
        """Score what the states predict: the rest of each run, then its children's first tokens."""
        rows: list[int] = []
        tokens: list[int] = []
        at = 0
        for best, rest, _ in opened:
            rows += range(at, at + len(rest))
            tokens += rest
            at += len(rest)
            if best.run.children:
                rows += [at] * len(best.run.children)
                tokens += [child.ids[0] for child in best.run.children]
                at += 1
        logits = self.engine.model.logits(states)
        picked = logits[rows, tokens] - logits.logsumexp(-1)[rows]
        logps = iter(picked.tolist())
        for best, rest, path in opened:
            score = best.bound + sum(itertools.islice(logps, len(rest)))
            self.find(best.run, score)
            for child in best.run.children:
                self.meet(child, score + next(logps), path)

    def meet(self, run: Run, score: float, above: tuple[int, ...]) -> None:
        """Take a run whose first token is scored: it waits to be opened, or is a text already."""
        if not run.fed:
            self.find(run, score)
        elif score > self.bar:
            guess = TOKEN_COST * run.rest - score
            heapq.heappush(self.open, Open(guess, next(self.numbers), score, run, above))

    def find(self, run: Run, score: float) -> None:
        """Keep the texts that end with this run if they are among the k best."""
        for text in run.texts:
            heapq.heappush(self.found, (score, -text))
            if len(self.found) > self.k:
                heapq.heappop(self.found)
