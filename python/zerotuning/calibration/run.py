"""One calibration's search, from its first or its saved state to a result and a report."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from zerotuning.calibration.acceptance import AcceptanceTest
from zerotuning.calibration.folds import make_splits
from zerotuning.calibration.gradient_search import GradientSearch
from zerotuning.calibration.holdout_search import HoldoutSearch
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.report import held_out_figures, prompt_settings, versions
from zerotuning.calibration.search_result import SearchResult
from zerotuning.calibration.state import CalibrationState
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.objectives import estimated_prior


class CalibrationRun:
    """A search whose state is saved after every step, and its seconds, interruptions excluded.

    Args:
        objective: The objective and its gradient.
        parameterization: Maps the searched numbers to log γ.
        options: The options, after CalibrationOptions.resolved.
        state: The state on disk. A saved search is continued.
    """

    def __init__(
        self,
        objective: CalibrationObjective,
        parameterization: ScaleParameterization,
        options: CalibrationOptions,
        state: CalibrationState,
    ) -> None:
        self.objective = objective
        self.parameterization = parameterization
        self.options = options
        self.state = state
        self.seconds = 0.0
        self.all_examples = [list(range(len(task.records))) for task in objective.tasks]
        self.splits = make_splits([task.records for task in objective.tasks], options)
        self.acceptance: AcceptanceTest | None = None
        if not objective.reads_text:
            self._begin_acceptance()
        self.search = self._new_search()
        self._restore()

    def _begin_acceptance(self) -> None:
        if self.options.prior == "estimate":
            untuned = self.parameterization.log_scale(self.parameterization.untuned)
            scores_of_tasks = self.objective.scores(untuned, self.all_examples)
            for task, scores in zip(self.objective.tasks, scores_of_tasks, strict=True):
                task.prior = estimated_prior(scores)
        self.acceptance = AcceptanceTest(self.objective, self.parameterization, self.all_examples, self.splits)
        if not np.isfinite(self.acceptance.baseline.loss):
            raise ZeroTuningError("the model's scores are not finite at γ = 1")

    def _new_search(self) -> GradientSearch | HoldoutSearch:
        if self.options.method != "gradient":
            return HoldoutSearch(self.objective, self.parameterization, self.options, self.splits)
        assert self.acceptance is not None
        return GradientSearch(
            self.objective, self.parameterization, self.options, self.splits, self.all_examples, self.acceptance
        )

    # The search.

    def _restore(self) -> None:
        saved = self.state.read()
        if saved is None:
            return
        try:
            self.search.restore(saved.fields("search"))
            self.seconds = saved.number("seconds", 0)
            memory, limits = self.objective.memory, saved.fields("memory")
            memory.max_batch_size = limits.integer_or_none("max_batch_size", 1)
            memory.max_candidates = limits.integer_or_none("max_candidates", 1)
            memory.checkpointed, memory.notes = limits.flag("checkpointed"), list(map(str, limits.items("notes")))
        except ValueError as error:
            raise self.state.damaged(error) from error

    def until_finished(self, progress: bool) -> None:
        """Search to the end, or to the end of `options.seconds`.

        Args:
            progress: Whether to draw a progress bar, where stderr is a terminal.
        """
        if self.acceptance is not None and not self.acceptance.has_evidence:
            return
        with tqdm(
            total=self.search.steps_total,
            initial=self.search.steps_done,
            desc="calibrate",
            disable=not (progress and sys.stderr.isatty()),
        ) as bar:
            while not self.search.finished:
                if self._is_out_of_time():
                    self.search.stop()
                    continue
                started = time.perf_counter()
                self.search.advance()
                self.seconds += time.perf_counter() - started
                self._save()
                bar.n = self.search.steps_done
                bar.set_postfix_str(f"held-out loss {self.search.least_loss:.4f}", refresh=True)

    def _is_out_of_time(self) -> bool:
        if self.options.seconds is None:
            return False
        seconds = float(self.objective.processes.broadcast_from_main(repr(self.seconds)))
        return seconds >= self.options.seconds * self.search.share_of_time

    def _save(self) -> None:
        self.state.write(
            {"seconds": self.seconds, "memory": asdict(self.objective.memory), "search": self.search.state()}
        )

    # The result.

    def result(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Return log γ, float64 [layers * heads], and the report."""
        result = self.search.result()
        reason = self._reason_to_reject(result)
        untuned = self.parameterization.untuned
        if reason is not None:
            result = replace(result, point=None, held_out_points=[(split, untuned) for split in self.splits])
        log_scale = self.parameterization.log_scale(untuned if result.point is None else result.point)
        return log_scale, self._report(result, reason)

    def _reason_to_reject(self, result: SearchResult) -> str | None:
        if self.acceptance is not None and not self.acceptance.has_evidence:
            return "the untuned predictions depend too little on the input for a search without labels"
        if result.point is None:
            return "nothing beat γ = 1 on the held-out examples"
        if self.acceptance is not None and not self.acceptance.accepts(self.parameterization.log_scale(result.point)):
            return "the scales chosen on the held-out examples were no better than γ = 1 on all"
        return None

    def _report(self, result: SearchResult, reason: str | None) -> dict[str, Any]:
        options, tasks = self.options, self.objective.tasks
        report: dict[str, Any] = {
            "task": " + ".join(task.task.name for task in tasks),
            "method": options.method,
            "objective": "metric" if self.objective.reads_text else options.objective,
            "prompts": [prompt_settings(task.task) for task in tasks],
            "examples": sum(len(task.records) for task in tasks),
            "folds": len(self.splits) // options.search_count,
            "fit_examples": sum(len(indices) for indices in self.splits[0].fit),
            "steps": self.search.steps_done,
            "seed": options.seed,
            "num_searches": options.search_count,
            "seeds": options.search_count,  # the old name of num_searches, for one version
            "free_heads": self.parameterization.free_heads,
            "numbers_searched": self.parameterization.count,
            "seconds": round(self.seconds, 3),
            "improved": reason is None,
            "reason": reason,
            "chosen": result.chosen,
            **self._held_out(result),
            "evidence": None if self.acceptance is None else self.acceptance.evidence,
            "warnings": self.objective.memory.notes,
            "setbacks": self.objective.memory.notes,  # the old name of warnings, for one version
            "options": options.to_json(),
            "history": self.search.history,
            "versions": versions(),
        }
        if isinstance(self.search, HoldoutSearch) and self.search.profile is not None:
            report["profile"] = self.search.profile
        return report

    def _held_out(self, result: SearchResult) -> dict[str, Any]:
        if self.acceptance is not None:
            return held_out_figures(self.objective, self.parameterization, result, self.acceptance)
        assert isinstance(self.search, HoldoutSearch)
        return {
            "held_out_examples": sum(len(indices) for indices in self.splits[0].held_out),
            "baseline": {"loss": self.search.baseline_loss, "accuracy": None},
            "tuned": {"loss": self.search.least_loss, "accuracy": None},
        }
