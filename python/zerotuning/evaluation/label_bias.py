"""A bias for each label, fitted to some examples' scores: calibration without touching the model.

Zhao et al., "Calibrate Before Use" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Weight of the squared biases: what keeps them finite where a label never occurs.
RIDGE = 1e-3


def fit_label_bias(scores: Tensor, labels: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """b [C] that minimises the mean cross entropy of scores [n, C] + b, plus ridge/2 · |b|²; scores float, labels int64,
    b float32."""
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
