"""Self-enhancement at inference (SES): try several replies on an inner user, say the best one.

Departures from the paper (arXiv 2509.20381) and its release, and what either leaves open:
1. Votes are read in closed form from the judge's digit probabilities; `votes` samples them.
2. A first response's value is the mean over its leaves (release); `value="majority"` takes the
   most frequent class instead (paper's text). Ties go to the first candidate.
3. Equal texts after one parent are searched once; a later one counts as often as it was drawn.
4. An empty candidate is not searched and never preferred; a leaf whose votes cannot be read has
   no value and is left out of the mean.
5. The summary always sees the newest seeker line (the release's never does).
6. The inner judge scores the last reply itself; no explanation is asked for.
7. Later branches of the tree are drawn at the roll-out temperature, as the chain's replies are.

A whole chunk of dialogues is searched level by level, each level in one `generate` call; summary
and first responses share the first. Seen with `python infer.py --ses`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from usbrec.chat import Chat, LanguageModel, Sampling
from usbrec.crs.agents import (
    Cast,
    Verdict,
    ask,
    internal_judge_prompt,
    internal_seeker_prompt,
    judge,
    recommender_prompt,
    say,
    summary_prompt,
)
from usbrec.crs.dialogue import Dialogue
from usbrec.options import check, option, seed_for


@dataclass(frozen=True)
class SearchOptions:
    """How wide, how far and how warm the search is, and how its votes are read."""

    samples: int = option(3, "first responses that are tried (N)", low=1)
    turns: int = option(2, "recommender turns looked ahead, the candidate's own included", low=1)
    mode: Literal["chain", "tree"] = option("chain", "one continuation, or N at every later turn")
    start_turn: int = option(1, "first recommender turn, counted from 1, that is searched", low=1)
    temperature: float = option(0.5, "temperature of the first responses", low=0)
    rollout_temperature: float = option(
        0.1, "temperature of the inner seeker and later replies", low=0
    )
    votes: int = option(0, "sampled votes at a leaf; 0 reads the expectation in closed form", low=0)
    vote_temperature: float = option(0.7, "temperature of the judge's votes", low=0)
    value: Literal["mean", "majority"] = option("mean", "how leaves become a candidate's value")
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)
    summary_tokens: int = option(48, "longest summary, in tokens", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Leaf:
    """The end of one roll-out, the judge's verdict on it, and how many draws it stands for."""

    dialogue: Dialogue
    verdict: Verdict
    weight: int


@dataclass(frozen=True)
class Candidate:
    """A first response; `value` is None when it is empty or none of its leaves could be read."""

    reply: str
    value: float | None
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class SearchResult:
    """One dialogue's search: where it began, what it believed, what it tried, what it chose."""

    root: Dialogue
    profile: str
    candidates: tuple[Candidate, ...]
    best: int

    @property
    def reply(self) -> str:
        """The chosen first response."""
        return self.candidates[self.best].reply


@dataclass(frozen=True)
class _Node:
    """A dialogue on its way: the search it belongs to, with the profile and the first response
    there, its seed, and the draws it stands for.
    """

    owner: int
    profile: str
    first: str
    dialogue: Dialogue
    seed: int
    weight: int = 1


def search(
    llm: LanguageModel,
    cast: Cast,
    dialogues: Sequence[Dialogue],
    seeds: Sequence[int],
    options: SearchOptions,
) -> list[SearchResult]:
    """Return one finished search a dialogue; each depends on its own dialogue and seed alone."""
    profiles, drafts = open_search(llm, cast, dialogues, seeds, options)
    nodes = [
        _Node(i, profiles[i], text, say(root, "recommender", text),
              seed_for(seeds[i], "root", text))
        for i, root in enumerate(dialogues)
        for text, _ in _counted(drafts[i])
    ]  # fmt: skip
    for _ in range(options.turns - 1):
        nodes = expand(llm, cast, nodes, options)
    leaves = evaluate(llm, cast, nodes, options)
    found = defaultdict[tuple[int, str], list[Leaf]](list)
    for node, leaf in zip(nodes, leaves, strict=True):
        found[node.owner, node.first].append(leaf)
    results = []
    for i, root in enumerate(dialogues):
        below = [(text, tuple(found[i, text])) for text in drafts[i]]
        candidates = [Candidate(text, value_of(x, options.value), x) for text, x in below]
        results.append(SearchResult(root, profiles[i], tuple(candidates), select(candidates)))
    return results


