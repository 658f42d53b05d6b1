"""The points that a search without gradients chooses, on losses whose minimum is known; its saved state."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from known_losses import (
    SPLIT,
    TARGET,
    KnownLosses,
    check_restored_search,
    chosen_point,
    holdout_search,
    run,
    squared_distance,
)
from zerotuning.calibration.options import CalibrationOptions


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


@pytest.mark.parametrize("method", ["paper", "cma-es"])
def test_a_search_restored_in_every_round_from_json_finds_the_same(method: str) -> None:
    options = CalibrationOptions(method=method, steps=None if method == "paper" else 40)
    held_out = squared_distance(0.7 * TARGET)
    check_restored_search(lambda: holdout_search(KnownLosses(options, squared_distance(TARGET), held_out)))
