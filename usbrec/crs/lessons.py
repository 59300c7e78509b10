"""Training lessons from training dialogues: what the recommender and the simulator learn.

The recommender learns the gold turns of a dialogue, all in one lesson, and to explain its last
recommendation. The simulator (arXiv 2509.20381 takes a large model as it is; a small one must learn
to play the user) learns, for one example each:

    seeker, knows the target     its own lines, what it says to the gold film and to another,
                                 and as external judge 2, 1 or 0 for replies and explanations
    internal seeker, the profile the same, and as internal judge 2, 1 or 0 for the reply alone
    summariser                   the profile of the dialogue so far

Replies that deserve 1 or 0 are the gold reply rewritten for another film of the catalogue, drawn by
its count among the training labels and graded by rule (`Catalogue.grade`); a reply that names no
film deserves 0. Where a dataset has no profiles, explanations or reactions, the catalogue's facts
stand in for them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from usbrec.chat import Lesson, Message
from usbrec.crs.agents import (
    EXPLAIN,
    external_question,
    internal_question,
    internal_seeker_prompt,
    recommender_prompt,
    seeker_prompt,
    summary_prompt,
)
from usbrec.crs.catalogue import Catalogue, Item, describe, genre_word, rewrite
from usbrec.crs.dialogue import Example, Utterance
from usbrec.options import check, option, seed_for

FILMLESS = (  # replies that recommend nothing, as an untrained model gives them
    "What kind of film are you in the mood for?",
    "Do you have a favourite actor or director?",
    "Happy to help! Tell me a bit more about what you enjoy.",
    "I'm here to help. What would you like to watch?",
    "That's a great choice! I'm glad you like it.",
    "I'm sorry for any confusion. How can I assist you today?",
    "I'm not sure what you are looking for, but I can recommend a few movies you might enjoy.",
    "You are a fan of good films, and so am I. It is a classic.",
    "What about a comedy? Or perhaps a thriller?",
    "As an assistant, I can't recommend a specific film.",
    "The 1980s were a great time for movies.",
    "I'd love to recommend a film that suits you.",
)
EMPTY_WORDS = frozenset([
    "likes", "dislikes", "seen", "nothing", "said", "mood", "a", "an", "the", "i", "it", "you",
    "this", "that", "is", "by", "with", "from", "made", "of", "for", "to", "in", "and", "movie",
    "film", "starring", "directed",
])  # fmt: skip
TRIES = 40  # draws in search of a film of a wanted grade
UNLIKE = 4  # replies that share no word with a profile; with two its judge may fail to learn


@dataclass(frozen=True)
class LessonOptions:
    """How much the parts of a lesson weigh."""

    score_weight: float = option(
        10.0, "weight of a score's token against a word's in the loss", above=0
    )
    line_weight: float = option(0.3, "weight of the seeker's words in the loss", above=0)
    explanation_weight: float = option(0.3, "weight of an explanation against a gold turn", above=0)
    explain_every: int = option(4, "one in so many dialogues also teaches to explain", low=1)

    def __post_init__(self) -> None:
        check(self)


def recommender_lessons(
    examples: Sequence[Example], catalogue: Catalogue, options: LessonOptions
) -> list[Lesson]:
    """Return one lesson a dialogue: loss on each of its gold turns, at times on an explanation."""
    lessons = []
    for number, rows in enumerate(same_dialogue(examples)):
        longest = rows[-1]
        gold = {len(row.history): row.response for row in rows}
        dialogue = (*longest.history, Utterance("recommender", longest.response))
        system, *lines = recommender_prompt(dialogue)
        trunk = tuple(
            Message(m.role, m.content, 1.0) if gold.get(i) == m.content else m
            for i, m in enumerate(lines)
        )
        told = "" if number % options.explain_every else explanation_of(longest, catalogue)
        asked = (Message("user", EXPLAIN), Message("assistant", told, options.explanation_weight))
        lessons.append(Lesson((system, *trunk), (asked,) if told else ()))
    return lessons


def same_dialogue(examples: Sequence[Example]) -> list[list[Example]]:
    """Group rows that are prefixes of one dialogue, shortest first; others stay alone."""
    groups: list[list[Example]] = []
    for row in sorted(examples, key=lambda x: (x.dialog_id, len(x.history))):
        last = groups[-1][-1] if groups else None
        said = (*last.history, Utterance("recommender", last.response)) if last else ()
        if last and last.dialog_id == row.dialog_id and row.history[: len(said)] == said:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def explanation_of(example: Example, catalogue: Catalogue) -> str:
    """Return the row's own explanation, else one from the facts of its first known gold item."""
    if example.explanation:
        return example.explanation
    known = (catalogue.get(title) for title in example.items)
    return next((f"{item.title} is {describe(item)}." for item in known if item), "")


