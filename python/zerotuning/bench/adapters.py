"""Adapters of peft (IA3, LoRA) fitted to a task's examples, as peers of the head scales."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation import objectives
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.evaluate import label_scores
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.tasks.examples import Record

#: Learning rates to try. A held-out fifth of the examples decides among them, as for the step of the head scales.
ADAPTER_RATES = {"lora": (3e-4, 1e-3, 3e-3), "ia3": (3e-3, 1e-2, 3e-2)}
ADAPTER_EPOCHS = 8
ADAPTER_BATCH = 16
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class AdapterRun:
    """The model and the examples to which an adapter is fitted.

    Attributes:
        model: The model without the adapter.
        task_name: For errors.
        records: Examples in a random order; the first fifth is held out.
        seed: Of the adapter's initial weights and of the order of batches.
        scorer: Makes a scorer from (records, model, batch size); a batch size of None is the default.
    """

    model: Any
    task_name: str
    records: list[Record]
    seed: int
    scorer: Callable[[list[Record], Any, int | None], LabelScorer]


def lora_config() -> Any:
    """LoRA of rank 8 on query and value projections."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def ia3_config() -> Any:
    """IA3 on key, value and down projections."""
    from peft import IA3Config

    modules = ["k_proj", "v_proj", "down_proj"]
    return IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


@contextmanager
def fitted_adapter(run: AdapterRun, config: Any, rates: Sequence[float]) -> Iterator[tuple[Any, int]]:
    """Fit an adapter to the task loss; within the context the model has the adapter.

    Of all learning rates and epochs, the weights with the least loss on a held-out fifth of the records are chosen.

    Args:
        run: Model and examples.
        config: Of peft.
        rates: Learning rates.

    Yields:
        The model with the adapter, and how many numbers were fitted.

    Raises:
        ZeroTuningError: No epoch ended with a finite loss.
    """
    count = max(1, len(run.records) // 5)
    fit, held_out = run.records[count:], run.records[:count]
    best: tuple[float, dict[str, Tensor]] | None = None
    # Without cuDNN: the backward pass of its masked attention gives NaN at some lengths (pytorch issue 196678).
    with _adapted(run, config) as model, sdpa_kernel(NOT_CUDNN):
        initial = _weights(model)
        for rate in rates:
            _set_weights(model, initial)
            for loss, weights in _epochs(run, model, fit, held_out, rate):
                if math.isfinite(loss) and (best is None or loss < best[0]):
                    best = loss, weights
        if best is None:
            raise ZeroTuningError(f"no epoch of {config.peft_type.value} on {run.task_name} ended with a finite loss")
        _set_weights(model, best[1])
        yield model, sum(weight.numel() for weight in initial.values())


@contextmanager
def _adapted(run: AdapterRun, config: Any) -> Iterator[Any]:
    """Within the context the model has an adapter in float32; the model's own weights are not changed."""
    from peft import get_peft_model

    torch.manual_seed(run.seed)
    model = get_peft_model(run.model, copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()
    try:
        yield model
    finally:
        model.unload()
        if hasattr(run.model, "peft_config"):
            del run.model.peft_config
        run.model.requires_grad_(False)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def _epochs(
    run: AdapterRun, model: Any, fit: list[Record], held_out: list[Record], rate: float
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Held-out loss and weights after each epoch of AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    scorer, held_out_scorer = run.scorer(fit, model, ADAPTER_BATCH), run.scorer(held_out, model, None)
    generator = np.random.default_rng(run.seed)
    for _ in range(ADAPTER_EPOCHS):
        for batch in generator.permutation(np.array(scorer.batches, dtype=object)).tolist():
            optimizer.zero_grad()
            _label_loss(scorer, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield float(objectives.task_loss(label_scores(held_out_scorer), held_out_scorer.labels)), _weights(model)


def _label_loss(scorer: LabelScorer, batch: Batch) -> Tensor:
    scores = scorer.scores(batch)
    return objectives.task_loss(scores, batch.labels.to(scores.device))
