"""The acceptance rule: the selection, the patience, and the label-free statistics against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from zerotuning.calibration.acceptance import (
    Decision,
    Patience,
    Selection,
    evidence,
    fold_agreement,
    kappa,
    resemblance,
)
from zerotuning.calibration.folds import Split


def test_the_selection_keeps_the_first_admissible_candidate_of_the_least_loss_below_the_baseline() -> None:
    selection: Selection[str] = Selection(1.0)
    for name, loss, admissible in [
        ("equal to γ = 1", 1.0, True),
        ("inadmissible", 0.1, False),
        ("first", 0.5, True),
        ("equal to the first", 0.5, True),
        ("not a number", math.nan, True),
    ]:
        selection.consider(Decision(loss, None, admissible), name)
    assert (selection.best, selection.loss, selection.baseline_loss) == ("first", 0.5, 1.0)


def test_patience_counts_held_out_evaluations_without_a_lower_admissible_loss() -> None:
    def judged(*losses: tuple[float, bool]) -> list[Decision]:
        return [Decision(loss, None, admissible) for loss, admissible in losses]

    patience, endless = Patience(2), Patience(0)
    for decisions, exhausted in [
        (judged((9.0, True)), False),
        (judged((9.0, True), (8.0, False)), False),
        (judged((9.5, True), (7.0, True)), False),
        (judged((7.0, True)), False),
        (judged((math.inf, False)), True),
    ]:
        for one in (patience, endless):
            one.note(decisions)
        assert patience.is_exhausted == exhausted
        assert not endless.is_exhausted


def test_kappa_is_agreement_beyond_chance() -> None:
    # Counts of (one, other): 25 and 10 where one is 0, 15 and 20 where one is 1.
    one = torch.tensor([0] * 25 + [0] * 10 + [1] * 15 + [1] * 20)
    other = torch.tensor([0] * 25 + [1] * 10 + [0] * 15 + [1] * 20)
    observed = 45 / 70
    chance = (35 / 70) * (40 / 70) + (35 / 70) * (30 / 70)
    assert kappa(one, other, 2) == pytest.approx((observed - chance) / (1 - chance))
    assert kappa(one, one, 2) == pytest.approx(1)
    assert kappa(torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), 2) == 0


def test_folds_of_one_seed_are_compared_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    first, second, third = (torch.tensor(rng.normal(size=(50, 3))) for _ in range(3))
    splits = [Split(seed, [[0]], [[1]]) for seed in (0, 0, 0, 1)]
    predictions = [one.argmax(-1) for one in (first, second, third)]
    expected = sum(kappa(predictions[i], predictions[j], 3) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert fold_agreement(splits, [[first], [second], [third], [first]]) == pytest.approx(expected)
    assert fold_agreement(splits[3:], [[first]]) is None


def test_resemblance_ignores_a_label_bias_and_falls_with_new_evidence() -> None:
    rng = np.random.default_rng(1)
    scores = torch.tensor(rng.normal(size=(200, 3)))
    assert resemblance(scores, 3 * scores + torch.tensor([5.0, -2.0, 0.0])) == pytest.approx(1)
    assert abs(resemblance(scores, torch.tensor(rng.normal(size=(200, 3))))) < 0.2
    odds = scores.numpy() - scores.numpy().mean(axis=1, keepdims=True)
    mixed = scores + torch.tensor(rng.normal(size=(200, 3)))
    other = mixed.numpy() - mixed.numpy().mean(axis=1, keepdims=True)
    expected = np.mean([np.corrcoef(odds[:, c], other[:, c])[0, 1] for c in range(3)])
    assert resemblance(scores, mixed) == pytest.approx(expected)


def test_evidence_is_0_for_equal_predictions_and_1_for_certain_varied_ones() -> None:
    same = torch.tensor([[1.0, 2.0, 0.0]]).repeat(9, 1)
    assert evidence(same) == pytest.approx(0, abs=1e-12)
    sure = 100 * torch.eye(3).repeat(3, 1)
    assert evidence(sure) == pytest.approx(1)
    half = torch.tensor([[math.log(0.9), math.log(0.1)], [math.log(0.1), math.log(0.9)]])
    conditional = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert evidence(half) == pytest.approx(1 - conditional / math.log(2), rel=1e-6)
