"""Few-shot prompts: a seeded draw of solved examples, and the remaining examples without the drawn ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record, as_records
from zerotuning.tasks.prompts import MAX_SHOTS
from zerotuning.tasks.task import Task

#: Makes this draw independent of other draws with the same seed (calibration/folds.py).
_STREAM = 2


def draw_shots(task: Task, records: Iterable[Mapping[str, Any]], count: int, seed: int = 0) -> list[Record]:
    """Draw solved examples for `task.with_shots`.

    The seed determines an order of the records. For a task with fixed labels, each round draws the next record of every
    label, with the labels in a random order. The numbers of any two labels differ by at most one until a label has no
    more records, and with the same seed the first four of eight shots are the shots of a draw of four. For other tasks
    the draw is the first `count` records.

    Args:
        task: The task.
        records: The examples to draw from.
        count: Number of examples to draw, 0 to 16.
        seed: The seed, at least 0.

    Raises:
        ZeroTuningError: The count or the seed is out of range, there are fewer records, or a record lacks its label.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_SHOTS:
        raise ZeroTuningError(f"shots must be an integer from 0 to {MAX_SHOTS}, got {count!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ZeroTuningError(f"shot seed must be an integer of at least 0, got {seed!r}")
    candidates = as_records(records)
    if count > len(candidates):
        raise ZeroTuningError(
            f"shots must be at most {len(candidates)}, the number of examples to draw from, got {count}"
        )
    random = np.random.default_rng((seed, _STREAM))
    shuffled = [candidates[place] for place in random.permutation(len(candidates))]
    if not isinstance(task.labels, tuple) or not task.labels:
        return shuffled[:count]
    by_label: list[list[Record]] = [[] for _ in task.labels]
    for record in shuffled if count else ():
        label = task.render(record, require_label=True).label
        assert label is not None
        by_label[label].append(record)
    drawn: list[Record] = []
    while len(drawn) < count:
        drawn.extend(by_label[label].pop(0) for label in random.permutation(len(by_label)) if by_label[label])
    return drawn[:count]


def without_shots(task: Task, records: Sequence[Record]) -> list[Record]:
    """The records whose prompt is not that of one of the task's shots."""
    prompts = {shot.prompt for shot in task.shots}
    return [record for record in records if task.render(record).own not in prompts] if prompts else list(records)


def without_prompts_of(task: Task, records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """The records whose prompt is not that of one of `others`."""
    prompts = {task.render(record).own for record in others}
    return [record for record in records if task.render(record).own not in prompts]
