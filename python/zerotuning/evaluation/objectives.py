"""What a calibration minimises: functions of label log-probabilities.

Every function takes `scores` [N, C], float, one row an example and one column a label: log-probabilities up
to a constant of each row, -inf in the columns beyond an example's own labels. All are differentiable in
`scores`; a -inf column contributes nothing and gets gradient 0. Values are in nats.
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
    """log softmax over the labels, 0 at absent ones: finite, so that p · log p makes no NaN there."""
    return torch.log_softmax(scores, dim=-1).masked_fill(scores == -torch.inf, 0.0)


def _probabilities(scores: Tensor) -> Tensor:
    """softmax over the labels, exactly 0 at absent ones."""
    return torch.softmax(scores, dim=-1)


def entropy_per_example(scores: Tensor) -> Tensor:
    """-Σ_c p_c log p_c of each row: [N]."""
    _check_scores(scores)
    return -(_probabilities(scores) * _log_probabilities(scores)).sum(dim=-1)


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the gold label among the labels. labels: int64 [N]."""
    _check_labels(scores, labels)
    return -torch.log_softmax(scores, dim=-1).gather(1, labels[:, None]).mean()


def entropy(scores: Tensor) -> Tensor:
    """Mean entropy of the predictions, the paper's unsupervised objective. It may collapse onto one label."""
    return entropy_per_example(scores).mean()


def information(scores: Tensor, prior: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Minus the mutual information between example and predicted label.

    mean_n H(p_n) - weight · H(p̄), with p̄ = mean_n p_n: low where each prediction is sure and all labels are
    used. With a class `prior` [C] (positive, sum 1): mean_n H(p_n) + weight · KL(p̄ ‖ prior). A uniform prior
    differs from none by the constant weight · log C only.
    """
    conditional = entropy_per_example(scores).mean()
    mean = _probabilities(scores).mean(dim=0)
    # clamp: the derivative of p log p at p = 0 is -inf, which would turn into NaN upstream.
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    if prior is None:
        return conditional + weight * (mean * log_mean).sum()
    if prior.shape != mean.shape or not bool((prior > 0).all()) or abs(float(prior.sum()) - 1.0) > 1e-3:
        raise ZeroTuningError(
            f"prior must be [C] with C = {mean.shape[0]}, positive and summing to 1, got {prior.tolist()}"
        )
    return conditional + weight * (mean * (log_mean - prior.to(mean).log())).sum()


def estimated_prior(scores: Tensor) -> Tensor:
    """Shares of the classes as untuned predictions suggest them: halfway from their mean to equal shares, [C].

    Halfway, because an untuned model's mean prediction shows its own preference for a label no less than the
    classes' shares.
    """
    _check_scores(scores)
    mean = _probabilities(scores).mean(dim=0)
    return (mean + 1.0 / mean.shape[0]) / 2


def continuation_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean of `scores` [N, 1]: mean log-probability per token of gold continuations, nats.

    `labels` is not read: it is there so that this can take the place of `task_loss`.
    """
    _check_scores(scores)
    return -scores.mean()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction, in [0, 1], of the examples whose gold label has the largest score (the first of equals)."""
    _check_labels(scores, labels)
    return float((scores.argmax(dim=-1) == labels).double().mean())


def _entropy_objective(scores: Tensor, labels: Tensor) -> Tensor:
    return entropy(scores)


def _information_objective(scores: Tensor, labels: Tensor) -> Tensor:
    return information(scores)


#: Objectives by the name the command line gives them; each is called as `objective(scores, labels)` and
#: returns a scalar to minimise. Only `task-loss` reads `labels`.
OBJECTIVES: dict[str, Objective] = {
    "task-loss": task_loss,
    "entropy": _entropy_objective,
    "information": _information_objective,
}

#: Names of the objectives that need gold labels.
SUPERVISED_OBJECTIVES = frozenset({"task-loss"})
