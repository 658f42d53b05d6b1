"""The examples that each search fits, those of one gradient step, and those held out to judge the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zerotuning.calibration.options import CalibrationOptions
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record

MIN_EXAMPLES = 4
#: A single fold holds out 1 / SINGLE_FOLD_PARTS of the examples.
SINGLE_FOLD_PARTS = 5

#: For each task, positions in the list of its examples.
ExampleIndices = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Fold:
    """Positions of one task's examples: those that drive a search, and those held out."""

    fit: list[int]
    held_out: list[int]


@dataclass(frozen=True)
class Split:
    """One fold of one seed, over all tasks: positions of the examples that drive one search and of those held out."""

    seed: int
    fit: ExampleIndices
    held_out: ExampleIndices


def draw_examples(records: Sequence[Record], options: CalibrationOptions) -> list[Record]:
    """Draw `options.examples` of the records, or all of them, in an order that `options.seed` decides.

    Raises:
        ZeroTuningError: There are fewer records than `options.examples` or than MIN_EXAMPLES.
    """
    if options.examples is not None and len(records) < options.examples:
        raise ZeroTuningError(f"examples must be at most {len(records)}, the number of records, got {options.examples}")
    if len(records) < MIN_EXAMPLES:
        raise ZeroTuningError(f"calibration needs at least {MIN_EXAMPLES} examples, got {len(records)}")
    order = np.random.default_rng(options.seed).permutation(len(records))[: options.examples]
    return [records[i] for i in order]


def make_folds(examples: Sequence[Record], count: int, seed: int) -> list[Fold]:
    """Cut the examples into `count` folds, each of which holds out another part; every part has each label's share.

    With fewer examples than twice `count` there are fewer folds. A single fold holds out one fifth.
    Different seeds give different parts.
    """
    parts = SINGLE_FOLD_PARTS if count == 1 else max(2, min(count, len(examples) // 2))
    order = np.random.default_rng((seed, 1)).permutation(len(examples))
    # A stable sort by label: every k-th example of the sorted list has the labels in their shares.
    by_label = sorted(order.tolist(), key=lambda i: str(examples[i].get("label")))
    held_out = [by_label[part::parts] for part in range(parts)]
    if count == 1:
        held_out = [by_label[parts // 2 :: parts]]
    return [Fold([i for i in range(len(examples)) if i not in set(part)], sorted(part)) for part in held_out]


def make_splits(examples: Sequence[Sequence[Record]], options: CalibrationOptions) -> list[Split]:
    """Make a Split of every fold of every seed. Tasks with fewer folds than others repeat their folds.

    Args:
        examples: The examples of each task.
        options: The calibration's options.
    """
    splits = []
    for seed in range(options.seed, options.seed + options.search_count):
        folds = [make_folds(records, options.fold_count, seed) for records in examples]
        for index in range(max(map(len, folds))):
            parts = [folds_of_task[index % len(folds_of_task)] for folds_of_task in folds]
            splits.append(Split(seed, [part.fit for part in parts], [part.held_out for part in parts]))
    return splits


def pooled_held_out(splits: Sequence[Split]) -> ExampleIndices:
    """Return the held-out examples of all splits, task by task, in the splits' order."""
    return [[index for split in splits for index in split.held_out[task]] for task in range(len(splits[0].held_out))]


def examples_of_step(indices: Sequence[int], count: int, order_seed: tuple[int, ...], step: int) -> list[int]:
    """Return the `count` examples, or all of them, that gradient step `step` sees.

    Steps walk through all examples, epoch after epoch; `order_seed` decides each epoch's order.
    """
    if count >= len(indices):
        return list(indices)
    chosen = range(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng((*order_seed, epoch)).permutation(len(indices))
        for epoch in {index // len(indices) for index in chosen}
    }
    return list(dict.fromkeys(indices[orders[index // len(indices)][index % len(indices)]] for index in chosen))
