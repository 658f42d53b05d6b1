"""The paper's method and CMA-ES: a search for each seed, which holds out one fifth of the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zerotuning import _search
from zerotuning.calibration.acceptance import Decision, Selection
from zerotuning.calibration.folds import ExampleIndices, Split
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import MAX_ABS_LOG_SCALE, ScaleParameterization
from zerotuning.calibration.saved_fields import SavedFields
from zerotuning.calibration.search_result import SearchResult
from zerotuning.errors import ZeroTuningError


class SeedSearch:
    """One seed's search: finalists by their loss on the fit examples, and a choice among them by held-out loss.

    Args:
        optimizer: Proposes points.
        split: The search's examples.

    Attributes:
        selection: The best finalist by held-out loss; None before the loss at γ = 1 is measured.
        is_judged: Whether the finalists' held-out losses are measured.
    """

    def __init__(self, optimizer: _search.Optimizer, split: Split) -> None:
        self.optimizer, self.split = optimizer, split
        self.selection: Selection[np.ndarray] | None = None
        self.is_judged = False

    @property
    def finished(self) -> bool:
        """Whether nothing is left to evaluate."""
        return self.optimizer.finished() and (self.is_judged or not self.optimizer.finalists())

    @property
    def gain(self) -> float:
        """The held-out loss at γ = 1 less that of the best finalist; 0 where no finalist is better."""
        return 0.0 if self.selection is None else self.selection.baseline_loss - self.selection.loss

    @property
    def best(self) -> np.ndarray | None:
        """x [P] of the best finalist; None where γ = 1 is better."""
        return None if self.selection is None else self.selection.best

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        selection = self.selection
        best = None if selection is None or selection.best is None else selection.best.tolist()
        return {
            "optimizer": self.optimizer.state(),
            "baseline_loss": None if selection is None else selection.baseline_loss,
            "best_loss": None if selection is None else selection.loss,
            "best": best,
            "is_judged": self.is_judged,
        }

    def restore(self, saved: SavedFields) -> None:
        """Continue where `state` was taken."""
        saved.restore("optimizer", self.optimizer)
        self.is_judged = saved.flag("is_judged")
        baseline = saved.number_or_none("baseline_loss")
        if baseline is None:
            return
        self.selection = Selection(baseline)
        if saved.value("best") is not None:
            self.selection.best = saved.point("best", self.optimizer.dimension)
            self.selection.loss = saved.number("best_loss")


class HoldoutSearch:
    """The searches of all seeds, one after another. One round, `advance`, evaluates one set of points.

    Args:
        objective: Losses of the examples.
        parameterization: Maps points to log γ.
        options: The calibration's options.
        splits: One for each seed.
    """

    share_of_time = 1.0

    def __init__(
        self,
        objective: CalibrationObjective,
        parameterization: ScaleParameterization,
        options: CalibrationOptions,
        splits: Sequence[Split],
    ) -> None:
        self.objective, self.parameterization, self.options = objective, parameterization, options
        self.searches = [SeedSearch(new_optimizer(parameterization, options, split.seed), split) for split in splits]
        self.history: list[dict[str, Any]] = []
        self.stopped = False

    @property
    def steps_total(self) -> int:
        """The largest possible number of evaluations."""
        return sum(search.optimizer.steps_total for search in self.searches)

    @property
    def steps_done(self) -> int:
        """Evaluations so far."""
        return sum(search.optimizer.steps_done for search in self.searches)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to evaluate."""
        return self.stopped or all(search.finished for search in self.searches)

    @property
    def baseline_loss(self) -> float:
        """The first seed's held-out loss at γ = 1; NaN before the first round."""
        selection = self.searches[0].selection
        return math.nan if selection is None else selection.baseline_loss

    @property
    def least_loss(self) -> float:
        """The least held-out loss so far, γ = 1 included; NaN before the first measurement."""
        losses = [search.selection.loss for search in self.searches if search.selection is not None]
        return min(losses, default=math.nan)

    def stop(self) -> None:
        """End the searches. The finalists so far of each search that has begun are judged."""
        self.stopped = True
        for search in self.searches:
            if search.selection is not None and not search.is_judged:
                self.history.append({"step": self.steps_done, **self._judge(search)})

    def advance(self) -> None:
        """Evaluate the next points of the first unfinished search, or judge its finalists."""
        search = next(search for search in self.searches if not search.finished)
        entry: dict[str, Any] = {"step": self.steps_done}
        if not search.optimizer.finished():
            losses = self._losses(search.optimizer.ask(), search.split.fit)
            search.optimizer.tell(losses)
            entry |= _least_finite("fit_loss", losses)
            if search.selection is None:
                baseline = self._losses([self.parameterization.untuned], search.split.held_out)
                if not math.isfinite(baseline[0]):
                    raise ZeroTuningError("the loss of the held-out examples is not finite at γ = 1")
                search.selection = Selection(baseline[0])
                entry |= _least_finite("held_out_loss", baseline)
        else:
            entry |= self._judge(search)
        self.history.append(entry)

    def _judge(self, search: SeedSearch) -> dict[str, float]:
        """Choose among a search's finalists by their held-out loss, and return an entry of the history."""
        assert search.selection is not None
        points = search.optimizer.finalists()
        losses = self._losses(points, search.split.held_out) if points else []
        for point, loss in zip(points, losses, strict=True):
            # Only the loss is compared here: AcceptanceTest.accepts tests the accuracy, on all examples.
            search.selection.consider(Decision(loss, None, admissible=math.isfinite(loss)), point)
        search.is_judged = True
        return _least_finite("held_out_loss", losses)

    def _losses(self, points: Sequence[np.ndarray], indices: ExampleIndices) -> list[float]:
        return self.objective.losses([self.parameterization.log_scale(point) for point in points], indices)

    def result(self) -> SearchResult:
        """Return the point of the seed whose held-out loss fell most."""
        untuned = self.parameterization.untuned
        points = [(search.split, untuned if search.best is None else search.best) for search in self.searches]
        winner = self.searches[int(np.argmax([search.gain for search in self.searches]))]
        if winner.best is None or not winner.best.any():
            return SearchResult(None, points, {"step": self.steps_done})
        return SearchResult(winner.best, points, {"step": self.steps_done, "seed": winner.split.seed})

    @property
    def profile(self) -> dict[str, Any] | None:
        """The first seed's profile of the heads by the paper's method; None for another method."""
        first = self.searches[0].optimizer
        if not isinstance(first, _search.PaperOptimizer):
            return None
        return {
            "effect": [float(effect) if math.isfinite(effect) else None for effect in first.profile()],
            "direction": first.direction(),
            "group": first.group(),
        }

    def state(self) -> dict[str, Any]:
        """Return the state of all searches as JSON values."""
        return {
            "searches": [search.state() for search in self.searches],
            "history": self.history,
            "stopped": self.stopped,
        }

    def restore(self, saved: SavedFields) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: A field is missing or wrong; the message names it.
        """
        for search, fields in zip(self.searches, saved.objects("searches", len(self.searches)), strict=True):
            search.restore(fields)
        self.history, self.stopped = saved.history("history"), saved.flag("stopped")


def _least_finite(name: str, losses: Sequence[float]) -> dict[str, float]:
    """An entry of the history: the least finite loss; empty where every evaluation failed."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return {name: min(finite)} if finite else {}


def new_optimizer(
    parameterization: ScaleParameterization, options: CalibrationOptions, seed: int
) -> _search.PaperOptimizer | _search.CmaEsOptimizer:
    """Make the optimiser of csrc/search for the options' method.

    Raises:
        ZeroTuningError: A start with the paper's method, or too few evaluations for a generation of CMA-ES.
    """
    if options.method == "paper":
        if parameterization.start.any():
            raise ZeroTuningError(
                "start: the paper's method begins at γ = 1; exclude the heads that must keep their scales"
            )
        return _search.PaperOptimizer(parameterization.count)
    steps = options.total_steps
    try:
        return _search.CmaEsOptimizer(
            parameterization.count,
            seed=seed,
            evaluations=steps,
            max_abs_log_scale=MAX_ABS_LOG_SCALE,
            start=parameterization.start,
        )
    except ValueError as error:
        raise ZeroTuningError(f"method {options.method} with steps = {steps}: {error}") from error