def profile_of(example: Example, catalogue: Catalogue) -> str:
    """Return the row's own profile, else the genres and titles that the seeker has named."""
    if example.profile is not None:
        return example.profile
    lines = [line.text for line in example.history if line.speaker == "seeker"]
    items = [mention.items[0] for text in lines for mention in catalogue.find(text)]
    words = {word.strip(".,!?").lower() for text in lines for word in text.split()}
    genres = dict.fromkeys(
        genre_word(genre) for item in catalogue for genre in item.genres if genre in words
    )
    genres |= dict.fromkeys(genre_word(genre) for item in items for genre in item.genres)
    liked = [*list(genres)[:4], *dict.fromkeys(item.title for item in items[-3:])]
    return f"Likes: {', '.join(liked)}." if liked else "Likes: unknown."


@dataclass(frozen=True)
class Suggestion:
    """A reply of the recommender, its explanation, and the score it deserves."""

    reply: str
    explanation: str
    score: int


class Suggestions:
    """Draws replies for other films, by their count among the training labels."""

    def __init__(self, catalogue: Catalogue, popularity: Mapping[str, int]) -> None:
        self.catalogue = catalogue
        counts = [(catalogue.get(title), n) for title, n in sorted(popularity.items())]
        self.pool = [(item, n) for item, n in counts if item is not None]
        total = sum(n for _, n in self.pool)
        self.shares = np.array([n / total for _, n in self.pool])

    def others(self, generator: np.random.Generator) -> Iterator[Item]:
        """Draw TRIES films by their count."""
        for place in generator.choice(len(self.pool), TRIES, p=self.shares):
            yield self.pool[place][0]

    def draw(self, example: Example, seed: int) -> list[Suggestion]:
        """Return the gold reply (2), one for a kindred film (1), for another (0), and one
        that names no film (0).

        A grade that no drawn film has is left out, and all are where the gold item is unknown.
        """
        generator = np.random.default_rng(seed)
        gold = [self.catalogue.get(title) for title in example.items]
        named = [g for g in gold if g and self.catalogue.mentions(example.response, [g.title])]
        if not named:
            return []
        told = explanation_of(example, self.catalogue)
        found = {2: Suggestion(example.response, told, 2)}
        for item in self.others(generator):
            score = self.catalogue.grade(item, example.items)
            if score not in found:
                reply, why = (rewrite_all(x, named, item) for x in (example.response, told))
                if not self.catalogue.mentions(reply, example.items):
                    found[score] = Suggestion(reply, why, score)
        reply, why = generator.choice(FILMLESS, 2)
        return [*found.values(), Suggestion(str(reply), str(why), 0)]

    def unlike(self, example: Example, profile: str, seed: int) -> list[Suggestion]:
        """Return the reply for up to UNLIKE films with nothing of the target or the profile."""
        generator = np.random.default_rng(seed_for(seed, "unlike"))
        known = [gold for title in example.items if (gold := self.catalogue.get(title))]
        found: list[Suggestion] = []
        for item in self.others(generator):
            reply = rewrite_all(example.response, known, item)
            fits = self.catalogue.grade(item, example.items) or words_of(reply) & words_of(profile)
            if not fits and reply != example.response and len(found) < UNLIKE:
                found.append(Suggestion(reply, "", 0))
        return found


