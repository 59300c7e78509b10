"""Self-enhancement at inference (SES): replies are tried on an inner user, and the best is given.

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
8. Beyond the paper, and off unless asked for: `candidates` of different titles, drawn until there
   are enough, or the announcements of the likeliest titles of the catalogue, whose values are
   weighted by the titles' probability (`prior`), and of which the chosen one is written out;
   `scored="path"`, which also scores the candidate itself; `cards`, with which the judge sees the
   catalogue's facts of the title; `memory`, with which it first writes what it knows of the title
   itself, without a catalogue. With cards a reply that the profile calls refused or seen is 0
   (`veto`), and so is a last reply without a title of the catalogue; a question on the way is not
   scored.
9. Beyond the paper, and off unless asked for: a budget. A search that fits its tokens is not
   changed. Otherwise the first responses are judged at once; then at each turn the better half, or
   fewer if the tokens run out, is rolled out and judged. A value is that of the whole path. With
   cards the rule `wishes.fit`, which asks no model, chooses the candidates to be judged, and a
   first response without a title is scored, as 0, even if a later one follows. A single candidate
   is not judged. A search spends at least a summary and a candidate.

    dialogue + profile                  summary and first responses: one call for all dialogues
    |- candidate -- seeker -- reply     the later reply is a leaf, which the inner judge scores
    |- candidate -- seeker -- reply
    `- candidate -- seeker -- reply     here with 3 samples, 2 turns, mode "chain"

All dialogues of a chunk are searched level by level, each level in one `generate` call per language
model. `python infer.py --ses` shows a search.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tqdm import tqdm

from usbrec.chat import Messages, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import Asked, JudgeScore, Roles, Seeds, Side, Votes
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Dialogues, add_turn
from usbrec.crs.wishes import card, fit, read_profile
from usbrec.options import MOST, option, seed_for

BOUND = 10_000  # replies, and votes, of one dialogue's search
LAYOUT_TOKENS = 6  # in a budget: of a chat layout around a message


@dataclass(frozen=True)
class SearchOptions(Votes):
    """Width, depth and temperatures of the search, and the reading of its votes."""

    samples: int = option(3, "first responses that are tried (N)", low=1, high=BOUND)
    turns: int = option(2, "recommender turns looked ahead, the first included", low=1, high=100)
    mode: Literal["chain", "tree"] = option("chain", "one continuation, or N at every later turn")
    start_turn: int = option(1, "first recommender turn, counted from 1, that is searched", low=1)
    temperature: float = option(0.5, "temperature of the first responses", low=0)
    rollout_temperature: float = option(0.1, "temperature of the seeker and later replies", low=0)
    value: Literal["mean", "majority"] = option("mean", "how leaves become a candidate's value")
    scored: Literal["leaf", "path"] = option("leaf", "the last reply, or all of the path's replies")
    candidates: Literal["sampled", "distinct", "ranked"] = option(
        "sampled", "draws, draws of N different titles, or the likeliest titles' announcements"
    )
    prior: float = option(0.3, "ranked: weight of a title's own probability", low=0)
    draws: int = option(24, "most draws in search of N different titles", low=1, high=BOUND)
    cards: bool = option(False, "the judge sees the catalogue's facts of the title")
    memory: bool = option(False, "the judge first writes what it knows of the title")
    veto: bool = option(True, "with cards: a refused or seen title is worth 0, as none is")
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)
    summary_tokens: int = option(48, "longest summary, in tokens", low=1)
    budget_tokens: int = option(0, "most tokens, by estimate; 0: any", low=0)
    budget_seconds: float = option(0.0, "by the clock; calls overrun, results vary; 0: any", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        judged = self.levels if self.scored == "path" else self.levels[-1:]
        replies, votes = (min(n, 1e99) for n in (sum(self.levels), sum(judged) * self.votes))
        if max(replies, votes) > BOUND:
            told = f"{replies:.3g} replies and {votes:.3g} votes per dialogue"
            raise ValueError(f"samples, turns, mode and votes ask for {told}, at most {BOUND} each")

    @property
    def levels(self) -> list[int]:
        """The greatest number of replies at each level of one dialogue's search."""
        width = self.samples if self.mode == "tree" else 1
        return [self.samples * width**level for level in range(self.turns)]


