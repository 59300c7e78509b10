"""Agreement of scores with people's ratings, and a judged rate less the errors of its judge.

A statistic is a function of scores (n,), ratings (n,) and weights (b, n). It returns its values
(b,) in b draws, where row i counts weights[:, i] times, and NaN where a draw leaves it open (all
scores alike). Rows of one dialogue are drawn together: 10,000 draws with replacement, percentile
interval, as in usbrec/extras/intervals.py. people.py uses them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from usbrec.extras.intervals import DRAWS, draws, room
from usbrec.options import seed_for

Array = np.ndarray
Statistic = Callable[[Array, Array, Array], Array]
BLOCK = 400  # draws at once
LEAST_POWER = 0.1  # of a judge, sensitivity + specificity - 1, for a correction
ASSUMED = "the judge errs on these replies as often as on those that measured it"


def pearson(x: Array, y: Array, w: Array) -> Array:
    """Return the correlation of x and y; either may have values of its own per draw, (b, n)."""
    total = w.sum(1)

    def mean(values: Array) -> Array:
        return (w * values).sum(1) / total

    x, y = x - x.mean(), y - y.mean()  # small numbers lose less in the differences below
    squares = [mean(z * z) for z in (x, y)]
    spreads = [squares[0] - mean(x) ** 2, squares[1] - mean(y) ** 2]
    alike = (spreads[0] <= 1e-9 * squares[0]) | (spreads[1] <= 1e-9 * squares[1])
    product = mean(x * y) - mean(x) * mean(y)
    return np.where(alike, np.nan, product / np.sqrt(np.where(alike, 1, spreads[0] * spreads[1])))


def midranks(x: Array, w: Array) -> Array:
    """Return (b, n): the rank of each row in each draw, equal values sharing the middle one.

    x = [5, 5, 7] drawn once each has the ranks [1.5, 1.5, 3].
    """
    order = np.argsort(x, kind="stable")
    starts = np.flatnonzero(np.diff(x[order], prepend=-np.inf))
    mass = np.add.reduceat(w[:, order], starts, axis=1)  # (b, different values)
    place = np.searchsorted(x[order][starts], x)
    return (mass.cumsum(1) - mass / 2 + 0.5)[:, place]


def spearman(x: Array, y: Array, w: Array) -> Array:
    """Return the correlation of the ranks."""
    return pearson(midranks(x, w), midranks(y, w), w)


def kappa(x: Array, y: Array, w: Array) -> Array:
    """Return Cohen's kappa with quadratic weights: 1 - (x - y)^2 over that of unrelated pairs."""
    total = w.sum(1)
    observed = (w * (x - y) ** 2).sum(1) / total
    means = [(w * z).sum(1) / total for z in (x, y)]
    spreads = [(w * z * z).sum(1) / total - mean**2 for z, mean in zip((x, y), means, strict=True)]
    expected = sum(spreads) + (means[0] - means[1]) ** 2
    return np.where(expected < 1e-9, np.nan, 1 - observed / np.maximum(expected, 1e-9))


def auc(x: Array, y: Array, w: Array) -> Array:
    """Return P(a row with y = 1 scores above one with y = 0) + half the ties."""
    good, bad = w * y, w * (1 - y)
    below = midranks(x, bad) - 0.5  # rows with y = 0 below each row, and half of those beside it
    pairs = good.sum(1) * bad.sum(1)
    return np.where(pairs == 0, np.nan, (good * below).sum(1) / np.maximum(pairs, 1))


def across(names: Sequence[str]) -> Statistic:
    """Return the statistic that correlates the ranks of the named groups by their mean scores.

    Row i is of the group names[i]. A draw without one of the groups leaves it open.
    """
    kinds, place = np.unique(names, return_inverse=True)
    member = np.eye(len(kinds))[place]  # (n, groups)

    def statistic(x: Array, y: Array, w: Array) -> Array:
        mass = w @ member
        there = np.maximum(mass, 1e-9)
        ranks = [_row_ranks((w * z) @ member / there) for z in (x, y)]
        found = pearson(*ranks, np.ones_like(mass))
        return np.where((mass == 0).any(1), np.nan, found)

    return statistic


def _row_ranks(means: Array) -> Array:
    """Return the ranks within each row, equal values sharing the middle one."""
    below = np.sign(means[:, :, None] - means[:, None, :]).sum(2)
    return (below + means.shape[1] + 1) / 2


