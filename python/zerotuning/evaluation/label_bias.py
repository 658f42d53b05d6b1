"""A bias for each label, fitted to some examples' scores: calibration of the scores, without a change of the model.

Zhao et al., "Calibrate Before Use" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Weight of the squared biases. This term keeps the bias of a label without examples finite.
RIDGE = 1e-3


def fit_label_bias(scores: Tensor, labels: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """The bias b that minimizes the mean cross entropy of `scores` + b, plus ridge/2 · |b|².

    Args:
        scores: Log-probabilities of labels, float [n, C].
        labels: Gold labels, int64 [n].
        ridge: The weight of the squared biases.

    Returns:
        float32 [C].
    """
    bias = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [bias], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )
    wide = scores.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wide + bias, labels) + ridge / 2 * bias.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return bias.detach().float()
