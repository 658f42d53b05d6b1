"""The gradient method over folds: one search a fold, side by side, judged together by what each holds out.

All searches of one penalty take their steps in lockstep. Every few steps the examples that each fold holds out are
scored at that fold's point; together these are scores of all examples by scales that never saw them. The step, the
penalty and the kind of point (the last one, or the moving average) with the least loss on them are chosen; γ = 1 is
the first candidate, so that scales worse than it there are never returned. The result is the mean of the folds' log γ
there, in which what a fold learned from its own examples alone averages out, or a search on all examples that stops
at that step.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from zerotuning import _search
from zerotuning.calibration.acceptance import AcceptanceTest
from zerotuning.calibration.folds import Places, Split, examples_of_step
from zerotuning.calibration.objective import Measurement
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import MAX_ABS_LOG_SCALE, ScaleParameterization
from zerotuning.calibration.search_result import SearchResult
from zerotuning.errors import ZeroTuningError

#: Judged so many times on the way to the last step, and at least every so many steps: a budget of seconds may end
#: the search anywhere.
JUDGEMENTS = 20
LONGEST_UNJUDGED = 5
#: Told to an optimiser, which takes finite numbers only, for a held-out loss that is none.
FAILED = 1e30


@dataclass
class _Candidate:
    """The best so far: where it was found and the point of each of that penalty's searches."""

    loss: float
    step: int
    penalty: float
    kind: str
    points: list[np.ndarray]


@dataclass
class _Group:
    """The searches of one penalty, a split each."""

    penalty: float
    optimizers: list[_search.GradientOptimizer]
    least: float = math.inf
    judgements_without_gain: int = 0
    stopped: bool = False
    curve: list[dict[str, Any]] = field(default_factory=list)


