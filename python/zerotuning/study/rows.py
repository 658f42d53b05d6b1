"""The rows of a study, selected by their keys and summarized for tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from zerotuning.statistics import bootstrap_interval, wilson_interval
from zerotuning.study.experiment import Row


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(values))


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The names of the rows' tasks, each once, in order of appearance."""
    return distinct(row["key"]["task"] for row in rows)


def select(rows: Iterable[Row], **key: Any) -> list[Row]:
    """The rows whose keys have all these values, such as task="sst2"; a key without one of the names does not match."""
    return [row for row in rows if all(name in row["key"] and row["key"][name] == key[name] for name in key)]


def by_task(rows: Sequence[Row]) -> list[list[Row]]:
    """One list of rows for each task."""
    return [select(rows, task=task) for task in tasks_of(rows)]


def figures_by_task(rows: Sequence[Row], name: str, factor: float = 1.0) -> list[list[float]]:
    """A figure of each row, times a factor: one list for each task."""
    return [[factor * row[name] for row in of_task] for of_task in by_task(rows)]


def accuracy_with_interval(correct: Sequence[int]) -> tuple[float, float, float]:
    """Accuracy in per cent and its 95 % interval (mean, low, high).

    Args:
        correct: 1 for each example with the right answer, else 0; of all seeds together.
    """
    low, high = wilson_interval(sum(correct), len(correct))
    return 100 * sum(correct) / len(correct), 100 * low, 100 * high


def paired_gain(pairs: Iterable[tuple[int, int]]) -> tuple[float, float, float]:
    """Gain in accuracy on the same examples, in points, and bootstrap's 95 % interval over examples (mean, low, high).

    Args:
        pairs: (before, after) for each example: 1 for the right answer, else 0.
    """
    gains = [100.0 * (after - before) for before, after in pairs]
    return (float(np.mean(gains)), *bootstrap_interval(gains))
