"""Claim: a searched turn costs a tenth (chain) or twentieth (tree) of calling a model one by one.

    python benchmarks/ses.py [--quick]          # needs requirements-dev.txt
    python benchmarks/ses.py --grow             # no peer: how the cost grows with the search

The same search of one dialogue, 3 samples, 2 turns, 10 sampled votes at each leaf, asked of our
engine and of transformers' `generate`, one call a reply, as the authors' release asks. The default
model in bf16, every text forced to 32 tokens and every vote to 2, no adapters. All texts but the
summary are drawn at temperature 1: at the search's own temperatures some come out equal and are
searched once, so that the two would differ in their work by chance. Here both make 40 replies
(chain) or 106 (tree), which is checked. `over_plain` is a chain turn with closed-form votes over
one plain reply of our own engine (3.5 is the floor: summary and three dependent replies of 32
tokens against one).

The chain within half of its tokens (by estimate) is timed alone: the release has no such search.

`--grow` tells what samples, depth and a budget of tokens cost, with closed-form votes, in plain
replies of our own engine. Leaves are what a search called one by one would pay for.
"""

import argparse
import itertools
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from contest import show
from race import WORDS, finish, medians, our_engine, their_model

from usbrec.chat import Reply, Request, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Dialogue, Utterance
from usbrec.crs.ses import SearchOptions, plan, search
from usbrec.llm.engine import Engine, Usage

TOKENS, VOTE_TOKENS, VOTES = 32, 2, 10
GROWN_TOKENS, MOST_LEAVES = 16, 64  # of --grow: a text's tokens, a search's leaves
SHAPES = {"chain": (1 + 3 + 3 + 3, 3), "tree": (1 + 3 + 3 + 9, 9)}  # texts, leaves
REACH = {"chain": 10.0, "tree": 20.0, "over_plain": 5.0}


