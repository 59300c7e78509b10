"""Self-enhancement at inference (SES): several replies tried on an inner user, the best said.

Departures from the paper (arXiv 2509.20381) and its release, and our choice where both are silent:
1. Votes are read in closed form from the judge's digit probabilities; `votes` samples them.
2. A first response's value is the mean over its leaves (release); `value="majority"` takes the
   most frequent class instead (paper's text). Ties go to the first candidate.
3. Equal texts after one parent are searched once; a later one counts as often as it was drawn.
4. An empty candidate is not searched and never preferred; a leaf whose votes cannot be read has
   no value and is left out of the mean.
5. The summary always sees the newest seeker line (the release's never does).
6. The inner judge scores the last reply itself; no explanation is asked for.
7. Later branches of the tree are drawn at the roll-out temperature, as the chain's replies are.

    dialogue + profile                  summary and first responses: one call for all dialogues
    |- candidate -- seeker -- reply     the later reply is a leaf, which the inner judge scores
    |- candidate -- seeker -- reply
    `- candidate -- seeker -- reply     here with 3 samples, 2 turns, mode "chain"

All dialogues of a chunk are searched level by level, each level in one `generate` call per language
model. `python infer.py --ses` shows a search.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from usbrec.chat import Sampling
from usbrec.crs import agents
from usbrec.crs.agents import JudgeScore, Roles, Seeds, Votes
from usbrec.crs.dialogue import Dialogue, Dialogues, add_turn
from usbrec.options import Options, option, seed_for


@dataclass(frozen=True)
class SearchOptions(Options):
    """Width, depth and temperatures of the search, and the reading of its votes."""

    samples: int = option(3, "first responses that are tried (N)", low=1)
    turns: int = option(2, "recommender turns looked ahead, the candidate's own included", low=1)
    mode: Literal["chain", "tree"] = option("chain", "one continuation, or N at every later turn")
    start_turn: int = option(1, "first recommender turn, counted from 1, that is searched", low=1)
    temperature: float = option(0.5, "temperature of the first responses", low=0)
    rollout_temperature: float = option(0.1, "temperature of the seeker and later replies", low=0)
    votes: int = option(0, "sampled votes at a leaf; 0 reads the expectation in closed form", low=0)
    vote_temperature: float = option(0.7, "temperature of the judge's votes", low=0)
    value: Literal["mean", "majority"] = option("mean", "how leaves become a candidate's value")
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)
    summary_tokens: int = option(48, "longest summary, in tokens", low=1)


@dataclass
class Node:
    """A node of the search: a dialogue in which the seeker speaks next, and its continuations.

    The inner seeker and judge know `profile` alone. `draws` is the number of equal draws that the
    node stands for, those of its candidate left out. Only leaves are scored.
    """

    dialogue: Dialogue
    profile: str
    seed: int
    draws: int = 1
    children: "list[Node]" = field(default_factory=list)
    score: JudgeScore = JudgeScore()

    def leaves(self) -> "list[Node]":
        """Return the leaves below the node, in order of draw; the node itself without children."""
        return [leaf for child in self.children for leaf in child.leaves()] or [self]

    def record(self, start: int) -> dict[str, Any]:
        """Return a leaf in JSON's own types: the lines from `start` on, its score, its draws."""
        lines = [[line.speaker, line.text] for line in self.dialogue[start:]]
        score = asdict(self.score)
        return {"lines": lines, "value": score.pop("score"), **score, "weight": self.draws}


@dataclass
class Candidate:
    """A first response and its node, shared by equal responses and None for an empty one.

    `value` is None if there is no node or none of its leaves could be read.
    """

    reply: str
    node: Node | None
    value: float | None = None

    @property
    def leaves(self) -> list[Node]:
        """The leaves of the node, none without a node."""
        return self.node.leaves() if self.node else []


@dataclass
class SearchResult:
    """One dialogue's search: the dialogue, its profile, all candidates, the index of the best."""

    root: Dialogue
    profile: str
    candidates: list[Candidate]
    best: int = 0

    @property
    def reply(self) -> str:
        """The chosen first response."""
        return self.candidates[self.best].reply

    def record(self) -> dict[str, Any]:
        """Return the search in JSON's own types, the root dialogue left out."""
        n = len(self.root)
        candidates = [
            {"reply": x.reply, "value": x.value, "leaves": [leaf.record(n) for leaf in x.leaves]}
            for x in self.candidates
        ]
        return {"profile": self.profile, "best": self.best, "candidates": candidates}


