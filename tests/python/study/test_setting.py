"""Choices that studies share."""

from __future__ import annotations

from zerotuning.study.setting import best_gamma


def test_the_gamma_of_highest_accuracy_is_chosen_and_ties_go_to_the_lowest_loss() -> None:
    curve = {g: {"accuracy": a, "loss": x} for g, a, x in ((1.0, 0.5, 0.6), (2.0, 0.7, 0.9), (0.5, 0.7, 0.8))}
    assert best_gamma(curve) == 0.5
