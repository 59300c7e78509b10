"""The k most probable of thousands of given replies, with their exact log-probabilities.

The texts form a trie of token runs. A run's first token bounds every text below it, because a
probability only falls as tokens are added. Each pass opens the most promising runs:

    "I recommend" --+-- " Heat" --+-- "."                     -6.1
     (one prefill)  |             +-- " (" -- "199" -- ...    at most -5.0
                    +-- " The" ------ ...
                    +-- " Zod" -- "iac (" -- ...              at most -14.2

The search ends when k texts beat every remaining bound, or when its tokens are spent. Scores are
exact either way, and so is every place whose score beats the best remaining bound. Runs are opened
by their bound less a guessed cost of the rest. This order decides the result of a search that is
cut short, not of an exact one. Proof takes the most tokens: of ReDial's 6,576 titles (46,000 tokens
of trie) the ten best were found within 900 tokens, and proven after 2,000 to 10,000.

A text is scored by its own tokens; the rest of the reply is left open. So a caller should close
texts of which one continues another ("Heat", "Heat (1995)" -> "Heat.", "Heat (1995)."): otherwise
the longer one can never win.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from usbrec.chat import Ranked, Requests
from usbrec.llm.cache import shared_length
from usbrec.llm.decoding import adapter_spans
from usbrec.llm.model import Stretch
from usbrec.llm.sampler import finite

if TYPE_CHECKING:  # engine.py imports this module
    from usbrec.llm.engine import Engine

TOKENS = 2000  # of a search: about two seconds of two cores with a model of 135M
PASS_TOKENS = 96  # of a search in a pass; more would open runs that a better text rules out
SEARCHES = 16  # that share a pass: 96 tokens alone leave the products far below their speed
RUN_TOKENS = 2  # at most; the tokens of a run are run together, even if the first rules it out
TOKEN_COST = 0.3  # the guessed -log p of each later token, for the order of the runs

Slots = tuple[int, ...]  # of the trie's tokens, in the order in which they are run


@dataclass(eq=False)
class TokenRun:
    """A node of the trie: tokens that all texts below share; `texts` end with the last of them.

    `fed` are the tokens with successors, and `next` holds the successors of each: the run's next
    token, or after its last the children's first tokens. `rest` is the number of tokens after the
    first, down to the nearest end of a text.
    """

    ids: list[int]
    texts: list[int]
    children: list["TokenRun"]

    def __post_init__(self) -> None:
        heads = [child.ids[0] for child in self.children]
        self.next = [[token] for token in self.ids[1:]] + ([heads] if heads else [])
        self.fed = self.ids[: len(self.next)]
        below = 0 if self.texts else 1 + min(child.rest for child in self.children)
        self.rest: int = len(self.ids) - 1 + below


def make_trie(rows: Sequence[tuple[list[int], int]], depth: int = 0) -> TokenRun:
    """Return the trie of rows (ids, text), sorted by ids and equal in their first `depth` ids."""
    first, last = rows[0][0], rows[-1][0]
    # in sorted rows these agree least
    end = depth + min(shared_length(first[depth:], last[depth:]), RUN_TOKENS)
    texts = [text for ids, text in rows if len(ids) == end]
    below = itertools.groupby(rows[len(texts) :], key=lambda row: row[0][end])
    return TokenRun(first[depth:end], texts, [make_trie(list(branch), end) for _, branch in below])


@dataclass(frozen=True, order=True)
class Open:
    """A run that waits to be opened; its first token is scored."""

    guess: float  # of the -log p of the best text below
    bound: float = field(compare=False)  # log p up to the first token
    run: TokenRun = field(compare=False)
    above: Slots = field(compare=False)  # the tokens between prompt and run


class Ranking:
    """The trie of a set of texts, which `best` ranks per request."""

    def __init__(self, engine: "Engine", texts: Sequence[str]) -> None:
        self.engine, self.texts = engine, list(texts)
        rows = sorted((engine.tokenizer.beginning(text), i) for i, text in enumerate(texts))
        self.longest = max(len(ids) for ids, _ in rows)
        trie = make_trie(rows)
        # -1: the prompt's last token, which differs by request, precedes all texts
        self.trie = TokenRun([-1, *trie.ids], trie.texts, trie.children)

    @torch.inference_mode()
    def best(self, requests: Requests, k: int, tokens: int = TOKENS) -> list[Ranked]:
        """Return per request the k most probable texts as its reply's beginning.

        A search ends after `tokens` tokens, once it has a text, or as soon as its result is exact
        (0: only then). A request's result does not depend on the others, and its sampling is not
        used.
        """
        engine, lead, ranked = self.engine, self.trie.ids[1:], []
        root = [Open(0.0, 0.0, self.trie, ())]  # all texts share it: it is computed with the prompt
        rows = [(asked.adapter, engine.prompt(asked, self.longest) + lead) for asked in requests]
        for batch in engine.batches([len(ids) for _, ids in rows]):
            firsts = [len(ids) - len(lead) - 1 for _, ids in rows[batch]]
            paths, states = engine.prefill(rows[batch], firsts)
            begun = list(zip(rows[batch], paths, states, strict=True))
            for start in range(0, len(begun), SEARCHES):
                searches = []
                for (adapter, _), path, state in begun[start : start + SEARCHES]:
                    searches.append(Search(engine, adapter, path, k, tokens))
                    searches[-1].score(root, [()], state[: len(self.trie.fed)])
                while going := [(x, chosen) for x in searches if (chosen := x.choose())]:
                    advance(engine, going)
                ranked += [search.result() for search in searches]
        return ranked


def advance(engine: "Engine", going: Sequence[tuple["Search", list[Open]]]) -> None:
    """Open the chosen runs of several searches in one pass, and score what follows them."""
    laid_out = [search.lay_out(chosen) for search, chosen in going]
    ids, places = ([x for own in laid_out for x in own[i]] for i in (0, 1))
    counts = [len(own[0]) for own in laid_out]

    def attention(layer: int, *qkv: Tensor) -> Tensor:
        own = zip(going, *(x.split(counts) for x in qkv), strict=True)
        return torch.cat([search.attend(layer, *x) for (search, _), *x in own])

    rows = (torch.tensor(x, device=engine.model.device) for x in (ids, places))
    spans = adapter_spans([search.adapter for search, _ in going], counts)
    states = engine.model(*rows, attention, spans).split(counts)
    engine.usage.computed_tokens += len(ids)
    for (search, chosen), (_, _, ends), own in zip(going, laid_out, states, strict=True):
        search.score(chosen, ends, own)


class Search:
    """The search of one request: the runs that wait to be opened, and the best texts so far.

    Its keys and values (layers, H_kv, S, d) are those of the prompt, then of all tokens run so far,
    in order. A token sees the prompt and its own path through the trie.
    """

    def __init__(
        self, engine: "Engine", adapter: str | None, prompt: Tensor, k: int, tokens: int
    ) -> None:
        self.engine, self.adapter, self.tokens = engine, adapter, tokens or math.inf
        slots = prompt.to(engine.model.device)
        self.k, self.v = engine.cache.k[:, :, slots], engine.cache.v[:, :, slots]
        self.used, self.prompt_length = 0, len(slots)
        self.open: list[Open] = []
        self.found = [(-math.inf, 0)] * k  # (log p, -text) of the best, the k-th on top

    def result(self) -> Ranked:
        """Return the k best texts that were found."""
        found = sorted((pair for pair in self.found if pair[0] > -math.inf), reverse=True)
        bound = max((left.bound for left in self.open), default=-math.inf)
        proven = sum(score > bound for score, _ in found)
        return Ranked([(-text, score) for score, text in found], proven)

    def choose(self) -> list[Open]:
        """Return the runs to open next: the most promising of those that beat the k-th text."""
        chosen: list[Open] = []
        found_none = max(self.found)[0] == -math.inf  # a search gives at least one text
        room = PASS_TOKENS if found_none else min(PASS_TOKENS, self.tokens - self.used)
        while self.open and room > 0:
            best = heapq.heappop(self.open)
            if best.bound > self.found[0][0]:
                chosen.append(best)
                room -= len(best.run.fed)
        return chosen

    def lay_out(self, chosen: Sequence[Open]) -> tuple[list[int], list[int], list[Slots]]:
        """Return the ids and positions of the runs' tokens, and the path to each run's last one.

        The tokens get room among the keys, and the mask of their paths.
        """
        # paths: of each token the slots it sees, its own the last
        ends, paths = list[Slots](), list[Slots]()
        for best in chosen:
            path = best.above
            for _ in best.run.fed:
                path = (*path, self.used + len(paths))
                paths.append(path)
            ends.append(path)
        self.first = self.prompt_length + self.used
        self.used += len(paths)
        self.k, self.v = (F.pad(x, (0, 0, 0, len(paths))) for x in (self.k, self.v))
        seen = torch.zeros(len(paths), self.used, dtype=torch.bool)
        for row, path in zip(seen, paths, strict=True):
            row[list(path)] = True
        seen = F.pad(seen, (self.prompt_length, 0), value=True)
        self.arranged = self.engine.model.ops.arrange([Stretch(torch.arange(seen.shape[1]), seen)])
        ids = [token for best in chosen for token in best.run.fed]
        return ids, [self.prompt_length + len(path) - 1 for path in paths], ends

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of a pass, q (T, H, d), k and v (T, H_kv, d) -> (T, H, d)."""
        keys, values = self.k[layer], self.v[layer]
        keys[:, self.first :], values[:, self.first :] = k.transpose(0, 1), v.transpose(0, 1)
        return self.engine.model.ops.attend(q, keys, values, self.arranged)

    def score(self, opened: Sequence[Open], ends: Sequence[Slots], states: Tensor) -> None:
        """Score the tokens after the states: the rest of each run, then its children's first."""
        following = [tokens for best in opened for tokens in best.run.next]  # of each state
        rows = [i for i, tokens in enumerate(following) for _ in tokens]
        logits = self.engine.model.logits(states).float()
        logps = logits[rows, list(itertools.chain(*following))] - finite(logits.logsumexp(-1))[rows]
        scores = iter(self.engine.agreed(logps).tolist())
        for best, path in zip(opened, ends, strict=True):
            score = best.bound + sum(itertools.islice(scores, len(best.run.ids) - 1))
            self.find(best.run, score)
            for child in best.run.children:
                self.meet(child, score + next(scores), path)

    def meet(self, run: TokenRun, bound: float, above: Slots) -> None:
        """Queue a run whose first token is scored, or record its texts if no token follows."""
        if not run.fed:
            self.find(run, bound)
        elif bound > self.found[0][0]:
            heapq.heappush(self.open, Open(TOKEN_COST * run.rest - bound, bound, run, above))

    def find(self, run: TokenRun, score: float) -> None:
        """Keep the texts that end with this run if they are among the k best."""
        for text in run.texts:
            heapq.heappushpop(self.found, (score, -text))
