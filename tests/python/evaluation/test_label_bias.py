"""Fitted label biases against finite differences of the penalized loss."""

from __future__ import annotations

import numpy as np
import torch
from zerotuning.evaluation.label_bias import fit_label_bias


def test_fitted_biases_minimise_the_penalised_loss() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(50, 3).log_softmax(dim=-1), torch.randint(0, 3, (50,))
    scores[::5, 2] = -torch.inf
    labels[::5] = labels[::5].clamp_max(1)
    wide, ridge = scores.double().numpy(), 0.02

    def penalised(bias: np.ndarray) -> float:
        logits = wide + bias
        right = logits[np.arange(50), labels.numpy()] - np.log(np.exp(logits).sum(axis=1))
        return float(-right.mean() + ridge / 2 * (bias**2).sum())

    def slopes(bias: np.ndarray) -> np.ndarray:
        steps = np.eye(3) * 1e-5
        return np.array([(penalised(bias + step) - penalised(bias - step)) / 2e-5 for step in steps])

    assert np.abs(slopes(fit_label_bias(scores, labels, ridge=ridge).double().numpy())).max() < 1e-5
    assert np.abs(slopes(np.zeros(3))).min() > 1e-3  # the start is not the minimum
