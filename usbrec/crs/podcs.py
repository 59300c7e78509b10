"""Preference dataset construction (PODCS): which of several replies wins the seeker over.

Departures from the paper (arXiv 2509.20381) and its release, and what either leaves open:
1. The class of a score is the judge's most probable digit, ties to the lower, read in closed form;
   `votes` samples votes and takes their majority instead.
2. All k samples take part (the release keeps one), drawn at a raised temperature (its 0.1 repeats
   itself); equal texts are rolled out once.
3. Best and worst are told apart by the expectation where classes tie, then by order of draw.
4. `worst` decides when the worst sample may be the rejected side: score 0 (paper) or below 2
   (release); else, and in the chosen's place without a 2, stands the gold response, unscored.
5. An empty sample, or one whose score cannot be read, takes no part; without any other the
   example is dropped. So are the degenerate all-ones and a pair of equal texts. All are counted.
6. Only training examples are for this; the caller passes no others.

Only the first response enters a pair; the roll-out with the external seeker scores it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from usbrec.chat import LanguageModel, Sampling
from usbrec.crs.agents import (
    Cast,
    ask,
    explain_and_judge,
    recommender_prompt,
    recommender_turn,
    say,
    seeker_turn,
)
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Dialogue, Example, PreferencePair
from usbrec.options import check, option, seed_for


@dataclass(frozen=True)
class PairOptions:
    """How many samples are tried, how far they are rolled out, and what may be rejected."""

    samples: int = option(3, "first responses sampled for each training example (k)", low=1)
    turns: int = option(
        2, "recommender turns of a roll-out, the first response's own included", low=1
    )
    temperature: float = option(0.8, "temperature of the first responses", low=0)
    rollout_temperature: float = option(
        0.1, "temperature of the seeker and of later replies", low=0
    )
    votes: int = option(0, "sampled votes a score; 0 takes the most probable digit", low=0)
    vote_temperature: float = option(0.7, "temperature of the judge's votes", low=0)
    worst: Literal["zero", "below-two"] = option("zero", "scores that a rejected sample may have")
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Sample:
    """A first response, its class (None: empty or unread) and what led to it."""

    reply: str
    label: int | None
    expectation: float | None
    mass: float
    explanation: str
    transcript: Dialogue


@dataclass(frozen=True)
class PairOutcome:
    """What became of one example: all samples, and the pair or the reason why there is none."""

    example: Example
    samples: tuple[Sample, ...]
    pair: PreferencePair | None
    reason: str


def build_pairs(
    llm: LanguageModel,
    cast: Cast,
    catalogue: Catalogue,
    examples: Sequence[Example],
    seed: int,
    options: PairOptions,
) -> list[PairOutcome]:
    """Return one outcome an example; each depends on its own example and the run's seed alone."""
    keys = [seed_for(seed, "pairs", example.dialog_id, example.turn_id) for example in examples]
    drafts = draw_samples(llm, cast, examples, keys, options)
    owners = [i for i, texts in enumerate(drafts) for text in dict.fromkeys(texts) if text]
    firsts = [text for texts in drafts for text in dict.fromkeys(texts) if text]
    scored = roll_out(
        llm, cast, catalogue,
        [examples[i] for i in owners], firsts,
        [seed_for(keys[i], "rollout", text) for i, text in zip(owners, firsts, strict=True)],
        options,
    )  # fmt: skip
    known = {(i, sample.reply): sample for i, sample in zip(owners, scored, strict=True)}
    outcomes = []
    for i, example in enumerate(examples):
        empty = Sample("", None, None, 0.0, "", ())
        samples = tuple(known.get((i, text), empty) for text in drafts[i])
        outcomes.append(
            PairOutcome(example, samples, *choose_pair(example, samples, options.worst))
        )
    return outcomes


def draw_samples(
    llm: LanguageModel,
    cast: Cast,
    examples: Sequence[Example],
    keys: Sequence[int],
    options: PairOptions,
) -> list[list[str]]:
    """Return `samples` first responses for each example, all drawn in one call."""
    k = options.samples
    chats = [cast.recommends(recommender_prompt(x.history)) for x in examples for _ in range(k)]
    seeds = [seed_for(key, "sample", n) for key in keys for n in range(k)]
    texts = ask(llm, chats, Sampling(options.max_new_tokens, options.temperature), seeds)
    return [texts[i : i + k] for i in range(0, len(texts), k)]


