"""Which of several draws of shots a search should stand behind: the one that leaves the untuned model the most to tell.

The loss behind a draw says little by itself: labels that the shots favour, and scores that are too flat or too sure, cost
nats that head scales win back. So the scores behind each draw first get the temperature and the label biases that suit
them best, and the loss that is left decides. Examples that are a shot of some draws are judged behind the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zerotuning.errors import ZeroTuningError
from zerotuning.label_calibration import adjusted, fit_labels
from zerotuning.processes import Processes
from zerotuning.scoring import LabelScorer
from zerotuning.setbacks import Setbacks
from zerotuning.shared_prefix import prefix_read_once
from zerotuning.shots import draw_shots, places_without_shots
from zerotuning.tasks import Record, Task
from zerotuning.tensor_parallelism import is_tensor_parallel

#: Examples that judge a draw. With 196 the loss of two draws differs by 0.02 to 0.05 (standard error), draws by up to 0.2.
MOST_JUDGES = 256
#: A normal prior of standard deviation 3 on each bias (shots favour a label by as many nats) and on the temperature's
#: logarithm, so that a few examples are not fitted one by one.
RIDGE = 1 / 9


@dataclass(frozen=True)
class ShotChoice:
    """What `choose_shots` found.

    task      the chosen task, with its shots
    losses    of every candidate, nats, float64: mean loss of the right label after a temperature and label biases
    setbacks  what was survived on the way
    """

    task: Task
    losses: list[float]
    setbacks: list[str]


def shot_candidates(task: Task, records: Sequence[Record], count: int, seed: int, draws: int) -> list[Task]:
    """The task behind `count` shots, drawn (`draw_shots`) by the seeds seed, seed + 1, … of so many draws; of several
    draws, without shots as well."""
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ZeroTuningError(f"shot draws must be an integer of at least 1, got {draws!r}")
    if draws > 1:
        _check_scoring(task)
    drawn = [task.with_shots(draw_shots(task, records, count, one), seed=one) for one in range(seed, seed + draws)]
    return drawn if draws == 1 else [*drawn, task.with_shots(())]


def choose_shots(
    model: nn.Module,
    tokenizer: Any,
    candidates: Sequence[Task],
    records: Sequence[Record],
    *,
    batch_size: int = 16,
    truncate: bool = False,
) -> ShotChoice:
    """Of tasks that differ in their shots the one behind which the model knows the labels of the records best.

    model, tokenizer   a transformers causal language model as it stands and its tokenizer
    candidates         such as `shot_candidates` gives; with labels to choose among the temperature is fitted, with labels
                       that all examples have the biases too, of a continuation nothing
    records            with labels; the first MOST_JUDGES judge, each all candidates that it is no shot of
    batch_size         prompts that go through the model together, fewer where memory runs out
    truncate           as of `calibrate`
    Errors: ZeroTuningError for scoring `generate`, which gives texts no probabilities, for records without labels, for a
    candidate that is behind all of them, and for scores that are no numbers.
    """
    if not candidates:
        raise ZeroTuningError("candidates must be at least one task, got none")
    for task in candidates:
        _check_scoring(task)
    if len(candidates) == 1:
        return ShotChoice(candidates[0], [math.nan], [])
    judges = list(records[:MOST_JUDGES])
    setbacks = Setbacks()
    losses = np.full((len(candidates), len(judges)), np.nan)
    for task, row in zip(candidates, losses, strict=True):
        own = places_without_shots(task, judges)
        if not own:
            raise ZeroTuningError(
                f"all {len(judges)} examples of task {task.name!r} are shots, none is left to judge them"
            )
        judging = [judges[place] for place in own]
        scorer = LabelScorer(model, tokenizer, task, judging, batch_size=batch_size, truncate=truncate)
        row[own] = losses_after_fit(task, _scores(scorer, setbacks), scorer.labels)
    means = means_over_all_judges(losses)
    told = Processes(share_model=is_tensor_parallel(model)).from_first(" ".join(map(repr, means.tolist())))
    found = [float(text) for text in told.split()]
    if not all(map(math.isfinite, found)):
        raise ZeroTuningError(f"task {candidates[0].name!r}: the model's scores are not finite")
    return ShotChoice(candidates[found.index(min(found))], found, setbacks.notes)


def _check_scoring(task: Task) -> None:
    if task.scoring == "generate":
        raise ZeroTuningError("draws of shots are compared by their loss, which scoring generate does not have")


@torch.no_grad()
def _scores(scorer: LabelScorer, setbacks: Setbacks) -> Tensor:
    """Float32 [n, C], on the CPU; NaN where they are no numbers."""
    scores = torch.full((len(scorer), scorer.num_labels), torch.nan)
    with prefix_read_once(scorer):
        for batch in scorer.batches:
            for piece, found in setbacks.in_pieces(scorer, batch, lambda part: scorer.scores(part).cpu()):
                scores[piece.indices] = found
    return scores


def losses_after_fit(task: Task, scores: Tensor, labels: Tensor) -> np.ndarray:
    """Loss of each example, float64 [n], after what its task allows was fitted to scores [n, C] and labels [n]."""
    if task.continuation:
        return -scores[:, 0].double().numpy()
    known = ~scores.isnan().any(dim=-1)
    losses = np.full(len(scores), np.nan)
    if bool(known.any()):
        own, gold = scores[known].double(), labels[known]
        fitted = fit_labels(own, gold, ridge=RIDGE / len(own), bias=isinstance(task.labels, tuple))
        right = -torch.log_softmax(adjusted(own, *fitted), dim=-1).gather(1, gold[:, None])[:, 0]
        losses[known.numpy()] = right.numpy()
    return losses


def means_over_all_judges(losses: np.ndarray) -> np.ndarray:
    """Means [D] of losses [D, N] as if every draw had been judged by every example, NaN where one was not.

    Least squares of a_d + b_i over the losses that there are: an example that few draws are judged by counts for what it
    tells of these against each other, not for how hard it is.
    """
    present = np.isfinite(losses)
    filled = np.where(present, losses, 0.0)
    judged = present.sum(axis=0)
    present, filled, judged = present[:, judged > 0].astype(float), filled[:, judged > 0], judged[judged > 0]
    of_example = filled.sum(axis=0) / judged
    matrix = np.diag(present.sum(axis=1)) - present / judged @ present.T
    effects = np.linalg.lstsq(matrix, (filled - present * of_example).sum(axis=1), rcond=None)[0]
    level = np.mean(of_example - effects @ present / judged) if len(judged) else np.nan
    means = effects + level
    means[present.sum(axis=1) == 0] = np.nan
    return np.asarray(means)