@dataclass
class Node:
    """A node of the search: a dialogue in which the seeker speaks next, and its continuations.

    The inner seeker and judge know `profile` alone. `draws` is the number of equal draws that the
    node stands for, those of its candidate left out. `score` is that of the last reply. Inner nodes
    are scored with `scored="path"` alone. `known` is what the judge has written of its title, "" if
    it was not asked. `ranked` is the film whose announcement it is.
    """

    dialogue: Dialogue
    profile: str
    seed: int
    draws: int = 1
    children: "list[Node]" = field(default_factory=list)
    score: JudgeScore = JudgeScore()
    known: str = ""
    ranked: Item | None = None

    def item(self, catalogue: Catalogue) -> Item | None:
        """Return the film of the last reply, None where it names none of the catalogue."""
        return self.ranked or next(iter(catalogue.first(self.dialogue[-1].text)), None)

    def paths(self) -> "list[list[Node]]":
        """Return the nodes from this one to each leaf, in order of draw."""
        return [[self, *path] for child in self.children for path in child.paths()] or [[self]]

    def record(self, start: int) -> dict[str, Any]:
        """Return a leaf in JSON's own types: the lines from `start` on, score, draws, `known`."""
        lines = [[line.speaker, line.text] for line in self.dialogue[start:]]
        score, known = asdict(self.score), {"known": self.known} if self.known else {}
        return {"lines": lines, "value": score.pop("score"), **score, "weight": self.draws, **known}


@dataclass
class Candidate:
    """A first response and its node, shared by equal responses and None for an empty one.

    `value` is None if there is no node or none of its leaves could be read. `dropped` is the turn,
    from 1, that a budget went on to without it; what was dropped at turn 1 was never judged.
    `chance` is a ranked title's probability, as a share of the likeliest one's, and else 1.
    """

    reply: str
    node: Node | None
    value: float | None = None
    dropped: int | None = None
    chance: float = 1.0

    @property
    def paths(self) -> list[list[Node]]:
        """The nodes from the candidate's own to each leaf, none without a node."""
        return self.node.paths() if self.node else []

    @property
    def leaves(self) -> list[Node]:
        """The last node of each path."""
        return [path[-1] for path in self.paths]

    def record(self, start: int) -> dict[str, Any]:
        """Return the candidate in JSON's own types, its leaves as `Node.record`."""
        dropped = {"dropped": self.dropped} if self.dropped else {}
        own = {"reply": self.reply, "value": self.value, "chance": self.chance, **dropped}
        return {**own, "leaves": [leaf.record(start) for leaf in self.leaves]}


@dataclass
class SearchResult:
    """One dialogue's search: the dialogue, its seed and profile, candidates, the best one's index.

    `widths` are the candidates that a budget keeps at each turn, none if it keeps all. `late` is
    the turn before which the clock ended the search and left one.
    """

    root: Dialogue
    seed: int
    profile: str
    candidates: list[Candidate] = field(default_factory=list)
    best: int = 0
    widths: list[int] = field(default_factory=list)
    late: int | None = None

    def requests(self, recommender: Side, options: SearchOptions, numbers: Sequence[int]) -> Asked:
        """Return the requests for the first responses of these numbers."""
        prompts = [agents.recommender_prompt(self.root)] * len(numbers)
        keys = [seed_for(self.seed, "candidate", n) for n in numbers]
        sampling = Sampling(options.max_new_tokens, options.temperature)
        return recommender.requests(prompts, sampling, keys)

    @property
    def reply(self) -> str:
        """The chosen first response."""
        return self.candidates[self.best].reply

    def record(self) -> dict[str, Any]:
        """Return the search in JSON's own types, the root dialogue left out."""
        candidates = [x.record(len(self.root)) for x in self.candidates]
        budget = {"budget": {"widths": self.widths, "late": self.late}} if self.widths else {}
        return {"profile": self.profile, "best": self.best, "candidates": candidates, **budget}


Searches = list[SearchResult]


