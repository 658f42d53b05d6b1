"""The Python interface of the searches in csrc/search: numpy in and out, errors as ValueError, states as JSON."""

import json
import math
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
from zerotuning import _search

TARGET = np.array([0.5, -0.25, 0.75, 0.5, -0.5])


def loss(point: np.ndarray) -> float:
    return float(((point - TARGET) ** 2).sum())


def slope(point: np.ndarray) -> np.ndarray:
    return 2 * (point - TARGET)


def losses(optimizer: _search.Optimizer) -> list[float]:
    return [loss(point) for point in optimizer.ask()]


def run(optimizer: _search.Optimizer) -> _search.Optimizer:
    while not optimizer.finished():
        optimizer.tell(losses(optimizer))
    return optimizer


def make(method: str, **options: Any) -> Any:
    classes: dict[str, Any] = {
        "gradient": _search.GradientStepper,
        "paper": _search.PaperOptimizer,
        "cma-es": _search.CmaEsOptimizer,
    }
    return classes[method](TARGET.size, **options)


def advance(search: Any) -> None:
    """One step, or the losses of one ask()."""
    if isinstance(search, _search.GradientStepper):
        search.step(slope(search.point()))
    else:
        search.tell(losses(search))


OPTIMIZERS = ["paper", "cma-es"]
METHODS = ["gradient", *OPTIMIZERS]


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_every_optimizer_proposes_points_that_improve_on_zero(method: str) -> None:
    optimizer = make(method)
    assert optimizer.finalists() == []
    run(optimizer)
    assert optimizer.method == method
    assert optimizer.dimension == TARGET.size
    assert min(map(loss, optimizer.finalists())) < 0.7 * loss(np.zeros(TARGET.size))
    assert optimizer.ask() == []
    assert 0 < optimizer.steps_done <= optimizer.steps_total


def test_gradient_steps_and_cma_es_find_the_optimum() -> None:
    stepper = make("gradient", steps=200, l2_penalty=0.0)
    assert (stepper.steps_total, stepper.dimension) == (200, TARGET.size)
    while not stepper.finished():
        advance(stepper)
    assert stepper.steps_done == 200
    np.testing.assert_allclose(stepper.point(), TARGET, atol=1e-3)
    np.testing.assert_allclose(run(make("cma-es", evaluations=3000)).finalists()[0], TARGET, atol=1e-4)


def sphere(point: np.ndarray) -> float:
    return float((point**2).sum())


def ellipsoid(point: np.ndarray) -> float:
    return float((10 ** (6 * np.arange(point.size) / (point.size - 1)) * point**2).sum())


def rosenbrock(point: np.ndarray) -> float:
    return float((100 * (point[1:] - point[:-1] ** 2) ** 2 + (1 - point[:-1]) ** 2).sum())


def spent_by_pycma(function: Any, start: np.ndarray, seed: int) -> float:
    """Evaluations that the reference implementation of CMA-ES needs for a loss of 1e-9.

    Infinite if pycma ends in the other minimum of Rosenbrock's function, whose loss is 3.99.
    """
    cma = pytest.importorskip("cma")
    search = cma.CMAEvolutionStrategy(start, 0.5, {"seed": seed + 1, "verbose": -9, "ftarget": 1e-9})
    search.optimize(function)
    return float(search.result.evaluations) if search.result.fbest <= 1e-9 else math.inf


def spent_by_ours(function: Any, start: np.ndarray, seed: int) -> float:
    options: dict[str, Any] = {"evaluations": 40_000, "tolfun": 1e-30, "tolx": 1e-30}
    search = _search.CmaEsOptimizer(start.size, sigma=0.5, seed=seed, start=start, **options)
    spent = 0
    while not search.finished():
        losses = [function(point) for point in search.ask()]
        spent += len(losses)
        if min(losses) <= 1e-9:
            return spent
        search.tell(losses)
    return math.inf


