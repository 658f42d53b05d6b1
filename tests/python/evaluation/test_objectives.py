"""Objectives against their formulas in Python's floats, and their gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation import objectives

INFINITY = math.inf
SCORES = [[-0.5, -2.0, -1.0], [0.3, 0.1, -INFINITY], [4.0, -3.0, 1.0], [-900.0, 0.0, -2.0]]
LABELS = [2, 0, 1, 1]


def probabilities(scores: list[list[float]]) -> list[list[float]]:
    rows = []
    for row in scores:
        weights = [math.exp(score - max(row)) for score in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def entropy_of(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def mean_of(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def scores64() -> Tensor:
    return torch.tensor(SCORES, dtype=torch.float64)


def test_task_loss_is_the_mean_cross_entropy_of_the_gold_label() -> None:
    expected = -sum(math.log(p[label]) for p, label in zip(probabilities(SCORES), LABELS, strict=True)) / 4
    assert float(objectives.task_loss(scores64(), torch.tensor(LABELS))) == pytest.approx(expected, rel=1e-12)


def test_entropy_is_the_mean_over_examples_in_nats() -> None:
    expected = [entropy_of(row) for row in probabilities(SCORES)]
    assert objectives.entropy_per_example(scores64()).tolist() == pytest.approx(expected, rel=1e-12)
    assert float(objectives.entropy(scores64())) == pytest.approx(sum(expected) / 4, rel=1e-12)
    assert float(objectives.entropy(torch.zeros(2, 5))) == pytest.approx(math.log(5))


def test_information_is_entropy_given_the_example_less_entropy_of_the_mean_prediction() -> None:
    rows = probabilities(SCORES)
    conditional = sum(entropy_of(row) for row in rows) / 4
    value = float(objectives.information(scores64()))
    assert value == pytest.approx(conditional - entropy_of(mean_of(rows)), rel=1e-12)
    value = float(objectives.information(scores64(), weight=2.0))
    assert value == pytest.approx(conditional - 2 * entropy_of(mean_of(rows)), rel=1e-12)


def test_information_with_a_class_prior_adds_the_divergence_from_it() -> None:
    prior = [0.5, 0.3, 0.2]
    rows = probabilities(SCORES)
    divergence = sum(p * math.log(p / q) for p, q in zip(mean_of(rows), prior, strict=True))
    expected = sum(entropy_of(row) for row in rows) / 4 + divergence
    assert float(objectives.information(scores64(), torch.tensor(prior))) == pytest.approx(expected, rel=1e-6)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    difference = objectives.information(scores64(), uniform) - objectives.information(scores64())
    assert float(difference) == pytest.approx(math.log(3), rel=1e-12)


def test_information_prefers_sure_and_varied_predictions() -> None:
    sure_and_varied = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    collapsed = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    unsure = torch.zeros(2, 2)
    assert objectives.information(sure_and_varied) < -0.6
    assert objectives.information(collapsed) == pytest.approx(0.0, abs=1e-6)
    assert objectives.information(unsure) == pytest.approx(0.0, abs=1e-6)
    assert objectives.entropy(collapsed) == pytest.approx(float(objectives.entropy(sure_and_varied)))


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_gradients_equal_finite_differences_and_absent_labels_get_zero(name: str) -> None:
    objective = objectives.OBJECTIVES[name]
    labels = torch.tensor(LABELS)
    scores = scores64().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(scores, labels), scores)
    assert bool(gradient.isfinite().all())
    assert gradient[1, 2] == 0.0
    step = 1e-6
    for row, column in [(0, 0), (0, 2), (1, 1), (2, 1), (3, 2)]:
        up, down = scores64(), scores64()
        up[row, column] += step
        down[row, column] -= step
        difference = (objective(up, labels) - objective(down, labels)) / (2 * step)
        assert float(gradient[row, column]) == pytest.approx(float(difference), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_label_that_no_example_has_gives_no_nan(name: str) -> None:
    scores = torch.tensor([[1.0, 2.0, -INFINITY], [0.0, 1.0, -INFINITY]], requires_grad=True)
    value = objectives.OBJECTIVES[name](scores, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(value, scores)
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())
    kept = scores.detach()[:, :2]
    assert float(value.detach()) == pytest.approx(float(objectives.OBJECTIVES[name](kept, torch.tensor([0, 1]))))


def test_accuracy_is_the_fraction_of_gold_labels_that_score_highest() -> None:
    assert objectives.accuracy(torch.tensor(SCORES), torch.tensor(LABELS)) == 0.5
    assert objectives.accuracy(torch.zeros(2, 3), torch.tensor([0, 1])) == 0.5


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        (lambda: objectives.entropy(torch.zeros(3)), r"scores must be a float tensor \[N, C\].*got \[3\]"),
        (lambda: objectives.entropy(torch.zeros(0, 3)), r"got \[0, 3\]"),
        (lambda: objectives.entropy(torch.zeros(2, 3, dtype=torch.int64)), "got .*int64"),
        (lambda: objectives.task_loss(torch.zeros(2, 3), torch.tensor([0])), r"labels must be int64 \[N\]"),
        (lambda: objectives.task_loss(torch.zeros(2, 3), torch.tensor([0, -1])), r"in \[0, 3\), got -1"),
        (lambda: objectives.accuracy(torch.zeros(2, 3), torch.tensor([0, 3])), r"in \[0, 3\), got 3"),
        (lambda: objectives.task_loss(torch.zeros(2, 3), torch.tensor([0.0, 1.0])), "got .*float32"),
        (lambda: objectives.information(torch.zeros(2, 3), torch.tensor([0.5, 0.5])), "prior must be"),
        (lambda: objectives.information(torch.zeros(2, 2), torch.tensor([1.0, 0.0])), "prior must be"),
        (lambda: objectives.information(torch.zeros(2, 2), torch.tensor([0.5, 0.9])), "prior must be"),
    ],
)
def test_a_wrong_tensor_is_named(action: Callable[[], object], problem: str) -> None:
    with pytest.raises(ZeroTuningError, match=problem):
        action()


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_only_means_over_examples_are_the_mean_of_their_values_on_each_example(name: str) -> None:
    labels = torch.tensor(LABELS)
    whole = float(objectives.OBJECTIVES[name](scores64(), labels))
    alone = [float(objectives.OBJECTIVES[name](scores64()[n : n + 1], labels[n : n + 1])) for n in range(4)]
    assert (abs(whole - sum(alone) / 4) < 1e-12) == (name in objectives.MEANS_OVER_EXAMPLES)
