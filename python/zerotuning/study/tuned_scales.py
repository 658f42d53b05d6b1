"""Head scales that a study tunes by gradient; each set is a cell of the study, which a resumed study reads back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from zerotuning.calibration.calibrate import calibrate
from zerotuning.study.experiment import Cell, Row
from zerotuning.study.setting import Setting
from zerotuning.tasks.few_shot import draw_shots, without_shots
from zerotuning.tasks.task import Task


@dataclass(frozen=True)
class _TunedOn:
    """The examples on which scales are tuned: task, seed of the draw, number, and the shots before each prompt."""

    task: str
    seed: int
    examples: int
    shots: int


class TunedScales:
    """log γ [layers, heads] for each task, seed, number of examples and number of shots.

    Args:
        setting: The study's model and examples.
        steps: Gradient steps of each search.
        step_examples: Examples of each step.
    """

    def __init__(self, setting: Setting, steps: int, step_examples: int) -> None:
        self.setting, self.steps, self.step_examples = setting, steps, step_examples
        self._log_scales: dict[_TunedOn, np.ndarray] = {}
        self._requested: set[_TunedOn] = set()

    def cells(self, task: str, seed: int, examples: int, shots: int = 0) -> Iterator[Cell]:
        """Yield the cell that tunes these scales; nothing where an earlier call has yielded it."""
        tuned_on = _TunedOn(task, seed, examples, shots)
        if tuned_on not in self._requested:
            self._requested.add(tuned_on)
            key = {"part": "scales", "task": task, "seed": seed, "examples": examples, "shots": shots}
            key |= {"steps": self.steps, "step_examples": self.step_examples}
            yield Cell(key, partial(self._tune, tuned_on), partial(self._remember, tuned_on))

    def log_scale(self, task: str, seed: int, examples: int, shots: int = 0) -> np.ndarray:
        """The scales of a cell that has been measured or read back: [layers, heads]."""
        return self._log_scales[_TunedOn(task, seed, examples, shots)]

    def _remember(self, tuned_on: _TunedOn, row: Row) -> None:
        self._log_scales[tuned_on] = np.array(row["log_scale"])

    def _tune(self, tuned_on: _TunedOn) -> dict[str, Any]:
        setting = self.setting
        model, tokenizer = setting.loaded()
        task = with_shots(setting.task(tuned_on.task), tuned_on.shots, tuned_on.seed)
        records = without_shots(task, setting.drawn(tuned_on.task, tuned_on.seed, tuned_on.examples))
        started = time.perf_counter()
        result = calibrate(
            model,
            tokenizer,
            task,
            records=records,
            steps=self.steps,
            step_examples=self.step_examples,
            folds=1,
            num_searches=1,
            seed=tuned_on.seed,
            batch_size=setting.batch_size,
        )
        report = result.report
        return {
            "log_scale": [[round(value, 6) for value in row] for row in result.scales.log_scale.tolist()],
            "improved": result.improved,
            "reason": report["reason"],
            "held_out": {"untuned": report["baseline"], "tuned": report["tuned"]},
            "tuning_seconds": round(time.perf_counter() - started, 3),
        }


def with_shots(task: Task, count: int, seed: int) -> Task:
    """The task with `count` of its validation examples, drawn by the seed, solved before each prompt."""
    return task.with_shots(draw_shots(task, task.examples("validation"), count, seed))
