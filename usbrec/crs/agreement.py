"""How well the judges' scores agree with the truth, on held-out dialogues.

Each gold reply is set against the same reply rewritten, title and attributes, for a film drawn by
its count among the training labels and never a target. The external judge sees either reply with
its explanation: the row's own (rewritten likewise) where the dataset has one, else one that the
recommender gives for that very reply. The internal judge reads a summary generated from the
history alone. A reply whose gold title cannot be found or replaced is skipped and says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from usbrec.chat import LanguageModel, Sampling
from usbrec.crs.agents import (
    Cast,
    Verdict,
    ask,
    asked_to_explain,
    external_judge_prompt,
    internal_judge_prompt,
    judge,
    recommender_prompt,
    say,
    summary_prompt,
)
from usbrec.crs.catalogue import Catalogue, Item, rewrite
from usbrec.crs.dialogue import Dialogue, Example
from usbrec.crs.evaluation import EvaluationOptions
from usbrec.crs.intervals import auc_interval
from usbrec.options import seed_for

SUMMARY_TOKENS = 48


@dataclass(frozen=True)
class Contrast:
    """A gold reply and its rewriting, with their explanations where the dataset has one."""

    example: Example
    seed: int
    replies: tuple[str, str]
    explanations: tuple[str, str] | None
    titles: tuple[str, ...]

    def said(self) -> list[Dialogue]:
        """Return the dialogue with either reply."""
        return [say(self.example.history, "recommender", reply) for reply in self.replies]


def judge_agreement(
    llm: LanguageModel,
    cast: Cast,
    catalogue: Catalogue,
    examples: Sequence[Example],
    popularity: Mapping[str, int],
    seed: int,
    options: EvaluationOptions,
) -> list[dict[str, Any]]:
    """Return one row an example: {"external": [gold, other], "internal": [gold, other], ...}.

    A score is None where the judge could not be read; a skipped row has only "skipped".
    """
    rows: list[dict[str, Any]] = []
    pairs: list[Contrast] = []
    for x in examples:
        key = seed_for(seed, "agreement", x.dialog_id, x.turn_id)
        made = contrast(catalogue, x, popularity, key)
        row = {"dialog_id": x.dialog_id, "turn_id": x.turn_id, "skipped": None}
        if isinstance(made, Contrast):
            gold, other = made.replies
            row |= {"gold": gold, "other": other, "titles": list(made.titles)}
            pairs.append(made)
        else:
            row["skipped"] = made
        rows.append(row)
    profiles, explanations = _prepare(llm, cast, pairs, options)
    verdicts = _judge_all(llm, cast, pairs, profiles, explanations, options)
    kept = [row for row in rows if row["skipped"] is None]
    for i, row in enumerate(kept):
        own = verdicts[4 * i : 4 * i + 4]
        scores = [verdict.expectation for verdict in own]
        row |= {"profile": profiles[i], "external": scores[:2], "internal": scores[2:]}
        row["mass"] = [verdict.mass for verdict in own]
    return rows


def contrast(
    catalogue: Catalogue, example: Example, popularity: Mapping[str, int], seed: int
) -> Contrast | str:
    """Return the gold reply beside its rewriting, or the reason why there is none."""
    golds = [catalogue.get(title) for title in example.items]
    if None in golds:
        return "a gold title is not in the catalogue"
    drawn = draw_others(catalogue, example, popularity, len(golds), seed)
    if len(drawn) < len(golds):
        return "too few other titles to draw from"
    gold, told = example.response, example.explanation
    other, why = gold, told or ""
    for item, new in zip(golds, drawn, strict=True):
        assert item is not None
        other, why = rewrite(other, item, new), rewrite(why, item, new)
    if other == gold or catalogue.mentions(other, example.items):
        return "a gold title in the reply could not be replaced"
    explanations = None if told is None else (told, why)
    titles = tuple(item.title for item in drawn)
    return Contrast(example, seed, (gold, other), explanations, titles)


def draw_others(
    catalogue: Catalogue, example: Example, popularity: Mapping[str, int], count: int, seed: int
) -> list[Item]:
    """Return `count` different items drawn by their training count, none of them a target."""
    golds = {item for title in example.items for item in catalogue.named(title)}
    items = [(catalogue.get(title), number) for title, number in sorted(popularity.items())]
    pool = [(item, number) for item, number in items if item and item not in golds]
    if len(pool) < count:
        return []
    share = np.array([number for _, number in pool], float)
    generator = np.random.default_rng(seed_for(seed, "others"))
    places = generator.choice(len(pool), size=count, replace=False, p=share / share.sum())
    return [pool[place][0] for place in places]


def agreement(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return each judge's {"auc", "low", "high", "n", "unparsed"} and how many rows were skipped.

    `unparsed` counts the rows of which a score could not be read; they are left out of the AUC.
    """
    used = [row for row in rows if row["skipped"] is None]
    result: dict[str, Any] = {"skipped": len(rows) - len(used)}
    for judge_name in ("external", "internal"):
        read = [row[judge_name] for row in used if None not in row[judge_name]]
        area = auc_interval([gold for gold, _ in read], [other for _, other in read], seed)
        result[judge_name] = {**area, "unparsed": len(used) - len(read)}
    return result


def _prepare(
    llm: LanguageModel, cast: Cast, pairs: Sequence[Contrast], options: EvaluationOptions
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return each pair's profile and both explanations; what must be generated is, in one call."""
    plain = Sampling(options.max_new_tokens, options.temperature)
    chats = [cast.simulates(summary_prompt(made.example.history)) for made in pairs]
    samplings = [Sampling(SUMMARY_TOKENS, temperature=0.0)] * len(chats)
    seeds = [seed_for(made.seed, "summary") for made in pairs]
    for made in pairs:
        if made.explanations is None:
            asked = map(asked_to_explain, made.said())
            chats += [cast.recommends(recommender_prompt(dialogue)) for dialogue in asked]
            samplings += [plain] * 2
            seeds += [seed_for(made.seed, "explain", reply) for reply in made.replies]
    texts = ask(llm, chats, samplings, seeds)
    profiles, generated = texts[: len(pairs)], iter(texts[len(pairs) :])
    explanations = [x.explanations or (next(generated), next(generated)) for x in pairs]
    return profiles, explanations


def _judge_all(
    llm: LanguageModel,
    cast: Cast,
    pairs: Sequence[Contrast],
    profiles: Sequence[str],
    explanations: Sequence[tuple[str, str]],
    options: EvaluationOptions,
) -> list[Verdict]:
    """Return four verdicts a pair: external gold, other, then internal gold, other."""
    chats, seeds = [], []
    for made, profile, told in zip(pairs, profiles, explanations, strict=True):
        both, titles = made.said(), made.example.items
        prompts = [external_judge_prompt(both[i], told[i], titles) for i in (0, 1)]
        prompts += [internal_judge_prompt(dialogue, profile) for dialogue in both]
        chats += [cast.simulates(prompt) for prompt in prompts]
        seeds += [seed_for(made.seed, "judge", i) for i in range(4)]
    return judge(llm, chats, options.votes, options.vote_temperature, seeds)
