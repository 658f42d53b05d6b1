"""The study of layers: its figures against the paper's formula in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from study_formula import HEADS, LAYERS, STEP, formula_figures, rows_of
from zerotuning.study import Setting, run_study
from zerotuning.study.layers import third_of
from zerotuning.study.runner import study
from zerotuning.tasks.task import Task


def test_layer_losses_equal_the_formula(setting: Setting) -> None:
    rows = run_study("layers", setting).rows
    task = Task.load("sst2")
    test = setting.with_defaults(study("layers").numbers).tests("sst2", 0)
    initial = [(0, 1)] * len(test)

    def loss(layers: Sequence[int], gamma: float) -> float:
        log_scale = np.zeros((LAYERS, HEADS))
        log_scale[list(layers)] = math.log(gamma)
        return formula_figures(setting, task, test, log_scale, initial)[1]

    for gamma in (0.3, 3.0):
        (row,) = rows_of(rows, measure="layer", layer=0, gamma=gamma)
        assert row["loss"] == pytest.approx(loss([0], gamma), abs=2e-4)
    (row,) = rows_of(rows, measure="third", third="middle", gamma=2.0)
    assert row["loss"] == pytest.approx(loss([1], 2.0), abs=2e-4)  # of two layers none is deep
    (slopes,) = rows_of(rows, measure="slopes")
    for layer in range(LAYERS):
        want = (loss([layer], math.exp(STEP)) - loss([layer], math.exp(-STEP))) / (2 * STEP)
        assert slopes["slopes"][layer] == pytest.approx(want, rel=3e-3, abs=2e-5)


def test_thirds_are_as_even_as_can_be() -> None:
    assert [third_of(layer, 7) for layer in range(7)] == [0, 0, 0, 1, 1, 2, 2]
