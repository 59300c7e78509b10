"""Lessons of the recommender and the simulator: chats, made from a dataset's examples.

The recommender learns the gold turns of a dialogue, all in one chat, and the explanation of its
last recommendation. Beyond the paper it learns to answer a profile alone with the gold title, which
takes half the tokens. arXiv 2509.20381 uses a large simulator untrained; a small one must learn to
play the user. It learns per example:

    seeker, knows the target     its own lines, its reactions to the gold film and to another,
                                 and as external judge 2, 1 or 0 for replies and explanations
    internal seeker, the profile the same, and as internal judge 2, 1 or 0 for the reply alone
    summariser                   the profile of the dialogue so far
    judge with cards             a title's card, written by heart, and a reply's score by it

A reply that deserves 1 or 0 is the gold reply rewritten for another film of the catalogue. The film
is drawn by its count among the training labels and graded by rule (`Catalogue.grade`). A reply that
names no film deserves 0. Where a dataset has no profiles or explanations, the catalogue's facts
replace them; where it has no reactions, their chats are left out.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from usbrec.chat import Lesson, Message, Messages
from usbrec.crs import agents, wishes
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import SILENCE, Dialogue, Example, Examples, add_turn
from usbrec.crs.wishes import Fact, attributes, describe, fit, read_profile, rewrite_all
from usbrec.options import Options, option, seed_for

Profile = Collection[Fact]
Generator = np.random.Generator
Lessons = list[Lesson]

# replies that recommend nothing, as an untrained model gives them
FILMLESS = Path(__file__).with_name("filmless_replies.txt").read_text("utf-8").splitlines()
# words of replies and profiles that describe no film
EMPTY_WORDS = Path(__file__).with_name("empty_words.txt").read_text("utf-8").split()
TRIES = 40  # films drawn in search of one per grade
UNLIKE = 4  # replies without a word of the profile; with 2 the internal judge may fail to learn


@dataclass(frozen=True)
class LessonOptions(Options):
    """Weights and sizes of lessons, and the titles that the judge learns."""

    score_weight: float = option(10.0, "weight of a score's token in the loss", above=0)
    line_weight: float = option(0.3, "weight of the seeker's words in the loss", above=0)
    explanation_weight: float = option(0.3, "weight of an explanation against a gold turn", above=0)
    explain_every: int = option(4, "one in so many dialogues also teaches to explain", low=1)
    cards: int = option(300, "titles that the judge learns to know, the most frequent", low=1)
    rehearsals: int = option(1, "times it scores a reply with each, and writes its card", low=1)
    sft_chats: int = option(8, "chats in a lesson of sft", low=1)
    simulator_chats: int = option(4, "the same, in one of the simulator: summaries or cards", low=1)


def recommender_lessons(
    examples: Examples, brief: Examples, films: Catalogue, options: LessonOptions
) -> Lessons:
    """Return lessons of `sft_chats` chats each.

    A chat is a dialogue whose gold turns have weight 1. One in `explain_every` goes on with the
    explanation of its last gold turn. Of each of `brief` follows a chat of two lines, the profile
    and the announcement of its first gold title.
    """
    chats = list[Messages]()
    for number, rows in enumerate(same_dialogue(examples)):
        gold = {len(row.history) for row in rows}  # the places of their responses
        whole = add_turn(rows[-1].history, "recommender", rows[-1].response)
        system, *said = agents.recommender_prompt(whole)
        lines = [replace(x, weight=float(i in gold)) for i, x in enumerate(said)]
        why = "" if number % options.explain_every else explanation_of(rows[-1], films)
        answer = Message("assistant", why, options.explanation_weight)
        chats.append((system, *lines, *((Message("user", agents.EXPLAIN), answer) if why else ())))
    for row in brief:
        profile = profile_of(row, films).replace(f" Dislikes: {wishes.NOTHING}.", "")
        prompt = agents.recommender_prompt(add_turn((), "seeker", profile))
        chats.append((*prompt, Message("assistant", agents.announce(row.items[0]), 1.0)))
    return in_lessons(chats, options.sft_chats)


def in_lessons(chats: Lesson, size: int) -> Lessons:
    """Return lessons of `size` chats each; the last may have fewer."""
    return [chats[i : i + size] for i in range(0, len(chats), size)]


def same_dialogue(examples: Examples) -> list[list[Example]]:
    """Return the examples in groups, shortest first: those that are prefixes of one dialogue."""
    groups, said = list[list[Example]](), Dialogue()
    for row in sorted(examples, key=lambda x: (x.dialog_id, len(x.history))):
        if groups and groups[-1][0].dialog_id == row.dialog_id and row.history[: len(said)] == said:
            groups[-1].append(row)
        else:
            groups.append([row])
        said = add_turn(row.history, "recommender", row.response)
    return groups


def gold_items(example: Example, catalogue: Catalogue) -> list[Item]:
    """Return the items of the gold titles that the catalogue has."""
    return [item for title in example.items if (item := catalogue.get(title))]


def explanation_of(example: Example, catalogue: Catalogue) -> str:
    """Return the row's own explanation, else one from the facts of its first known gold item."""
    told = (f"{x.title} is {describe(x)}." for x in gold_items(example, catalogue))
    return example.explanation or next(told, "")