class OneByOne:
    """transformers' `generate`, one call a reply."""

    def __init__(self, model: Any, engine: Engine) -> None:
        self.model, self.tokenizer = model, engine.tokenizer
        self.usage = Usage()

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Return one reply per request."""
        return [self.reply(request) for request in requests]

    def reply(self, request: Request) -> Reply:
        """Make one call."""
        how = request.sampling
        self.usage.decoded_tokens += how.max_new_tokens
        ids = torch.tensor([self.tokenizer.prompt(request.messages)])
        warm = {"do_sample": True, "temperature": how.temperature} if how.temperature else {}
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=how.max_new_tokens,
            min_new_tokens=how.max_new_tokens,
            pad_token_id=0,
            **(warm or {"do_sample": False}),
        )
        new = out[0, ids.shape[1] :].tolist()
        return Reply(self.tokenizer.decode(new), tuple(new), False)

    def choice_logprobs(
        self, requests: Sequence[Request], choices: Sequence[str]
    ) -> list[list[float]]:
        """The release has no closed-form votes."""
        raise NotImplementedError


def dialogue(number: int = 0) -> Dialogue:
    """Five lines of 16 words, others for each number."""
    words = random.Random(number).sample(WORDS, len(WORDS)) if number else WORDS
    return tuple(
        Utterance("recommender" if i % 2 else "seeker", " ".join(words[i:] + words[:i])[:80])
        for i in range(5)
    )


def options_of(mode: Any, votes: int, tokens: int, **others: Any) -> SearchOptions:
    """Return the options of a search whose texts have so many tokens."""
    warm = {"temperature": 1.0, "rollout_temperature": 1.0}
    long = {"max_new_tokens": tokens, "summary_tokens": tokens}
    return SearchOptions(mode=mode, votes=votes, **{**warm, **long, **others})


def turn(roles: Roles, roots: Sequence[Dialogue], mode: Any, votes: int, tokens: int) -> None:
    """Search the next turn of dialogues with texts of so many tokens; both sides share a model."""
    options = options_of(mode, votes, tokens)
    llm: Any = roles.recommender.llm
    before, (texts, leaves) = llm.usage.decoded_tokens, SHAPES[mode]
    search(roles, roots, range(len(roots)), options)
    drawn = llm.usage.decoded_tokens - before
    whole = len(roots) * (texts * tokens + leaves * votes * VOTE_TOKENS)
    # short texts may be equal by chance, and are then searched once
    assert drawn == whole or tokens < TOKENS, f"equal texts: {drawn} tokens of {whole}"


def grow(engine: Engine, tokens: int, rounds: int) -> None:
    """Print the cost of searches of many sizes, in plain replies."""
    roles, root = Roles(Side(engine), Side(engine), Catalogue([])), dialogue()
    shapes = {}
    for mode, turns, samples in itertools.product(("chain", "tree"), (1, 2, 3), (1, 2, 4, 8)):
        options = options_of(mode, 0, tokens, turns=turns, samples=samples)
        if options.levels[-1] <= MOST_LEAVES and not (mode == "tree" and 1 in (turns, samples)):
            shapes[mode, turns, samples, "all"] = options
    whole = shapes["chain", 2, 8, "all"]
    for part in (2, 4):
        shapes["chain", 2, 8, f"1/{part}"] = bounded(whole, tokens_of(whole, root) // part)
    decoded: dict[Any, int] = {}

    def searched(key: Any) -> None:
        engine.clear_cache()
        before = engine.usage.decoded_tokens
        search(roles, [root], [0], shapes[key])
        decoded[key] = engine.usage.decoded_tokens - before

    jobs = {"plain": lambda: plain(engine, root, tokens)}
    jobs |= {key: lambda key=key: searched(key) for key in shapes}
    seconds = medians(jobs, rounds)
    rows = []
    for key, options in shapes.items():
        leaves, cost = options.levels[-1], seconds[key] / seconds["plain"]
        own = (f"{cost:.1f}", f"{cost / leaves:.2f}")
        rows.append([*key, leaves, decoded[key], *own])
    heads = ["search", "turns", "samples", "tokens", "most leaves", "decoded tokens"]
    show(rows, [*heads, "time / plain", "and per leaf"])
    print(f"a plain reply of {tokens} tokens takes {seconds['plain']:.2f} s")


def tokens_of(options: SearchOptions, root: Dialogue) -> int:
    """Return the least budget that leaves a search whole."""
    return 1 + bisect_left(range(1, 10**6), True, key=lambda n: not plan(root, bounded(options, n)))


def bounded(options: SearchOptions, tokens: int) -> SearchOptions:
    """Return the options with a budget."""
    return replace(options, budget_tokens=tokens)


def plain(engine: Engine, root: Dialogue, tokens: int) -> None:
    """Make one plain reply."""
    engine.clear_cache()
    engine.generate([Request(agents.recommender_prompt(root), Sampling(tokens))])


def main() -> None:
    """Print the table and the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="texts of 4 tokens and one round")
    parser.add_argument("--grow", action="store_true", help="the cost by samples, depth and budget")
    flags = parser.parse_args()
    quick = flags.quick
    tokens, rounds = (4, 1) if quick else (TOKENS, 3)
    agents.VOTE_TOKENS = VOTE_TOKENS
    engine = our_engine()
    if flags.grow:
        grow(engine, min(tokens, GROWN_TOKENS), 1)
        return
    serial = OneByOne(their_model(), engine)
    root = dialogue()

    def searched(llm: Any, mode: str, votes: int) -> None:
        engine.clear_cache()
        turn(Roles(Side(llm), Side(llm), Catalogue([])), [root], mode, votes, tokens)

    def within_half() -> None:
        engine.clear_cache()
        search(Roles(Side(engine), Side(engine), Catalogue([])), [root], [0], half)

    chain = options_of("chain", VOTES, tokens)
    half = bounded(chain, tokens_of(chain, root) // 2)
    rows, ratios = [], {}
    for mode in ("chain", "tree"):
        seconds = medians(
            {
                "transformers": lambda mode=mode: searched(serial, mode, VOTES),
                "ours": lambda mode=mode: searched(engine, mode, VOTES),
            },
            rounds,
        )
        ratios[mode] = seconds["transformers"] / seconds["ours"]
        replies = SHAPES[mode][0] + SHAPES[mode][1] * VOTES
        times = (f"{s:.1f}" for s in seconds.values())
        rows.append([mode, replies, *times, f"{ratios[mode]:.1f}"])
    seconds = medians({"half": within_half}, rounds)
    rows.append(["chain, half of its tokens", "", "", f"{seconds['half']:.1f}", ""])
    show(rows, ["search", "replies", "transformers, s", "ours, s", "ratio"])
    seconds = medians(
        {
            "plain": lambda: plain(engine, root, tokens),
            "search": lambda: searched(engine, "chain", 0),
        },
        2 * rounds,
    )
    ratios["over_plain"] = seconds["search"] / seconds["plain"]
    print(f"a plain reply {seconds['plain']:.2f} s, a searched one {seconds['search']:.2f} s")
    finish("ses", ratios, REACH)


if __name__ == "__main__":
    main()
