"""Searches on losses that are known functions of log γ, and the comparison of a search with its resumption."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from zerotuning.calibration.acceptance import AcceptanceTest
from zerotuning.calibration.folds import ExampleIndices, Split
from zerotuning.calibration.gradient_search import GradientSearch
from zerotuning.calibration.holdout_search import HoldoutSearch
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.saved_fields import SavedFields

HEADS = 4
TARGET = np.array([0.5, -1.0, 0.75, 0.25])
#: Two examples: the first drives a search, the second is held out.
SPLIT = Split(0, [[0]], [[1]])
ALL_EXAMPLES = [[0, 1]]

Loss = Callable[[np.ndarray], float]


def squared_distance(target: np.ndarray) -> Loss:
    return lambda point: float(((point - target) ** 2).sum())


class KnownLosses:
    """A CalibrationObjective whose loss is a known function of log γ for the fit and for the held-out example."""

    def __init__(
        self, options: CalibrationOptions, fit: Loss, held_out: Loss, slope_target: np.ndarray = TARGET
    ) -> None:
        self.options, self.of_example, self.slope_target = options, (fit, held_out), slope_target
        self.scored: list[tuple[np.ndarray, ExampleIndices]] = []

    def scores(self, log_scale: np.ndarray, indices: ExampleIndices) -> list[Tensor]:
        self.scored.append((log_scale, indices))
        return [torch.tensor([[self.of_example[i](log_scale)] for i in part], dtype=torch.float64) for part in indices]

    def loss_of(self, scores: Sequence[Tensor], indices: ExampleIndices) -> float:
        return float(scores[0].mean())

    def accuracy_of(self, scores: Sequence[Tensor], indices: ExampleIndices) -> None:
        return None

    def losses(self, points: Sequence[np.ndarray], indices: ExampleIndices) -> list[float]:
        return [self.loss_of(self.scores(point, indices), indices) for point in points]

    def loss_and_gradient(self, log_scale: np.ndarray, indices: ExampleIndices) -> tuple[float, np.ndarray]:
        return self.of_example[0](log_scale), 2 * (log_scale - self.slope_target)


def gradient_search(
    known: KnownLosses, start: np.ndarray | None = None, splits: Sequence[Split] = (SPLIT,)
) -> GradientSearch:
    objective = cast(CalibrationObjective, known)
    parameterization = ScaleParameterization(1, HEADS, start=None if start is None else start[None])
    acceptance = AcceptanceTest(objective, parameterization, ALL_EXAMPLES, splits)
    return GradientSearch(objective, parameterization, known.options, splits, ALL_EXAMPLES, acceptance)


def holdout_search(known: KnownLosses) -> HoldoutSearch:
    return HoldoutSearch(cast(CalibrationObjective, known), ScaleParameterization(1, HEADS), known.options, [SPLIT])


def run(search: Any) -> Any:
    while not search.finished:
        search.advance()
    return search


def chosen_point(search: Any) -> np.ndarray:
    point = search.result().point
    assert point is not None
    return cast(np.ndarray, point)


def check_restored_search(make: Callable[[], Any]) -> None:
    """Save and restore a search in every round, and compare it with an uninterrupted one."""
    whole, resumed = run(make()), make()
    while not resumed.finished:
        resumed.advance()
        state = json.loads(json.dumps(resumed.state(), allow_nan=False))
        resumed = make()
        resumed.restore(SavedFields(state, "search"))
    np.testing.assert_array_equal(chosen_point(resumed), chosen_point(whole))
    assert resumed.result().chosen == whole.result().chosen
    assert (resumed.history, resumed.state()) == (whole.history, whole.state())