def profile_of(example: Example, catalogue: Catalogue) -> str:
    """Return the row's own profile, else the genres and titles that the seeker has named."""
    if example.profile is not None:
        return example.profile
    lines = [line.text for line in example.history if line.speaker == "seeker"]
    items = [mention.items[0] for text in lines for mention in catalogue.find(text)]
    words = {word.strip(".,!?").lower() for text in lines for word in text.split()}
    genres = [genre for item in catalogue for genre in item.genres if genre in words]
    genres += [genre for item in items for genre in item.genres]
    liked = [*list(dict.fromkeys(genres))[:4], *dict.fromkeys(item.title for item in items[-3:])]
    return f"Likes: {', '.join(liked) or wishes.NOTHING}."


class Suggestion(NamedTuple):
    """A reply of the recommender, its explanation, and the score it deserves."""

    reply: str
    explanation: str
    score: int


class Suggestions:
    """A source of replies for other films, drawn by their count among the training labels."""

    def __init__(self, catalogue: Catalogue, popularity: Mapping[str, int]) -> None:
        self.catalogue = catalogue
        known = [(catalogue.get(title), count) for title, count in sorted(popularity.items())]
        self.pool = [item for item, _ in known if item]
        counts = np.array([count for item, count in known if item])
        self.shares = counts / counts.sum()

    def others(self, rng: Generator) -> list[Item]:
        """Return TRIES films, drawn by their count."""
        return [self.pool[x] for x in rng.choice(len(self.pool), TRIES, p=self.shares)]

    def draw(self, example: Example, seed: int, lies: bool = False) -> list[Suggestion]:
        """Return the gold reply (2) and replies for a kindred film (1), another (0) and none (0).

        If it `lies`, the reply for another film claims what is true of the gold one, as a
        recommender's misses do. A grade that no drawn film has is left out. The result is empty if
        the reply names no known gold item.
        """
        rng = np.random.default_rng(seed)
        golds, text = gold_items(example, self.catalogue), example.response
        named = [item for item in golds if self.catalogue.mentions(text, [item.title])]
        if not named:
            return []
        told = explanation_of(example, self.catalogue)
        found = {2: Suggestion(text, told, 2)}
        for item in self.others(rng):
            score = self.catalogue.grade(item, example.items)
            if score not in found:
                lie = lies and score == 0
                new = [replace(x, title=item.title, name=item.name) if lie else item for x in named]
                reply, why = (rewrite_all(x, zip(named, new, strict=True)) for x in (text, told))
                if not self.catalogue.mentions(reply, example.items):
                    found[score] = Suggestion(reply, why, score)
        reply, why = map(str, rng.choice(FILMLESS, 2))
        return [*found.values(), Suggestion(reply, why, 0)]

    def amiss(self, example: Example, seed: int) -> Suggestion:
        """Return a reply (0) with an invented title, without a title, or an empty one.

        Half of them are explained as if they were the gold reply: a recommender does that too.
        """
        rng = np.random.default_rng(seed_for(seed, "amiss"))
        filmless, why = map(str, rng.choice(FILMLESS, 2))
        reply = rng.choice([self.invented(example, rng), filmless, SILENCE])
        told = rng.choice([why, explanation_of(example, self.catalogue)])
        return Suggestion(str(reply), str(told), 0)

    def invented(self, example: Example, rng: Generator) -> str:
        """Return the gold reply with a title that no film has, SILENCE if a film has it."""
        first, last = (self.pool[i].name.split() for i in rng.choice(len(self.pool), 2))
        name, golds = f"{first[0]} {last[-1]}", gold_items(example, self.catalogue)
        films = [(x, replace(x, title=f"{name} ({x.year})", name=name)) for x in golds]
        made = rewrite_all(example.response, films)
        named = self.catalogue.find(made) or self.catalogue.mentions(made, example.items)
        return SILENCE if named else made

    def unlike(self, example: Example, profile: str, seed: int) -> list[Suggestion]:
        """Return up to UNLIKE replies (0) that share nothing with the target or the profile."""
        rng, named = np.random.default_rng(seed_for(seed, "unlike")), self.catalogue.mentions
        known, told = gold_items(example, self.catalogue), telling_words(profile)
        others = [x for x in self.others(rng) if not self.catalogue.grade(x, example.items)]
        replies = [rewrite_all(example.response, [(x, other) for x in known]) for other in others]
        fitting = [x for x in replies if not (telling_words(x) & told or named(x, example.items))]
        return [Suggestion(reply, "", 0) for reply in [*dict.fromkeys(fitting)][:UNLIKE]]


