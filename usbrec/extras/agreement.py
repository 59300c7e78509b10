"""Agreement of the judges' scores with the truth, on held-out dialogues.

Each gold reply is compared with a rewriting of it, title and attributes, for another film. The film
is drawn by its count among the training labels and is never a target. The external judge sees
either reply with an explanation: the row's own (rewritten likewise) where the dataset has one, else
the recommender's explanation of that reply. The internal judge sees a summary generated from the
history alone. A reply whose gold title cannot be found or replaced is skipped with the reason.
"""

from collections.abc import Sequence

import numpy as np

from usbrec.chat import Row, Sampling
from usbrec.crs import agents
from usbrec.crs.agents import EXPLAIN, Messages, Roles, Votes
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Dialogue, Example, Examples, Popularity, add_turn
from usbrec.crs.evaluation import EvaluationOptions
from usbrec.crs.lessons import gold_items
from usbrec.crs.rewrite import rewrite_all
from usbrec.extras.intervals import auc_interval
from usbrec.options import seed_for

SUMMARY_TOKENS = 48
REPLIES = ("gold", "other")  # the two replies of a row


def judge_agreement(
    roles: Roles, examples: Examples, popularity: Popularity, seed: int, options: EvaluationOptions
) -> list[Row]:
    """Return one row per example: {"external": [gold, other], "internal": [gold, other], ...}.

    A score that could not be read is None. A skipped row has only its ids and the reason,
    "skipped".
    """
    keys = [seed_for(seed, "agreement", x.dialog_id, x.turn_id) for x in examples]
    pairs = zip(examples, keys, strict=True)
    rows = [contrast(roles.catalogue, x, popularity, key) for x, key in pairs]
    used = [x for x in zip(examples, keys, rows, strict=True) if x[2]["skipped"] is None]
    seeds = [seed_for(key, "summary") for _, key, _ in used]
    asked = roles.summaries([x.history for x, _, _ in used], SUMMARY_TOKENS, seeds)
    plain = Sampling(options.max_new_tokens, options.temperature)
    for x, key, row in used:
        if not row["explanations"]:
            heard = [add_turn(said, "seeker", EXPLAIN) for said in dialogues_of(x, row)]
            seeds = [seed_for(key, "explain", row[side]) for side in REPLIES]
            asked += roles.recommender.requests(map(agents.recommender_prompt, heard), plain, seeds)
    texts = iter(roles.complete(asked))
    for _, _, row in used:
        row["profile"] = next(texts)
    prompts: dict[str, list[Messages]] = {"external": [], "internal": []}
    for x, _, row in used:
        told, both = row.pop("explanations") or [next(texts), next(texts)], dialogues_of(x, row)
        prompts["external"] += map(agents.external_judge_prompt, both, told, [x.items] * 2)
        prompts["internal"] += [agents.internal_judge_prompt(said, row["profile"]) for said in both]
    votes = Votes(options.votes, options.vote_temperature)
    for name, judge, first in (("external", roles.external, 0), ("internal", None, 2)):
        seeds = [seed_for(key, "judge", first + i) for _, key, _ in used for i in range(2)]
        scores = iter(roles.judge(prompts[name], votes, seeds, judge))
        for _, _, row in used:
            row[name] = [next(scores).score for _ in REPLIES]
    return rows


def dialogues_of(example: Example, row: Row) -> list[Dialogue]:
    """Return the dialogue with the gold reply, and with the other one."""
    return [add_turn(example.history, "recommender", row[side]) for side in REPLIES]


def contrast(catalogue: Catalogue, example: Example, popularity: Popularity, key: int) -> Row:
    """Return {"gold", "other", "titles", "explanations"}: a row with the gold reply and another.

    The other is the gold reply rewritten for the films `titles`. They are as many as gold titles
    and none of them, drawn by training count. `explanations` are of both replies, or none where the
    dataset has none. "skipped" is the reason why a row has no replies, or None.
    """
    row = {"dialog_id": example.dialog_id, "turn_id": example.turn_id, "skipped": None}
    golds = gold_items(example, catalogue)
    if len(golds) < len(example.items):
        return {**row, "skipped": "a gold title is not in the catalogue"}
    known = [(catalogue.get(title), count) for title, count in sorted(popularity.items())]
    pool = [(item, count) for item, count in known if item and item not in golds]
    if len(pool) < len(golds):
        return {**row, "skipped": "too few other titles to draw from"}
    share = np.array([count for _, count in pool], float)
    generator = np.random.default_rng(seed_for(key, "others"))
    places = generator.choice(len(pool), len(golds), replace=False, p=share / share.sum())
    films = [pool[place][0] for place in places]
    gold, told = example.response, example.explanation
    pairs = list(zip(golds, films, strict=True))
    other, why = (rewrite_all(text, pairs) for text in (gold, told or ""))
    if other == gold or catalogue.mentions(other, example.items):
        return {**row, "skipped": "a gold title in the reply could not be replaced"}
    titles, explanations = [film.title for film in films], [] if told is None else [told, why]
    return {**row, "gold": gold, "other": other, "titles": titles, "explanations": explanations}


def agreement(rows: Sequence[Row], seed: int) -> Row:
    """Return {"auc", "low", "high", "n", "unparsed"} per judge, and the number of skipped rows.

    `unparsed` counts the rows with a score that could not be read; the AUC leaves them out.
    """
    used = [row for row in rows if row["skipped"] is None]
    result: Row = {"skipped": len(rows) - len(used)}
    for judge_name in ("external", "internal"):
        read = [row[judge_name] for row in used if None not in row[judge_name]]
        area = auc_interval([gold for gold, _ in read], [other for _, other in read], seed)
        result[judge_name] = {**area, "unparsed": len(used) - len(read)}
    return result
