"""The temperature and label biases that suit some scores, against finite differences of the penalised loss."""

from __future__ import annotations

import math

import numpy as np
import torch
from zerotuning.label_calibration import adjusted, fit_label_bias, fit_labels


def test_temperature_and_biases_are_where_the_penalised_loss_has_no_slope() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(50, 3).log_softmax(dim=-1), torch.randint(0, 3, (50,))
    scores[::5, 2] = -torch.inf
    labels[::5] = labels[::5].clamp_max(1)
    wide, ridge = scores.double().numpy(), 0.02

    def penalised(x: np.ndarray) -> float:
        logits = np.where(np.isneginf(wide), -np.inf, (np.nan_to_num(wide, neginf=0) + x[1:]) * np.exp(x[0]))
        right = logits[np.arange(50), labels.numpy()] - np.log(np.exp(logits).sum(axis=1))
        return float(-right.mean() + ridge / 2 * (x**2).sum())

    def slopes(x: np.ndarray) -> np.ndarray:
        steps = np.eye(4) * 1e-5
        return np.array([(penalised(x + step) - penalised(x - step)) / 2e-5 for step in steps])

    inverse, bias = fit_labels(scores, labels, ridge=ridge)
    both = np.array([math.log(inverse), *bias.tolist()])
    assert np.abs(slopes(both)).max() < 1e-5
    assert np.abs(slopes(np.zeros(4))).min() > 1e-3  # not where it began
    only_bias = np.array([0.0, *fit_label_bias(scores, labels, ridge=ridge).tolist()])
    assert np.abs(slopes(only_bias)[1:]).max() < 1e-5 < np.abs(slopes(only_bias)[0])
    only = fit_labels(scores, labels, ridge=ridge, bias=False)
    assert only[1].tolist() == [0.0, 0.0, 0.0]
    assert abs(slopes(np.array([math.log(only[0]), 0, 0, 0]))[0]) < 1e-5
    assert torch.equal(adjusted(scores, inverse, bias) == -torch.inf, scores == -torch.inf)
