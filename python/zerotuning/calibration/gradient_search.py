"""The gradient method: gradient steps on the examples of each split, and a choice by the held-out examples.

Each penalty has a search for every split (fold and seed), and all searches of a penalty take their steps in lockstep.
Every few steps the examples that each split holds out are scored at the point of its search: together these are the
scores of all examples by scales that were not fitted to them. The acceptance test decides on each such candidate, and
the selection keeps the step, the L2 penalty and the kind of point (the last one, or the moving average) with the least
held-out loss; γ = 1 is the first candidate. The result is the mean of the splits' log γ at the selected step: the mean
removes much of what each search fitted to its own examples only. With `combine` = "refit" the result is the mean over
searches on all examples, which end at the selected step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from zerotuning import _search
from zerotuning.calibration.acceptance import AcceptanceTest, Decision, Patience, Selection
from zerotuning.calibration.folds import ExampleIndices, Split, examples_of_step
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import MAX_ABS_LOG_SCALE, ScaleParameterization
from zerotuning.calibration.saved_fields import SavedFields
from zerotuning.calibration.search_result import SearchResult
from zerotuning.errors import ZeroTuningError

#: Candidates are judged about NUM_JUDGEMENTS times, and at least every MAX_JUDGING_INTERVAL steps, because a budget of
#: seconds may end the search at any step.
NUM_JUDGEMENTS = 20
MAX_JUDGING_INTERVAL = 5


@dataclass(frozen=True)
class Candidate:
    """A point of each split's search, all of one step, penalty and kind.

    Attributes:
        step: Number of steps that led to the points.
        penalty: The L2 penalty of the searches.
        kind: `point`, `averaged` (the moving average of the points) or `zero` (γ = 1, beside a start elsewhere).
        points: x [P] of each split.
    """

    step: int
    penalty: float
    kind: str
    points: list[np.ndarray]


@dataclass
class PenaltySearch:
    """The searches with one L2 penalty, one for each split.

    Attributes:
        penalty: The L2 penalty.
        steppers: One for each split.
        patience: Ends these searches early.
        stopped: Whether these searches have ended.
        history: Losses by step, for the report.
    """

    penalty: float
    steppers: list[_search.GradientStepper]
    patience: Patience
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class GradientSearch:
    """All searches of the gradient method. One round, `advance`, is a step of every search that is not stopped.

    Args:
        objective: Losses, gradients and scores of the examples.
        parameterization: Maps points to log γ.
        options: The calibration's options.
        splits: A search is made for each.
        all_examples: Positions of all examples, for searches on all of them.
        acceptance: Decides on the candidates.
    """

    def __init__(
        self,
        objective: CalibrationObjective,
        parameterization: ScaleParameterization,
        options: CalibrationOptions,
        splits: Sequence[Split],
        all_examples: ExampleIndices,
        acceptance: AcceptanceTest,
    ) -> None:
        self.objective, self.parameterization, self.options = objective, parameterization, options
        self.splits, self.all_examples, self.acceptance = list(splits), all_examples, acceptance
        self.steps = options.total_steps
        self.judging_interval = min(max(1, round(self.steps / NUM_JUDGEMENTS)), MAX_JUDGING_INTERVAL)
        self.searches = [
            PenaltySearch(penalty, self._new_steppers(penalty, len(self.splits)), Patience(options.patience))
            for penalty in options.l2_penalties
        ]
        self.selection: Selection[Candidate] = Selection(acceptance.baseline.loss)
        self.round = 0
        #: Searches on all examples (`combine` = "refit"), one for each seed; empty until the first refit step.
        self.refit_steppers: list[_search.GradientStepper] = []
        self.refit_is_out_of_time = False

    @property
    def steps_total(self) -> int:
        """The largest possible number of rounds."""
        return self.steps * (2 if self.options.combine == "refit" else 1)

    @property
    def steps_done(self) -> int:
        """Rounds so far."""
        return min(self.round, self.steps) + self._refit_steps

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self._split_searches_finished and not self._needs_refit

    @property
    def least_loss(self) -> float:
        """The least held-out loss of the admissible candidates, γ = 1 included."""
        return self.selection.loss

    @property
    def share_of_time(self) -> float:
        """The share of a budget of seconds after which the current part of the search ends."""
        if self.options.combine == "average" or self._split_searches_finished:
            return 1.0
        return len(self.splits) / (len(self.splits) + self.options.search_count)

    def stop(self) -> None:
        """End the current part of the search: the searches on splits, or the searches on all examples."""
        if self._split_searches_finished:
            self.refit_is_out_of_time = True
        for search in self.searches:
            search.stopped = True

    def advance(self) -> None:
        """Take one step of every search that is not stopped."""
        if not self._split_searches_finished:
            for search in self.searches:
                if not search.stopped:
                    self._advance_penalty(search)
            self.round += 1
        elif self._needs_refit:
            self._advance_refit()

    # The searches on splits.

    @property
    def _split_searches_finished(self) -> bool:
        # The round after the last step judges the last points.
        return self.round > self.steps or all(search.stopped for search in self.searches)

    def _advance_penalty(self, search: PenaltySearch) -> None:
        """Judge the points where a judgement is due, and take a step from each point."""
        points: dict[str, list[np.ndarray]] = {}
        scores: dict[str, list[list[Tensor]]] = {}
        fit_losses = []
        for index, (stepper, split) in enumerate(zip(search.steppers, self.splits, strict=True)):
            gradient = None
            if not stepper.finished():
                loss, gradient = self._loss_and_gradient(stepper, (split.seed, index), split.fit)
                fit_losses.append(loss)
            for kind, point in self._points_to_judge(stepper).items():
                points.setdefault(kind, []).append(point)
                scores.setdefault(kind, []).append(self._scores(point, self.acceptance.examples_to_score(split)))
            if gradient is not None:
                self._step(stepper, gradient)
        entry: dict[str, Any] = {"step": self.round, "penalty": search.penalty}
        if fit_losses:
            entry["fit_loss"] = math.fsum(fit_losses) / len(fit_losses)
        decisions = {kind: self.acceptance.decide(self.splits, kind_scores) for kind, kind_scores in scores.items()}
        for kind, decision in decisions.items():
            entry |= _figures(kind, decision)
            self.selection.consider(decision, Candidate(self.round, search.penalty, kind, points[kind]))
        search.history.append(entry)
        if decisions:
            # γ = 1 is left out: a search from a bad start may improve for many steps before it beats γ = 1.
            search.patience.note([decision for kind, decision in decisions.items() if kind != "zero"])
            search.stopped = search.patience.is_exhausted

    def _points_to_judge(self, stepper: _search.GradientStepper) -> dict[str, np.ndarray]:
        """Return the candidate points of this round by their kind; none where no judgement is due."""
        if self.round % self.judging_interval and self.round != self.steps:
            return {}
        points = {"point": stepper.point()}
        if self.round == 0 and points["point"].any():
            points = {"zero": self.parameterization.untuned, **points}
        if self.round > 0 and self.options.average > 0:
            points["averaged"] = stepper.averaged_point()
        return points

    # The searches on all examples.

    @property
    def _refit_steps(self) -> int:
        return self.refit_steppers[0].steps_done if self.refit_steppers else 0

    @property
    def _needs_refit(self) -> bool:
        best = self.selection.best
        if self.options.combine != "refit" or best is None or self.refit_is_out_of_time:
            return False
        return self._refit_steps < best.step

    def _advance_refit(self) -> None:
        assert self.selection.best is not None
        if not self.refit_steppers:
            self.refit_steppers = self._new_steppers(self.selection.best.penalty, self.options.search_count)
        for index, stepper in enumerate(self.refit_steppers):
            order_seed = (self.options.seed + index, len(self.splits))
            _, gradient = self._loss_and_gradient(stepper, order_seed, self.all_examples)
            self._step(stepper, gradient)

    # The result.

    def result(self) -> SearchResult:
        """Return the selected point; the caller tests it with AcceptanceTest.accepts."""
        best = self.selection.best
        if best is None:
            untuned = self.parameterization.untuned
            return SearchResult(None, [(split, untuned) for split in self.splits], {"step": 0})
        points, combine = best.points, "average"
        if self.refit_steppers and self._refit_steps == best.step:
            averaged, combine = best.kind == "averaged", "refit"
            points = [stepper.averaged_point() if averaged else stepper.point() for stepper in self.refit_steppers]
        chosen = {"step": best.step, "penalty": best.penalty, "kind": best.kind, "combine": combine}
        return SearchResult(np.mean(points, axis=0), list(zip(self.splits, best.points, strict=True)), chosen)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Losses by step and penalty."""
        return sorted((entry for search in self.searches for entry in search.history), key=lambda entry: entry["step"])

    # State.

    def state(self) -> dict[str, Any]:
        """Return the state of all searches as JSON values."""
        best = self.selection.best
        return {
            "round": self.round,
            "searches": [
                {
                    "steppers": [stepper.state() for stepper in search.steppers],
                    "patience": search.patience.state(),
                    "stopped": search.stopped,
                    "history": search.history,
                }
                for search in self.searches
            ],
            "best": None
            if best is None
            else {
                "loss": self.selection.loss,
                "step": best.step,
                "penalty": best.penalty,
                "kind": best.kind,
                "points": [point.tolist() for point in best.points],
            },
            "refit_steppers": [stepper.state() for stepper in self.refit_steppers],
            "refit_is_out_of_time": self.refit_is_out_of_time,
        }

    def restore(self, saved: SavedFields) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: A field is missing or wrong; the message names it.
        """
        self.round = saved.integer("round", 0, self.steps + 1)
        for search, fields in zip(self.searches, saved.objects("searches", len(self.searches)), strict=True):
            fields.restore("steppers", search.steppers)
            search.patience.restore(fields.fields("patience"))
            search.stopped, search.history = fields.flag("stopped"), fields.history("history")
        if saved.value("best") is not None:
            best = saved.fields("best")
            points = best.points("points", len(self.splits), self.parameterization.count)
            step = best.integer("step", 0, self.steps)
            self.selection.best = Candidate(step, best.number("penalty", 0), best.text("kind"), points)
            self.selection.loss = best.number("loss")
            if saved.items("refit_steppers"):
                self.refit_steppers = self._new_steppers(self.selection.best.penalty, self.options.search_count)
                saved.restore("refit_steppers", self.refit_steppers)
        self.refit_is_out_of_time = saved.flag("refit_is_out_of_time")

    # Parts.

    def _new_steppers(self, penalty: float, count: int) -> list[_search.GradientStepper]:
        return [
            _search.GradientStepper(
                self.parameterization.count,
                steps=self.steps,
                learning_rate=self.options.learning_rate,
                epsilon=self.options.epsilon,
                l2_penalty=penalty,
                max_abs_log_scale=MAX_ABS_LOG_SCALE,
                average_decay=self.options.average,
                start=self.parameterization.start,
            )
            for _ in range(count)
        ]

    def _loss_and_gradient(
        self, stepper: _search.GradientStepper, order_seed: tuple[int, int], indices: ExampleIndices
    ) -> tuple[float, np.ndarray]:
        """Return loss and gradient dL/dx [P] at the stepper's point, on the examples of its next step."""
        chosen = [
            examples_of_step(part, self.options.examples_per_step, order_seed, stepper.steps_done) for part in indices
        ]
        log_scale = self.parameterization.log_scale(stepper.point())
        loss, gradient = self.objective.loss_and_gradient(log_scale, chosen)
        if not math.isfinite(loss):
            raise ZeroTuningError(f"the model's loss must be finite, got {loss}")
        return loss, self.parameterization.point_gradient(gradient)

    def _scores(self, point: np.ndarray, indices: ExampleIndices) -> list[Tensor]:
        if not point.any():
            return self.acceptance.baseline_scores(indices)
        return self.objective.scores(self.parameterization.log_scale(point), indices)

    @staticmethod
    def _step(stepper: _search.GradientStepper, gradient: np.ndarray) -> None:
        try:
            stepper.step(gradient)
        except ValueError as error:
            raise ZeroTuningError(f"the gradient of the model's loss cannot be used: {error}") from error


def _figures(kind: str, decision: Decision) -> dict[str, Any]:
    """The entries of the report's history for a decision."""
    name = "held_out" if kind == "point" else f"{kind}_held_out"
    loss = decision.loss if math.isfinite(decision.loss) else None
    return {f"{name}_loss": loss, f"{name}_accuracy": decision.accuracy} | decision.details
