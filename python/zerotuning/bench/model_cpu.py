"""`zerotuning bench calibration` on a CPU: the cost of a patched model and of every head's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zerotuning.bench.rows import GRADIENT, OURS, UNTUNED, Row
from zerotuning.bench.timing import take_turns
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.objectives import task_loss
from zerotuning.evaluation.prefix_cache import behind_prefix
from zerotuning.models.loading import load_model
from zerotuning.patching.patch import head_parameters, patch, unpatch
from zerotuning.tasks.few_shot import draw_shots, without_shots
from zerotuning.tasks.task import Task

SHOTS = 4


def calibration_rows(seconds: float = 10.0) -> Iterator[Row]:
    """Measure 16 prompts of SST-2 together on the embedded model: forward untuned and patched, all heads' gradients.

    Then measure the same prompts behind solved examples, which the model reads with every prompt or once for all
    prompts.

    Args:
        seconds: Of each measurement.
    """
    model, tokenizer = load_model("demo")
    task, records = Task.load("sst2"), Task.load("sst2").examples("validation", 64)
    for shots in (0, SHOTS):
        behind = task.with_shots(draw_shots(task, records, shots))
        scorer = LabelScorer(model, tokenizer, behind, without_shots(behind, records))
        batch = scorer.batches[len(scorer.batches) // 2]
        peers = _peers(model, scorer, batch)
        if shots:
            once = _peers(model, scorer, batch, share_prefix=True)
            peers |= {f"{name}, shots read once": once[name] for name in (OURS, GRADIENT)}
        shape = f"{len(batch)} x {batch.input_ids.shape[1]} tokens"
        dtype = str(model.dtype).removeprefix("torch.")
        yield {"what": "SmolLM2-135M", "shape": shape, "dtype": dtype, "peers": take_turns(peers, seconds)}


def _peers(
    model: Any, scorer: LabelScorer, batch: Batch, share_prefix: bool = False
) -> dict[str, Callable[[], object]]:
    def scores() -> Tensor:
        return (behind_prefix(scorer) if share_prefix else scorer).scores(batch)

    # Patching is not timed: before each timed call, an untimed call has patched or unpatched the model.
    @torch.no_grad()
    def untuned() -> object:
        unpatch(model)
        return scores()

    @torch.no_grad()
    def patched() -> object:
        patch(model)
        return scores()

    def gradient() -> object:
        patch(model)
        with head_parameters(model) as parameters:
            return torch.autograd.grad(task_loss(scores(), batch.labels), parameters)

    return {UNTUNED: untuned, OURS: patched, GRADIENT: gradient}
