"""The study of heads: its figures against the paper's formula in float64, and its comparisons of slopes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from study_formula import HEADS, LAYERS, formula_figures, rows_of
from zerotuning.study import Setting, run_study
from zerotuning.study.heads import agreement, checked_heads, group_directions, other_wordings, pairs
from zerotuning.study.runner import study
from zerotuning.tasks.task import Task


def test_each_group_of_heads_gets_the_gamma_of_its_direction(setting: Setting) -> None:
    rows = run_study("heads", setting).rows
    task = Task.load("sst2")
    validation = setting.with_defaults(study("heads").numbers).drawn("sst2", 0)
    initial = [(0, 1)] * len(validation)
    slopes = np.array(rows_of(rows, measure="slopes", wording=0)[0]["slopes"])
    log_scale = np.where(slopes < 0, math.log(2), -math.log(2))
    (row,) = rows_of(rows, group="up and down")
    measured = next(found for found in row["validation"] if found["gamma"] == 2.0)
    assert measured["loss"] == pytest.approx(
        formula_figures(setting, task, validation, log_scale, initial)[1], abs=2e-4
    )
    assert {row["key"]["wording"] for row in rows_of(rows, measure="slopes")} == {0, 1, 2}
    check = rows_of(rows, measure="check")[0]
    log_scale = np.zeros((LAYERS, HEADS))
    log_scale[check["key"]["layer"], check["key"]["head"]] = 0.5
    assert check["high"] == pytest.approx(formula_figures(setting, task, validation, log_scale, initial)[1], abs=2e-4)


def test_checked_heads_and_groups_match_their_names() -> None:
    assert checked_heads((2, 3), 2) == [(0, 0), (1, 2)]
    assert len(checked_heads((2, 3), 99)) == 6
    slopes = np.array([[-1.0, 2.0, 0.0]])
    assert group_directions(slopes, "up").tolist() == [[1, 0, 0]]
    assert group_directions(slopes, "down").tolist() == [[0, 1, 0]]
    assert group_directions(slopes, "up and down").tolist() == [[1, -1, 0]]


def test_stability_compares_maps_that_differ_in_one_thing_only() -> None:
    def row(task: str, seed: int, wording: int, slopes: list[float]) -> dict[str, Any]:
        return {"key": {"measure": "slopes", "task": task, "seed": seed, "wording": wording}, "slopes": [slopes]}

    rows = [
        row("a", 0, 0, [1, 2, 3]),
        row("a", 1, 0, [1, 2, 4]),
        row("b", 0, 0, [-3, -2, -1]),
        row("a", 0, 1, [3, 2, -1]),
    ]
    assert pairs(rows, "seed") == [pytest.approx((1.0, 1.0))]
    assert pairs(rows, "task") == [pytest.approx((1.0, 0.0))]
    assert pairs(rows, "wording") == [pytest.approx((-1.0, 2 / 3))]
    assert agreement(np.array([[1.0, -1.0]]), np.array([[2.0, 3.0]]))[1] == 0.5


@pytest.mark.parametrize("name", ["sst2", "mr", "trec"])
def test_other_wordings_keep_the_labels_and_name_them_all(name: str) -> None:
    task = Task.load(name)
    others = other_wordings(task)
    assert len({task.prompt, *(other.prompt for other in others)}) == 3
    for other in others:
        assert other.labels == task.labels
        assert other.fields == task.fields
        assert all(label.strip().lower() in other.prompt.lower() for label in task.labels)
