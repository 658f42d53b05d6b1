"""The rule by which scales are accepted: a lower loss than at γ = 1 on examples that the search did not fit.

A search proposes candidates; `AcceptanceTest` decides from their held-out scores which are admissible, `Selection`
keeps the admissible candidate with the least held-out loss (γ = 1 is the first candidate), and `Patience` ends a search
that no longer improves.

With labels a candidate is admissible if its held-out accuracy is no lower than at γ = 1. Without labels an objective
such as `information` falls with any split of the inputs into groups, right or wrong. Three more conditions are tested:

- evidence: the untuned model's predictions must depend on the input; otherwise scales have nothing to amplify. The
  measure is the mutual information of prediction and input, as a share of log C.
- agreement: searches on disjoint parts of the examples must lead to the same predictions; otherwise the predictions are
  due to chance. The measure is Cohen's kappa of the folds' predictions, the mean over pairs of folds.
- resemblance: the tuned model must separate the inputs as the untuned model does. The measure is the correlation over
  examples of each label's log-odds before and after, the mean over labels. A constant added to a label's scores does
  not change this measure.

With several tasks, each measure is the lowest of the tasks' values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from zerotuning.calibration.folds import ExampleIndices, Split, pooled_held_out
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.saved_fields import SavedFields
from zerotuning.evaluation import objectives

C = TypeVar("C")

# Measured with SmolLM2-135M on 96 validation examples, searches on 64 others each, two disjoint ones a task:
#
#               evidence   agreement by step 16   resemblance   accuracy, untuned -> step 16
#     sst2      0.14       0.92                   0.91          80 -> 84
#     mr        0.13       0.85                   0.89          71 -> 82
#     trec      0.16       0.80                   0.84          41 -> 52 (best at step 4, resemblance 0.92: 53)
#     sst5      0.08       0.61                   0.81          38 -> 32
#     cb        0.04       0.21                   0.52          50 -> 18
MIN_EVIDENCE = 0.06
MIN_AGREEMENT = 0.7
MIN_RESEMBLANCE = 0.85


@dataclass(frozen=True)
class Decision:
    """The held-out loss and accuracy of a candidate, and whether it may be chosen.

    Attributes:
        loss: The objective on the held-out examples.
        accuracy: The accuracy on the held-out examples; None without labels.
        admissible: Whether the candidate may be chosen.
        details: Agreement and resemblance, for the report.
    """

    loss: float
    accuracy: float | None
    admissible: bool
    details: dict[str, Any] = field(default_factory=dict)


class Selection(Generic[C]):
    """The admissible candidate with the least held-out loss.

    γ = 1 is the first candidate, so the result is never worse. Of candidates with equal loss the first is kept.

    Args:
        baseline_loss: The held-out loss at γ = 1.

    Attributes:
        loss: The least loss so far.
        best: The candidate with that loss; None while no candidate beats γ = 1.
    """

    def __init__(self, baseline_loss: float) -> None:
        self.baseline_loss = self.loss = baseline_loss
        self.best: C | None = None

    def consider(self, decision: Decision, candidate: C) -> None:
        """Keep the candidate if it is admissible and its loss is the lowest so far."""
        if decision.admissible and decision.loss < self.loss:
            self.loss, self.best = decision.loss, candidate


class Patience:
    """Ends a search after `limit` judgements in a row without a lower admissible loss; never if `limit` is 0."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.least_loss = math.inf
        self.without_gain = 0

    def note(self, decisions: Sequence[Decision]) -> None:
        """Count one judgement, which led to `decisions` on several candidates."""
        loss = min((decision.loss for decision in decisions if decision.admissible), default=math.inf)
        self.without_gain = 0 if loss < self.least_loss else self.without_gain + 1
        self.least_loss = min(self.least_loss, loss)

    @property
    def is_exhausted(self) -> bool:
        """Whether the search is to end."""
        return 0 < self.limit <= self.without_gain

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        least = self.least_loss if math.isfinite(self.least_loss) else None
        return {"least_loss": least, "without_gain": self.without_gain}

    def restore(self, saved: SavedFields) -> None:
        """Continue where `state` was taken."""
        least = saved.number_or_none("least_loss")
        self.least_loss = math.inf if least is None else least
        self.without_gain = saved.integer("without_gain", 0)