@pytest.mark.parametrize("dimension", [5, 10, 20])
@pytest.mark.parametrize(("function", "start"), [(sphere, 1.0), (ellipsoid, 1.0), (rosenbrock, 0.0)])
def test_cma_es_needs_at_most_half_more_evaluations_than_pycma(function: Any, start: float, dimension: int) -> None:
    first = np.full(dimension, start)
    reference, ours = (
        np.median([spent(function, first, seed) for seed in range(7)]) for spent in (spent_by_pycma, spent_by_ours)
    )
    assert ours <= 1.5 * reference < math.inf


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_points_are_float64_copies_that_the_caller_may_change(method: str) -> None:
    optimizer = make(method)
    point = optimizer.ask()[0]
    assert point.dtype == np.float64
    assert point.shape == (TARGET.size,)
    point[:] = 99
    assert not (optimizer.ask()[0] == 99).any()
    assert run(optimizer).finalists()[0].dtype == np.float64


def test_the_steppers_points_are_copies() -> None:
    stepper = make("gradient", average_decay=0.5)
    for point in (stepper.point(), stepper.averaged_point()):
        assert point.dtype == np.float64
        point[:] = 99
    np.testing.assert_array_equal(stepper.point(), np.zeros(TARGET.size))


@pytest.mark.parametrize("method", METHODS)
def test_a_search_restored_at_every_step_from_json_continues_bit_for_bit(method: str) -> None:
    uninterrupted, restored = make(method), make(method)
    while not uninterrupted.finished():
        state = json.dumps(restored.state(), allow_nan=False)
        restored = make(method)
        restored.restore(json.loads(state))
        advance(restored)
        advance(uninterrupted)
    assert restored.finished()
    assert restored.state() == uninterrupted.state()


def test_a_state_is_readable() -> None:
    stepper = make("gradient", steps=3, l2_penalty=0.25)
    stepper.step(np.zeros(TARGET.size))
    state = stepper.state()
    assert state["format"] == "zerotuning-search 2"
    assert (state["method"], state["dimension"], state["l2_penalty"]) == ("gradient", 5, 0.25)
    assert (state["steps"], state["steps_done"], state["point"]) == (3, 1, [0.0] * 5)