class GradientSearch:
    """One round of `advance` is one step of every search that goes on; `state` after it is all there is to know."""

    def __init__(
        self,
        measurement: Measurement,
        parameterization: ScaleParameterization,
        options: CalibrationOptions,
        splits: Sequence[Split],
        all_examples: Places,
        acceptance: AcceptanceTest,
    ) -> None:
        self.measurement, self.parameterization, self.options = measurement, parameterization, options
        self.splits, self.all_examples, self.acceptance = list(splits), all_examples, acceptance
        self.steps = options.total_steps
        self.groups = [
            _Group(penalty, [self._optimizer(penalty) for _ in self.splits]) for penalty in options.l2_penalties
        ]
        self.round = 0
        self.best: _Candidate | None = None
        self.refits: list[_search.GradientOptimizer] = []
        self.refit_round = 0
        self.out_of_time = False

    # The loop.

    @property
    def steps_total(self) -> int:
        return self.steps * (2 if self.options.combine == "refit" else 1)

    @property
    def steps_done(self) -> int:
        return min(self.round, self.steps) + self.refit_round

    @property
    def folds_finished(self) -> bool:
        return self.round > self.steps or all(group.stopped for group in self.groups)

    @property
    def finished(self) -> bool:
        return self.folds_finished and not self._refit_is_wanted()

    @property
    def least_loss(self) -> float:
        return self.acceptance.baseline.loss if self.best is None else self.best.loss

    @property
    def share_of_time(self) -> float:
        """How much of a budget of seconds this part of the search may have used."""
        folds_only = self.options.combine == "average" or self.folds_finished
        return 1.0 if folds_only else len(self.splits) / (len(self.splits) + self.options.search_count)

    def stop(self) -> None:
        """Ends this part of the search where it stands."""
        if self.folds_finished:
            self.out_of_time = True
        for group in self.groups:
            group.stopped = True

    def advance(self) -> None:
        if not self.folds_finished:
            for group in self.groups:
                if not group.stopped:
                    self._advance_group(group)
            self.round += 1
        elif self._refit_is_wanted():
            self._advance_refit()

    def _advance_group(self, group: _Group) -> None:
        judged: dict[str, list[tuple[np.ndarray, list[Tensor]]]] = {}
        fit_losses = []
        for index, (optimizer, split) in enumerate(zip(group.optimizers, self.splits, strict=True)):
            wanted = optimizer.ask()
            answers: list[tuple[float, np.ndarray | None]] = []
            for evaluation, role in zip(wanted, self._roles(wanted), strict=True):
                if role == "gradient":
                    answers.append(self._loss_and_gradient(evaluation.point, split.seed, index, split.fit, self.round))
                    fit_losses.append(answers[-1][0])
                else:
                    # Without labels the folds' predictions are compared, so that each needs those of all examples.
                    places = self.all_examples if self.acceptance.label_free else split.held_out
                    scores = self._scores(evaluation.point, places)
                    loss = self.measurement.loss_of(scores, places)
                    answers.append((loss if math.isfinite(loss) else FAILED, None))
                    judged.setdefault(role, []).append((evaluation.point, scores))
            self._tell(optimizer, answers)
        self._judge(group, judged, fit_losses)

    def _roles(self, wanted: Sequence[_search.Evaluation]) -> list[str]:
        """What each evaluation that an optimiser asks for is: see GradientOptimizer in csrc/search."""
        judged = [evaluation for evaluation in wanted if not evaluation.gradient]
        # The first round judges x = 0 before a start elsewhere; later ones the moving average after the point.
        names = ["zero", "point"][-len(judged) :] if self.round == 0 else ["point", "averaged"]
        left = iter(names)
        return ["gradient" if evaluation.gradient else next(left) for evaluation in wanted]

    def _judge(
        self, group: _Group, judged: Mapping[str, list[tuple[np.ndarray, list[Tensor]]]], fit_losses: Sequence[float]
    ) -> None:
        entry: dict[str, Any] = {"step": self.round, "penalty": group.penalty}
        if fit_losses:
            entry["fit_loss"] = math.fsum(fit_losses) / len(fit_losses)
        least = math.inf
        for kind, results in judged.items():
            verdict = self.acceptance.decide(self.splits, [scores for _, scores in results])
            name = "held_out" if kind == "point" else f"{kind}_held_out"
            entry |= {f"{name}_loss": _finite(verdict.loss), f"{name}_accuracy": verdict.accuracy} | verdict.details
            if not verdict.admissible:
                continue
            least = min(least, verdict.loss)
            if verdict.loss < (self.acceptance.baseline.loss if self.best is None else self.best.loss):
                points = [point for point, _ in results]
                self.best = _Candidate(verdict.loss, self.round, group.penalty, kind, points)
        group.curve.append(entry)
        if judged:
            gained = least < group.least
            group.least = min(group.least, least)
            group.judgements_without_gain = 0 if gained else group.judgements_without_gain + 1
            if self.options.patience and group.judgements_without_gain >= self.options.patience:
                group.stopped = True

    # The search on all examples.

    def _refit_is_wanted(self) -> bool:
        if self.options.combine != "refit" or self.best is None or self.out_of_time:
            return False
        return self.refit_round < self.best.step

    def _advance_refit(self) -> None:
        assert self.best is not None
        if not self.refits:
            self.refits = self._new_refits(self.best)
        for index, optimizer in enumerate(self.refits):
            answers: list[tuple[float, np.ndarray | None]] = []
            for evaluation in optimizer.ask():
                if evaluation.gradient:
                    seed = self.options.seed + index
                    answers.append(
                        self._loss_and_gradient(
                            evaluation.point, seed, len(self.splits), self.all_examples, self.refit_round
                        )
                    )
                else:  # asked to choose among points; which one it is, is known
                    answers.append((0.0, None))
            self._tell(optimizer, answers)
        self.refit_round += 1

    def _new_refits(self, best: _Candidate) -> list[_search.GradientOptimizer]:
        options = {"held_out": False, "evaluate_every": best.step}
        return [self._optimizer(best.penalty, **options) for _ in range(self.options.search_count)]

    def _refitted(self, best: _Candidate) -> np.ndarray:
        """The points at the chosen step: what is asked for next, the moving average last."""
        asked = [optimizer.ask() for optimizer in self.refits]
        chosen = [one[-1] if best.kind == "averaged" else one[0] for one in asked]
        return np.mean([evaluation.point for evaluation in chosen], axis=0)

    # The result.

    def found(self) -> SearchResult:
        """What was chosen. `point` is not judged yet as a whole: see AcceptanceTest.accepts."""
        if self.best is None:
            zero = self.parameterization.untuned
            return SearchResult(None, [(split, zero) for split in self.splits], {"step": 0})
        best = self.best
        refitted = self.options.combine == "refit" and self.refit_round == best.step
        point = self._refitted(best) if refitted else np.mean(best.points, axis=0)
        chosen = {
            "step": best.step,
            "penalty": best.penalty,
            "kind": best.kind,
            "combine": "refit" if refitted else "average",
        }
        return SearchResult(point, list(zip(self.splits, best.points, strict=True)), chosen)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Losses by step and penalty."""
        return sorted((entry for group in self.groups for entry in group.curve), key=lambda entry: entry["step"])

    # State.

    def state(self) -> dict[str, Any]:
        best = self.best
        return {
            "round": self.round,
            "refit_round": self.refit_round,
            "out_of_time": self.out_of_time,
            "groups": [
                {
                    "optimizers": [optimizer.state() for optimizer in group.optimizers],
                    "least": _finite(group.least),
                    "judgements_without_gain": group.judgements_without_gain,
                    "stopped": group.stopped,
                    "curve": group.curve,
                }
                for group in self.groups
            ],
            "best": None if best is None else {**vars(best), "points": [_encoded(point) for point in best.points]},
            "refits": [optimizer.state() for optimizer in self.refits],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. ValueError, KeyError or TypeError for one that is damaged."""
        self.round, self.refit_round = int(state["round"]), int(state["refit_round"])
        self.out_of_time = bool(state["out_of_time"])
        for group, saved in zip(self.groups, state["groups"], strict=True):
            for optimizer, text in zip(group.optimizers, saved["optimizers"], strict=True):
                optimizer.restore(text)
            group.least = math.inf if saved["least"] is None else float(saved["least"])
            group.judgements_without_gain = int(saved["judgements_without_gain"])
            group.stopped, group.curve = bool(saved["stopped"]), list(saved["curve"])
        best = state["best"]
        if best is not None:
            self.best = _Candidate(**{**best, "points": [_decoded(text) for text in best["points"]]})
        if state["refits"] and self.best is not None:
            self.refits = self._new_refits(self.best)
            for optimizer, text in zip(self.refits, state["refits"], strict=True):
                optimizer.restore(text)

    # Parts.

    def _optimizer(self, penalty: float, **changes: Any) -> _search.GradientOptimizer:
        settings: dict[str, Any] = {
            "steps": self.steps,
            "learning_rate": self.options.learning_rate,
            "epsilon": self.options.epsilon,
            "penalty": penalty,
            "max_abs_log_scale": MAX_ABS_LOG_SCALE,
            "evaluate_every": min(max(1, round(self.steps / JUDGEMENTS)), LONGEST_UNJUDGED),
            "patience": 0,  # judged here, over all folds
            "average": self.options.average,
            "start": self.parameterization.start,
        }
        return _search.GradientOptimizer(self.parameterization.count, **(settings | changes))

    def _loss_and_gradient(
        self, point: np.ndarray, seed: int, fold: int, places: Places, step: int
    ) -> tuple[float, np.ndarray]:
        chosen = [examples_of_step(part, self.options.examples_per_step, (seed, fold), step) for part in places]
        loss, gradient = self.measurement.loss_and_gradient(self.parameterization.log_scale(point), chosen)
        return loss, self.parameterization.point_gradient(gradient)

    def _scores(self, point: np.ndarray, places: Places) -> list[Tensor]:
        if not point.any():
            return self.acceptance.baseline_scores(places)
        return self.measurement.scores(self.parameterization.log_scale(point), places)

    @staticmethod
    def _tell(optimizer: _search.Optimizer, answers: Sequence[tuple[float, np.ndarray | None]]) -> None:
        try:
            optimizer.tell(answers)
        except ValueError as error:
            raise ZeroTuningError(f"the model's loss cannot be used: {error}") from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _encoded(point: np.ndarray) -> str:
    """Float64 numbers as text that gives the same bits again."""
    return base64.b64encode(np.ascontiguousarray(point, dtype="<f8").tobytes()).decode("ascii")


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)
