"""Means with 95 % intervals, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Two-sided 95 % quantiles of Student's t for 1 to 15 degrees of freedom; beyond, the normal distribution's is used.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Z95 = 1.959963984540054


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927).

    Args:
        right: Successes.
        total: Trials.

    Returns:
        (low, high), in [0, 1].
    """
    share, square = right / total, Z95 * Z95 / total
    middle = (share + square / 2) / (1 + square)
    half = Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return middle - half, middle + half


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval by Student's t; the half is NaN for a single value.

    Raises:
        ValueError: There are no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("values must not be empty")
    if array.size == 1:
        return float(array[0]), math.nan
    freedom = array.size - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else Z95
    return float(array.mean()), float(quantile * array.std(ddof=1) / math.sqrt(array.size))


def bootstrap_interval(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval (low, high) of the mean, by the bootstrap (Efron 1979).

    Args:
        values: The sample.
        draws: How many resamples.
        seed: Of the resamples.
    """
    array = np.asarray(values, dtype=np.float64)
    places = np.random.default_rng(seed).integers(0, array.size, (draws, array.size))
    low, high = np.quantile(array[places].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def nested_bootstrap_interval(
    groups: Sequence[Sequence[float]], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval (low, high) of the mean of the groups' means, for values that depend on their group.

    A draw resamples groups, then the values within each group (Davison and Hinkley 1997, section 3.8). An example are
    the seeds of several tasks.

    Args:
        groups: The values of each group.
        draws: How many resamples.
        seed: Of the resamples.

    Returns:
        (low, high); NaN where no group has two values.

    Raises:
        ValueError: There are no groups, or a group has no values.
    """
    generator = np.random.default_rng(seed)
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("groups must not be empty")
    if all(array.size == 1 for array in arrays):
        return math.nan, math.nan
    means = np.stack([array[generator.integers(0, array.size, (draws, array.size))].mean(axis=1) for array in arrays])
    places = generator.integers(0, len(arrays), (draws, len(arrays)))
    low, high = np.quantile(means[places, np.arange(draws)[:, None]].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one sequence is constant. Equal values share their mean rank."""
    one, other = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def mean_and_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(mean of the groups' means, low, high), with the interval of `nested_bootstrap_interval`."""
    low, high = nested_bootstrap_interval(groups)
    return float(np.mean([np.mean(group) for group in groups])), low, high


def with_interval(groups: Sequence[Sequence[float]], digits: int) -> str:
    """`mean_and_interval` as text, such as "+1.2 [-0.3, +2.4]".

    Args:
        groups: The values of each group.
        digits: After the point.

    Returns:
        The text; only the mean where there is no interval, and "" for no groups.
    """
    if not groups:
        return ""
    mean, low, high = mean_and_interval(groups)
    interval = "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:+.{digits}f}{interval}"