def telling_words(text: str) -> set[str]:
    """Return the words of a reply or a profile that describe a film."""
    return set(re.findall(r"[a-z0-9']+", text.lower())).difference(EMPTY_WORDS)


def simulator_lessons(
    examples: Examples, draws: Suggestions, seed: int, options: LessonOptions
) -> tuple[Lessons, Lessons]:
    """Return two lists of the simulator's lessons: what it learns first, and then.

    A small model learns to compare only after some dozens of steps, so the judges have many short
    lessons rather than few long ones. The external judge of five examples in six comes first, with
    two replies: finding the target's title in one of them is the easiest comparison. For every
    other example it comes again later, with a reply that lies, and by turns one for a kindred film
    or without a film: kindred films in all of them would have it call every miss comparable. A
    judge that has learned this can learn that a reply without a film is worth nothing, whatever its
    explanation says, which taught from the start keeps it from finding titles: half of those
    lessons end the first list, half are in the second. It can also learn to compare a reply with a
    profile: the internal seeker of four examples in five has two lessons in the second list.
    """
    first, last, then = [], [], []
    for number, example in enumerate(examples):
        key = seed_for(seed, "lesson", example.dialog_id, example.turn_id)
        if not (made := draws.draw(example, key)):
            continue
        *named, filmless = made
        at_times = [filmless] if number % 4 == 0 else []
        profile = profile_of(example, draws.catalogue)
        kindred = [each for each in named if each.score == 1]
        if number % 5 < 4:
            unlike = draws.unlike(example, profile, key)
            for judged in (unlike[:2], [*unlike[2:], *kindred, *at_times]):
                then.append(seeker_lesson(example, [named[0], *judged], profile, options))
        silent = seeker_lesson(example, [*named[:2], draws.amiss(example, key)], None, options)
        if number % 6 == 1:
            then.append(silent)
        else:
            other = [each for each in named if each.score == 0] or kindred
            first.append(seeker_lesson(example, [named[0], *other], None, options))
        if number % 6 == 4:
            last.append(silent)
        if number % 2 == 0:
            claimed = draws.draw(example, key, lies=True)[:-1]
            again = [each for each in claimed if not at_times or each.score != 1]
            then.append(seeker_lesson(example, [*again, *at_times], None, options))
    return first + last, then


