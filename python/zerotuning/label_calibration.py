"""Label scores made right without the model: the temperature and the bias of each label that suit some examples.

Guo et al., "On Calibration of Modern Neural Networks" (2017); Zhao et al., "Calibrate Before Use" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Weight of the squared label biases: what keeps them finite where a label never occurs.
BIAS_RIDGE = 1e-3


def fit_label_bias(scores: Tensor, labels: Tensor, *, ridge: float = BIAS_RIDGE) -> Tensor:
    """b [C] that minimises the mean cross entropy of scores [n, C] + b, plus ridge/2 · |b|²."""
    return fit_labels(scores, labels, ridge=ridge, temperature=False)[1]


def fit_labels(
    scores: Tensor, labels: Tensor, *, ridge: float, temperature: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """(t, b) that minimise the mean cross entropy of t · (scores + b), plus ridge/2 · ((log t)² + |b|²).

    scores float [n, C], -inf where an example has no such label; labels int64 [n]. Float32, t of no dimensions, b [C];
    without `temperature` t is 1, without `bias` b is 0.
    """
    log_inverse = torch.zeros((), dtype=torch.float64, requires_grad=temperature)
    shift = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=bias)
    optimizer = torch.optim.LBFGS(
        [log_inverse, shift], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )
    wide = scores.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(adjusted(wide, log_inverse.exp(), shift), labels)
        loss = loss + ridge / 2 * (log_inverse.square() + shift.square().sum())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if temperature or bias:
        optimizer.step(closure)  # type: ignore[arg-type]
    return log_inverse.detach().exp().float(), shift.detach().float()


def adjusted(scores: Tensor, inverse_temperature: Tensor, bias: Tensor) -> Tensor:
    """t · (scores + b) with what `fit_labels` gives, -inf where scores are."""
    absent = scores == -torch.inf
    return ((scores.masked_fill(absent, 0.0) + bias) * inverse_temperature).masked_fill(absent, -torch.inf)