def measured(
    statistic: Statistic,
    scores: Sequence[float],
    ratings: Sequence[float],
    groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the statistic as {"mean", "low", "high", "n"}, by whole groups; "mean" is its value.

    `n` is the number of rows. A statistic that the rows leave open is None. Draws that leave it
    open are left out of the interval. Where all agree, it has the `room` of few groups.
    """
    empty = {"mean": None, "low": None, "high": None, "n": len(scores)}
    if not scores:
        return empty
    x, y = np.asarray(scores, float), np.asarray(ratings, float)
    value = float(statistic(x, y, np.ones((1, len(x))))[0])
    if np.isnan(value):
        return empty
    place = np.unique(groups, return_inverse=True)[1]
    blocks = [statistic(x, y, w[:, place]) for w in _blocks(int(place.max()) + 1, seed)]
    found = np.concatenate(blocks)
    low, high = np.percentile(found[~np.isnan(found)], [2.5, 97.5]).tolist()
    if low == high:  # all draws agree: a share of the groups may be otherwise
        low, high = room(low, int(place.max()) + 1, (0 if statistic is auc else -1, 1))
    return {"mean": value, "low": low, "high": high, "n": len(x)}


def _blocks(n: int, seed: int) -> Iterator[Array]:
    """Yield `intervals.draws` in blocks of few draws, for rows that are many more than groups."""
    for block in draws(n, seed):
        yield from np.array_split(block, -(-len(block) // BLOCK))


# --- the judge's errors -----------------------------------------------------------------------


def corrected_rate(
    passed: Sequence[float],
    talks: Sequence[str],
    verdicts: Sequence[float],
    truths: Sequence[float],
    groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the share of good replies that explains the share that the judge passed.

    By Rogan and Gladen: (passed + specificity - 1) / (sensitivity + specificity - 1), from 0 to 1.
    A judge that passes 80% of good and 30% of bad replies, and passes 55%, saw 50% good ones.

    `passed` holds 1 or 0 per judged reply, `talks` its dialogue. `verdicts`, `truths` and `groups`
    are the calibration's: whether the judge passed a reply, whether it was good, its dialogue. Each
    draw of the interval draws the dialogues of both, apart from one another. A draw whose judge has
    less than LEAST_POWER says nothing: it counts as 0 at the lower end and as 1 at the upper. A
    judge that has less in all gives no mean.
    """
    good, verdict, own = (np.asarray(x, float) for x in (truths, verdicts, passed))
    apart, together = seed_for(seed, "passed"), seed_for(seed, "calibration")
    share = _rate(own, np.ones(len(own)), talks, apart, "share")
    sensitivity = _rate(verdict, good, groups, together, "sensitivity")
    specificity = _rate(1 - verdict, 1 - good, groups, together, "specificity")
    power = sensitivity + specificity - 1
    facts = {"n": len(own), "calibrated_on": len(good), "assumes": ASSUMED}
    facts |= {"sensitivity": float(sensitivity[0]), "specificity": float(specificity[0])}
    if power[0] < LEAST_POWER:
        return {"mean": None, "low": None, "high": None, **facts}
    weak = power < LEAST_POWER
    rate = np.clip((share + specificity - 1) / np.where(weak, 1, power), 0, 1)
    low = np.percentile(np.where(weak, 0, rate)[1:], 2.5)
    high = np.percentile(np.where(weak, 1, rate)[1:], 97.5)
    return {"mean": float(rate[0]), "low": float(low), "high": float(high), **facts}


def _rate(hit: Array, base: Array, groups: Sequence[str], seed: int, name: str) -> Array:
    """Return the share of the `base` rows that are hits: first as measured, then in each draw.

    Draws from rows that all agree would agree as well. There a rate of 1 among n groups is drawn as
    u^(1/n), whose 2.5% quantile is the bound of Clopper and Pearson; 0 likewise. `name` keeps
    several such rates of one seed apart.
    """
    place = np.unique(groups, return_inverse=True)[1]
    top, bottom = (np.bincount(place, values) for values in (hit * base, base))
    value = float(top.sum() / bottom.sum())
    if value in (0, 1):
        random = np.random.default_rng(seed_for(seed, name)).random(DRAWS)
        far = 1 - random ** (1 / np.count_nonzero(bottom))
        return np.concatenate([[value], np.abs(value - far)])
    found = [(w @ top) / np.maximum(w @ bottom, 1e-9) for w in _blocks(len(top), seed)]
    return np.concatenate([[value], *found])