def open_search(
    llm: LanguageModel,
    cast: Cast,
    dialogues: Sequence[Dialogue],
    seeds: Sequence[int],
    options: SearchOptions,
) -> tuple[list[str], list[list[str]]]:
    """Return each dialogue's profile and its `samples` first responses, drawn in one call."""
    summary = Sampling(options.summary_tokens, temperature=0.0)
    first = Sampling(options.max_new_tokens, options.temperature)
    chats: list[Chat] = []
    keys: list[int] = []
    for dialogue, seed in zip(dialogues, seeds, strict=True):
        chats.append(cast.simulates(summary_prompt(dialogue)))
        chats += [cast.recommends(recommender_prompt(dialogue))] * options.samples
        keys += [seed_for(seed, "summary")]
        keys += [seed_for(seed, "candidate", n) for n in range(options.samples)]
    samplings = [summary, *[first] * options.samples] * len(dialogues)
    texts = ask(llm, chats, samplings, keys)
    width = options.samples + 1
    rows = [texts[i : i + width] for i in range(0, len(texts), width)]
    return [row[0] for row in rows], [row[1:] for row in rows]


def expand(
    llm: LanguageModel, cast: Cast, nodes: Sequence[_Node], options: SearchOptions
) -> list[_Node]:
    """Return the nodes one exchange later: the inner seeker answers, the recommender goes on."""
    sampling = Sampling(options.max_new_tokens, options.rollout_temperature)
    chats = [cast.simulates(internal_seeker_prompt(x.dialogue, x.profile)) for x in nodes]
    lines = ask(llm, chats, sampling, [seed_for(node.seed, "seeker") for node in nodes])
    dialogues = [say(node.dialogue, "seeker", x) for node, x in zip(nodes, lines, strict=True)]
    width = options.samples if options.mode == "tree" else 1
    chats = [cast.recommends(recommender_prompt(d)) for d in dialogues for _ in range(width)]
    keys = [seed_for(node.seed, "recommender", n) for node in nodes for n in range(width)]
    replies = ask(llm, chats, sampling, keys)
    return [
        replace(node, dialogue=say(dialogues[i], "recommender", text),
                seed=seed_for(node.seed, "next", text), weight=node.weight * count)
        for i, node in enumerate(nodes)
        for text, count in _counted(replies[i * width : (i + 1) * width], keep_empty=True)
    ]  # fmt: skip


def evaluate(
    llm: LanguageModel, cast: Cast, nodes: Sequence[_Node], options: SearchOptions
) -> list[Leaf]:
    """Return each node as a leaf with the inner judge's verdict on its last reply."""
    chats = [cast.simulates(internal_judge_prompt(x.dialogue, x.profile)) for x in nodes]
    seeds = [seed_for(node.seed, "judge") for node in nodes]
    verdicts = judge(llm, chats, options.votes, options.vote_temperature, seeds)
    return [Leaf(n.dialogue, v, n.weight) for n, v in zip(nodes, verdicts, strict=True)]


def value_of(leaves: Sequence[Leaf], value: str) -> float | None:
    """Return the weighted mean of the leaves' expectations, or their most frequent class."""
    if value == "mean":
        means = [(leaf.verdict.expectation, leaf.weight) for leaf in leaves]
        read = [(mean, weight) for mean, weight in means if mean is not None]
        return sum(m * w for m, w in read) / sum(w for _, w in read) if read else None
    tally = [0, 0, 0]
    for leaf in leaves:
        if leaf.verdict.label is not None:
            tally[leaf.verdict.label] += leaf.weight
    return float(tally.index(max(tally))) if any(tally) else None


def select(candidates: Sequence[Candidate]) -> int:
    """Return the index of the highest value, ties to the first; without values, the first said.

    A candidate without a value never beats one that has one, and an empty one beats none.
    """

    def rank(i: int) -> tuple[bool, bool, float]:
        value = candidates[i].value
        return value is not None, bool(candidates[i].reply), value or 0.0

    return max(range(len(candidates)), key=rank)


def _counted(texts: Sequence[str], keep_empty: bool = False) -> list[tuple[str, int]]:
    """Return the different texts in order of first draw, and how often each was drawn."""
    return [(x, texts.count(x)) for x in dict.fromkeys(texts) if x or keep_empty]
