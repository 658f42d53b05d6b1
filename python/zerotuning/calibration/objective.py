"""The objective of chosen examples at any log γ, the gradient in log γ, and the label scores behind both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zerotuning.calibration.batched_candidates import CandidateScorer
from zerotuning.calibration.folds import ExampleIndices
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation import objectives
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.cuda_graphs import RecordedForward, Recordings, supports_recording
from zerotuning.evaluation.forward import PlainForward
from zerotuning.evaluation.generation import generate_answers, generated_accuracy, max_answer_tokens
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix, is_worth_sharing
from zerotuning.models.process_group import Processes
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

#: Maps generated texts and their examples to a number, the higher the better.
Metric = Callable[[list[str], list[Record]], float]


@dataclass
class TaskExamples:
    """A task and the examples of its calibration.

    Attributes:
        task: The task.
        records: The examples.
        scorer: Scores the examples' labels.
        prior: float32 [C], the share of each label, for the objective information.
    """

    task: Task
    records: list[Record]
    scorer: LabelScorer
    prior: Tensor | None = None

    @property
    def has_labels(self) -> bool:
        """Whether every example has a label."""
        return not self.task.continuation and int(self.scorer.labels.min()) >= 0

    @cached_property
    def shares_prefix(self) -> bool:
        """Whether the prompts' shared prefix is read once for each point, or with gradients once for each batch."""
        return is_worth_sharing(self.scorer)

    def scorer_at_point(self) -> LabelScorer:
        """Return a scorer for one point, or for one batch with gradients, that may read the shared prefix once."""
        return behind_prefix(self.scorer) if self.shares_prefix else self.scorer


