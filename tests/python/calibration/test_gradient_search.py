"""The points that a gradient search chooses, on losses whose minimum is known; its saved state."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_losses import (
    HEADS,
    TARGET,
    KnownLosses,
    check_restored_search,
    chosen_point,
    gradient_search,
    run,
    squared_distance,
)
from zerotuning.calibration.folds import ExampleIndices
from zerotuning.calibration.gradient_search import GradientSearch
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.saved_fields import SavedFields
from zerotuning.errors import ZeroTuningError


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

        def loss_and_gradient(self, log_scale: np.ndarray, indices: ExampleIndices) -> tuple[float, np.ndarray]:
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


@pytest.mark.parametrize("combine", ["average", "refit"])
def test_a_search_restored_in_every_round_from_json_finds_the_same(combine: str) -> None:
    options = CalibrationOptions(steps=9, l2_penalties=(0.0, 0.1), average=0.5, patience=4, folds=1, combine=combine)
    held_out = squared_distance(0.7 * TARGET)
    check_restored_search(lambda: gradient_search(KnownLosses(options, squared_distance(TARGET), held_out)))


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
