"""Baselines and upper marks beside the methods: guesses that need no language model."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from usbrec.crs.catalogue import Catalogue
from usbrec.crs.dialogue import Example, Examples, Popularity
from usbrec.crs.evaluation import Guesses, Labels, gold_labels
from usbrec.crs.lessons import popularity_of
from usbrec.crs.titles import key_of
from usbrec.crs.wishes import fit, read_profile


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

    popularity = popularity_of(train, films)
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
