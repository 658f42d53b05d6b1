"""`zerotuning bench sensitivity`: every head's ∂L/∂log γ by one gradient, against two evaluations a head."""

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
from zerotuning.tasks.task import Task

#: Half the distance, in log γ, of a head's two evaluations. Float32 rounding is far below the difference it makes.
HALF_STEP = 0.05


def sensitivity_rows(
    name: str = "demo", device: str | None = None, task: str = "sst2", examples: int = 32
) -> Iterator[dict[str, Any]]:
    """One row: seconds of both, their ratio, Spearman's rank correlation. The model is in float32."""
    model, tokenizer = load_model(name, torch.float32, device)
    chosen = Task.load(task)
    scorer = LabelScorer(model, tokenizer, chosen, chosen.examples("validation", examples), batch_size=examples)
    patch(model)
    with head_parameters(model) as parameters:
        _gradient(scorer, parameters)  # warms up
        found, seconds = _timed(lambda: _gradient(scorer, parameters))
        measured, slow = _timed(
            lambda: _measured(scorer, CandidateScorer(model, parameters, OutOfMemoryRetry()), len(found))
        )
    unpatch(model)
    peers = {
        "one gradient": {"s": seconds},
        "two evaluations a head": {
            "s": slow,
            "times the gradient's": slow / seconds,
            "rank correlation": rank_correlation(found, measured),
        },
    }
    shape = f"{len(found)} heads, {examples} examples of {task}"
    yield {"what": "sensitivity", "shape": shape, "dtype": "float32", "peers": peers}


def _timed(call: Any) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    value = call()  # its numbers are on the CPU: the GPU has finished
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
    """Central differences, head by head; candidates share passes where that is faster."""
    points = np.concatenate((np.eye(heads), -np.eye(heads))) * HALF_STEP
    sums = np.zeros(2 * heads)
    for index, batch, scores in candidates.scores(scorer, scorer.batches, list(points)):
        sums[index] += float(objectives.task_loss(scores, batch.labels.to(scores.device))) * len(batch)
    losses = sums / len(scorer)
    return (losses[:heads] - losses[heads:]) / (2 * HALF_STEP)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks (ties do not occur among measured numbers)."""
    one, other = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return float(np.corrcoef(one, other)[0, 1])
