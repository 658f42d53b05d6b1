"""A task of film reviews, its examples, and a calibration of a model on these examples."""

from __future__ import annotations

from typing import Any

import zerotuning as zt
from zerotuning.tasks.task import Task

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
FIRST = ("good", "bad", "a good story", "far too long")
SECOND = ("told", "long", "well told", "far too well told", "a story")
# All examples have one label: a change that helps one example helps the others, so that a search lowers the loss.
RECORDS = [{"text": f"the film is {one} and {two}", "label": 1} for one in FIRST for two in SECOND]


def calibrate(tiny: tuple[Any, Any], task: Any = FILMS, **changes: Any) -> Any:
    settings: dict[str, Any] = {"records": RECORDS, "steps": 4, "folds": 2}
    return zt.calibrate(*tiny, task, **(settings | changes))


def loss_of(tiny: tuple[Any, Any], scales: Any, records: Any = RECORDS, task: Task = FILMS) -> float:
    zt.patch(tiny[0])
    zt.apply_scales(tiny[0], scales)
    try:
        return float(zt.evaluate(*tiny, task, records).loss)
    finally:
        zt.unpatch(tiny[0])
