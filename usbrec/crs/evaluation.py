"""iEval: a method talks with the seeker for some turns, then explains itself and is judged.

All methods meet the same dialogues, options and draws: a row's seed does not name its method, so
that differences are paired. Beside the score stand what rules alone can tell: the first catalogue
title of the first reply (Recall@1), any gold title up to the judged turn (hit), and the grade of
the judged reply's first title, a second opinion on the judge. Copy-last and most-popular need no
model. `judge_agreement` measures the judges against the truth. Left out: methods' names, tables
(report.py), and intervals (intervals.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from usbrec.chat import LanguageModel, Sampling
from usbrec.crs.agents import Cast, Verdict, explain_and_judge, recommender_turn, say, seeker_turn
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Example
from usbrec.crs.ses import SearchOptions, SearchResult, search
from usbrec.options import check, option, seed_for


@dataclass(frozen=True)
class EvaluationOptions:
    """How long the talk is, when it is judged, and how warm the speakers are."""

    turns: int = option(1, "recommender turns of an evaluated talk (N)", low=1)
    judged_turn: int = option(0, "the turn after which iEval judges (T); 0 is the last", low=0)
    temperature: float = option(0.0, "temperature of plain replies and explanations", low=0)
    seeker_temperature: float = option(0.1, "temperature of the seeker's replies", low=0)
    votes: int = option(0, "sampled votes a score; 0 reads the expectation in closed form", low=0)
    vote_temperature: float = option(0.7, "temperature of the judge's votes", low=0)
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)

    def __post_init__(self) -> None:
        check(self)
        if self.judged_turn > self.turns:
            raise ValueError(
                f"judged_turn must lie in 1 to {self.turns} (0: the last), got {self.judged_turn}"
            )

    @property
    def last(self) -> int:
        """The judged turn, counted from 1."""
        return self.judged_turn or self.turns


@dataclass(frozen=True)
class EvalRow:
    """One dialogue's evaluation, in JSON's own types: `EvalRow(**json.loads(line))` reads it back.

    `score` (0 to 2) and `label` are None when the judge could not be read. `labels` has an entry
    a gold title: {"title", "repeated", "found"}. `items` are the catalogue titles of each reply,
    `grade` the rules' 0, 1 or 2 for the judged reply's first title (0 where it names none).
    """

    dialog_id: str
    turn_id: int
    replies: list[str]
    items: list[list[str]]
    labels: list[dict[str, Any]]
    hit: bool
    grade: int
    score: float | None
    label: int | None
    mass: float
    explanation: str
    transcript: list[list[str]]
    searches: list[dict[str, Any]]


def evaluate_method(
    llm: LanguageModel,
    cast: Cast,
    catalogue: Catalogue,
    examples: Sequence[Example],
    seed: int,
    options: EvaluationOptions,
    searching: SearchOptions | None = None,
) -> list[EvalRow]:
    """Return one row an example; `searching` turns SES on from its `start_turn`."""
    keys = [seed_for(seed, "ieval", example.dialog_id, example.turn_id) for example in examples]
    targets = [example.items for example in examples]
    plain = Sampling(options.max_new_tokens, options.temperature)
    dialogues: list[Dialogue] = [example.history for example in examples]
    replies: list[list[str]] = [[] for _ in examples]
    searches: list[list[dict[str, Any]]] = [[] for _ in examples]
    judged = dialogues
    for turn in range(1, options.turns + 1):
        if turn > 1:
            sampling = Sampling(options.max_new_tokens, options.seeker_temperature)
            seeds = [seed_for(key, "seeker", turn) for key in keys]
            dialogues = seeker_turn(llm, cast, catalogue, dialogues, targets, sampling, seeds)
        seeds = [seed_for(key, "recommender", turn) for key in keys]
        if searching is not None and turn >= searching.start_turn:
            results = search(llm, cast, dialogues, seeds, searching)
            texts = [result.reply for result in results]
            for found, result in zip(searches, results, strict=True):
                found.append({"turn": turn, **search_record(result)})
        else:
            texts = recommender_turn(llm, cast, dialogues, plain, seeds)
        for spoken, text in zip(replies, texts, strict=True):
            spoken.append(text)
        dialogues = [say(d, "recommender", x) for d, x in zip(dialogues, texts, strict=True)]
        if turn == options.last:
            judged = dialogues
    scored = explain_and_judge(
        llm, cast, judged, targets, keys, plain, options.votes, options.vote_temperature
    )
    parts = zip(examples, replies, dialogues, searches, scored, strict=True)
    return [_row(catalogue, options.last, *own) for own in parts]


def search_record(result: SearchResult) -> dict[str, Any]:
    """Return a search in JSON's own types, the root dialogue left out."""
    start = len(result.root)
    candidates = [
        {
            "reply": candidate.reply,
            "value": candidate.value,
            "leaves": [
                {
                    "lines": [[line.speaker, line.text] for line in leaf.dialogue[start:]],
                    "value": leaf.verdict.expectation,
                    "label": leaf.verdict.label,
                    "mass": leaf.verdict.mass,
                    "weight": leaf.weight,
                }
                for leaf in candidate.leaves
            ],
        }
        for candidate in result.candidates
    ]
    return {"profile": result.profile, "best": result.best, "candidates": candidates}


