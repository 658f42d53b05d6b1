"""The model, tasks and examples that a study runs on, and the passes through the model that studies share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerotuning.calibration.folds import draw_examples
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation import objectives
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.loading import load_model
from zerotuning.patching.patch import head_parameters, patch, patched_shape, scaled_keys
from zerotuning.study.experiment import SIZES, Numbers
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

#: Keys [first, end) of each example's prompt, in tokens from the prompt's first token.
Spans = Sequence[tuple[int, int]]


@dataclass
class Setting:
    """The options on which a study's rows depend, and the model, which is loaded on first use.

    Attributes:
        model: As `load_model` accepts it.
        dtype: As `load_model` accepts it.
        device: As `load_model` accepts it.
        size: "small" (a minute or less, for tests) or "full".
        tasks: See `Numbers`; None: the study's default for the size, also for num_draws, examples and limit.
        num_draws: See `Numbers`.
        examples: See `Numbers`.
        limit: See `Numbers`.
        parts: Of a study of several parts; empty: all.
        batch_size: Prompts of one pass.

    Raises:
        ZeroTuningError: An unknown size, or a number that is not a positive integer.
    """

    model: str = "demo"
    dtype: str | None = None
    device: str | None = None
    size: str = "full"
    tasks: Sequence[str] | None = None
    num_draws: int | None = None
    examples: int | None = None
    limit: int | None = None
    parts: Sequence[str] = ()
    batch_size: int = 16
    _loaded: tuple[Any, Any] | None = field(default=None, repr=False)
    _scorers: dict[tuple[Any, ...], LabelScorer] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ZeroTuningError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        for name in ("num_draws", "examples", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ZeroTuningError(f"{name} must be a positive integer, got {value!r}")

    def with_defaults(self, numbers: Mapping[str, Numbers]) -> Setting:
        """The same setting with the numbers that are None replaced by the study's own."""
        defaults = numbers[self.size]
        return replace(
            self,
            tasks=tuple(self.tasks or defaults.tasks),
            num_draws=self.num_draws or defaults.num_draws,
            examples=self.examples or defaults.examples,
            limit=self.limit or defaults.limit,
        )

    @property
    def numbers(self) -> Numbers:
        """All numbers of a setting that `with_defaults` has completed."""
        assert self.tasks
        assert self.num_draws
        assert self.examples
        assert self.limit
        return Numbers(tuple(self.tasks), self.num_draws, self.examples, self.limit)

    # The model and its examples.

    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer); the model is patched, and every γ is 1."""
        if self._loaded is None:
            model, tokenizer = load_model(self.model, self.dtype, self.device)
            self._loaded = patch(model), tokenizer
        return self._loaded

    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return patched_shape(self.loaded()[0])

    def task(self, name: str) -> Task:
        """The task of that name."""
        return Task.load(name)

    def drawn(self, name: str, seed: int, count: int | None = None) -> list[Record]:
        """Draw `count` (default: `examples`) of a task's validation examples by the seed, as `calibrate` draws them."""
        wanted = count or self.numbers.examples
        records = self.task(name).examples("validation")
        return draw_examples(records, CalibrationOptions(examples=min(wanted, len(records)), seed=seed))

    def tests(self, name: str, seed: int = 0) -> list[Record]:
        """`limit` of a task's test examples: the first ones for seed 0, drawn by the seed for others."""
        records = self.task(name).examples("test")
        if seed == 0:
            return records[: self.numbers.limit]
        order = np.random.default_rng((seed, 2)).permutation(len(records))
        return [records[place] for place in order[: self.numbers.limit]]

    def scorer(self, task: Task, records: Sequence[Record]) -> LabelScorer:
        """The scorer of these records; a second call with the same records returns the same scorer."""
        key = (task, *(record.origin for record in records))
        if key not in self._scorers:
            model, tokenizer = self.loaded()
            self._scorers[key] = LabelScorer(model, tokenizer, task, records, batch_size=self.batch_size)
        return self._scorers[key]

    # Passes.

    @contextmanager
    def scaled(self, log_scale: Any) -> Iterator[None]:
        """Within the context log γ is `log_scale`: one for all heads, one a layer [L, 1] or one a head [L, H]."""
        values = torch.as_tensor(log_scale, dtype=torch.float32).expand(self.shape())
        with head_parameters(self.loaded()[0]) as parameters:
            with torch.no_grad():
                for parameter, row in zip(parameters, values, strict=True):
                    parameter.copy_(row)
            yield

    @torch.no_grad()
    def scores(self, scorer: LabelScorer, log_scale: Any = 0.0, spans: Spans | None = None) -> Tensor:
        """Score a scorer's labels with scaled heads.

        Args:
            scorer: Of N examples with C labels.
            log_scale: As for `scaled`.
            spans: Keys that are scaled in place of the initial token: one pair an example.

        Returns:
            Label scores, float32 [N, C].
        """
        model, _ = self.loaded()
        by_batch = []
        with self.scaled(log_scale):
            for batch in scorer.batches:
                with nullcontext() if spans is None else scaled_keys(model, batch_spans(batch, spans)):
                    by_batch.append(scorer.scores(batch).cpu())
        return scorer.gather(by_batch)

    def slopes(self, scorer: LabelScorer, spans: Spans | None = None) -> np.ndarray:
        """Differentiate the mean task loss in each head's log γ, at γ = 1.

        Args:
            scorer: Of the examples.
            spans: As for `scores`.

        Returns:
            Slopes in nats, float64 [L, H].
        """
        model, _ = self.loaded()
        total = np.zeros(self.shape())
        with head_parameters(model) as parameters:
            for batch in scorer.batches:
                with nullcontext() if spans is None else scaled_keys(model, batch_spans(batch, spans)):
                    scores = scorer.scores(batch)
                    loss = objectives.task_loss(scores, batch.labels.to(scores.device)) * len(batch)
                    gradients = torch.autograd.grad(loss, parameters)
                total += torch.stack(gradients).double().cpu().numpy()
        return total / len(scorer)


def figures_of(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in [0, 1], loss and entropy in nats, of scores [N, C] and gold labels int64 [N]."""
    return {
        "accuracy": objectives.accuracy(scores, labels),
        "loss": float(objectives.task_loss(scores, labels)),
        "entropy": float(objectives.entropy(scores)),
    }


def best_gamma(curve: Mapping[float, Mapping[str, float]]) -> float:
    """The γ with the highest accuracy; among equals the one with the least loss."""
    return min(curve, key=lambda gamma: (-curve[gamma]["accuracy"], curve[gamma]["loss"]))


def batch_spans(batch: Batch, spans: Spans) -> Tensor:
    """Spans of prompts as positions in the padded batch: int64 [sequences, 2]."""
    length = batch.input_ids.shape[1]
    rows = []
    for index, example, (_, beginnings) in zip(batch.indices.tolist(), batch.examples, batch.rows, strict=True):
        for beginning in beginnings:
            offset = length - len(example.prompt) - len(beginning)
            rows.append([offset + position for position in spans[index]])
    return torch.tensor(rows)
