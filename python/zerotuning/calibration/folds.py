"""Which examples a search fits and which judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerotuning.calibration.options import CalibrationOptions
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.task import Record

LEAST_EXAMPLES = 4
#: One part of so many is held out where there is one fold only.
SINGLE_FOLD_PARTS = 5


@dataclass(frozen=True)
class Fold:
    """Places in the list of examples: those that drive a search, and those kept aside to judge it."""

    fit: list[int]
    held_out: list[int]


def draw_examples(records: Sequence[Record], options: CalibrationOptions) -> list[Record]:
    """`options.examples` of the records, or all, in an order drawn by the seed."""
    if options.examples is not None and len(records) < options.examples:
        raise ZeroTuningError(f"examples must be at most {len(records)}, all there are, got {options.examples}")
    if len(records) < LEAST_EXAMPLES:
        raise ZeroTuningError(f"calibration needs at least {LEAST_EXAMPLES} examples, got {len(records)}")
    order = np.random.default_rng(options.seed).permutation(len(records))[: options.examples]
    return [records[i] for i in order]


def make_folds(examples: Sequence[Record], count: int, seed: int) -> list[Fold]:
    """`count` folds (fewer when there are fewer examples than twice that): each example is held out once.

    The labels keep their shares in every part. One fold holds out one fifth. Different seeds give different parts.
    """
    parts = SINGLE_FOLD_PARTS if count == 1 else max(2, min(count, len(examples) // 2))
    order = np.random.default_rng((seed, 1)).permutation(len(examples))
    # A stable sort by label: every k-th example of the sorted list has the labels in their shares.
    by_label = sorted(order.tolist(), key=lambda i: str(examples[i].get("label")))
    held_out = [by_label[part::parts] for part in range(parts)]
    if count == 1:
        held_out = [by_label[parts // 2 :: parts]]
    everything = range(len(examples))
    return [Fold([i for i in everything if i not in set(one)], sorted(one)) for one in held_out]
