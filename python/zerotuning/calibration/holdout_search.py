"""The paper's method and CMA-ES: one search a seed, which holds a fifth of the examples out and judges itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zerotuning import _search
from zerotuning.calibration.folds import Split
from zerotuning.calibration.gradient_search import FAILED
from zerotuning.calibration.objective import Measurement
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import MAX_ABS_LOG_SCALE, ScaleParameterization
from zerotuning.calibration.search_result import SearchResult
from zerotuning.errors import ZeroTuningError


class HoldoutSearch:
    """One round of `advance` answers what one search asks for at once; the searches run one after another."""

    share_of_time = 1.0

    def __init__(
        self,
        measurement: Measurement,
        parameterization: ScaleParameterization,
        options: CalibrationOptions,
        splits: Sequence[Split],
    ) -> None:
        self.measurement, self.parameterization, self.options = measurement, parameterization, options
        self.splits = list(splits)
        self.optimizers = [new_optimizer(parameterization, options, split.seed) for split in self.splits]
        self.history: list[dict[str, Any]] = []
        self.stopped = False

    @property
    def steps_total(self) -> int:
        return sum(optimizer.steps_total() for optimizer in self.optimizers)

    @property
    def steps_done(self) -> int:
        return sum(optimizer.steps_done() for optimizer in self.optimizers)

    @property
    def finished(self) -> bool:
        return self.stopped or all(optimizer.finished() for optimizer in self.optimizers)

    @property
    def least_loss(self) -> float:
        known = [optimizer.best_loss() for optimizer in self.optimizers]
        return min((loss for loss in known if not math.isnan(loss)), default=math.nan)

    def stop(self) -> None:
        self.stopped = True

    def advance(self) -> None:
        index = next(i for i, optimizer in enumerate(self.optimizers) if not optimizer.finished())
        optimizer, split = self.optimizers[index], self.splits[index]
        entry: dict[str, Any] = {"step": self.steps_done}
        asked = optimizer.ask()
        answers: list[tuple[float, np.ndarray | None]] = [(FAILED, None)] * len(asked)
        for part, places in (("fit", split.fit), ("held_out", split.held_out)):
            chosen = [i for i, wanted in enumerate(asked) if wanted.part == part]
            if not chosen:
                continue
            losses = self.measurement.losses([self.parameterization.log_scale(asked[i].point) for i in chosen], places)
            for i, loss in zip(chosen, losses, strict=True):
                answers[i] = (loss if math.isfinite(loss) else FAILED, None)
            entry[f"{part}_loss"] = min(answers[i][0] for i in chosen)
        try:
            optimizer.tell(answers)
        except ValueError as error:
            raise ZeroTuningError(f"the model's loss cannot be used: {error}") from error
        self.history.append(entry)

    def found(self) -> SearchResult:
        """The search whose held-out loss fell most, if one's did."""
        zero = self.parameterization.untuned
        points = [optimizer.best() for optimizer in self.optimizers]
        falls = [optimizer.baseline_loss() - optimizer.best_loss() for optimizer in self.optimizers]
        best = int(np.argmax([0.0 if math.isnan(fall) else fall for fall in falls]))
        judged = [(split, point if len(point) else zero) for split, point in zip(self.splits, points, strict=True)]
        if not points[best].any():
            return SearchResult(None, judged, {"step": self.steps_done})
        return SearchResult(points[best], judged, {"step": self.steps_done, "seed": self.splits[best].seed})

    @property
    def profile(self) -> dict[str, Any] | None:
        """What the paper's method measured head by head: of the first seed."""
        first = self.optimizers[0]
        if not isinstance(first, _search.PaperOptimizer):
            return None
        return {
            "effect": [None if np.isnan(effect) else float(effect) for effect in first.profile()],
            "direction": first.direction(),
            "group": first.group(),
        }

    def state(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state() for optimizer in self.optimizers],
            "history": self.history,
            "stopped": self.stopped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. ValueError, KeyError or TypeError for one that is damaged."""
        for optimizer, text in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.restore(text)
        self.history, self.stopped = list(state["history"]), bool(state["stopped"])


def new_optimizer(parameterization: ScaleParameterization, options: CalibrationOptions, seed: int) -> _search.Optimizer:
    """The C++ search that the options ask for."""
    if options.method == "paper":
        if parameterization.start.any():
            raise ZeroTuningError(
                "start: the paper's method begins at γ = 1; exclude the heads that are to keep theirs"
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
    except ValueError as error:  # too few evaluations for a generation
        raise ZeroTuningError(f"method {options.method} with steps = {steps}: {error}") from error
