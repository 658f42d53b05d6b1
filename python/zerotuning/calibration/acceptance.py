"""Whether scales are better than γ = 1 on examples that they never saw, with labels or without.

With labels: the loss must be less, the accuracy no less. Without labels an objective such as `information` can be
lowered by any split of the inputs into groups, right or wrong, so more is asked for:

- evidence: the untuned model's predictions must say something about the input, or there is nothing to bring out.
  That is their mutual information with the input, as a share of log C.
- agreement: searches on disjoint parts of the examples must come to the same predictions, or what they found is
  chance. That is Cohen's kappa of the folds' predictions, the mean over pairs of folds.
- resemblance: what tells the inputs apart must still be what told them apart before. That is the correlation over
  examples of each label's log-odds with the untuned ones, the mean over labels; shifts of a label do not count.

Of several tasks the least counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerotuning.calibration.folds import Places, Split, pooled_places
from zerotuning.calibration.objective import Measurement
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.evaluation import objectives

# Measured with SmolLM2-135M on 96 validation examples, searches on 64 others each, two disjoint ones a task:
#
#               evidence   agreement by step 16   resemblance   accuracy, untuned -> step 16
#     sst2      0.14       0.92                   0.91          80 -> 84
#     mr        0.13       0.85                   0.89          71 -> 82
#     trec      0.16       0.80                   0.84          41 -> 52 (best at step 4, resemblance 0.92: 53)
#     sst5      0.08       0.61                   0.81          38 -> 32
#     cb        0.04       0.21                   0.52          50 -> 18
LEAST_EVIDENCE = 0.06
LEAST_AGREEMENT = 0.7
LEAST_RESEMBLANCE = 0.85


@dataclass(frozen=True)
class Decision:
    """loss and accuracy of held-out examples, and whether the scales may be chosen."""

    loss: float
    accuracy: float | None
    admissible: bool
    details: dict[str, Any] = field(default_factory=dict)


class AcceptanceTest:
    """Compares scores with those at γ = 1, which it measures once, on all examples.

    Without labels `evidence` is the least of the tasks' (see above); None with labels.
    """

    def __init__(
        self,
        measurement: Measurement,
        parameterization: ScaleParameterization,
        all_examples: Places,
        splits: Sequence[Split],
    ) -> None:
        self.measurement = measurement
        self.all_examples = all_examples
        self.untuned = measurement.scores(parameterization.log_scale(parameterization.untuned), all_examples)
        self._places = pooled_places(splits)
        self.baseline = self._verdict_at_one(self._places)
        self.label_free = measurement.options.objective != "task-loss"
        self.evidence = min(map(evidence, self.untuned)) if self.label_free else None

    @property
    def has_evidence(self) -> bool:
        """Whether it is worth a search at all."""
        return self.evidence is None or self.measurement.options.guard is False or self.evidence >= LEAST_EVIDENCE

    def baseline_scores(self, places: Places) -> list[Tensor]:
        """For each task the scores [n, C] at γ = 1."""
        return [scores[list(chosen)] for scores, chosen in zip(self.untuned, places, strict=True)]

    def decide(self, splits: Sequence[Split], results: Sequence[Sequence[Tensor]]) -> Decision:
        """Of the scores of each split's held-out examples; without labels, of each split on all examples."""
        if not self.label_free:
            pooled = [torch.cat(parts) for parts in zip(*results, strict=True)]
            return self._verdict(pooled, pooled_places(splits), self.baseline)
        held_out = [
            [scores[list(places)] for scores, places in zip(result, split.held_out, strict=True)]
            for split, result in zip(splits, results, strict=True)
        ]
        pooled = [torch.cat(parts) for parts in zip(*held_out, strict=True)]
        verdict = self._verdict(pooled, pooled_places(splits), self.baseline)
        found = fold_agreement(splits, results)
        if found is None:
            return verdict
        disagree = self.measurement.options.guard and found < LEAST_AGREEMENT
        return replace(
            verdict, admissible=verdict.admissible and not disagree, details={**verdict.details, "agreement": found}
        )

    def accepts(self, point: np.ndarray) -> bool:
        """Whether the final scales beat γ = 1 on all examples, those they were fitted to included."""
        scores = self.measurement.scores(point, self.all_examples)
        baseline = self._verdict_at_one(self.all_examples)
        verdict = self._verdict(scores, self.all_examples, baseline)
        return verdict.admissible and verdict.loss < baseline.loss

    def _verdict_at_one(self, places: Places) -> Decision:
        scores = self.baseline_scores(places)
        accuracy = self.measurement.accuracy_of(scores, places)
        return Decision(self.measurement.loss_of(scores, places), accuracy, admissible=True)

    def _verdict(self, scores: Sequence[Tensor], places: Places, baseline: Decision) -> Decision:
        loss, accuracy = self.measurement.loss_of(scores, places), self.measurement.accuracy_of(scores, places)
        if not math.isfinite(loss):
            return Decision(loss, accuracy, admissible=False)
        if self.label_free:
            return self._label_free_verdict(loss, accuracy, scores, places)
        worse = accuracy is not None and baseline.accuracy is not None and accuracy < baseline.accuracy
        return Decision(loss, accuracy, admissible=not worse)

    def _label_free_verdict(
        self, loss: float, accuracy: float | None, scores: Sequence[Tensor], places: Places
    ) -> Decision:
        before = self.baseline_scores(places)
        least = min(resemblance(old, new) for old, new in zip(before, scores, strict=True))
        admissible = not self.measurement.options.guard or least >= LEAST_RESEMBLANCE
        return Decision(loss, accuracy, admissible, {"resemblance": least})


