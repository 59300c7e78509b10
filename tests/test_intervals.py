"""Intervals: against closed forms, by hand, and with groups and weights."""

from itertools import pairwise

import numpy as np
import pytest

from usbrec.extras.intervals import (
    DRAWS,
    auc,
    auc_interval,
    differences,
    draws,
    mean_interval,
)


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.5, 400).tolist()
    found = mean_interval(values, 1)
    error = float(np.std(values)) / 20
    assert found["mean"] == pytest.approx(np.mean(values)) and found["n"] == 400
    assert found["low"] == pytest.approx(found["mean"] - 1.96 * error, abs=0.004)
    assert found["high"] == pytest.approx(found["mean"] + 1.96 * error, abs=0.004)


def test_no_values_have_no_mean_and_equal_fractions_no_width() -> None:
    assert mean_interval([], 0) == {"mean": None, "low": None, "high": None, "n": 0}
    assert mean_interval([0.5] * 3, 0) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 3}


def bounds(found: dict[str, float]) -> list[float]:
    return [round(found[key], 4) for key in ("low", "mean", "high")]


def test_rows_that_agree_leave_room_for_what_was_not_drawn() -> None:
    """0.025 ** (1 / 128) = exp(-3.68888 / 128) = 0.97159, so a share of 0.02841 may be otherwise.

    A grade of 0 to 2 moves twice as far, and so does a difference in both directions.
    """
    none, all_ = [0.0] * 128, [1.0] * 128
    assert bounds(mean_interval(none, 0)) == [0, 0, 0.0284]
    assert bounds(mean_interval(all_, 0)) == [0.9716, 1, 1]
    assert bounds(mean_interval(none, 0, limits=(0, 2))) == [0, 0, 0.0568]
    nearly = [1 + 1e-8] * 128  # a score whose sum was rounded otherwise
    for gaps in (differences(all_, all_), differences(all_, nearly)):
        assert bounds(mean_interval(gaps, 0, limits=(-1, 1))) == [-0.0284, 0, 0.0284]
        assert bounds(mean_interval(gaps, 0, limits=(-2, 2))) == [-0.0568, 0, 0.0568]


