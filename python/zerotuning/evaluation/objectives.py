"""Objectives of a calibration: functions of label log-probabilities that a search minimizes.

The argument `scores` is float [N, C], one row for each example and one column for each label: log-probabilities up to a
constant of each row, -inf in the columns beyond an example's own labels. All functions are differentiable in `scores`;
a -inf column contributes nothing and gets gradient 0. Values are in nats.

To add an objective, write its function, enter it in OBJECTIVES (and in MEANS_OVER_EXAMPLES if it is a mean over
examples), and add its name to `calibration.options.OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zerotuning.errors import ZeroTuningError

Objective = Callable[[Tensor, Tensor], Tensor]


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[0] == 0 or scores.shape[1] == 0 or not scores.is_floating_point():
        raise ZeroTuningError(
            f"scores must be a float tensor [N, C] with N, C > 0, got {list(scores.shape)} {scores.dtype}"
        )


def _check_labels(scores: Tensor, labels: Tensor) -> None:
    _check_scores(scores)
    if labels.shape != scores.shape[:1] or labels.dtype != torch.int64:
        raise ZeroTuningError(
            f"labels must be int64 [N] with N = {scores.shape[0]}, got {list(labels.shape)} {labels.dtype}"
        )
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= scores.shape[1]:
        raise ZeroTuningError(f"labels must lie in [0, {scores.shape[1]}), got {smallest if smallest < 0 else largest}")


def _log_probabilities(scores: Tensor) -> Tensor:
    """Log softmax over the labels; 0 for absent labels, so that p · log p is not NaN there."""
    return torch.log_softmax(scores, dim=-1).masked_fill(scores == -torch.inf, 0.0)


def _probabilities(scores: Tensor) -> Tensor:
    """Softmax over the labels; exactly 0 for absent labels."""
    return torch.softmax(scores, dim=-1)


def entropy_per_example(scores: Tensor) -> Tensor:
    """-Σ_c p_c log p_c of each row: [N]."""
    _check_scores(scores)
    return -(_probabilities(scores) * _log_probabilities(scores)).sum(dim=-1)


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the gold label among the labels.

    Args:
        scores: Log-probabilities of labels, float [N, C].
        labels: Gold labels, int64 [N].

    Raises:
        ZeroTuningError: A shape or dtype is wrong, or a label is not in [0, C).
    """
    _check_labels(scores, labels)
    return -torch.log_softmax(scores, dim=-1).gather(1, labels[:, None]).mean()


def entropy(scores: Tensor) -> Tensor:
    """Mean entropy of the predictions, the paper's unsupervised objective.

    A model that predicts the same label for every example can have the least entropy.
    """
    return entropy_per_example(scores).mean()


def information(scores: Tensor, prior: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Minus the mutual information between example and predicted label.

    mean_n H(p_n) - weight · H(p̄), with p̄ = mean_n p_n: low where each prediction is confident and all labels are
    predicted. With a class prior: mean_n H(p_n) + weight · KL(p̄ ‖ prior). A uniform prior adds the constant
    weight · log C to the value without a prior.

    Args:
        scores: Log-probabilities of labels, float [N, C].
        prior: Shares of the classes, [C], positive with sum 1.
        weight: The weight of the second term.

    Raises:
        ZeroTuningError: A shape is wrong, or the prior is not positive with sum 1.
    """
    conditional = entropy_per_example(scores).mean()
    mean = _probabilities(scores).mean(dim=0)
    # Clamped: the derivative of p log p at p = 0 is -inf, which becomes NaN in the backward pass.
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    if prior is None:
        return conditional + weight * (mean * log_mean).sum()
    if prior.shape != mean.shape or not bool((prior > 0).all()) or abs(float(prior.sum()) - 1.0) > 1e-3:
        raise ZeroTuningError(
            f"prior must be [C] with C = {mean.shape[0]}, positive and summing to 1, got {prior.tolist()}"
        )
    return conditional + weight * (mean * (log_mean - prior.to(mean).log())).sum()


def estimated_prior(scores: Tensor) -> Tensor:
    """Shares of the classes, estimated from untuned predictions: halfway from their mean to equal shares, [C].

    Halfway, because an untuned model's mean prediction reflects the model's preference for a label as well as the
    shares of the classes.
    """
    _check_scores(scores)
    mean = _probabilities(scores).mean(dim=0)
    return (mean + 1.0 / mean.shape[0]) / 2


def continuation_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean log-probability per token of gold continuations.

    Args:
        scores: Mean log-probabilities per token, [N, 1].
        labels: Not used; the function has the signature of an Objective.
    """
    _check_scores(scores)
    return -scores.mean()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction, in [0, 1], of the examples whose gold label has the largest score (the first label of a tie)."""
    _check_labels(scores, labels)
    return float((scores.argmax(dim=-1) == labels).double().mean())


def _entropy_objective(scores: Tensor, labels: Tensor) -> Tensor:
    return entropy(scores)


def _information_objective(scores: Tensor, labels: Tensor) -> Tensor:
    return information(scores)


#: Objectives by their names in options; each is called as `objective(scores, labels)` and returns a scalar to minimize.
#: Only `task-loss` reads `labels`. `calibration.options.OBJECTIVES` lists the same names, without importing torch.
OBJECTIVES: dict[str, Objective] = {
    "task-loss": task_loss,
    "entropy": _entropy_objective,
    "information": _information_objective,
}

#: Objectives that are means over examples: their gradient is a sum over batches. Other objectives depend on all
#: scores at once, so their gradient in the scores is computed first.
MEANS_OVER_EXAMPLES = frozenset({"task-loss", "entropy"})
