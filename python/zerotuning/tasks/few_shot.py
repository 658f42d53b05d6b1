"""Which solved examples stand before a prompt, drawn by a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record, as_records
from zerotuning.tasks.prompts import MOST_SHOTS
from zerotuning.tasks.task import Task

#: Sets this draw apart from the others that one seed drives (example_folds.py).
_STREAM = 2


def draw_shots(task: Task, records: Iterable[Mapping[str, Any]], count: int, seed: int = 0) -> list[Record]:
    """`count` (0 to 16) of the records, for `task.with_shots`.

    The seed puts the records in an order. Where the task has fixed labels the draw goes round by round: each takes
    the next record of every label, the labels in an order drawn for that round. So no label comes up more than once
    more often than another unless its records run out, and with one seed the first four of eight shots are the four
    of a draw of four. Elsewhere it takes the first `count`.

    Errors: ZeroTuningError for another count, more than there are records, a record without its label.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_SHOTS:
        raise ZeroTuningError(f"shots must be an integer from 0 to {MOST_SHOTS}, got {count!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ZeroTuningError(f"shot seed must be an integer of at least 0, got {seed!r}")
    known = as_records(records)
    if count > len(known):
        raise ZeroTuningError(
            f"shots must be at most {len(known)}, the examples that they can be drawn from, got {count}"
        )
    random = np.random.default_rng((seed, _STREAM))
    shuffled = [known[place] for place in random.permutation(len(known))]
    if not isinstance(task.labels, tuple) or not task.labels:
        return shuffled[:count]
    left: list[list[Record]] = [[] for _ in task.labels]
    for record in shuffled if count else ():
        label = task.render(record, require_label=True).label
        assert label is not None
        left[label].append(record)
    drawn: list[Record] = []
    while len(drawn) < count:
        drawn.extend(left[label].pop(0) for label in random.permutation(len(left)) if left[label])
    return drawn[:count]


def without_shots(task: Task, records: Sequence[Record]) -> list[Record]:
    """The records whose prompt is none of the task's shots."""
    taken = {shot.prompt for shot in task.shots}
    return [record for record in records if task.render(record).own not in taken] if taken else list(records)


def without_prompts_of(task: Task, records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """The records whose prompt is none of the others'."""
    taken = {task.render(record).own for record in others}
    return [record for record in records if task.render(record).own not in taken]
