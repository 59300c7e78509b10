"""iEval: a method talks with the seeker for some turns, explains its reply and is judged.

All methods get the same dialogues, options and draws: a row's seed does not depend on its method,
so that differences are paired. Three figures besides the judge's score come from rules alone:
Recall@1 (the first catalogue title of the first reply), hit (any gold title in any reply), and the
grade of the last reply's first title. Baselines and upper marks need no language model. Left out:
the tables (extras/report.py) and the intervals (extras/intervals.py).

There are three protocols:

    targets      the seeker and the judge know the target titles (USB-Rec, arXiv 2509.20381)
    until-hit    the same, but a talk ends with a reply that names a target (iEvaLM, arXiv
                 2305.13112, with five turns)
    profile      both know a profile in place of the titles; the reply is judged without an
                 explanation
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from usbrec.chat import Row, Sampling
from usbrec.crs.agents import JudgeScore, Roles, Told, Votes, internal_judge_prompt
from usbrec.crs.catalogue import Catalogue, Item
from usbrec.crs.dialogue import Dialogue, Example, Examples, Popularity, add_turn
from usbrec.crs.lessons import popularity_of, profile_of
from usbrec.crs.ses import SearchOptions, search
from usbrec.crs.titles import key_of
from usbrec.crs.wishes import fit, read_profile
from usbrec.options import option, seed_for

# best first; a guess has several items if its title leaves the year open
Guesses = Sequence[tuple[Item, ...]]
# one per gold title: {"title", "repeated", "found"}; `found` is a probability for a random guess
Labels = list[Row]


@dataclass(frozen=True)
class EvaluationOptions(Votes):
    """The turns of a talk, the temperatures, and the measures beside the talks."""

    protocol: Literal["targets", "until-hit", "profile"] = option(
        "targets", "what the seeker and the judge know, and when a talk ends"
    )
    turns: int = option(1, "most recommender turns of a talk, judged after the last", low=1)
    temperature: float = option(0.0, "temperature of plain replies and explanations", low=0)
    seeker_temperature: float = option(0.1, "temperature of the seeker's replies", low=0)
    max_new_tokens: int = option(48, "longest reply, in tokens", low=1)
    ranked_dialogues: int = option(24, "dialogues whose best films are judged; 0: none", low=0)
    ranked_titles: int = option(20, "films that are judged in each of them", low=2)
    seen: int = option(128, "first dialogues, known by now; those after them are told apart", low=0)


@dataclass
class Talk:
    """A talk in progress: its example and seed, its lines, and the recommender's part in them.

    `told` is what the seeker and the judge know.
    """

    example: Example
    key: int
    told: Told
    dialogue: Dialogue
    replies: list[str] = field(default_factory=list)
    searches: list[Row] = field(default_factory=list)

    def is_hit(self, catalogue: Catalogue) -> bool:
        """Return whether any reply names a gold title."""
        return any(catalogue.mentions(reply, self.example.items) for reply in self.replies)


def evaluate_method(
    roles: Roles,
    examples: Examples,
    seed: int,
    options: EvaluationOptions,
    searching: SearchOptions | None = None,
) -> list[Row]:
    """Return the `row_of` each example; `searching` turns SES on from its `start_turn`."""
    catalogue, talks = roles.catalogue, []
    for x in examples:
        told = profile_of(x, catalogue) if options.protocol == "profile" else x.items
        talks.append(Talk(x, seed_for(seed, "ieval", x.dialog_id, x.turn_id), told, x.history))
    plain = Sampling(options.max_new_tokens, options.temperature)
    seeking = Sampling(options.max_new_tokens, options.seeker_temperature)
    for turn in range(1, options.turns + 1):
        going = [x for x in talks if options.protocol != "until-hit" or not x.is_hit(catalogue)]
        dialogues = [x.dialogue for x in going]
        if turn > 1:
            seeds = [seed_for(x.key, "seeker", turn) for x in going]
            dialogues = roles.seek(dialogues, [x.told for x in going], seeking, seeds)
        seeds = [seed_for(x.key, "recommender", turn) for x in going]
        if searching is not None and turn >= searching.start_turn:
            results = search(roles, dialogues, seeds, searching)
            said = [result.reply for result in results]
            for talk, result in zip(going, results, strict=True):
                record = checked(catalogue, talk.example, result.record())
                talk.searches.append({"turn": turn, **record})
        else:
            said = roles.recommend(dialogues, plain, seeds)
        for talk, dialogue, reply in zip(going, dialogues, said, strict=True):
            talk.dialogue = add_turn(dialogue, "recommender", reply)
            talk.replies.append(reply)
    keys = [x.key for x in talks]
    dialogues, known = [x.dialogue for x in talks], [x.told for x in talks]
    if options.protocol == "profile":  # unexplained
        prompts = list(map(internal_judge_prompt, dialogues, map(str, known)))
        judged = [("", score) for score in roles.judge(prompts, options, keys, roles.external)]
    else:
        judged = roles.explain_and_judge(dialogues, known, keys, plain, options)
    stop = options.protocol == "until-hit"
    return [row_of(talk, roles, stop, *each) for talk, each in zip(talks, judged, strict=True)]


def row_of(talk: Talk, roles: Roles, stop: bool, explanation: str, score: JudgeScore) -> Row:
    """Return the row of a talk that has been judged, in JSON's own types.

    It has the fields of its `JudgeScore`, its ids, and these. `replies` are the recommender's,
    `items` the catalogue titles of each, `labels` those of the first. `hit` tells whether any reply
    names a gold title. `grade` is the rules' 0, 1 or 2 for the last reply's first title (0 if it
    names none). `explanation` is of the last reply, and so is the score. `transcript` holds all
    lines, and `adapters` tells who spoke for each side. `end` tells why the talk ended: "hit", a
    target named where that is to `stop` it, or "turns", as many as it may have. `searches` are the
    records of the searched turns, each as `checked` returns it.
    """
    x, replies, catalogue = talk.example, talk.replies, roles.catalogue
    row = {**asdict(score), "dialog_id": x.dialog_id, "turn_id": x.turn_id, "replies": replies}
    row["items"] = [titles_in(catalogue, reply) for reply in replies]
    row["labels"] = gold_labels(catalogue, x, [catalogue.first(replies[0])])
    row["hit"], row["grade"] = talk.is_hit(catalogue), catalogue.grade_of(replies[-1], x.items)
    row["end"], row["adapters"] = "hit" if stop and row["hit"] else "turns", roles.adapters()
    lines = [[line.speaker, line.text] for line in talk.dialogue]
    return row | {"explanation": explanation, "transcript": lines, "searches": talk.searches}


def checked(catalogue: Catalogue, example: Example, record: Row) -> Row:
    """Return a search's record, checked against the targets and the gold profile.

    Each candidate gets the first title of its reply (`title`, None without one), whether that is a
    target (`found`), and its `fit` with the true wishes. The record gets `facts`: how many facts
    the summary tells (`told`), how many of these are `right`, and how many are `true`. Without a
    gold profile `fit` and `facts` are None. A title that leaves the year open fits as the worst of
    its readings, no title as 0.
    """
    facts, true, candidates = None, None, []
    if example.profile is not None:
        told, true = (read_profile(x, catalogue) for x in (record["profile"], example.profile))
        facts = {"right": len(told & true), "told": len(told), "true": len(true)}
    for candidate in record["candidates"]:
        named = catalogue.first(candidate["reply"])
        title = " or ".join(item.title for item in named) or None
        found = is_target(catalogue, named, example.items)
        fits = None if true is None else min((fit(item, true) for item in named), default=0)
        candidates.append({**candidate, "title": title, "found": found, "fit": fits})
    return {**record, "candidates": candidates, "facts": facts}


def gold_labels(catalogue: Catalogue, example: Example, guesses: Guesses) -> Labels:
    """Return one label per gold title: `repeated` if the context names it, `found` if guessed."""
    lines, labels = [line.text for line in example.history], []
    for title in example.items:
        repeated = any(catalogue.mentions(line, [title]) for line in lines)
        found = any(is_target(catalogue, guess, [title]) for guess in guesses)
        labels.append({"title": title, "repeated": repeated, "found": found})
    return labels


def is_target(catalogue: Catalogue, guess: tuple[Item, ...], titles: Sequence[str]) -> bool:
    """Return whether a guess is one of the titles.

    A guess whose year is left open counts only if every film that it may mean is that title.
    """
    return any(guess and set(guess) <= set(catalogue.named(title)) for title in titles)


def titles_in(catalogue: Catalogue, text: str) -> list[str]:
    """Return the catalogue titles in a text, in order, once each.

    A title without a year stands for every film that it may mean.
    """
    return list(dict.fromkeys(x.title for found in catalogue.find(text) for x in found.items))


# --- baselines and upper marks ----------------------------------------------------------------


def copied(catalogue: Catalogue, example: Example) -> Guesses:
    """Return the guesses of copy-last: the titles in the context, once each, the newest first."""
    found = [mention.items for line in example.history for mention in catalogue.find(line.text)]
    return list(dict.fromkeys(reversed(found)))


def popular(catalogue: Catalogue, popularity: Popularity) -> Guesses:
    """Return the guesses of most-popular: items by count among the training labels, then title."""
    order = sorted(popularity, key=lambda title: (-popularity[title], title))
    return [(item,) for title in order if (item := catalogue.get(title))]


def nearest(examples: Examples, train: Examples) -> Iterator[Example]:
    """Yield per example the nearest training example, ties to the first.

    Nearest by the cosine of the words that the seeker has said, each weighted by log(N / n): n of
    the N training examples have it.
    """

    def words(example: Example) -> list[str]:
        lines = [line.text for line in example.history if line.speaker == "seeker"]
        return list(dict.fromkeys(key_of(" ".join(lines)).split()))

    said, having = [words(example) for example in train], defaultdict(list)
    for place, own in enumerate(said):
        for word in own:
            having[word].append(place)
    places = {word: np.array(found) for word, found in having.items()}
    weights = {word: math.log(len(train) / len(found)) ** 2 for word, found in having.items()}
    lengths = np.sqrt([sum(weights[word] for word in own) or 1.0 for own in said])
    for example in examples:
        products = np.zeros(len(train))
        for word in filter(places.__contains__, words(example)):
            products[places[word]] += weights[word]
        yield train[int((products / lengths).argmax())]


def baseline_labels(films: Catalogue, tests: Examples, train: Examples) -> dict[str, list[Labels]]:
    """Return the gold labels per example of each baseline, which has one guess.

    copy-last         the newest title of the dialogue
    most-popular      the most frequent training label
    nearest           the target of the nearest training dialogue

    Where all examples have a gold profile, two upper marks hear every wish:

    rule listener     the most popular film that fits the gold profile
    random listener   any film that fits: `found` is the probability of the target
    """

    def label(guesses: Sequence[Guesses]) -> list[Labels]:
        return [gold_labels(films, x, own) for x, own in zip(tests, guesses, strict=True)]

    popularity = popularity_of(train)
    found = {
        "copy-last": label([copied(films, x)[:1] for x in tests]),
        "most-popular": label([popular(films, popularity)[:1]] * len(tests)),
        "nearest": label([[films.named(x.items[0])] for x in nearest(tests, train)]),
    }
    order = sorted(films, key=lambda item: (-popularity.get(item.title, 0), item.title))
    known = [read_profile(x.profile, films) for x in tests if x.profile is not None]
    if len(known) == len(tests):
        fitting = [[(item,) for item in order if fit(item, facts) == 2] for facts in known]
        found["rule listener"] = label([own[:1] for own in fitting])
        found["random listener"] = label(fitting)
        for row, own in zip(found["random listener"], fitting, strict=True):
            for gold in row:
                gold["found"] /= max(1, len(own))
    return found