def seeker_lesson(
    example: Example, judged: Sequence[Suggestion], profile: str | None, options: LessonOptions
) -> Lesson:
    """Return a chat per judged reply: the dialogue, the reply, the question and the score.

    The seeker's own lines are learned in the first.

    With a profile the speaker is the internal seeker, who knows the profile alone and scores the
    reply. Without one it is the external seeker, who knows the target and scores the explanation. A
    reaction that the dataset has is the last chat: the external seeker's to the gold reply, the
    internal seeker's to the last judged reply.
    """
    if profile is None:
        met, question = judged[0], agents.external_question(example.items)
    else:
        met, question = judged[-1], agents.internal_question(profile)
    prompt = agents.seeker_prompt(example.history, example.items if profile is None else profile)
    explain, weight = Message("assistant", agents.EXPLAIN), options.line_weight
    said = (replace(m, weight=weight) if m.role == "assistant" else m for m in prompt)
    ends: list[Messages] = []
    for each in judged:
        told = (explain, Message("user", each.explanation)) if profile is None else ()
        score = Message("assistant", str(each.score), options.score_weight)
        ends.append((Message("user", each.reply), *told, question, score))
    if reaction := example.accept if met.score == 2 else example.refuse:
        ends.append((Message("user", met.reply), Message("assistant", reaction, weight)))
    return [(*said, *ends[0]), *((*prompt, *end) for end in ends[1:])]


def woven(*lists: Lessons) -> Lessons:
    """Return the lists as one, each spread evenly over it and in its own order."""
    placed = [((i + 0.5) / len(x), n, i) for n, x in enumerate(lists) for i in range(len(x))]
    return [lists[n][i] for _, n, i in sorted(placed)]


def summary_lessons(examples: Examples, films: Catalogue, options: LessonOptions) -> Lessons:
    """Return lessons of summaries, `simulator_chats` chats in each."""
    answers = (Message("assistant", profile_of(x, films), 1.0) for x in examples)
    chats = [(*agents.summary_prompt(x.history), y) for x, y in zip(examples, answers, strict=True)]
    return in_lessons(chats, options.simulator_chats)


