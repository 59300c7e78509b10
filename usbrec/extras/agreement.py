"""Agreement of the judges' scores with the truth, on held-out dialogues.

Each gold reply is compared with a rewriting of it, title and attributes, for another film. The film
is drawn by its count among the training labels and is never a target. The external judge sees
either reply with an explanation: the row's own (rewritten likewise) where the dataset has one, else
the recommender's explanation of that reply. The internal judge sees a summary generated from the
history alone. A reply whose gold title cannot be found or replaced is skipped with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from usbrec.chat import Row, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import EXPLAIN, JudgeScore, Messages, Roles, Votes
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Example, Examples, Popularity, add_turn
from usbrec.crs.evaluation import EvaluationOptions
from usbrec.crs.rewrite import rewrite
from usbrec.extras.intervals import auc_interval
from usbrec.options import seed_for

SUMMARY_TOKENS = 48
SCORE_FIELDS = ("score", "digit_probability", "parse_rate")  # of a JudgeScore, kept in a row


@dataclass
class Contrast:
    """A gold reply and its rewriting for the films `titles`, with the explanations of both.

    Where the dataset has no explanations, `explanations` is empty until `prepare_all` sets it.
    """

    example: Example
    seed: int
    replies: tuple[str, str]
    titles: tuple[str, ...]
    explanations: tuple[str, ...]
    profile: str = ""

    def dialogues(self) -> list[Dialogue]:
        """Return the dialogue with the gold reply, and with the rewritten one."""
        return [add_turn(self.example.history, "recommender", reply) for reply in self.replies]

    def judge_prompts(self) -> list[Messages]:
        """Return four prompts: external judge of gold and other, then the internal judge's."""
        both, titles = self.dialogues(), [self.example.items] * 2
        external = map(agents.external_judge_prompt, both, self.explanations, titles)
        return [*external, *(agents.internal_judge_prompt(x, self.profile) for x in both)]

    def record(self, scores: Sequence[JudgeScore]) -> Row:
        """Return texts and scores, ordered as `judge_prompts`, in JSON's own types."""
        texts = {"gold": self.replies[0], "other": self.replies[1], "titles": list(self.titles)}
        found = {name: [getattr(x, name) for x in scores] for name in SCORE_FIELDS}
        marks = found.pop("score")
        judged = {"external": marks[:2], "internal": marks[2:]}
        return {"skipped": None, **texts, "profile": self.profile, **judged, **found}


def judge_agreement(
    roles: Roles, examples: Examples, popularity: Popularity, seed: int, options: EvaluationOptions
) -> list[Row]:
    """Return one row per example: {"external": [gold, other], "internal": [gold, other], ...}.

    A score that could not be read is None. A skipped row has only its ids and the reason,
    "skipped".
    """
    made = [contrast(roles.catalogue, example, popularity, seed) for example in examples]
    contrasts = [x for x in made if isinstance(x, Contrast)]
    prepare_all(roles, contrasts, options)
    votes, judged = Votes(options.votes, options.vote_temperature), []
    for judge, numbers in ((roles.external, (0, 1)), (None, (2, 3))):
        prompts = [x.judge_prompts()[i] for x in contrasts for i in numbers]
        seeds = [seed_for(x.seed, "judge", i) for x in contrasts for i in numbers]
        judged += [iter(roles.judge(prompts, votes, seeds, judge))] * 2
    rows = []
    for example, x in zip(examples, made, strict=True):
        ids = {"dialog_id": example.dialog_id, "turn_id": example.turn_id}
        told = {"skipped": x} if isinstance(x, str) else x.record([next(y) for y in judged])
        rows.append({**ids, **told})
    return rows


def contrast(
    catalogue: Catalogue, example: Example, popularity: Popularity, seed: int
) -> Contrast | str:
    """Return the contrast of an example, or the reason why it has none."""
    seed = seed_for(seed, "agreement", example.dialog_id, example.turn_id)
    golds = [item for title in example.items if (item := catalogue.get(title))]
    if len(golds) < len(example.items):
        return "a gold title is not in the catalogue"
    drawn = draw_others(catalogue, example, popularity, len(golds), seed)
    if len(drawn) < len(golds):
        return "too few other titles to draw from"
    gold, told = example.response, example.explanation
    other, why = gold, told or ""
    for old, new in zip(golds, drawn, strict=True):
        other, why = rewrite(other, old, new), rewrite(why, old, new)
    if other == gold or catalogue.mentions(other, example.items):
        return "a gold title in the reply could not be replaced"
    titles = tuple(item.title for item in drawn)
    return Contrast(example, seed, (gold, other), titles, () if told is None else (told, why))


def draw_others(
    catalogue: Catalogue, example: Example, popularity: Popularity, count: int, seed: int
) -> list[Item]:
    """Return `count` distinct items that are no targets, drawn by training count; [] if too few."""
    golds = {item for title in example.items for item in catalogue.named(title)}
    items = [(catalogue.get(title), number) for title, number in sorted(popularity.items())]
    pool = [(item, number) for item, number in items if item and item not in golds]
    if len(pool) < count:
        return []
    share = np.array([number for _, number in pool], float)
    generator = np.random.default_rng(seed_for(seed, "others"))
    places = generator.choice(len(pool), size=count, replace=False, p=share / share.sum())
    return [pool[place][0] for place in places]


def prepare_all(roles: Roles, contrasts: Sequence[Contrast], options: EvaluationOptions) -> None:
    """Set all profiles, and the explanations that the dataset lacks, in one `complete`."""
    prompts = [agents.summary_prompt(x.example.history) for x in contrasts]
    seeds = [seed_for(x.seed, "summary") for x in contrasts]
    asked = roles.simulator.requests(prompts, Sampling(SUMMARY_TOKENS, temperature=0.0), seeds)
    untold = [x for x in contrasts if not x.explanations]
    both = [add_turn(dialogue, "seeker", EXPLAIN) for x in untold for dialogue in x.dialogues()]
    prompts = [agents.recommender_prompt(dialogue) for dialogue in both]
    seeds = [seed_for(x.seed, "explain", reply) for x in untold for reply in x.replies]
    plain = Sampling(options.max_new_tokens, options.temperature)
    texts = iter(roles.complete(asked + roles.recommender.requests(prompts, plain, seeds)))
    for x in contrasts:
        x.profile = next(texts)
    for x in untold:
        x.explanations = (next(texts), next(texts))


def agreement(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return {"auc", "low", "high", "n", "unparsed"} per judge, and the number of skipped rows.

    `unparsed` counts the rows with a score that could not be read; the AUC leaves them out.
    """
    used = [row for row in rows if row["skipped"] is None]
    result: dict[str, Any] = {"skipped": len(rows) - len(used)}
    for judge_name in ("external", "internal"):
        read = [row[judge_name] for row in used if None not in row[judge_name]]
        area = auc_interval([gold for gold, _ in read], [other for _, other in read], seed)
        result[judge_name] = {**area, "unparsed": len(used) - len(read)}
    return result
