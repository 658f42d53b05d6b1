"""Means, intervals and rank correlations against values worked out by hand or known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from zerotuning.statistics import (
    bootstrap_interval,
    mean_and_half_width,
    mean_and_interval,
    nested_bootstrap_interval,
    rank_correlation,
    with_interval,
)


def test_the_half_width_is_students_and_undefined_for_one_value() -> None:
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-6)
    assert math.isnan(mean_and_half_width([5.0])[1])
    with pytest.raises(ValueError, match="empty"):
        mean_and_half_width([])


def test_bootstrap_interval_of_many_normal_values_is_near_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(size=400)
    low, high = bootstrap_interval(values.tolist())
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_nested_interval_counts_groups_not_values() -> None:
    # Two groups of equal values: each resample's mean is 0, 1 or 2, with chances 1/4, 1/2, 1/4, however many values.
    assert nested_bootstrap_interval([[0.0] * 50, [2.0] * 50]) == (0.0, 2.0)
    assert nested_bootstrap_interval([[1.0, 1.0], [1.0, 1.0]]) == (1.0, 1.0)
    assert all(math.isnan(end) for end in nested_bootstrap_interval([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="empty"):
        nested_bootstrap_interval([])


def test_the_mean_of_groups_weights_each_group_equally() -> None:
    assert mean_and_interval([[0.0, 0.0, 0.0], [1.0]])[0] == 0.5
    assert with_interval([[1.0, 1.0]], 1) == "+1.0 [+1.0, +1.0]"
    assert with_interval([[1.0]], 2) == "+1.00"
    assert with_interval([], 2) == ""


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
