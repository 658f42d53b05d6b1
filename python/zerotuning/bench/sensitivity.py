"""`zerotuning bench sensitivity`: ∂L/∂log γ of every head by one gradient, against two evaluations for each head."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerotuning.calibration.batched_candidates import CandidateScorer
from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.evaluation import objectives
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.loading import load_model
from zerotuning.patching.patch import head_parameters, patch, unpatch
from zerotuning.statistics import rank_correlation
from zerotuning.tasks.task import Task

#: Half the distance in log γ between a head's two evaluations: float32 rounding is far below the loss's difference.
HALF_STEP = 0.05


def sensitivity_rows(
    name: str = "demo", device: str | None = None, task: str = "sst2", examples: int = 32
) -> Iterator[dict[str, Any]]:
    """Measure every head's sensitivity both ways: one row with seconds, their ratio and Spearman's rank correlation.

    Args:
        name: A model as `load_model` accepts it; its weights are loaded as float32.
        device: As `load_model` accepts it.
        task: A built-in task.
        examples: How many of its validation examples.
    """
    model, tokenizer = load_model(name, torch.float32, device)
    loaded_task = Task.load(task)
    scorer = LabelScorer(
        model, tokenizer, loaded_task, loaded_task.examples("validation", examples), batch_size=examples
    )
    patch(model)
    with head_parameters(model) as parameters:
        _gradient(scorer, parameters)  # warms up
        derived, seconds = _timed(lambda: _gradient(scorer, parameters))
        measured, slow = _timed(
            lambda: _measured(scorer, CandidateScorer(model, parameters, OutOfMemoryRetry()), len(derived))
        )
    unpatch(model)
    peers = {
        "one gradient": {"s": seconds},
        "two evaluations a head": {
            "s": slow,
            "times the gradient's": slow / seconds,
            "rank correlation": rank_correlation(derived.tolist(), measured.tolist()),
        },
    }
    shape = f"{len(derived)} heads, {examples} examples of {task}"
    yield {"what": "sensitivity", "shape": shape, "dtype": "float32", "peers": peers}


def _timed(call: Any) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    value = call()  # the result is on the CPU: the GPU has finished
    return value, time.perf_counter() - started


def _mean_loss(scorer: LabelScorer) -> Tensor:
    losses = [
        objectives.task_loss(scorer.scores(batch), batch.labels.to(scorer.model.device)) * len(batch)  # type: ignore[arg-type]
        for batch in scorer.batches
    ]
    return torch.stack(losses).sum() / len(scorer)


def _gradient(scorer: LabelScorer, parameters: list[Tensor]) -> np.ndarray:
    return torch.cat(torch.autograd.grad(_mean_loss(scorer), parameters)).cpu().numpy()


def _measured(scorer: LabelScorer, candidates: CandidateScorer, heads: int) -> np.ndarray:
    """Central differences, head by head; several candidates share a pass where that is faster."""
    points = np.concatenate((np.eye(heads), -np.eye(heads))) * HALF_STEP
    sums = np.zeros(2 * heads)
    for index, batch, scores in candidates.scores(scorer, scorer.batches, list(points)):
        sums[index] += float(objectives.task_loss(scores, batch.labels.to(scores.device))) * len(batch)
    losses = sums / len(scorer)
    return (losses[:heads] - losses[heads:]) / (2 * HALF_STEP)