def fold_agreement(splits: Sequence[Split], results: Sequence[Sequence[Tensor]]) -> float | None:
    """Kappa of the predictions of all examples by the folds of one seed: the mean over pairs, of several tasks the
    least. results: for each split and task, scores [N, C]. None where every seed has one fold."""
    by_seed: dict[int, list[Sequence[Tensor]]] = {}
    for split, result in zip(splits, results, strict=True):
        by_seed.setdefault(split.seed, []).append(result)
    pairs = [pair for folds in by_seed.values() for pair in combinations(folds, 2)]
    if not pairs:
        return None
    of_tasks = [
        [kappa(one[task].argmax(-1), other[task].argmax(-1), one[task].shape[1]) for one, other in pairs]
        for task in range(len(results[0]))
    ]
    return min(math.fsum(values) / len(values) for values in of_tasks)


def kappa(one: Tensor, other: Tensor, count: int) -> float:
    """Cohen's kappa of two lists of labels in [0, count), int64 [N]: agreement beyond chance, 1 where they are equal;
    0 where one label alone is used, since nothing can be told from it."""
    shares = [torch.bincount(labels, minlength=count).double() / len(labels) for labels in (one, other)]
    chance = float((shares[0] * shares[1]).sum())
    agreed = float((one == other).double().mean())
    return 0.0 if chance > 1 - 1e-12 else (agreed - chance) / (1 - chance)


def evidence(scores: Tensor) -> float:
    """Mutual information of prediction and input as a share of log C, in [0, 1]. scores [N, C]."""
    return -float(objectives.information(scores.double())) / math.log(scores.shape[1])


def resemblance(before: Tensor, after: Tensor) -> float:
    """Mean over labels of the correlation over examples of a label's log-odds before and after, in [-1, 1].

    A label's log-odds: its score less the mean score of the example's other labels. scores [N, C]; columns that some
    examples lack (-inf) are left out.
    """
    present = torch.isfinite(before).all(dim=0) & torch.isfinite(after).all(dim=0)
    rows = [scores[:, present].double() for scores in (before, after)]
    odds = [row - row.mean(dim=1, keepdim=True) for row in rows]
    centred = [one - one.mean(dim=0) for one in odds]
    norms = [one.norm(dim=0) for one in centred]
    correlation = (centred[0] * centred[1]).sum(dim=0) / (norms[0] * norms[1]).clamp_min(1e-12)
    return float(correlation.mean())
