"""Preference dataset construction (PODCS): pairs of a better and a worse reply, by roll-outs.

Departures from the paper (arXiv 2509.20381) and its release, and our choice where both are silent:
1. The class of a score is the judge's most probable digit, ties to the lower, read in closed form;
   `votes` samples votes and takes their majority instead.
2. All k samples take part (the release keeps one), drawn at a raised temperature (at the
   release's 0.1 most are equal); equal texts are rolled out once.
3. Samples of one class are told apart by the mean score, then by order of draw.
4. `worst` is the highest class of a rejected sample: 0 (paper) or 1, "below two" (release). Without
   such a sample the gold response is rejected; without a 2 it is chosen. It is not scored.
5. An empty sample, or one whose score cannot be read, takes no part; without any other the
   example is dropped. So are the degenerate all-ones and a pair of equal texts. All are counted.
6. Pairs are made from training examples alone; the caller passes no others.

Only the first response enters a pair; the roll-out with the external seeker scores it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Literal

from usbrec.chat import Row, Sampling
from usbrec.crs.agents import JudgeScore, Roles, Votes, recommender_prompt
from usbrec.crs.dialogue import Example, Examples, add_turn
from usbrec.options import option, seed_for

Cases = Sequence[tuple[Example, str, int]]  # an example, a first response to it, and a seed


@dataclass(frozen=True)
class PairOptions(Votes):
    """Samples per example, turns of a roll-out, and the scores that may be rejected."""

    samples: int = option(3, "first responses sampled for each training example (k)", low=1)
    turns: int = option(2, "recommender turns of a roll-out, the first response included", low=1)
    temperature: float = option(0.8, "temperature of the first responses", low=0)
    rollout_temperature: float = option(0.1, "temperature of the seeker and later replies", low=0)
    worst: Literal["zero", "below-two"] = option("zero", "scores that a rejected sample may have")
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)


def build_pairs(roles: Roles, examples: Examples, seed: int, options: PairOptions) -> list[Row]:
    """Return one row of samples.jsonl per example: its pairs, the reason, and all roll-outs.

    A row depends on its example and the run's seed alone. `samples` are in order of draw. An empty
    one is neither rolled out nor scored. `adapters` tells who speaks for each side.
    """
    keys = [seed_for(seed, "pairs", example.dialog_id, example.turn_id) for example in examples]
    k, first = options.samples, Sampling(options.max_new_tokens, options.temperature)
    seeds = [seed_for(key, "sample", n) for key in keys for n in range(k)]
    texts = roles.recommend([x.history for x in examples for _ in range(k)], first, seeds)
    # equal texts of an example are rolled out once
    drawn = dict.fromkeys((i // k, text) for i, text in enumerate(texts) if text)
    cases = [(examples[i], text, seed_for(keys[i], "rollout", text)) for i, text in drawn]
    tried = dict(zip(drawn, roll_out(roles, cases, options), strict=True))
    empty = {"reply": "", **asdict(JudgeScore()), "explanation": "", "lines": []}
    rows = []
    for i, example in enumerate(examples):
        samples = [tried.get((i, text), empty) for text in texts[i * k : (i + 1) * k]]
        pairs, reason = choose_pairs(example, samples, options)
        row = {"dialog_id": example.dialog_id, "turn_id": example.turn_id, "reason": reason}
        rows.append({**row, "pairs": pairs, "samples": samples, "adapters": roles.adapters()})
    return rows


def roll_out(roles: Roles, cases: Cases, options: PairOptions) -> Iterator[Row]:
    """Yield one roll-out per case: the reply, the score, the explanation, the lines from it on."""
    sampling = Sampling(options.max_new_tokens, options.rollout_temperature)
    targets, keys = [example.items for example, _, _ in cases], [key for _, _, key in cases]
    dialogues = [add_turn(example.history, "recommender", reply) for example, reply, _ in cases]
    for turn in range(2, options.turns + 1):
        seeds = [seed_for(key, "seeker", turn) for key in keys]
        dialogues = roles.seek(dialogues, targets, sampling, seeds)
        seeds = [seed_for(key, "recommender", turn) for key in keys]
        replies = roles.recommend(dialogues, sampling, seeds)
        dialogues = [add_turn(d, "recommender", x) for d, x in zip(dialogues, replies, strict=True)]
    judged = roles.explain_and_judge(dialogues, targets, keys, sampling, options)
    for (example, reply, _), said, (told, score) in zip(cases, dialogues, judged, strict=True):
        lines = [[line.speaker, line.text] for line in said[len(example.history) :]]
        yield {"reply": reply, **asdict(score), "explanation": told, "lines": lines}


def choose_pairs(example: Example, drawn: list[Row], options: PairOptions) -> tuple[list[Row], str]:
    """Return a row of pairs.jsonl and the origins of its sides, or none and the reason.

    A row is trl's conversational preference format, with scores (None: gold) and origins. Samples
    are ordered by the class of the score, then by the score.
    Classes of the samples -> (chosen, rejected), under `worst` zero; G is the gold response:
    2 2 2 -> 2 G;  2 1 0 -> 2 0;  2 1 1 -> 2 G;  1 1 0 -> G 0;  0 0 0 -> G 0;  1 1 1 -> none.
    """
    read = [x for x in drawn if x["reply"] and x["label"] is not None]
    if not read:
        empty = not any(x["reply"] for x in drawn)
        return [], "all samples empty" if empty else "no sample's score could be read"
    if all(x["label"] == 1 for x in read):
        return [], "all samples scored 1"
    rank, bound = itemgetter("label", "score"), 0 if options.worst == "zero" else 1
    gold, best = {"reply": example.response}, max(read, key=rank)  # the first of equals
    chosen = best if best["label"] == 2 else gold
    rejected = min((x for x in read if x["label"] <= bound), key=rank, default=gold)
    if chosen["reply"] == rejected["reply"]:
        return [], "chosen and rejected are equal"
    prompt = [{"role": x.role, "content": x.content} for x in recommender_prompt(example.history)]
    pair, sides = Row(prompt=prompt), {"chosen": chosen, "rejected": rejected}
    pair |= {x: [{"role": "assistant", "content": y["reply"]}] for x, y in sides.items()}
    pair |= {f"{x}_score": None if y is gold else float(y["label"]) for x, y in sides.items()}
    origins = ["gold" if x is gold else f"samples[{drawn.index(x)}]" for x in sides.values()]
    pair |= {"chosen_from": origins[0], "rejected_from": origins[1]}
    return [pair], " over ".join(x.split("[")[0] for x in origins)
