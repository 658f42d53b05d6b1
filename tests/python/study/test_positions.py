"""The study of positions: its figures against the paper's formula in float64, and its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from study_formula import HEADS, LAYERS, STEP, ends, formula_figures, rows_of
from zerotuning.study import Setting, run_study
from zerotuning.study.positions import step_down, table
from zerotuning.study.runner import study
from zerotuning.tasks.task import Task


@pytest.mark.parametrize("position", ["initial", "token 4", "middle", "last"])
def test_figures_of_a_position_equal_the_formula(setting: Setting, position: str) -> None:
    (row,) = rows_of(run_study("positions", setting).rows, position=position)
    task = Task.load("sst2")
    complete = setting.with_defaults(study("positions").numbers)
    validation, test = complete.drawn("sst2", 0), complete.tests("sst2", 0)

    def spans(records: Sequence[Any]) -> list[tuple[int, int]]:
        places = [
            {"initial": 0, "token 4": 4, "middle": n // 2, "last": n - 1}[position]
            for n in ends(setting, task, records)
        ]
        return [(place, place + 1) for place in places]

    for found in row["validation"]:
        want = formula_figures(setting, task, validation, math.log(found["gamma"]), spans(validation))
        assert (found["accuracy"], found["loss"]) == pytest.approx(want, abs=2e-4)
    untuned = formula_figures(setting, task, test, 0.0, spans(test))
    shared = formula_figures(setting, task, test, math.log(row["gamma"]), spans(test))
    assert row["accuracy_gain"] == pytest.approx(shared[0] - untuned[0], abs=1e-9)
    assert row["loss_gain"] == pytest.approx(untuned[1] - shared[1], abs=2e-4)
    slopes = np.zeros((LAYERS, HEADS))
    for place in np.ndindex(LAYERS, HEADS):
        losses = []
        for step in (-STEP, STEP):
            log_scale = np.zeros((LAYERS, HEADS))
            log_scale[place] = step
            losses.append(formula_figures(setting, task, validation, log_scale, spans(validation))[1])
        slopes[place] = (losses[1] - losses[0]) / (2 * STEP)
    assert row["slope_norm"] == pytest.approx(np.linalg.norm(slopes), rel=3e-3, abs=2e-5)
    by_head = formula_figures(setting, task, test, step_down(slopes), spans(test))
    assert row["by_head_loss_gain"] == pytest.approx(untuned[1] - by_head[1], abs=5e-4)


def position_row(task: str, seed: int, position: str, gain: float) -> dict[str, Any]:
    key = {"task": task, "seed": seed, "position": position}
    gains = dict.fromkeys(("accuracy_gain", "loss_gain", "by_head_accuracy_gain", "by_head_loss_gain"), gain)
    return {"key": key, "slope_norm": 1.0, **gains}


def test_the_positions_table_shows_where_the_initial_token_leads_and_where_not() -> None:
    rows = []
    for place, task in enumerate(("a", "b", "c")):
        for seed in range(3):
            base = 0.1 * place + 0.01 * seed
            rows.append(position_row(task, seed, "initial", base))
            rows.append(position_row(task, seed, "token 1", base - 0.1))
            rows.append(position_row(task, seed, "token 4", base + 0.1))
            rows.append(position_row(task, seed, "last", base + 0.1 * (seed - 1)))
    text = table(rows)
    assert "ahead of token 1; behind token 4; not told apart from last" in text
    assert "| token 1 | 9 | +1.0" in text  # mean of the base, 11 points, less 10
    assert "+10.0 [+10.0, +10.0]" in text
    one_draw = table([row for row in rows if row["key"]["seed"] == 0])
    assert "no finding" in one_draw
    assert "ahead" not in one_draw


def test_the_gradient_step_has_a_fixed_length_and_descends() -> None:
    slopes = np.array([[3.0, -4.0], [0.0, 0.0]])
    step = step_down(slopes)
    assert np.sqrt(np.mean(step**2)) == pytest.approx(0.3)
    np.testing.assert_allclose(step, step_down(1e-3 * slopes))
    assert step[0, 0] < 0 < step[0, 1]
    assert np.abs(step_down(np.eye(20))).max() == 1.0
    assert not step_down(np.zeros((2, 2))).any()