def rewrite_all(text: str, olds: Sequence[Item], new: Item) -> str:
    """Return a text about some films as it would read about another."""
    for old in olds:
        text = rewrite(text, old, new)
    return text


def simulator_lessons(
    examples: Sequence[Example],
    catalogue: Catalogue,
    popularity: Mapping[str, int],
    seed: int,
    options: LessonOptions,
) -> list[Lesson]:
    """Return the simulator's lessons, in the order in which they must be learned.

    First comes the external judge, from every other example: to find the target's title in a reply
    is the easiest comparison. A small model that has learned it learns to compare a reply with a
    profile, which it does not learn from the start. Then each example's internal seeker, and by
    turns its summary, or the external seeker again. Rarer branches are left out by turns, too.
    """
    draws = Suggestions(catalogue, popularity)
    first, then = [], []
    for number, example in enumerate(examples):
        key = seed_for(seed, "lesson", example.dialog_id, example.turn_id)
        made = draws.draw(example, key)
        if not made:
            continue
        *named, filmless = made
        profile = profile_of(example, catalogue)
        kindred = [each for each in named if each.score == 1]
        judged = [named[0], *draws.unlike(example, profile, key), *kindred]
        judged += [filmless] if number % 4 == 0 else []
        then.append(internal_lesson(example, judged, profile, options))
        if number % 2 == 0:
            judged = [*named, filmless] if number % 4 == 0 else named
            first.append(external_lesson(example, judged, options))
            summary = Message("assistant", profile, options.line_weight)
            then.append(Lesson((*summary_prompt(example.history), summary)))
        elif number % 6 == 1:
            then.append(external_lesson(example, [*named[:2], filmless], options))
    return first + then


def external_lesson(
    example: Example, judged: Sequence[Suggestion], options: LessonOptions
) -> Lesson:
    """The seeker who knows the target: its lines, a reaction, its scores of explanations."""
    asked = [
        (Message("assistant", EXPLAIN), Message("user", each.explanation),
         external_question(example.items))
        for each in judged
    ]  # fmt: skip
    prompt = seeker_prompt(example.history, example.items)
    return seekers_lesson(example, prompt, judged, asked, judged[0], options)


def internal_lesson(
    example: Example, judged: Sequence[Suggestion], profile: str, options: LessonOptions
) -> Lesson:
    """The seeker who knows the profile alone: its lines, a reaction, its scores of replies.

    The gold reply deserves 2, one of a kindred film 1, those that share no word with the profile 0.
    """
    asked = [(internal_question(profile),)] * len(judged)
    prompt = internal_seeker_prompt(example.history, profile)
    return seekers_lesson(example, prompt, judged, asked, judged[-1], options)


def seekers_lesson(
    example: Example,
    prompt: Sequence[Message],
    judged: Sequence[Suggestion],
    asked: Sequence[tuple[Message, ...]],
    met: Suggestion,
    options: LessonOptions,
) -> Lesson:
    """The seeker's own lines, then its scores of replies after what it is `asked`.

    Where the dataset tells what it says to the reply `met`, that is learned as well.
    """
    trunk = tuple(
        Message(m.role, m.content, options.line_weight) if m.role == "assistant" else m
        for m in prompt
    )
    branches: list[tuple[Message, ...]] = []
    for each, question in zip(judged, asked, strict=True):
        score = Message("assistant", str(each.score), options.score_weight)
        branches.append((Message("user", each.reply), *question, score))
    if said := example.accept if met.score == 2 else example.refuse:
        answer = Message("assistant", said, options.line_weight)
        branches.append((Message("user", met.reply), answer))
    return Lesson(trunk, tuple(branches))


def words_of(text: str) -> set[str]:
    """The words of a reply or a profile that tell something of a film."""
    return set(re.findall(r"[a-z0-9']+", text.lower())) - EMPTY_WORDS


def popularity_of(examples: Sequence[Example]) -> dict[str, int]:
    """Count each gold title among the training labels, in order of title."""
    return dict(sorted(Counter(title for x in examples for title in x.items).items()))
