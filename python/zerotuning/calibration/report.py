"""The figures of a calibration's report: loss, accuracy and entropy on the held-out examples, before and after."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zerotuning.calibration.acceptance import AcceptanceTest
from zerotuning.calibration.folds import ExampleIndices, Split, pooled_held_out
from zerotuning.calibration.objective import CalibrationObjective
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.search_result import SearchResult
from zerotuning.evaluation import objectives
from zerotuning.tasks.task import Task
from zerotuning.version import __version__

#: The report's fields in zerotuning_config.json: only fields that two runs of the same command have in common.
METADATA_FIELDS = (
    "prompts",
    "examples",
    "held_out_examples",
    "folds",
    "steps",
    "seed",
    "num_searches",
    "seeds",  # the old name of num_searches, for one version
    "baseline",
    "tuned",
    "chosen",
    "improved",
)


def held_out_figures(
    objective: CalibrationObjective,
    parameterization: ScaleParameterization,
    result: SearchResult,
    acceptance: AcceptanceTest,
) -> dict[str, Any]:
    """Measure the held-out examples of every split with the scales that were fitted without these examples.

    Returns:
        `held_out_examples`, their number; `baseline` and `tuned` (loss, accuracy, entropy); `tasks`, the same for each
        task with its confusion; `by_seed`, the tuned figures of each search, and their `spread`.
    """
    before, after, by_seed = [], [], []
    for split, point in result.held_out_points:
        before.append(acceptance.baseline_scores(split.held_out))
        after.append(objective.scores(parameterization.log_scale(point), split.held_out) if point.any() else before[-1])
    splits = [split for split, _ in result.held_out_points]
    for seed in dict.fromkeys(split.seed for split in splits):
        of_seed = [index for index, split in enumerate(splits) if split.seed == seed]
        figures = _figures(objective, [splits[i] for i in of_seed], [after[i] for i in of_seed])
        by_seed.append({"seed": seed, **figures})
    return {
        "held_out_examples": sum(len(set(indices)) for indices in pooled_held_out(splits)),
        "baseline": _figures(objective, splits, before),
        "tuned": _figures(objective, splits, after),
        "tasks": _by_task(objective, splits, before, after),
        "by_seed": by_seed,
        "spread": _spread(by_seed),
    }


def prompt_settings(task: Task) -> dict[str, Any]:
    """Return how the task's prompts are made: few-shot examples, chat template, scoring."""
    shots = {"shots": len(task.shots)} | ({} if task.shot_seed is None else {"shot_seed": task.shot_seed})
    return {"task": task.name, **shots, "chat": task.chat, "scoring": task.scoring}


def versions() -> dict[str, str]:
    """Return the versions of zerotuning, torch and Python."""
    return {"zerotuning": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _figures(
    objective: CalibrationObjective, splits: Sequence[Split], results: Sequence[Sequence[Tensor]]
) -> dict[str, float | None]:
    scores, indices = [torch.cat(parts) for parts in zip(*results, strict=True)], pooled_held_out(splits)
    return _mean_figures(objective, scores, indices)


def _mean_figures(
    objective: CalibrationObjective, scores: Sequence[Tensor], indices: ExampleIndices
) -> dict[str, float | None]:
    labelled = all(not task.task.continuation for task in objective.tasks)
    entropies = [float(objectives.entropy(part)) for part in scores] if labelled else []
    return {
        "loss": objective.loss_of(scores, indices),
        "accuracy": objective.accuracy_of(scores, indices),
        "entropy": statistics.fmean(entropies) if entropies else None,
    }


def _by_task(
    objective: CalibrationObjective,
    splits: Sequence[Split],
    before: Sequence[Sequence[Tensor]],
    after: Sequence[Sequence[Tensor]],
) -> list[dict[str, Any]]:
    tasks = []
    for index, (task, indices) in enumerate(zip(objective.tasks, pooled_held_out(splits), strict=True)):
        entry: dict[str, Any] = {
            "task": task.task.name,
            "labels": _label_names(task.task.labels, task.scorer.num_labels),
        }
        for name, results in (("baseline", before), ("tuned", after)):
            scores = torch.cat([parts[index] for parts in results])
            if task.task.continuation:
                continue
            labels = task.scorer.labels[indices]
            entry[f"{name}_entropies"] = [round(value, 5) for value in objectives.entropy_per_example(scores).tolist()]
            entry[f"{name}_predictions"] = torch.bincount(scores.argmax(-1), minlength=scores.shape[1]).tolist()
            if task.has_labels:
                entry[f"{name}_accuracy"] = objectives.accuracy(scores, labels)
                entry[f"{name}_confusion"] = confusion(labels, scores.argmax(-1), scores.shape[1])
        tasks.append(entry)
    return tasks


def confusion(labels: Tensor, predictions: Tensor, count: int) -> list[list[int]]:
    """Count the examples of each gold label (rows) that were predicted as each label (columns).

    Returns:
        [count][count] numbers.
    """
    flat = torch.bincount(labels * count + predictions, minlength=count * count)
    return flat.reshape(count, count).tolist()


def _label_names(labels: tuple[str, ...] | str, count: int) -> list[str]:
    if isinstance(labels, str):
        return [chr(ord("A") + index) for index in range(count)]
    return [label.strip() for label in labels]


def _spread(by_seed: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The standard deviations over seeds; None for a single seed."""
    if len(by_seed) < 2:
        return None
    names = [name for name in ("loss", "accuracy") if all(one[name] is not None for one in by_seed)]
    return {name: statistics.stdev(one[name] for one in by_seed) for name in names}
