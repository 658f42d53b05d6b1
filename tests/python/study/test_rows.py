"""The selection of a study's rows, and their accuracies and gains by hand."""

from __future__ import annotations

import pytest
from zerotuning.statistics import wilson_interval
from zerotuning.study.rows import accuracy_with_interval, by_task, figures_by_task, paired_gain, select

ROWS = [
    {"key": {"task": "b", "seed": 0, "gamma": 1.0}, "loss": 0.5},
    {"key": {"task": "a", "seed": 0}, "loss": 0.25},
    {"key": {"task": "b", "seed": 1, "gamma": 2.0}, "loss": 0.75},
]


def test_rows_are_selected_by_all_values_and_a_missing_name_does_not_match() -> None:
    assert select(ROWS, task="b", gamma=2.0) == [ROWS[2]]
    assert select(ROWS, gamma=None) == []
    assert select(ROWS) == ROWS


def test_rows_are_grouped_by_task_in_order_of_appearance() -> None:
    assert by_task(ROWS) == [[ROWS[0], ROWS[2]], [ROWS[1]]]
    assert figures_by_task(ROWS, "loss", 100.0) == [[50.0, 75.0], [25.0]]


def test_accuracies_and_gains_are_in_per_cent() -> None:
    low, high = wilson_interval(3, 4)
    assert accuracy_with_interval([1, 1, 0, 1]) == pytest.approx((75.0, 100 * low, 100 * high))
    mean, low, high = paired_gain([(0, 1), (1, 1), (0, 0), (1, 0), (0, 1)])
    assert mean == pytest.approx(20.0)
    assert low < mean < high