def roll_out(
    llm: LanguageModel,
    cast: Cast,
    catalogue: Catalogue,
    examples: Sequence[Example],
    firsts: Sequence[str],
    keys: Sequence[int],
    options: PairOptions,
) -> list[Sample]:
    """Return each first response with its score after the remaining turns and an explanation."""
    sampling = Sampling(options.max_new_tokens, options.rollout_temperature)
    targets = [example.items for example in examples]
    pairs = zip(examples, firsts, strict=True)
    dialogues = [say(example.history, "recommender", text) for example, text in pairs]
    for turn in range(2, options.turns + 1):
        seeds = [seed_for(key, "seeker", turn) for key in keys]
        dialogues = seeker_turn(llm, cast, catalogue, dialogues, targets, sampling, seeds)
        seeds = [seed_for(key, "recommender", turn) for key in keys]
        replies = recommender_turn(llm, cast, dialogues, sampling, seeds)
        dialogues = [say(d, "recommender", x) for d, x in zip(dialogues, replies, strict=True)]
    scored = explain_and_judge(
        llm, cast, dialogues, targets, keys, sampling, options.votes, options.vote_temperature
    )
    return [
        Sample(text, verdict.label, verdict.expectation, verdict.mass, told, dialogue)
        for text, dialogue, (told, verdict) in zip(firsts, dialogues, scored, strict=True)
    ]


def choose_pair(
    example: Example, samples: Sequence[Sample], worst: str
) -> tuple[PreferencePair | None, str]:
    """Return the pair and where its sides came from, or None and the reason.

    Classes of the samples -> (chosen, rejected), under `worst` zero; G is the gold response:
    2 2 2 -> 2 G;  2 1 0 -> 2 0;  2 1 1 -> 2 G;  1 1 0 -> G 0;  0 0 0 -> G 0;  1 1 1 -> none.
    """
    read = [i for i, sample in enumerate(samples) if sample.reply and sample.label is not None]
    if not read:
        empty = not any(sample.reply for sample in samples)
        return None, "all samples empty" if empty else "no sample's score could be read"
    if all(samples[i].label == 1 for i in read):
        return None, "all samples scored 1"
    top = max(read, key=lambda i: _standing(samples[i]))  # the first of equals, as below
    low = min(read, key=lambda i: _standing(samples[i]))
    gold = ("gold", example.response.strip(), None)
    chosen = _side(samples, top) if samples[top].label == 2 else gold
    bound = 0 if worst == "zero" else 1
    rejected = _side(samples, low) if _standing(samples[low])[0] <= bound else gold
    if "" in (chosen[1], rejected[1]):
        return None, "gold response empty"
    if chosen[1] == rejected[1]:
        return None, "chosen and rejected are equal"
    prompt = recommender_prompt(example.history)
    pair = PreferencePair(
        prompt, chosen[1], rejected[1], chosen[2], rejected[2], chosen[0], rejected[0]
    )
    origins = [side.split("[")[0] for side in (pair.chosen_from, pair.rejected_from)]
    return pair, " over ".join(origins)


def _standing(sample: Sample) -> tuple[int, float]:
    assert sample.label is not None and sample.expectation is not None, "an unread sample is ranked"
    return sample.label, sample.expectation


def _side(samples: Sequence[Sample], i: int) -> tuple[str, str, float | None]:
    return f"samples[{i}]", samples[i].reply, float(_standing(samples[i])[0])


def pair_record(pair: PreferencePair) -> dict[str, Any]:
    """Return a pair as a line of pairs.jsonl: a conversational preference row with its origins."""
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "chosen_from": pair.chosen_from,
        "rejected_from": pair.rejected_from,
    }


def outcome_record(outcome: PairOutcome) -> dict[str, Any]:
    """Return an outcome in JSON's own types, its pair as in pairs.jsonl or None."""
    start = len(outcome.example.history)
    return {
        "dialog_id": outcome.example.dialog_id,
        "turn_id": outcome.example.turn_id,
        "reason": outcome.reason,
        "pair": None if outcome.pair is None else pair_record(outcome.pair),
        "samples": [
            {
                "reply": sample.reply,
                "label": sample.label,
                "expectation": sample.expectation,
                "mass": sample.mass,
                "explanation": sample.explanation,
                "lines": [[line.speaker, line.text] for line in sample.transcript[start:]],
            }
            for sample in outcome.samples
        ],
    }


def count_reasons(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many outcomes made which kind of pair, or were dropped for which reason."""
    return dict(sorted(Counter(record["reason"] for record in records).items()))
