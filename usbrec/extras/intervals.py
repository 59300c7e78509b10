"""Means, differences and areas under the curve, each with its 95% bootstrap interval.

Rows of one dialogue are not independent, so whole groups (dialogues) are drawn with replacement;
rows without a group name stand alone. 10,000 draws, percentile interval, seeded.

If all rows agree, so do all draws, and the interval would say that nothing else is possible. But n
groups that agree allow a share p = 1 - 0.025 ** (1 / n) of all groups to be otherwise (the bound of
Clopper and Pearson for 0 of n). So where each value is a whole number (found or not, grades, their
differences) each end lies at least as far out as a share p of groups at the limit of the values
moves the mean:

    0 of 128 found        p = 0.028         0.000 [0.000, 0.028]
    1 of 128 found        p = 0.028         0.008 [0.000, 0.036], the draws alone say 0.023
    no difference, 128    limits -1 and 1   0.000 [-0.028, 0.028]
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Values = Sequence[float | None]
Weights = Sequence[float] | None
Groups = Sequence[str] | None  # a name per row
Limits = tuple[float, float]  # the least and the greatest value that a row can have
UNIT = (0.0, 1.0)
DRAWS = 10_000
ENDS = (2.5, 97.5)  # of an interval, in percent of the draws


def mean_interval(
    values: Values, seed: int, weights: Weights = None, groups: Groups = None, limits: Limits = UNIT
) -> dict[str, Any]:
    """Return the (weighted) mean of the values as {"mean", "low", "high", "n"}.

    Rows without a value are left out; if none is left, the mean is None, never 0. `n` is the number
    of rows, or the sum of the weights if they are given.
    """
    kept = [i for i, value in enumerate(values) if value is not None]
    if not kept:
        return {"mean": None, "low": None, "high": None, "n": 0}
    value = np.asarray(values, float)[kept]
    weight = np.ones(len(kept)) if weights is None else np.asarray(weights, float)[kept]
    place = np.unique(kept if groups is None else [groups[i] for i in kept], return_inverse=True)[1]
    top, bottom = np.bincount(place, value * weight), np.bincount(place, weight)  # a sum per group
    means = [(counts @ top) / (counts @ bottom) for counts in draws(len(top), seed)]
    mean = float((value * weight).sum() / weight.sum())
    low, high = np.percentile(np.concatenate(means), ENDS).tolist()
    if np.allclose(value, np.round(value), rtol=0, atol=1e-6):
        least, most = room(mean, len(top), limits)
        low, high = min(low, least), max(high, most)
    return {"mean": mean, "low": low, "high": high, "n": int(weight.sum())}


def unseen_share(n: int) -> float:
    """Return the greatest share of all groups that none of n drawn ones may be of, at 97.5%."""
    return 1 - 0.025 ** (1 / n)


def room(value: float, n: int, limits: Limits) -> tuple[float, float]:
    """Return the ends between which a value lies if what n groups do not exclude is at a limit."""
    share = unseen_share(n)
    return value - share * (value - limits[0]), value + share * (limits[1] - value)


def differences(first: Values, second: Values) -> list[float | None]:
    """Return first - second per row, or None where either has no value."""
    pairs = zip(first, second, strict=True)
    return [None if a is None or b is None else float(a) - float(b) for a, b in pairs]


def auc_interval(positive: Sequence[float], negative: Sequence[float], seed: int) -> dict[str, Any]:
    """Return {"auc", "low", "high", "n"}: P(positive > negative) + half the ties, over all pairs.

    The two lists are paired by row (a gold reply and its rewriting), and a row's two values are
    drawn together. Where all draws agree, a share of rows may be otherwise (`unseen_share`).
    """
    if (n := len(positive)) == 0:
        return {"auc": None, "low": None, "high": None, "n": 0}
    wins = _wins(positive, negative)
    areas = [np.einsum("bi,ij,bj->b", c, wins, c, optimize=True) / n**2 for c in draws(n, seed)]
    area = float(wins.mean())
    low, high = np.percentile(np.concatenate(areas), ENDS).tolist()
    if low == high:
        seen = (1 - unseen_share(n)) ** 2  # of all pairs: those whose two rows are like the drawn
        low, high = area * seen, 1 - (1 - area) * seen
    return {"auc": area, "low": low, "high": high, "n": n}


def auc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Return P(positive > negative) + half the ties, or None if a side is empty."""
    return float(_wins(positive, negative).mean()) if len(positive) and len(negative) else None


def _wins(positive: Sequence[float], negative: Sequence[float]) -> np.ndarray:
    """Return (P, N): 1 where the positive is above the negative, 1/2 for a tie, else 0."""
    return (np.sign(np.subtract.outer(positive, negative)) + 1) / 2


def draws(n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks (b, n): how often each of n rows is drawn, in b draws; DRAWS draws in all."""
    generator = np.random.default_rng(seed)
    block = max(1, 4_000_000 // n)  # 32 MB
    for start in range(0, DRAWS, block):
        yield generator.multinomial(n, np.full(n, 1 / n), min(block, DRAWS - start)).astype(float)