class CalibrationObjective:
    """The objective of chosen examples, as a mean over tasks.

    Points are log γ, float64 [layers * heads]. Several processes share every batch; all return the same numbers.

    Args:
        model: A patched model.
        tokenizer: Its tokenizer.
        tasks: The tasks and their examples.
        parameters: The model's log γ as leaves of autograd, from `patching.patch.head_parameters`.
        options: The calibration's options.
        memory: Retries smaller passes where memory runs out.
        processes: The processes that share the examples or the model.
        metric: A function of generated texts that replaces the objective.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tasks: Sequence[TaskExamples],
        parameters: Sequence[Tensor],
        options: CalibrationOptions,
        memory: OutOfMemoryRetry,
        processes: Processes,
        metric: Metric | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tasks = list(tasks)
        self.parameters = parameters
        self.options = options
        self.memory = memory
        self.processes = processes
        self.metric = metric
        self.candidates = CandidateScorer(model, parameters, memory)
        if supports_recording(model):
            forward = RecordedForward(PlainForward(model), Recordings(model, parameters, memory.note))
            self.tasks = [replace(task, scorer=task.scorer.using(forward)) for task in tasks]

    @property
    def reads_text(self) -> bool:
        """Whether the objective depends on generated text: on a metric, or on the answers of the scoring `generate`."""
        return self.metric is not None or self.tasks[0].task.scoring == "generate"

    # Losses.

    def scores(self, point: np.ndarray, indices: ExampleIndices) -> list[Tensor]:
        """Return each task's label scores of the examples at `indices`, float32 [n, C]; NaN where not finite."""
        return self.scores_at([point], indices)[0]

    def scores_at(self, points: Sequence[np.ndarray], indices: ExampleIndices) -> list[list[Tensor]]:
        """Return `scores` at each of several points, which share forward passes."""
        by_task = [self._task_scores(task, points, chosen) for task, chosen in zip(self.tasks, indices, strict=True)]
        return [list(of_point) for of_point in zip(*by_task, strict=True)]

    def loss_of(self, scores: Sequence[Tensor], indices: ExampleIndices) -> float:
        """Return the objective; inf where an example has no finite score."""
        values = []
        for task, part, chosen in zip(self.tasks, scores, indices, strict=True):
            if bool(part.isnan().any()):
                return math.inf
            values.append(self._value(task, part, task.scorer.labels[list(chosen)]))
        return math.fsum(values) / len(values)

    def accuracy_of(self, scores: Sequence[Tensor], indices: ExampleIndices) -> float | None:
        """Return the fraction of right answers, as a mean over tasks; None where labels are missing."""
        if not all(task.has_labels for task in self.tasks):
            return None
        labels = [task.scorer.labels[list(chosen)] for task, chosen in zip(self.tasks, indices, strict=True)]
        accuracies = [objectives.accuracy(part, gold) for part, gold in zip(scores, labels, strict=True)]
        return math.fsum(accuracies) / len(accuracies)

    def losses(self, points: Sequence[np.ndarray], indices: ExampleIndices) -> list[float]:
        """Return the objective at each point; with a metric of generated text, minus that metric."""
        if self.reads_text:
            return [self._generated_loss(point, indices) for point in points]
        return [self.loss_of(scores, indices) for scores in self.scores_at(points, indices)]

    def _value(self, task: TaskExamples, scores: Tensor, labels: Tensor) -> float:
        if self.options.method == "paper" and self.options.objective == "task-loss" and not task.task.continuation:
            return 1.0 - objectives.accuracy(scores, labels)
        return float(self._objective(task, scores, labels))

    def _objective(self, task: TaskExamples, scores: Tensor, labels: Tensor) -> Tensor:
        if self.options.objective == "information":
            return objectives.information(scores, None if task.prior is None else task.prior.to(scores.device))
        if task.task.continuation:
            return objectives.continuation_loss(scores, labels)
        return objectives.OBJECTIVES[self.options.objective](scores, labels.to(scores.device))

    def _task_scores(self, task: TaskExamples, points: Sequence[np.ndarray], indices: Sequence[int]) -> list[Tensor]:
        columns = task.scorer.num_labels
        table = np.zeros((len(points), len(indices), columns + 1))  # the last column is 1 for a row with scores
        row_of = {example: row for row, example in enumerate(indices)}
        batches = self._batches(task, indices)
        for index, piece, scores in self.candidates.scores(task.scorer, batches, points, task.shares_prefix):
            rows = [row_of[example] for example in piece.indices.tolist()]
            table[index, rows, :columns], table[index, rows, columns] = scores.double().cpu().numpy(), 1.0
        table = self.processes.sum(table)
        table[table[:, :, columns] == 0, :columns] = np.nan
        return list(torch.from_numpy(table[:, :, :columns].astype(np.float32)))

    def _batches(self, task: TaskExamples, indices: Sequence[int]) -> list[Batch]:
        """This process's share of the examples, in batches. Every process gets equally many examples of a length."""
        size = self.memory.batch_size(self.options.batch_size)
        scorer = task.scorer_at_point()
        shards = [self.processes.shard(batch.indices.tolist()) for batch in scorer.batches_of(indices, size)]
        return [batch for shard in shards for batch in scorer.batches_of(shard, size)]

    # Gradients.

    def loss_and_gradient(self, point: np.ndarray, indices: ExampleIndices) -> tuple[float, np.ndarray]:
        """Return the objective and its gradient in log γ, float64 [layers * heads].

        An example without a finite loss is left out.

        Raises:
            ZeroTuningError: No example has a finite loss.
        """
        loss, gradient = 0.0, np.zeros(self._size)
        for task, chosen in zip(self.tasks, indices, strict=True):
            is_mean = self.options.objective in objectives.MEANS_OVER_EXAMPLES
            compute = self._gradient_of_mean if is_mean else self._gradient_through_scores
            value, part = compute(task, point, chosen)
            loss += value / len(self.tasks)
            gradient += part / len(self.tasks)
        return loss, gradient

    def _gradient_of_mean(
        self, task: TaskExamples, point: np.ndarray, indices: Sequence[int]
    ) -> tuple[float, np.ndarray]:
        """The loss and gradient of an objective that is a mean over examples: batch by batch."""
        self.candidates.set_point(point)

        def compute(batch: Batch) -> np.ndarray | None:
            with self.memory.checkpointing(self.model):
                scores = self._scorer_with_gradients(task).scores(batch)
                value = self._objective(task, scores, batch.labels) * len(batch)
                return self._finite_sums(float(value.detach()), self._gradient(value), len(batch))

        sums = self._summed(task, indices, compute)
        return float(sums[0] / sums[1]), sums[2:] / sums[1]

    def _gradient_through_scores(
        self, task: TaskExamples, point: np.ndarray, indices: Sequence[int]
    ) -> tuple[float, np.ndarray]:
        """The loss and gradient of another objective: first the gradient in all scores, then batch by batch."""
        (scores,) = self._task_scores(task, [point], indices)
        self.candidates.set_point(point)
        is_finite = ~scores.isnan().any(dim=-1)
        usable = [example for example, finite in zip(indices, is_finite.tolist(), strict=True) if finite]
        if not usable:
            raise ZeroTuningError(f"task {task.task.name!r}: no example has a finite loss")
        leaf = scores[is_finite].requires_grad_()
        value = self._objective(task, leaf, task.scorer.labels[usable])
        (weights,) = torch.autograd.grad(value, leaf)
        weight_of = dict(zip(usable, weights, strict=True))

        def compute(batch: Batch) -> np.ndarray | None:
            with self.memory.checkpointing(self.model):
                batch_scores = self._scorer_with_gradients(task).scores(batch)
                weight = torch.stack([weight_of[example] for example in batch.indices.tolist()]).to(batch_scores.device)
                present = batch_scores.masked_fill(batch_scores == -torch.inf, 0.0)
                gradient = self._gradient((present * weight).sum())
            return self._finite_sums(0.0, gradient, len(batch))

        return float(value.detach()), self._summed(task, usable, compute)[2:]

    def _scorer_with_gradients(self, task: TaskExamples) -> LabelScorer:
        """The scorer for one batch's forward and backward pass.

        Checkpointed layers compute twice. They cannot use a prefix cache, which the first computation already fills.
        """
        return task.scorer_at_point() if self.memory.keeps_activations(self.model) else task.scorer

    def _summed(
        self, task: TaskExamples, indices: Sequence[int], compute: Callable[[Batch], np.ndarray | None]
    ) -> np.ndarray:
        """The sums over batches and processes of (loss, examples, gradient…), float64 [2 + layers * heads]."""
        sums = np.zeros(2 + self._size)
        for batch in self._batches(task, indices):
            for _, part in self.memory.in_pieces(task.scorer_at_point(), batch, compute):
                sums += part
        sums = self.processes.sum(sums)
        if sums[1] == 0:
            raise ZeroTuningError(f"task {task.task.name!r}: no example has a finite loss")
        return sums

    @staticmethod
    def _finite_sums(loss: float, gradient: np.ndarray, examples: int) -> np.ndarray | None:
        if not (math.isfinite(loss) and np.isfinite(gradient).all()):
            return None
        return np.concatenate(([loss, float(examples)], gradient))

    def _gradient(self, value: Tensor) -> np.ndarray:
        gradients = torch.autograd.grad(value, list(self.parameters), allow_unused=True)
        rows = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(gradients, self.parameters, strict=True)
        ]
        return torch.cat([row.detach().double().cpu().flatten() for row in rows]).numpy()

    @property
    def _size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    # Text.

    @torch.no_grad()
    def _generated_loss(self, point: np.ndarray, indices: ExampleIndices) -> float:
        self.candidates.set_point(point)
        values = []
        for task, chosen in zip(self.tasks, indices, strict=True):
            records = [task.records[example] for example in chosen]
            texts = self._generated_texts(task, chosen)
            value = (
                generated_accuracy(task.task, texts, records) if self.metric is None else self.metric(texts, records)
            )
            values.append(-float(self.processes.broadcast_from_main(repr(_finite(value)))))
        return math.fsum(values) / len(values)

    def _generated_texts(self, task: TaskExamples, indices: Sequence[int]) -> list[str]:
        """The text that greedy decoding writes after each prompt, with the scales of `set_point`."""
        texts: dict[int, str] = {}
        size = self.memory.batch_size(self.options.batch_size)
        for begin in range(0, len(indices), size):
            chosen = indices[begin : begin + size]
            for piece, answers in self.memory.in_pieces(
                task.scorer, task.scorer.prompt_batch(chosen), lambda batch: self._generate(task, batch)
            ):
                texts.update(zip(piece.indices.tolist(), answers, strict=True))
        return [texts[example] for example in indices]

    def _generate(self, task: TaskExamples, batch: Batch) -> list[str]:
        return generate_answers(task.scorer, self.tokenizer, batch, self._max_new_tokens(task))

    def _max_new_tokens(self, task: TaskExamples) -> int:
        return self.options.max_new_tokens if self.metric is not None else max_answer_tokens(task.scorer)


def _finite(value: Any) -> float:
    """A metric's result, a number of any library, as a Python float."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a torch tensor of several elements
        number = math.nan
    if not math.isfinite(number):
        raise ZeroTuningError(f"metric must return a finite number, got {value!r}")
    return number