def search(
    roles: Roles, dialogues: Dialogues, seeds: Seeds, options: SearchOptions, given: str = ""
) -> Searches:
    """Return one search per dialogue; a `given` profile takes the place of the summaries.

    A search depends on its dialogue, its seed and such a profile alone, with a budget of seconds on
    the clock too.
    """
    start, pairs = time.monotonic(), zip(dialogues, seeds, strict=True)
    n = len(roles.catalogue.items)
    results = [SearchResult(x, key, given, widths=plan(x, options, n)) for x, key in pairs]
    begin(results, roles, options)
    search_within([x for x in results if x.widths], roles, options, start)
    whole = [x for result in results if not result.widths for x in result.candidates]
    levels = [list({id(x.node): x.node for x in whole if x.node}.values())]
    for _ in tqdm(range(options.turns - 1), "search", leave=False, delay=2, disable=None):
        levels.append(expand(roles, levels[-1], options))
    scored = levels if options.scored == "path" else levels[-1:]
    score_nodes(roles, [node for level in scored for node in level], options)
    for result in results:
        for candidate in result.candidates:
            candidate.value = value_of(candidate.paths, options, candidate.chance)
        result.best = select(result.candidates)
    if options.candidates == "ranked":
        write_out(roles, results, options)
    return results


def search_within(results: Searches, roles: Roles, options: SearchOptions, start: float) -> None:
    """Search as far as the plans and the clock allow, each level after a choice of candidates."""
    for level in range(options.turns):
        going = [x for x in results if level < len(x.widths)]
        over = 0 < options.budget_seconds < time.monotonic() - start
        for result in going:
            if over:
                result.late, result.widths = level + 1, [*result.widths[:level], 1]
            keep(result, level, roles.catalogue, options)
        # one candidate alone is not judged
        left = [x for r in going if r.widths[level] > 1 for x in r.candidates if not x.dropped]
        nodes = list({id(leaf): leaf for x in left for leaf in x.leaves}.values())
        score_nodes(roles, expand(roles, nodes, options) if level else nodes, options)


def begin(results: Searches, roles: Roles, options: SearchOptions) -> None:
    """Give each search its candidates, and its profile if it has none.

    Summaries and sampled candidates share one `complete`.
    """
    ranked = options.candidates == "ranked"
    best = roles.likeliest([x.root for x in results], options.samples) if ranked else []
    drawn = [[agents.announce(item.title) for item, _ in row] for row in best]
    bare = [x for x in results if not x.profile]
    asked = roles.summaries([x.root for x in bare], options.summary_tokens, [x.seed for x in bare])
    drawn_numbers = [range(0 if ranked else (x.widths or [options.samples])[0]) for x in results]
    for result, numbers in zip(results, drawn_numbers, strict=True):
        asked += result.requests(roles.recommender, options, numbers)
    texts = iter(roles.complete(asked))
    for result in bare:
        result.profile = next(texts)
    drawn = drawn or [[next(texts) for _ in numbers] for numbers in drawn_numbers]
    if options.candidates == "distinct":
        drawn = draw_distinct(roles, results, drawn, options)
    for x, replies, row in zip(results, drawn, best or [[]] * len(results), strict=True):
        nodes = {}  # equal replies are searched once, empty ones not at all
        for reply in filter(None, replies):
            said, key = add_turn(x.root, "recommender", reply), seed_for(x.seed, "root", reply)
            nodes[reply] = Node(said, x.profile, key)
        x.candidates = [Candidate(reply, nodes.get(reply)) for reply in replies]
        for candidate, (item, logprob) in zip(x.candidates, row, strict=False):  # none if sampled
            candidate.chance = math.exp(round(logprob - row[0][1], 3))  # without the last bits
            nodes[candidate.reply].ranked = item