class AcceptanceTest:
    """Compares candidates' scores with those at γ = 1, which are measured once, on all examples.

    Args:
        objective: Scores and losses of the examples.
        parameterization: Maps points to log γ.
        all_examples: Positions of all examples.
        splits: The splits, whose held-out examples are pooled.

    Attributes:
        baseline: The decision on γ = 1 itself, on the held-out examples of all splits.
        label_free: Whether the objective uses no labels.
        evidence: Without labels, the least of the tasks' evidence at γ = 1; None with labels.
    """

    def __init__(
        self,
        objective: CalibrationObjective,
        parameterization: ScaleParameterization,
        all_examples: ExampleIndices,
        splits: Sequence[Split],
    ) -> None:
        self.objective = objective
        self.all_examples = all_examples
        self.untuned_scores = objective.scores(parameterization.log_scale(parameterization.untuned), all_examples)
        self.baseline = self._baseline_decision(pooled_held_out(splits))
        self.label_free = objective.options.objective != "task-loss"
        self.evidence = min(map(evidence, self.untuned_scores)) if self.label_free else None

    @property
    def has_evidence(self) -> bool:
        """Whether a search is worthwhile at all."""
        return self.evidence is None or not self.objective.options.guard or self.evidence >= MIN_EVIDENCE

    def baseline_scores(self, indices: ExampleIndices) -> list[Tensor]:
        """Return for each task the scores [n, C] at γ = 1."""
        return [scores[list(chosen)] for scores, chosen in zip(self.untuned_scores, indices, strict=True)]

    def examples_to_score(self, split: Split) -> ExampleIndices:
        """Return the examples that `decide` needs the scores of, for the point of one split's search.

        Without labels the folds' predictions are compared with each other, on all examples.
        """
        return self.all_examples if self.label_free else split.held_out

    def decide(self, splits: Sequence[Split], results: Sequence[Sequence[Tensor]]) -> Decision:
        """Decide on a candidate: one point for each split's search.

        Args:
            splits: The splits.
            results: For each split and task, the scores [n, C] of `examples_to_score` at that split's point.
        """
        held_out = results
        if self.label_free:
            held_out = [
                [scores[list(indices)] for scores, indices in zip(result, split.held_out, strict=True)]
                for split, result in zip(splits, results, strict=True)
            ]
        pooled = [torch.cat(parts) for parts in zip(*held_out, strict=True)]
        decision = self._decision(pooled, pooled_held_out(splits), self.baseline)
        agreement = fold_agreement(splits, results) if self.label_free else None
        if agreement is None:
            return decision
        agrees = not self.objective.options.guard or agreement >= MIN_AGREEMENT
        details = {**decision.details, "agreement": agreement}
        return replace(decision, admissible=decision.admissible and agrees, details=details)

    def accepts(self, log_scale: np.ndarray) -> bool:
        """Return whether the final log γ beats γ = 1 on all examples, fitted ones included."""
        baseline = self._baseline_decision(self.all_examples)
        scores = self.objective.scores(log_scale, self.all_examples)
        decision = self._decision(scores, self.all_examples, baseline)
        return decision.admissible and decision.loss < baseline.loss

    def _baseline_decision(self, indices: ExampleIndices) -> Decision:
        scores = self.baseline_scores(indices)
        accuracy = self.objective.accuracy_of(scores, indices)
        return Decision(self.objective.loss_of(scores, indices), accuracy, admissible=True)

    def _decision(self, scores: Sequence[Tensor], indices: ExampleIndices, baseline: Decision) -> Decision:
        loss, accuracy = self.objective.loss_of(scores, indices), self.objective.accuracy_of(scores, indices)
        if not math.isfinite(loss):
            return Decision(loss, accuracy, admissible=False)
        if self.label_free:
            before = self.baseline_scores(indices)
            least = min(resemblance(old, new) for old, new in zip(before, scores, strict=True))
            admissible = not self.objective.options.guard or least >= MIN_RESEMBLANCE
            return Decision(loss, accuracy, admissible, {"resemblance": least})
        is_worse = accuracy is not None and baseline.accuracy is not None and accuracy < baseline.accuracy
        return Decision(loss, accuracy, admissible=not is_worse)


def fold_agreement(splits: Sequence[Split], results: Sequence[Sequence[Tensor]]) -> float | None:
    """Return Cohen's kappa of the folds' predictions: the mean over pairs of one seed's folds, the least over tasks.

    Args:
        splits: The splits.
        results: For each split and task, the scores [N, C] of all examples.

    Returns:
        The agreement; None where every seed has one fold only.
    """
    results_of_seed: dict[int, list[Sequence[Tensor]]] = {}
    for split, result in zip(splits, results, strict=True):
        results_of_seed.setdefault(split.seed, []).append(result)
    pairs = [pair for folds in results_of_seed.values() for pair in combinations(folds, 2)]
    if not pairs:
        return None
    kappas_of_tasks = [
        [kappa(first[task].argmax(-1), second[task].argmax(-1), first[task].shape[1]) for first, second in pairs]
        for task in range(len(results[0]))
    ]
    return min(math.fsum(values) / len(values) for values in kappas_of_tasks)


def kappa(first: Tensor, second: Tensor, count: int) -> float:
    """Return Cohen's kappa of two lists of labels: the agreement beyond chance, 1 where the lists are equal.

    The result is 0 where both lists repeat one label, because chance alone would then lead to agreement.

    Args:
        first: Labels in [0, count), int64 [N].
        second: Labels of the same examples.
        count: Number of labels.
    """
    shares = [torch.bincount(labels, minlength=count).double() / len(labels) for labels in (first, second)]
    chance = float((shares[0] * shares[1]).sum())
    agreed = float((first == second).double().mean())
    return 0.0 if chance > 1 - 1e-12 else (agreed - chance) / (1 - chance)


def evidence(scores: Tensor) -> float:
    """Return the mutual information of prediction and input as a share of log C, in [0, 1]; scores [N, C]."""
    return -float(objectives.information(scores.double())) / math.log(scores.shape[1])


def resemblance(before: Tensor, after: Tensor) -> float:
    """Return how alike two score tables separate the examples: the mean over labels of a correlation, in [-1, 1].

    For each label, the log-odds before and after are correlated over the examples. A label's log-odds are its score
    less the mean score of the example's labels. Labels that some examples lack (score -inf) are left out.

    Args:
        before: Scores [N, C].
        after: Scores [N, C] of the same examples.
    """
    present = torch.isfinite(before).all(dim=0) & torch.isfinite(after).all(dim=0)
    rows = [scores[:, present].double() for scores in (before, after)]
    odds = [row - row.mean(dim=1, keepdim=True) for row in rows]
    centred = [label_odds - label_odds.mean(dim=0) for label_odds in odds]
    norms = [label_odds.norm(dim=0) for label_odds in centred]
    correlation = (centred[0] * centred[1]).sum(dim=0) / (norms[0] * norms[1]).clamp_min(1e-12)
    return float(correlation.mean())