def test_the_room_counts_dialogues_not_rows() -> None:
    """Two dialogues: 0.025 ** (1 / 2) = 0.1581."""
    groups = [str(i // 64) for i in range(128)]
    assert bounds(mean_interval([0.0] * 128, 0, groups=groups)) == [0, 0, 0.8419]


def test_one_hit_more_never_lowers_an_end_of_the_interval() -> None:
    """1 of 128: the draws end at 3 / 128 = 0.0234, the room at 0.0078 + 0.0284 * 0.9922 = 0.036."""
    found = [mean_interval([1.0] * hits + [0.0] * (128 - hits), 0) for hits in range(12)]
    assert bounds(found[1]) == [0, 0.0078, 0.036]
    for key in ("low", "high"):
        ends = [x[key] for x in found]
        assert all(b - a > -0.004 for a, b in pairwise(ends)), key  # the draws' own noise


def test_weights_make_a_micro_average() -> None:
    """Two rows with 1 of 3 labels and 1 of 1: (1 + 1) / 4."""
    found = mean_interval([1 / 3, 1.0], 0, weights=[3, 1])
    assert found["mean"] == pytest.approx(0.5) and found["n"] == 4
    assert found["low"] == pytest.approx(1 / 3) and found["high"] == 1.0


def test_rows_of_one_dialogue_are_drawn_together() -> None:
    values = [0.0, 1.0] * 50
    alone = mean_interval(values, 0)
    pairs = mean_interval(values, 0, groups=[str(i // 2) for i in range(100)])
    same = mean_interval(sorted(values), 0, groups=[str(i // 25) for i in range(100)])
    room = (1 - 0.025 ** (1 / 50)) / 2  # the draws agree, but a dialogue may have two hits or none
    assert (pairs["low"], pairs["high"]) == pytest.approx((0.5 - room, 0.5 + room))
    assert same["low"] == 0.0 and same["high"] == 1.0 and alone["low"] > 0.35


def test_a_paired_difference_is_narrower_than_its_sides() -> None:
    first = np.random.default_rng(0).normal(0, 1, 200).tolist()
    second = [value - 0.1 for value in first]
    found = mean_interval(differences(first, second), 0, limits=(-1, 1))
    assert found["mean"] == pytest.approx(0.1) and found["low"] == pytest.approx(0.1)


def test_a_difference_leaves_out_rows_that_one_side_lacks() -> None:
    gaps = differences([1.0, None, 3.0], [0.0, 5.0, None])
    found = mean_interval(gaps, 0, [1, 1, 1], ["a", "b", "c"], (-1, 1))
    assert (found["mean"], found["high"], found["n"]) == (1.0, 1.0, 1)
    assert found["low"] == pytest.approx(1 - 0.975 * 2)  # one dialogue excludes next to nothing


def test_a_row_without_a_value_leaves_the_others_in_their_dialogues() -> None:
    found = mean_interval([None, 0.2, 0.8], 0, groups=["a", "b", "b"])
    assert (found["low"], found["mean"], found["high"]) == (0.5, 0.5, 0.5)


def test_the_area_counts_all_pairs_and_half_the_ties() -> None:
    """Of 2 x 2 pairs 3 > 2, 3 > 1 win, 1 against 1 ties, 1 < 2 loses: 2.5 / 4."""
    assert auc([3, 1], [2, 1]) == 0.625
    assert auc_interval([3, 1], [2, 1], 0)["auc"] == 0.625
    assert auc([], [1]) is None
    assert auc_interval([], [], 0) == {"auc": None, "low": None, "high": None, "n": 0}


def test_an_area_of_one_or_zero_leaves_room_too() -> None:
    """Ten rows: 0.025 ** (2 / 10) = 0.4782 of the pairs are of two rows like those seen."""
    sure, wrong = auc_interval([2] * 10, [1] * 10, 0), auc_interval([1] * 10, [2] * 10, 0)
    assert (sure["auc"], sure["high"], wrong["auc"], wrong["low"]) == (1, 1, 0, 0)
    assert sure["low"] == pytest.approx(0.4782, abs=1e-4) == 1 - wrong["high"]


def test_an_area_of_ties_alone_leaves_room_on_both_sides() -> None:
    """Ten rows: 0.5 is seen in 0.4782 of the pairs at least; the others may win or lose."""
    tied = auc_interval([1] * 10, [1] * 10, 0)
    assert tied["auc"] == 0.5 and tied["low"] == pytest.approx(0.2391, abs=1e-4)
    assert tied["high"] == pytest.approx(1 - 0.2391, abs=1e-4)


def test_the_interval_of_the_area_is_that_of_resampled_rows() -> None:
    random = np.random.default_rng(3)
    high, low = random.normal(1, 1, 40), random.normal(0, 1, 40)
    areas = []
    for _ in range(2000):
        drawn = random.integers(0, 40, 40)
        areas.append(auc(high[drawn], low[drawn]))
    found = auc_interval(high, low, 0)
    assert found["low"] == pytest.approx(np.percentile(areas, 2.5), abs=0.015)
    assert found["high"] == pytest.approx(np.percentile(areas, 97.5), abs=0.015)


def test_every_draw_has_n_rows_and_the_seed_decides() -> None:
    blocks = list(draws(3, 5))
    assert sum(len(block) for block in blocks) == DRAWS
    assert (np.concatenate(blocks).sum(axis=1) == 3).all()
    assert mean_interval([0, 1, 1], 5) == mean_interval([0, 1, 1], 5)


def test_many_rows_are_drawn_in_blocks() -> None:
    assert max(block.size for block in draws(3000, 0)) <= 4_000_000
