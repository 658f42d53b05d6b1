"""The searches as Python sees them: numpy in and out, errors as ValueError, states as text."""

import math
import threading
import time
from typing import Any

import numpy as np
import pytest
from zerotuning import _search

TARGET = np.array([0.5, -0.25, 0.75, 0.5, -0.5])


def loss(point: np.ndarray) -> float:
    return float(((point - TARGET) ** 2).sum())


def answers(optimizer: _search.Optimizer) -> list[tuple[float, np.ndarray | None]]:
    return [
        (loss(wanted.point), 2 * (wanted.point - TARGET) if wanted.gradient else None) for wanted in optimizer.ask()
    ]


def run(optimizer: _search.Optimizer) -> _search.Optimizer:
    while not optimizer.finished():
        optimizer.tell(answers(optimizer))
    return optimizer


def make(method: str, **options: Any) -> _search.Optimizer:
    classes: dict[str, Any] = {
        "gradient": _search.GradientOptimizer,
        "paper": _search.PaperOptimizer,
        "cma-es": _search.CmaEsOptimizer,
    }
    return classes[method](TARGET.size, **options)


METHODS = ["gradient", "paper", "cma-es"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_improves_on_zero(method: str) -> None:
    optimizer = run(make(method))
    assert optimizer.method == method
    assert optimizer.dimension == TARGET.size
    assert optimizer.baseline_loss() == pytest.approx(loss(np.zeros(TARGET.size)))
    assert optimizer.best_loss() < 0.7 * optimizer.baseline_loss()
    assert optimizer.best_loss() == pytest.approx(loss(optimizer.best()))
    assert optimizer.ask() == []
    assert 0 < optimizer.steps_done() <= optimizer.steps_total()


def test_gradient_and_cma_es_find_the_optimum() -> None:
    gradient = run(make("gradient", steps=200, penalty=0.0, patience=0))
    np.testing.assert_allclose(gradient.best(), TARGET, atol=1e-3)
    cma_es = run(make("cma-es", evaluations=3000))
    np.testing.assert_allclose(cma_es.best(), TARGET, atol=1e-4)


def sphere(point: np.ndarray) -> float:
    return float((point**2).sum())


def ellipsoid(point: np.ndarray) -> float:
    return float((10 ** (6 * np.arange(point.size) / (point.size - 1)) * point**2).sum())


def rosenbrock(point: np.ndarray) -> float:
    return float((100 * (point[1:] - point[:-1] ** 2) ** 2 + (1 - point[:-1]) ** 2).sum())


def spent_by_pycma(function: Any, start: np.ndarray, seed: int) -> float:
    """Evaluations that the reference implementation of CMA-ES needs for a loss of 1e-9; inf where it ends in
    Rosenbrock's other valley, at 3.99."""
    cma = pytest.importorskip("cma")
    search = cma.CMAEvolutionStrategy(start, 0.5, {"seed": seed + 1, "verbose": -9, "ftarget": 1e-9})
    search.optimize(function)
    return float(search.result.evaluations) if search.result.fbest <= 1e-9 else math.inf


def spent_by_ours(function: Any, start: np.ndarray, seed: int) -> float:
    options = {"evaluations": 40_000, "tolfun": 1e-30, "tolx": 1e-30, "held_out": False}
    search = _search.CmaEsOptimizer(start.size, sigma=0.5, seed=seed, start=start, **options)
    spent = 0
    while not search.finished():
        losses = [function(wanted.point) for wanted in search.ask()]
        spent += len(losses)
        if min(losses) <= 1e-9:
            return spent
        search.tell([(loss, None) for loss in losses])
    return math.inf


@pytest.mark.parametrize("dimension", [5, 10, 20])
@pytest.mark.parametrize(("function", "start"), [(sphere, 1.0), (ellipsoid, 1.0), (rosenbrock, 0.0)])
def test_cma_es_needs_at_most_half_more_evaluations_than_pycma(function: Any, start: float, dimension: int) -> None:
    first = np.full(dimension, start)
    reference, ours = (
        np.median([spent(function, first, seed) for seed in range(7)]) for spent in (spent_by_pycma, spent_by_ours)
    )
    assert ours <= 1.5 * reference < math.inf


@pytest.mark.parametrize("method", METHODS)
def test_points_are_float64_vectors_that_the_caller_owns(method: str) -> None:
    optimizer = make(method)
    wanted = optimizer.ask()[0]
    assert wanted.part in ("fit", "held_out")
    assert wanted.point.dtype == np.float64
    assert wanted.point.shape == (TARGET.size,)
    wanted.point[:] = 99
    assert not (optimizer.ask()[0].point == 99).any()
    assert optimizer.best().dtype == np.float64


@pytest.mark.parametrize("method", METHODS)
def test_a_search_restored_at_every_ask_continues_bit_for_bit(method: str) -> None:
    uninterrupted, restored = make(method), make(method)
    while not uninterrupted.finished():
        state = restored.state()
        restored = make(method)
        restored.restore(state)
        restored.tell(answers(restored))
        uninterrupted.tell(answers(uninterrupted))
    assert restored.finished()
    assert restored.state() == uninterrupted.state()
    np.testing.assert_array_equal(restored.best(), uninterrupted.best())


@pytest.mark.parametrize("method", METHODS)
def test_wrong_outcomes_are_value_errors_and_change_nothing(method: str) -> None:
    optimizer = make(method)
    before = optimizer.state()
    right = answers(optimizer)
    gradient = np.zeros(TARGET.size + 1)
    for wrong, message in [
        ([], f"outcomes must be {len(right)}, one for each evaluation asked for, got 0"),
        ([(math.nan, right[0][1]), *right[1:]], r"outcomes\[0\].loss \(fit\) must be finite, got nan"),
        ([(1.0, gradient), *right[1:]], r"outcomes\[0\].gradient must have"),
        ([(1.0, gradient[None]), *right[1:]], "must be one-dimensional, got 2 dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.tell(wrong)
        assert optimizer.state() == before
    optimizer.tell(right)


def test_a_gradient_may_be_a_list_or_of_another_float_type() -> None:
    optimizers = [make("gradient") for _ in range(2)]
    optimizers[0].tell([(1.0, [0.5, 0.25, 1.0, 2.0, -1.0]), (1.0, None)])
    optimizers[1].tell([(1, np.array([0.5, 0.25, 1, 2, -1], dtype=np.float32)), (1, None)])
    assert optimizers[0].state() == optimizers[1].state()


def test_wrong_states_are_value_errors_that_say_what_differs() -> None:
    optimizer = make("gradient")
    state = optimizer.state()
    with pytest.raises(ValueError, match="truncated"):
        optimizer.restore(state[:-10])
    with pytest.raises(ValueError, match="this optimizer has 60, the state has 30"):
        make("gradient", steps=60).restore(state)
    with pytest.raises(ValueError, match="this optimizer has paper, the state has gradient"):
        make("paper").restore(state)
    with pytest.raises(ValueError, match="this optimizer has 3, the state has 5"):
        _search.GradientOptimizer(3).restore(state)
    assert optimizer.state() == state


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradient", {"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1"),
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
        _search.GradientOptimizer(5, 30)  # type: ignore[misc]
    signature = str(_search.GradientOptimizer.__init__.__doc__)
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
    outcomes: list[tuple[float, None]] = [(float(i), None) for i in range(len(optimizer.ask()))]
    told = threading.Event()

    def tell() -> None:
        optimizer.tell(outcomes)
        told.set()

    thread = threading.Thread(target=tell)
    turns = 0
    thread.start()
    while not told.is_set():
        turns += 1
        time.sleep(0.0005)
    thread.join()
    assert turns > 5, turns


def test_a_slope_below_epsilon_moves_its_number_by_less() -> None:
    slopes = np.array([1.0, 1e-3, 1e-6])
    optimizer = _search.GradientOptimizer(3, steps=2, learning_rate=0.1, epsilon=1e-3, penalty=0.0, held_out=False)
    optimizer.tell([(0.0, slopes)])
    np.testing.assert_allclose(optimizer.ask()[0].point, -0.1 * slopes / (slopes + 1e-3), rtol=1e-12)
    with pytest.raises(ValueError, match="epsilon must be positive and finite, got 0"):
        _search.GradientOptimizer(3, epsilon=0.0)
