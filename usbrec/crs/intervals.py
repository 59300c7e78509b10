"""Means, differences and areas under the curve, each with its 95% bootstrap interval.

Rows of one dialogue are not independent, so whole groups (dialogues) are drawn with replacement;
rows without a group name stand alone. 10,000 draws, percentile interval, seeded.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 10_000
CELLS = 4_000_000  # numbers drawn at once: 32 MB


def mean_interval(
    values: Sequence[float],
    seed: int,
    weights: Sequence[float] | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the (weighted) mean as {"mean", "low", "high", "n"}; no rows give None, never 0.

    `n` is the number of rows, or the sum of the weights where those are given.
    """
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    value = np.asarray(values, float)
    top, bottom = _grouped(value * weight, groups), _grouped(weight, groups)
    means = [(counts @ top) / (counts @ bottom) for counts in draws(len(top), seed)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    total = weight.sum()
    return {
        "mean": float((value * weight).sum() / total),
        "low": float(low),
        "high": float(high),
        "n": int(total),
    }


def paired_difference(
    first: Sequence[float | None],
    second: Sequence[float | None],
    seed: int,
    weights: Sequence[float] | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return mean(first - second) over the rows that both have, with its paired interval."""
    pairs = list(zip(first, second, strict=True))
    kept = [i for i, (a, b) in enumerate(pairs) if a is not None and b is not None]
    gaps = [float(a) - float(b) for a, b in pairs if a is not None and b is not None]
    return mean_interval(
        gaps,
        seed,
        None if weights is None else [weights[i] for i in kept],
        None if groups is None else [groups[i] for i in kept],
    )


def auc_interval(positive: Sequence[float], negative: Sequence[float], seed: int) -> dict[str, Any]:
    """Return {"auc", "low", "high", "n"}: P(positive > negative) + half the ties, over all pairs.

    The two lists are paired by row (a gold reply and its rewriting): rows are drawn together.
    """
    n = len(positive)
    if n == 0:
        return {"auc": None, "low": None, "high": None, "n": 0}
    wins = _wins(np.asarray(positive, float), np.asarray(negative, float))
    areas = [np.einsum("bi,ij,bj->b", c, wins, c, optimize=True) / n**2 for c in draws(n, seed)]
    low, high = np.percentile(np.concatenate(areas), [2.5, 97.5])
    return {"auc": float(wins.mean()), "low": float(low), "high": float(high), "n": n}


def auc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Return P(positive > negative) + half the ties, None where a side is empty."""
    if not len(positive) or not len(negative):
        return None
    return float(_wins(np.asarray(positive, float), np.asarray(negative, float)).mean())


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's correlation, ties sharing a rank; None where a side is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def draws(n: int, seed: int) -> Iterator[Array]:
    """Yield blocks (b, n) of how often each of n rows is drawn, DRAWS rows of blocks in all."""
    generator = np.random.default_rng(seed)
    block = max(1, CELLS // n)
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        yield generator.multinomial(n, np.full(n, 1 / n), size=size).astype(float)


def _wins(positive: Array, negative: Array) -> Array:
    above = positive[:, None] - negative[None, :]  # (P, N)
    return (above > 0) + 0.5 * (above == 0)


def _ranks(values: Sequence[float]) -> Array:
    _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def _grouped(values: Array, groups: Sequence[str] | None) -> Array:
    if groups is None:
        return values
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    sums: Array = np.bincount(place, weights=values).astype(float)
    return sums
