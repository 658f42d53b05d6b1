"""The points that the two searches choose, on losses whose minimum is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from zerotuning.calibration.acceptance import AcceptanceTest
from zerotuning.calibration.folds import Places, Split
from zerotuning.calibration.gradient_search import GradientSearch
from zerotuning.calibration.holdout_search import HoldoutSearch
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.saved_fields import SavedFields
from zerotuning.errors import ZeroTuningError

HEADS = 4
TARGET = np.array([0.5, -1.0, 0.75, 0.25])
#: Two examples: the first drives a search, the second is held out.
SPLIT = Split(0, [[0]], [[1]])
ALL_EXAMPLES = [[0, 1]]

Loss = Callable[[np.ndarray], float]


def squared_distance(target: np.ndarray) -> Loss:
    return lambda point: float(((point - target) ** 2).sum())


class KnownLosses:
    """A CalibrationObjective whose loss is a known function of log γ, one for the fit example and one for the held-out one."""

    def __init__(
        self, options: CalibrationOptions, fit: Loss, held_out: Loss, slope_target: np.ndarray = TARGET
    ) -> None:
        self.options, self.of_example, self.slope_target = options, (fit, held_out), slope_target
        self.scored: list[tuple[np.ndarray, Places]] = []

    def scores(self, log_scale: np.ndarray, places: Places) -> list[Tensor]:
        self.scored.append((log_scale, places))
        return [torch.tensor([[self.of_example[i](log_scale)] for i in part], dtype=torch.float64) for part in places]

    def loss_of(self, scores: Sequence[Tensor], places: Places) -> float:
        return float(scores[0].mean())

    def accuracy_of(self, scores: Sequence[Tensor], places: Places) -> None:
        return None

    def losses(self, points: Sequence[np.ndarray], places: Places) -> list[float]:
        return [self.loss_of(self.scores(point, places), places) for point in points]

    def loss_and_gradient(self, log_scale: np.ndarray, places: Places) -> tuple[float, np.ndarray]:
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


def test_the_earlier_point_is_chosen_when_the_held_out_examples_get_worse() -> None:
    held_out = squared_distance(0.4 * TARGET)
    options = CalibrationOptions(steps=100, learning_rate=0.05, patience=6, folds=1)
    search = run(gradient_search(KnownLosses(options, squared_distance(TARGET), held_out)))
    assert search.steps_done < 100
    assert held_out(chosen_point(search)) == search.least_loss < held_out(TARGET)
    assert search.result().chosen["step"] < search.steps_done


def test_gamma_one_is_kept_when_nothing_beats_it_on_the_held_out_examples() -> None:
    options = CalibrationOptions(steps=50, patience=5, folds=1)
    harmful = KnownLosses(options, squared_distance(TARGET), lambda x: 0.5 + float(np.abs(x).sum()))
    search = run(gradient_search(harmful))
    assert search.result().point is None
    assert search.least_loss == 0.5
    assert len([entry for entry in search.history if "held_out_loss" in entry]) == 6  # γ = 1, and five that are worse


def test_held_out_examples_are_scored_only_when_due_and_after_the_last_step() -> None:
    options = CalibrationOptions(steps=81, folds=1)
    search = run(gradient_search(KnownLosses(options, squared_distance(TARGET), squared_distance(TARGET))))
    judged = [entry["step"] for entry in search.history if "held_out_loss" in entry]
    assert judged == [*range(0, 81, 4), 81]
    assert [entry["step"] for entry in search.history if "fit_loss" in entry] == list(range(81))


def test_a_bad_start_is_compared_with_gamma_one_and_may_improve() -> None:
    target = np.full(HEADS, 0.1)
    options = CalibrationOptions(steps=40, patience=3, folds=1)
    known = KnownLosses(options, squared_distance(target), squared_distance(target), slope_target=target)
    search = run(gradient_search(known, start=np.array([3.0, -3.0, 3.0, -3.0])))
    assert search.steps_done == 40
    assert search.history[0]["zero_held_out_loss"] == squared_distance(target)(np.zeros(HEADS))
    assert search.least_loss <= search.history[0]["zero_held_out_loss"] < search.history[0]["held_out_loss"]


@pytest.mark.parametrize("combine", ["average", "refit"])
def test_a_start_that_no_step_improves_is_chosen_itself(combine: str) -> None:
    start = 0.5 * TARGET
    options = CalibrationOptions(steps=5, folds=1, combine=combine)
    known = KnownLosses(options, squared_distance(TARGET), squared_distance(start), slope_target=-TARGET)
    search = run(gradient_search(known, start=start))
    np.testing.assert_array_equal(chosen_point(search), start)
    assert search.result().chosen["combine"] == "average"


def test_the_moving_average_of_the_points_is_a_candidate_too() -> None:
    class Swinging(KnownLosses):
        """A loss whose gradient changes sign at 0.5, so that the points oscillate about 0.5."""

        def loss_and_gradient(self, log_scale: np.ndarray, places: Places) -> tuple[float, np.ndarray]:
            return 0.0, np.where(log_scale >= 0.5, 1.0, -1.0)

    def least_loss(average: float) -> tuple[float, str]:
        options = CalibrationOptions(steps=20, learning_rate=0.4, average=average, folds=1)
        swinging = Swinging(options, lambda x: 0.0, lambda x: float(np.abs(x - 0.5).sum()))
        search = run(gradient_search(swinging))
        return search.least_loss, search.result().chosen["kind"]

    loss, kind = least_loss(0.7)
    assert kind == "averaged"
    assert loss < 0.5 * least_loss(0.0)[0]


def test_the_held_out_loss_chooses_the_penalty() -> None:
    # The minimum of |x - TARGET|² + p/2 |x|² is at TARGET · 2 / (2 + p): half of TARGET for p = 2.
    options = CalibrationOptions(steps=200, l2_penalties=(0.0, 2.0, 8.0), folds=1)
    search = run(gradient_search(KnownLosses(options, squared_distance(TARGET), squared_distance(0.5 * TARGET))))
    late = [entry for entry in search.history if entry["step"] == 200]
    assert min(late, key=lambda entry: entry["held_out_loss"])["penalty"] == 2.0
    np.testing.assert_allclose(chosen_point(search), 0.5 * TARGET, atol=0.1)


def test_losses_and_slopes_that_are_not_finite_are_one_clear_error() -> None:
    options = CalibrationOptions(steps=5, folds=1)
    broken = KnownLosses(options, lambda x: math.inf, squared_distance(TARGET))
    with pytest.raises(ZeroTuningError, match="the model's loss must be finite, got inf"):
        run(gradient_search(broken))
    broken = KnownLosses(options, lambda x: 0.0, squared_distance(TARGET), slope_target=np.full(HEADS, math.nan))
    with pytest.raises(ZeroTuningError, match=r"the gradient .* cannot be used: gradient\[0\] must be finite, got nan"):
        run(gradient_search(broken))


@pytest.mark.parametrize("method", ["paper", "cma-es"])
def test_the_finalist_with_the_least_held_out_loss_is_chosen(method: str) -> None:
    options = CalibrationOptions(method=method, steps=None if method == "paper" else 400)
    known = KnownLosses(options, squared_distance(TARGET), squared_distance(0.9 * TARGET))
    search = run(holdout_search(known))
    point = chosen_point(search)
    assert search.least_loss == squared_distance(0.9 * TARGET)(point) < search.baseline_loss
    assert search.steps_done <= search.steps_total
    # Only γ = 1 and one or two finalists are scored on the held-out examples.
    assert len([places for _, places in known.scored if places == SPLIT.held_out]) <= 3


@pytest.mark.parametrize("method", ["paper", "cma-es"])
def test_gamma_one_is_kept_when_every_finalist_is_worse_on_the_held_out_examples(method: str) -> None:
    options = CalibrationOptions(method=method, steps=None if method == "paper" else 100)
    overfit = KnownLosses(options, squared_distance(TARGET), lambda x: 2.0 + float(np.abs(x).sum()))
    search = run(holdout_search(overfit))
    assert search.result().point is None
    assert search.least_loss == search.baseline_loss == 2.0


def test_a_search_that_is_stopped_early_proposes_what_it_found_so_far() -> None:
    options = CalibrationOptions(method="cma-es", steps=400)
    search = holdout_search(KnownLosses(options, squared_distance(TARGET), squared_distance(TARGET)))
    for _ in range(10):
        search.advance()
    search.stop()
    assert search.finished
    assert search.least_loss == squared_distance(TARGET)(chosen_point(search)) < search.baseline_loss
    profiling = holdout_search(KnownLosses(CalibrationOptions(method="paper"), squared_distance(TARGET), len))
    profiling.stop()
    assert profiling.result().point is None


def test_failed_evaluations_are_left_out_of_the_history_and_of_the_profile() -> None:
    def fails_for_the_first_head(point: np.ndarray) -> float:
        return math.inf if point[0] > 0 else squared_distance(TARGET)(point)

    options = CalibrationOptions(method="paper")
    search = run(holdout_search(KnownLosses(options, fails_for_the_first_head, squared_distance(TARGET))))
    assert search.profile is not None
    assert search.profile["effect"][0] is None
    json.dumps([search.history, search.profile, search.state()], allow_nan=False)


@pytest.mark.parametrize("method", ["gradient", "refit", "paper", "cma-es"])
def test_a_search_restored_in_every_round_from_json_finds_the_same(method: str) -> None:
    def make() -> Any:
        held_out = squared_distance(0.7 * TARGET)
        if method in ("paper", "cma-es"):
            options = CalibrationOptions(method=method, steps=None if method == "paper" else 40)
            return holdout_search(KnownLosses(options, squared_distance(TARGET), held_out))
        combine = "refit" if method == "refit" else "average"
        options = CalibrationOptions(
            steps=9, l2_penalties=(0.0, 0.1), average=0.5, patience=4, folds=1, combine=combine
        )
        return gradient_search(KnownLosses(options, squared_distance(TARGET), held_out))

    whole, resumed = run(make()), make()
    while not resumed.finished:
        resumed.advance()
        state = json.loads(json.dumps(resumed.state(), allow_nan=False))
        resumed = make()
        resumed.restore(SavedFields(state, "search"))
    np.testing.assert_array_equal(chosen_point(resumed), chosen_point(whole))
    assert resumed.result().chosen == whole.result().chosen
    assert (resumed.history, resumed.state()) == (whole.history, whole.state())


def test_a_damaged_state_is_an_error_that_names_the_field() -> None:
    options = CalibrationOptions(steps=9, folds=1)

    def make() -> GradientSearch:
        return gradient_search(KnownLosses(options, squared_distance(TARGET), squared_distance(TARGET)))

    search = make()
    for _ in range(4):
        search.advance()
    good = search.state()
    one = good["searches"][0]
    stepper = {**one["steppers"][0], "steps_done": 10}
    lacking = {name: value for name, value in one.items() if name != "patience"}
    for wrong, message in [
        ({**good, "round": math.inf}, r"search\.round must be an integer from 0 to 10, got inf"),
        ({**good, "searches": []}, r"search\.searches must be a list of 1, got a list of 0"),
        ({**good, "searches": [lacking]}, r"search\.searches\[0\]\.patience is missing"),
        (
            {**good, "searches": [{**one, "steppers": [stepper]}]},
            r"search\.searches\[0\]\.steppers\[0\]: state: steps_done: expected an integer from 0 to 9, got 10",
        ),
        ({**good, "searches": [{**one, "history": [1]}]}, r"history\[0\] must be a JSON object, got 1"),
        (
            {**good, "best": {**good["best"], "points": [[0.0]]}},
            r"best\.points\[0\] must be a list of 4 finite numbers",
        ),
        ({**good, "refit_is_out_of_time": 0}, r"search\.refit_is_out_of_time must be true or false, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make().restore(SavedFields(wrong, "search"))