@pytest.mark.parametrize("failed", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_failed_evaluation_is_worse_than_every_loss(method: str, failed: float | None) -> None:
    def run_with_failures(failure: float | None) -> Any:
        optimizer = make(method)
        while not optimizer.finished():
            optimizer.tell([failure if point[0] > 0.3 else loss(point) for point in optimizer.ask()])
            optimizer.restore(json.loads(json.dumps(optimizer.state(), allow_nan=False)))
        return optimizer

    optimizer = run_with_failures(failed)
    expected = run_with_failures(1e30)
    np.testing.assert_array_equal(optimizer.finalists(), expected.finalists())


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_wrong_number_of_losses_is_a_value_error_and_leaves_the_state_unchanged(method: str) -> None:
    optimizer = make(method)
    before, right = optimizer.state(), losses(optimizer)
    for wrong in ([], [*right, 1.0]):
        message = f"losses must have {len(right)} numbers, one for each point of the last ask(), got {len(wrong)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.tell(wrong)
        assert optimizer.state() == before
    optimizer.tell(right)


def test_a_wrong_gradient_is_a_value_error_and_leaves_the_state_unchanged() -> None:
    stepper = make("gradient")
    before = stepper.state()
    for wrong, message in [
        (np.zeros(TARGET.size + 1), "gradient must have 5 numbers, got 6"),
        (np.zeros((1, TARGET.size)), "gradient must be one-dimensional, got 2 dimensions"),
        (np.array([0, 0, math.nan, 0, 0]), r"gradient\[2\] must be finite, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            stepper.step(wrong)
        assert stepper.state() == before


def test_a_gradient_may_be_a_list_or_of_another_float_type() -> None:
    steppers = [make("gradient") for _ in range(2)]
    steppers[0].step([0.5, 0.25, 1.0, 2.0, -1.0])
    steppers[1].step(np.array([0.5, 0.25, 1, 2, -1], dtype=np.float32))
    assert steppers[0].state() == steppers[1].state()


def test_wrong_states_are_value_errors_that_name_the_field() -> None:
    stepper = make("gradient")
    state = stepper.state()
    lacking = {name: value for name, value in state.items() if name != "mean_square"}
    for wrong, message in [
        (lacking, "state: field 'mean_square' is missing"),
        ({**state, "more": 1}, "state: unexpected field 'more'"),
        ({**state, "steps_done": 31}, "state: steps_done: expected an integer from 0 to 30, got 31"),
        ({**state, "steps_done": math.inf}, "expected a value"),
        ({**state, "point": state["point"][1:]}, "state: point: expected a list of 5 numbers, got 4"),
        ({**state, "point": [*state["point"][1:], "far"]}, r"state: point\[4\]: expected a number, got \"far\""),
        ({**state, "format": "zerotuning-search 3"}, 'state: format: expected "zerotuning-search 2"'),
    ]:
        with pytest.raises(ValueError, match=message):
            stepper.restore(wrong)
    with pytest.raises(ValueError, match="this search has 60, the state has 30"):
        make("gradient", steps=60).restore(state)
    with pytest.raises(ValueError, match="this search has paper, the state has gradient"):
        make("paper").restore(state)
    with pytest.raises(ValueError, match="this search has 3, the state has 5"):
        _search.GradientStepper(3).restore(state)
    with pytest.raises(TypeError):
        stepper.restore("text")
    assert stepper.state() == state


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradient", {"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1"),
        ("gradient", {"epsilon": 0.0}, "epsilon must be positive and finite, got 0"),
        ("gradient", {"schedule": "linear"}, "schedule must be 'constant' or 'cosine', got 'linear'"),
        ("gradient", {"start": [0.0]}, "start must be empty or 5 numbers long, got 1"),
        ("gradient", {"start": [0.0, 0.0, 0.0, 0.0, 9.0]}, "start must be within max_abs_log_scale = 4 of 0"),
        ("paper", {"sweep": []}, "sweep must be a list of at least one gamma"),
        ("cma-es", {"evaluations": 3}, "evaluations must be at least the population, 8, got 3"),
    ],
)
def test_options_out_of_range_are_value_errors_that_name_them(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(method, **options)


def test_options_are_passed_by_name_and_shown_with_their_defaults() -> None:
    with pytest.raises(TypeError):
        _search.GradientStepper(5, 30)  # type: ignore[misc]
    signature = str(_search.GradientStepper.__init__.__doc__)
    assert "= 30" in signature
    assert "schedule: str = 'cosine'" in signature


def test_the_papers_profile_and_group_are_shown() -> None:
    optimizer = _search.PaperOptimizer(TARGET.size)
    assert np.isnan(optimizer.profile()).all()
    assert optimizer.direction() == "none"
    run(optimizer)
    step = math.log(1.5)
    np.testing.assert_allclose(optimizer.profile(), 2 * step * TARGET - step**2, atol=1e-12)
    assert optimizer.direction() == "up"
    assert optimizer.group() == [0, 2, 3]
    assert optimizer.sweep_losses().shape == (12,)


def test_other_threads_run_while_a_search_computes() -> None:
    # A generation in 200 dimensions with an eigendecomposition takes tens of milliseconds.
    optimizer = _search.CmaEsOptimizer(200, population=400, evaluations=4000)
    losses = [float(i) for i in range(len(optimizer.ask()))]
    finished = threading.Event()

    def tell() -> None:
        optimizer.tell(losses)
        finished.set()

    thread = threading.Thread(target=tell)
    turns = 0
    thread.start()
    while not finished.is_set():
        turns += 1
        time.sleep(0.0005)
    thread.join()
    assert turns > 5, turns


def test_a_gradient_below_epsilon_makes_a_step_shorter_than_the_learning_rate() -> None:
    slopes = np.array([1.0, 1e-3, 1e-6])
    stepper = _search.GradientStepper(3, steps=2, learning_rate=0.1, epsilon=1e-3, l2_penalty=0.0)
    stepper.step(slopes)
    np.testing.assert_allclose(stepper.point(), -0.1 * slopes / (slopes + 1e-3), rtol=1e-12)