def first_items(catalogue: Catalogue, text: str) -> tuple[Item, ...]:
    """Return the readings of the first catalogue title in a text: several if the year is open."""
    mentions = catalogue.find(text)
    return tuple(mentions[0].items) if mentions else ()


def gold_labels(
    catalogue: Catalogue, example: Example, items: Sequence[Item]
) -> list[dict[str, Any]]:
    """Return for each gold title whether the context has it and whether `items` names it.

    A mention whose year is left open counts only if every film it may mean is the gold title.
    """
    lines = [line.text for line in example.history]
    seen = [set(mention.items) for line in lines for mention in catalogue.find(line)]
    labels = []
    for title in example.items:
        gold = set(catalogue.named(title))
        repeated = (
            any(readings <= gold for readings in seen)
            if gold
            else any(catalogue.mentions(line, [title]) for line in lines)  # not in the catalogue
        )
        found = bool(items) and set(items) <= gold
        labels.append({"title": title, "repeated": repeated, "found": found})
    return labels


# best first; several items: a title that leaves the year open
Guesses = Sequence[tuple[Item, ...]]


def copied(catalogue: Catalogue, example: Example) -> Guesses:
    """Return the readings of the titles in the context, once each, the newest first."""
    lines = [catalogue.find(line.text) for line in example.history]
    mentions = [mention.items for line in reversed(lines) for mention in reversed(line)]
    return list(dict.fromkeys(mentions))


def popular(catalogue: Catalogue, popularity: Mapping[str, int]) -> Guesses:
    """Return the catalogue's items by their count among the training labels, ties by title."""
    order = sorted(popularity, key=lambda title: (-popularity[title], title))
    known = (catalogue.get(title) for title in order)
    return [(item,) for item in known if item is not None]


def copy_last(catalogue: Catalogue, example: Example) -> tuple[Item, ...]:
    """Return the readings of the last catalogue title in the context, the newest line first."""
    return next(iter(copied(catalogue, example)), ())


def most_popular(catalogue: Catalogue, popularity: Mapping[str, int]) -> tuple[Item, ...]:
    """Return the catalogue's most frequent training label, ties to the first title in order."""
    return next(iter(popular(catalogue, popularity)), ())


def baseline_labels(
    catalogue: Catalogue, examples: Sequence[Example], popularity: Mapping[str, int]
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the gold labels, row by row, as copy-last and most-popular find them."""
    favourite = most_popular(catalogue, popularity)
    return {
        "copy-last": [gold_labels(catalogue, x, copy_last(catalogue, x)) for x in examples],
        "most-popular": [gold_labels(catalogue, x, favourite) for x in examples],
    }


def _row(
    catalogue: Catalogue,
    last: int,
    example: Example,
    replies: list[str],
    dialogue: Dialogue,
    searches: list[dict[str, Any]],
    scored: tuple[str, Verdict],
) -> EvalRow:
    explanation, verdict = scored
    named = first_items(catalogue, replies[last - 1])
    return EvalRow(
        dialog_id=example.dialog_id,
        turn_id=example.turn_id,
        replies=replies,
        items=[titles_in(catalogue, reply) for reply in replies],
        labels=gold_labels(catalogue, example, first_items(catalogue, replies[0])),
        hit=any(catalogue.mentions(reply, example.items) for reply in replies[:last]),
        grade=min((catalogue.grade(item, example.items) for item in named), default=0),
        score=verdict.expectation,
        label=verdict.label,
        mass=verdict.mass,
        explanation=explanation,
        transcript=[[line.speaker, line.text] for line in dialogue],
        searches=searches,
    )


def titles_in(catalogue: Catalogue, text: str) -> list[str]:
    """Return the catalogue titles in a text in order, each reading of an open year, once each."""
    titles = [item.title for mention in catalogue.find(text) for item in mention.items]
    return list(dict.fromkeys(titles))
