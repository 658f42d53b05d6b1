"""Accuracy, loss and entropy of a model on a task."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation import objectives
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.generation import generate_answers, generated_accuracy, max_answer_tokens
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix, is_worth_sharing
from zerotuning.files import write_json_atomically
from zerotuning.tasks.examples import Record, as_records, first_examples
from zerotuning.tasks.hub import read_data
from zerotuning.tasks.task import Task


@dataclass(frozen=True)
class Evaluation:
    """The figures of a model on a task.

    Attributes:
        task: The task's name.
        examples: Number of examples that were scored.
        accuracy: Fraction of the examples, in [0, 1], whose gold label is the most likely of the labels. With a
            continuation: whose continuation greedy decoding would generate. With scoring `generate`: whose greedily
            generated text begins with the gold label.
        loss: Mean cross entropy of the gold label among the labels, nats; of a continuation, per token. None with
            scoring `generate`: a generated text has no probabilities of labels.
        entropy: Mean entropy of the distribution over the labels, nats; of a continuation, of the next token. None with
            scoring `generate`.
        seconds: Wall time of the model's passes.
        scoring: The task's scoring, which loss and entropy follow: `sum`, `mean`, `first-token` or `generate`.
        shots: Solved examples before each prompt.
        chat: Whether prompts were turns of a chat.
    """

    task: str
    examples: int
    accuracy: float
    loss: float | None
    entropy: float | None
    seconds: float
    scoring: str = "sum"
    shots: int = 0
    chat: bool = False

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary, ready for `json.dump`."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figures to a JSON file, whole or not at all."""
        return write_json_atomically(path, self.to_json())


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task | str | os.PathLike[str],
    examples: Iterable[Mapping[str, Any]] | str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    truncate: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Score the examples of a task and compare with their labels.

    Args:
        model: A transformers causal language model as it stands: patched or not, scaled or not.
        tokenizer: The model's tokenizer.
        task: A Task, a built-in name or the path of a YAML file.
        examples: Mappings, the path of a JSON lines file or a name of the hub (tasks/hub.py); by default a built-in
            task's test sample.
        limit: Use only the first `limit` examples.
        batch_size: The most sequences in one forward pass.
        truncate: Shorten prompts that exceed the model's context (see LabelScorer); by default they are an error.
        progress: Draw a progress bar if stderr is a terminal.

    Raises:
        ZeroTuningError: The input is bad (see Task and LabelScorer), or the model's scores are NaN or give the gold
            answer of an example the probability 0. The error names the example.
    """
    task = task if isinstance(task, Task) else Task.load(task)
    if examples is None:
        records = task.examples("test", limit)
    elif isinstance(examples, (str, os.PathLike)):
        records = first_examples(read_data(task, examples, "test"), limit)
    else:
        records = first_examples(as_records(examples), limit)
    scorer = LabelScorer(model, tokenizer, task, records, batch_size=batch_size, truncate=truncate)
    started = time.perf_counter()
    if task.scoring == "generate":
        figures = _generation_figures(scorer, tokenizer, records, progress)
    elif task.continuation:
        figures = _continuation_figures(scorer, progress)
    else:
        figures = _label_figures(scorer, progress)
    return Evaluation(
        task=task.name,
        examples=len(scorer),
        **figures,
        seconds=time.perf_counter() - started,
        scoring=task.scoring,
        shots=len(task.shots),
        chat=task.chat,
    )


def _label_figures(scorer: LabelScorer, progress: bool) -> dict[str, Any]:
    scores = label_scores(behind_prefix(scorer) if is_worth_sharing(scorer) else scorer, progress=progress)
    # NaN in any column makes the whole row's softmax NaN.
    _check_finite(scorer, torch.log_softmax(scores, dim=-1).gather(1, scorer.labels[:, None])[:, 0])
    return {
        "accuracy": objectives.accuracy(scores, scorer.labels),
        "loss": float(objectives.task_loss(scores, scorer.labels)),
        "entropy": float(objectives.entropy(scores)),
    }


@torch.no_grad()
def _continuation_figures(scorer: LabelScorer, progress: bool) -> dict[str, Any]:
    by_batch = [scorer.continuations(batch) for batch in _with_bar(scorer, progress)]
    log_probability, exact, entropy = (
        torch.cat([column.double().cpu() for column in columns]) for columns in zip(*by_batch, strict=True)
    )
    _check_finite(scorer, scorer.gather([log_probability]))
    return {
        "accuracy": float(exact.mean()),
        "loss": -float(log_probability.mean()),
        "entropy": float(entropy.mean()),
    }


def _check_finite(scorer: LabelScorer, log_probability: Tensor) -> None:
    """Raise an error for the first gold answer whose log_probability, [N] in the examples' order, is not finite."""
    not_finite = (~log_probability.isfinite()).nonzero()
    if len(not_finite) > 0:
        place = int(not_finite[0])
        problem = "scores are NaN" if bool(log_probability[place].isnan()) else "loss is infinite"
        raise ZeroTuningError(f"{scorer.examples[place].origin}: the model's {problem}")


def _generation_figures(
    scorer: LabelScorer, tokenizer: Any, records: Sequence[Record], progress: bool
) -> dict[str, Any]:
    correct = 0.0
    for batch in _with_bar(scorer, progress):
        texts = generate_answers(scorer, tokenizer, batch, max_answer_tokens(scorer))
        chosen = [records[place] for place in batch.indices.tolist()]
        correct += generated_accuracy(scorer.task, texts, chosen) * len(chosen)
    return {"accuracy": round(correct) / len(records), "loss": None, "entropy": None}


def _with_bar(scorer: LabelScorer, progress: bool) -> Iterable[Batch]:
    hidden = not (progress and sys.stderr.isatty())
    return tqdm(scorer.batches, desc=scorer.task.name, unit=" batches", disable=hidden, leave=False)


@torch.no_grad()
def label_scores(scorer: LabelScorer, *, progress: bool = False) -> Tensor:
    """`scorer.scores` of all examples in their given order: float32 [N, C] on the CPU, without gradients."""
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=len(scorer), desc=scorer.task.name, unit=" examples", disable=hidden, leave=False) as bar:
        results = []
        for batch in scorer.batches:
            results.append(scorer.scores(batch).cpu())
            bar.update(len(batch))
    return scorer.gather(results)