def search(
    roles: Roles, dialogues: Dialogues, seeds: Seeds, options: SearchOptions
) -> list[SearchResult]:
    """Return one search per dialogue.

    A search depends on its dialogue and seed alone.
    """
    results = open_searches(roles, dialogues, seeds, options)
    nodes = {id(x.node): x.node for result in results for x in result.candidates if x.node}
    level = list(nodes.values())
    for _ in range(options.turns - 1):
        level = expand(roles, level, options)
    evaluate_leaves(roles, level, options)
    for result in results:
        for candidate in result.candidates:
            candidate.value = value_of(candidate.leaves, options.value)
        result.best = select(result.candidates)
    return results


def open_searches(
    roles: Roles, dialogues: Dialogues, seeds: Seeds, options: SearchOptions
) -> list[SearchResult]:
    """Return one search per dialogue: its profile and `samples` candidates, from one `complete`."""
    summary = Sampling(options.summary_tokens, temperature=0.0)
    first = Sampling(options.max_new_tokens, options.temperature)
    asked = []
    for root, seed in zip(dialogues, seeds, strict=True):
        key = seed_for(seed, "summary")
        asked += roles.simulator.requests([agents.summary_prompt(root)], summary, [key])
        prompts = [agents.recommender_prompt(root)] * options.samples
        keys = [seed_for(seed, "candidate", n) for n in range(options.samples)]
        asked += roles.recommender.requests(prompts, first, keys)
    texts = iter(roles.complete(asked))
    results = []
    for root, seed in zip(dialogues, seeds, strict=True):
        profile, replies = next(texts), [next(texts) for _ in range(options.samples)]
        nodes = {}  # equal replies are searched once, empty ones not at all
        for x in filter(None, replies):
            nodes[x] = Node(add_turn(root, "recommender", x), profile, seed_for(seed, "root", x))
        results.append(SearchResult(root, profile, [Candidate(x, nodes.get(x)) for x in replies]))
    return results


def expand(roles: Roles, nodes: Sequence[Node], options: SearchOptions) -> list[Node]:
    """Return the children of all nodes, each longer by a line of the inner seeker and a reply."""
    sampling = Sampling(options.max_new_tokens, options.rollout_temperature)
    prompts = [agents.internal_seeker_prompt(node.dialogue, node.profile) for node in nodes]
    seeds = [seed_for(node.seed, "seeker") for node in nodes]
    lines = roles.complete(roles.simulator.requests(prompts, sampling, seeds))
    asked = [add_turn(node.dialogue, "seeker", x) for node, x in zip(nodes, lines, strict=True)]
    width = range(options.samples if options.mode == "tree" else 1)
    seeds = [seed_for(node.seed, "recommender", n) for node in nodes for n in width]
    texts = iter(roles.recommend([d for d in asked for _ in width], sampling, seeds))
    for node, dialogue in zip(nodes, asked, strict=True):
        for text, count in Counter(next(texts) for _ in width).items():  # equal ones are one child
            longer = add_turn(dialogue, "recommender", text)
            seed = seed_for(node.seed, "next", text)
            node.children.append(Node(longer, node.profile, seed, node.draws * count))
    return [child for node in nodes for child in node.children]


def evaluate_leaves(roles: Roles, leaves: Sequence[Node], options: SearchOptions) -> None:
    """Set the inner judge's score of the last reply of each leaf."""
    prompts = [agents.internal_judge_prompt(leaf.dialogue, leaf.profile) for leaf in leaves]
    votes = Votes(options.votes, options.vote_temperature)
    scores = roles.judge(prompts, votes, [seed_for(leaf.seed, "judge") for leaf in leaves])
    for leaf, score in zip(leaves, scores, strict=True):
        leaf.score = score


def value_of(leaves: Sequence[Node], value: str) -> float | None:
    """Return the mean of the leaves' scores, or their most frequent class; None if none was read.

    A leaf is weighted by its draws.
    """
    if value == "majority":
        majority = agents.count_votes([x.score.label for x in leaves for _ in range(x.draws)]).label
        return None if majority is None else float(majority)
    read = [(x.score.score, x.draws) for x in leaves if x.score.score is not None]
    return sum(mean * n for mean, n in read) / sum(n for _, n in read) if read else None


def select(candidates: Sequence[Candidate]) -> int:
    """Return the index of the candidate with the highest value, ties to the first.

    A candidate without a value never beats one that has one, and an empty one beats none. Without
    any value the first candidate that is not empty is chosen.
    """
    ranks = [(x.value is not None, bool(x.reply), x.value or 0.0) for x in candidates]
    return ranks.index(max(ranks))