def card_lessons(rows: Examples, draws: Suggestions, seed: int, options: LessonOptions) -> Lessons:
    """Return lessons of the judge with cards: a reply, its title's card, a score.

    The judge writes the card before it scores, so it learns to know the most frequent titles. Each
    is met `rehearsals` times, each time with another profile: in the first quarter one of a single
    wish, where the score tells whether the card holds it, since a small model learns to compare
    several wishes only after that. In the last quarter the reply claims what is true of another
    film, which costs a point if it is false of this one. Half as often as it is scored a card is
    asked for alone, which teaches it by heart at half the price. Of one reply in nine nothing is
    known, and it is worth 0: it names a title of another year, an invented one or none.
    """
    films, weight, chats = draws.catalogue, options.score_weight, list[Messages]()
    order = np.argsort(-draws.shares, kind="stable")[: options.cards]
    taught = [draws.pool[i] for i in order if attributes(draws.pool[i])]
    met = profiles_to_score(rows, taught, films, seed)
    for turn in range(options.rehearsals if taught and rows else 0):
        rng = np.random.default_rng(seed_for(seed, "cards", turn))
        for number, place in enumerate(rng.permutation(len(taught))):
            film, other = taught[place], rows[int(rng.integers(len(rows)))]
            share = (turn + number / len(taught)) / options.rehearsals  # of all, so far
            tried = met[film][share >= 0.25] or met[film][0]
            facts, reply, false = tried[turn % len(tried)], agents.announce(film.title), False
            if share >= 0.75:
                claim, stolen = claim_of(other.response, gold_items(other, films), film)
                reply, false = (claim, stolen) if films.first(claim) == (film,) else (reply, False)
            score = max(fit(film, facts) - false, 0)
            chats.append(scored(reply, wishes.card(film), told(facts), score, weight))
            if number % 2:
                bare = taught[place - len(taught) // 2]  # another film
                chats.append(scored(agents.announce(bare.title), wishes.card(bare), "", 0, 0)[:3])
            if number % 8 == 0:
                strange = f"{film.name} ({(film.year or 2000) + int(rng.integers(3, 20))})"
                amiss = draws.amiss(other, seed_for(seed, "cards", turn, number)).reply
                reply = amiss if turn % 2 or films.named(strange) else agents.announce(strange)
                chats.append(scored(reply, wishes.UNKNOWN, profile_of(other, films), 0, weight))
    return in_lessons(chats, options.simulator_chats)


def scored(reply: str, card: str, profile: str, score: int, weight: float) -> Messages:
    """Return a chat in which the judge learns to write the card and, at a weight, the score."""
    system, said, shown, asked = agents.card_prompt(reply, card, profile)
    return system, said, replace(shown, weight=1.0), asked, Message("assistant", str(score), weight)


def profiles_to_score(
    examples: Examples, taught: Sequence[Item], films: Catalogue, seed: int
) -> dict[Item, list[list[Profile]]]:
    """Return per film profiles of a single wish, and those of examples, both in a drawn order.

    The latter are those whose target the film is, four at most, and those that it meets by half or
    less. So no film is taught with all the wishes that it meets, except its own examples'.
    """
    known = [(gold_items(x, films), read_profile(profile_of(x, films), films)) for x in examples]
    met: dict[Item, list[list[Profile]]] = {}
    for film in taught:
        rng = np.random.default_rng(seed_for(seed, "cards", film.title))
        own = [facts for golds, facts in known if film in golds]
        others = [facts for golds, facts in known if film not in golds and fit(film, facts) < 2]
        found = single_wishes(film, films, rng), own[:4] + mixed(others, film, 8, rng)
        met[film] = [[x[i] for i in rng.permutation(len(x))] for x in found]
    return met


def single_wishes(film: Item, catalogue: Catalogue, rng: Generator) -> list[list[Fact]]:
    """Return profiles of one wish, which the film meets or not, with or without a dislike."""
    own = attributes(film)
    pool = sorted({x for item in catalogue for x in attributes(item)} - set(own))
    wrong = [pool[i] for i in rng.choice(len(pool), len(own) if pool else 0)]
    absent = sorted({value for kind, value in wrong if kind == "genre"})
    pairs = [(own[-1], x) for x in film.genres if own[-1][1] != x] + [(own[0], x) for x in absent]
    single = [[Fact("like", *x)] for x in (*own, *wrong)]
    return single + [[Fact("like", *x), Fact("dislike", "genre", genre)] for x, genre in pairs]


def mixed(profiles: Sequence[Profile], film: Item, count: int, rng: Generator) -> list[Profile]:
    """Return `count` of the profiles, drawn at random: by turns half met, a near miss, and any."""
    own = set(attributes(film))
    order = [profiles[i] for i in rng.permutation(len(profiles))]
    half = [x for x in order if fit(film, x) == 1]
    unmet = [x for x in order if not fit(film, x)]
    near = sorted(unmet, key=lambda facts: -len({x[1:] for x in facts} & own))
    turns = zip_longest(half[:count], near[:count], order[:count])
    return [x for turn in turns for x in turn if x is not None][:count]


def told(facts: Profile) -> str:
    """Return the profile of these facts, in the order of the gold profiles."""
    order = sorted(facts, key=lambda x: (wishes.FACT_KINDS.index(x.kind), x.value))
    parts = ([x for x in order if x.attitude == attitude] for attitude in wishes.SECTIONS.values())
    return wishes.write_profile(*([wishes.write_attribute(*x[1:]) for x in own] for own in parts))


def claim_of(reply: str, golds: Sequence[Item], film: Item) -> tuple[str, bool]:
    """Return a reply about the gold films, said of another film, and whether it is false of it."""
    stolen = rewrite_all(reply, [(x, replace(x, title=film.title, name=film.name)) for x in golds])
    return stolen, stolen != rewrite_all(reply, [(x, film) for x in golds])


def popularity_of(examples: Examples, films: Catalogue) -> dict[str, int]:
    """Return {gold title: its count among the training labels}, in order of title.

    A title is written as in the catalogue, where that has it.
    """
    titles = (getattr(films.get(x), "title", x) for row in examples for x in row.items)
    return dict(sorted(Counter(titles).items()))