def plan(root: Dialogue, options: SearchOptions, titles: int = 0) -> list[int]:
    """Return how many candidates a budget keeps at each turn, none if it pays for the whole search.

    Prices, also of a ranking of so many `titles`, are known before the first call, whatever the
    language model or server; one that tells no log-probabilities votes more often than is counted.
    A prompt counts a token for every four bytes of its text, cached or not, and its layout's. What
    is yet to be said counts at its longest, a card as a summary. A budget of seconds halves every
    search.
    """
    o, longest, profile = options, options.max_new_tokens, "x" * 4 * options.summary_tokens
    chats = agents.recommender_prompt(root), agents.internal_judge_prompt(root, profile)
    prompts = *chats, agents.card_prompt("", profile, profile) if o.cards or o.memory else chats[1]
    sizes = ([len(x.content.encode()) // 4 + LAYOUT_TOKENS for x in prompt] for prompt in prompts)
    asks, chat, judges = (longest + sum(each) for each in sizes)
    calls = {"sampled": 0, "distinct": max(o.draws, o.samples), "ranked": 2}[o.candidates]
    ranking = agents.ranking_tokens(o.samples, titles) * (o.candidates == "ranked")
    left = given = (o.budget_tokens or MOST) - chat - calls * asks - ranking
    parents, whole, widths = 0, 0, [2 * o.samples]
    for level, count in enumerate(o.levels):
        # of one candidate; since the root
        nodes, said = count // o.samples, 2 * level * (longest + LAYOUT_TOKENS)
        drawn = parents * (chat + said) + nodes * (asks + said) * (level > 0 or calls == 0)
        # to remember costs less than to judge
        judged = nodes * (max(1, o.votes) + o.memory) * (judges + said + agents.VOTE_TOKENS)
        whole += drawn + judged * (o.scored == "path" or level == o.turns - 1)
        widths.append(int(min((widths[-1] + 1) // 2, left // (drawn + judged))))
        parents, left = nodes, left - widths[-1] * (drawn + judged)
    fits = o.samples * whole <= given and not o.budget_seconds
    return [] if fits else [width for width in widths[1:] if width > 1] or [1]


def write_out(roles: Roles, results: Searches, options: SearchOptions) -> None:
    """Replace the chosen announcements by whole replies that begin with them."""
    begun = [(x, x.requests(roles.recommender, options, [x.best])[0]) for x in results]
    asked = [(side, replace(request, begin=x.reply)) for x, (side, request) in begun]
    for result, text in zip(results, roles.complete(asked), strict=True):
        result.candidates[result.best].reply = text


def draw_distinct(
    roles: Roles, results: Searches, drawn: list[list[str]], options: SearchOptions
) -> list[list[str]]:
    """Return per dialogue the first reply of each title, `samples` of them or as many as are drawn.

    Drawing goes on in rounds of `samples` for the dialogues that need more, until `draws` are
    spent. With a budget as many titles are enough as there were first draws. Replies without a
    title count as one title; where all are empty, one empty reply is left.
    """
    width, enough = options.samples, [len(x) for x in drawn]
    for start in range(width, options.draws, width):
        numbers = range(start, min(start + width, options.draws))
        short = [i for i, x in enumerate(drawn) if len(by_title(roles.catalogue, x)) < enough[i]]
        asked = [x for i in short for x in results[i].requests(roles.recommender, options, numbers)]
        texts = iter(roles.complete(asked))
        for i in short:
            drawn[i].extend(next(texts) for _ in numbers)
    return [list(by_title(roles.catalogue, x).values())[:width] or [""] for x in drawn]


def by_title(catalogue: Catalogue, replies: Sequence[str]) -> dict[tuple[Item, ...], str]:
    """Return {first title: the first reply with it}; the title is () if a reply names none."""
    found: dict[tuple[Item, ...], str] = {}
    for reply in filter(None, replies):
        found.setdefault(catalogue.first(reply), reply)
    return found


def keep(result: SearchResult, level: int, catalogue: Catalogue, options: SearchOptions) -> None:
    """Drop all candidates but the most promising ones of the plan, at ties the later.

    Before the first judgement all promise the same, with cards their fit with the profile by rule.
    Later one without a value promises less than any that has one.
    """
    told = read_profile(result.profile, catalogue) if options.cards else set()

    def promise(x: Candidate) -> float:
        if level == 0 and options.cards:
            return fit(item, told) if (item := x.node and x.node.item(catalogue)) else -1
        return -1 if (value := value_of(x.paths, options, x.chance)) is None else value

    left = [x for x in result.candidates if x.node and not x.dropped]
    best = list(dict.fromkeys(x.reply for x in sorted(left, key=promise, reverse=True)))
    for x in left:
        x.dropped = None if x.reply in best[: result.widths[level]] else level + 1


def expand(roles: Roles, nodes: Sequence[Node], options: SearchOptions) -> list[Node]:
    """Return the children of all nodes, each longer by a line of the inner seeker and a reply."""
    sampling = Sampling(options.max_new_tokens, options.rollout_temperature)
    seeds = [seed_for(node.seed, "seeker") for node in nodes]
    asked = roles.seek([x.dialogue for x in nodes], [x.profile for x in nodes], sampling, seeds)
    width = range(options.samples if options.mode == "tree" else 1)
    seeds = [seed_for(node.seed, "recommender", n) for node in nodes for n in width]
    texts = iter(roles.recommend([d for d in asked for _ in width], sampling, seeds))
    for node, dialogue in zip(nodes, asked, strict=True):
        for text, count in Counter(next(texts) for _ in width).items():  # equal ones are one child
            said, key = add_turn(dialogue, "recommender", text), seed_for(node.seed, "next", text)
            node.children.append(Node(said, node.profile, key, node.draws * count))
    return [child for node in nodes for child in node.children]


def score_nodes(roles: Roles, nodes: Sequence[Node], options: SearchOptions) -> None:
    """Set the inner judge's score of the last reply of each node."""
    if options.memory and not options.cards:
        said = [node.dialogue[-1].text for node in nodes]
        for node, text in zip(nodes, roles.remember(said, options.summary_tokens), strict=True):
            node.known = text
    prompts = [judge_prompt(node, roles, options) for node in nodes]
    seeds = [seed_for(node.seed, "judge") for node, x in zip(nodes, prompts, strict=True) if x]
    scores = iter(roles.judge(list(filter(None, prompts)), options, seeds))
    for node, prompt in zip(nodes, prompts, strict=True):
        asks = not prompt and node.children and not node.item(roles.catalogue)
        node.score = next(scores) if prompt else JudgeScore() if asks else JudgeScore(0.0, 0)


def judge_prompt(node: Node, roles: Roles, o: SearchOptions) -> Messages | None:
    """Return the inner judge's prompt, or None for a last reply that is not worth judging.

    With cards that is one without a title of the catalogue and, with `veto`, one whose film the
    profile calls refused or seen.
    """
    reply = node.dialogue[-1].text
    if not o.cards:
        by_memory = agents.card_prompt(reply, node.known, node.profile)
        return by_memory if o.memory else agents.internal_judge_prompt(node.dialogue, node.profile)
    item = node.item(roles.catalogue)
    over = [x[1:] for x in read_profile(node.profile, roles.catalogue) if x.attitude != "like"]
    if item is None or (o.veto and ("title", item.title) in over):
        return None
    return agents.card_prompt(reply, card(item), node.profile)


def value_of(paths: list[list[Node]], options: SearchOptions, chance: float = 1.0) -> float | None:
    """Return the mean of the scored nodes of all paths, or their most frequent class.

    A path is weighted by the draws of its leaf. The result is less where the title's `chance` is:
    it is multiplied by the chance to the power of `prior`. It is None if no score was read.
    """
    nodes = [(x.score, path[-1].draws) for path in paths for x in path]
    read = [(score.score, n) for score, n in nodes if score.score is not None]
    value = sum(mean * n for mean, n in read) / sum(n for _, n in read) if read else None
    if options.value == "majority":
        value = agents.count_votes([score.label for score, n in nodes for _ in range(n)]).label
    return None if value is None else value * chance**options.prior


def select(candidates: Sequence[Candidate]) -> int:
    """Return the index of the candidate with the highest value, ties to the first.

    A candidate without a value never beats one that has one, an empty one never one with text, and
    a dropped one never another. Without any value the first candidate with text is chosen.
    """
    ranks = [(not x.dropped, x.value is not None, bool(x.reply), x.value or 0) for x in candidates]
    return ranks.index(max(ranks))
