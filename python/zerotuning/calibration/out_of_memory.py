"""What a calibration does when memory runs out: smaller batches, then checkpointed layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.device_maps import is_offloaded
from zerotuning.models.tensor_parallel import is_tensor_parallel
from zerotuning.patching.layer_scales import CHILD

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch ran out of memory. On the CPU torch raises a RuntimeError, so its text is compared."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


@dataclass
class OutOfMemoryRetry:
    """Retries batches in halves, remembers which sizes fit, and collects warnings for the report.

    Attributes:
        max_batch_size: The most examples in a batch, once memory has run out; None before.
        max_candidates: The most candidates in one forward pass, once memory has run out; None before.
        checkpointed: Whether memory ran out for a single example. From then on the layers are checkpointed.
        notes: The warnings, each once.
    """

    max_batch_size: int | None = None
    max_candidates: int | None = None
    checkpointed: bool = False
    notes: list[str] = field(default_factory=list)

    def checkpointing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context of a pass with gradients: with checkpointed layers where memory requires them."""
        return nullcontext() if self.keeps_activations(model) else checkpointed_layers(model)

    def keeps_activations(self, model: nn.Module) -> bool:
        """Return whether a pass with gradients keeps its activations.

        Activations of an offloaded model are never kept: the autograd graph would keep the weights on the device.
        """
        return not (self.checkpointed or is_offloaded(model))

    @staticmethod
    def is_retryable(error: BaseException, model: nn.Module) -> bool:
        """Return whether a smaller pass may succeed after this error.

        Tensor-parallel ranks cannot retry: the other ranks are blocked in the same collective.
        """
        return is_out_of_memory(error) and not is_tensor_parallel(model)

    def note(self, text: str) -> None:
        """Add a warning to the report."""
        if text not in self.notes:
            self.notes.append(text)

    def batch_size(self, requested: int) -> int:
        """Return `requested`, or `max_batch_size` if that is smaller."""
        return requested if self.max_batch_size is None else min(requested, self.max_batch_size)

    def halve_candidates(self, candidates: int) -> None:
        """Allow half as many candidates in a pass, because `candidates` did not fit."""
        self.max_candidates = candidates // 2
        self.note(
            f"not enough memory for {candidates} candidates in a pass, retried with at most {self.max_candidates}"
        )
        self._free_memory()

    def in_pieces(
        self, scorer: LabelScorer, batch: Batch, compute: Callable[[Batch], T | None]
    ) -> list[tuple[Batch, T]]:
        """Compute a batch or, where that fails, its halves.

        Args:
            scorer: The scorer that makes batches of a half's examples.
            batch: The examples.
            compute: A function of a batch. The result None stands for a loss that is not finite.

        Returns:
            The pieces and their results. An example that fails alone is left out.

        Raises:
            ZeroTuningError: A single example that does not fit in memory.
            RuntimeError: A tensor-parallel model ran out of memory: torch's own error, without a retry.
        """
        try:
            value = compute(batch)
        except (RuntimeError, MemoryError) as error:
            if not self.is_retryable(error, scorer.model):
                raise
            value = None
            self._reduce_memory(batch, error)
        else:
            if value is not None:
                return [(batch, value)]
            if len(batch) == 1:
                self.note(f"{batch.examples[0].origin}: no finite loss at some scales, left out there")
                return []
            self.note(f"no finite loss in a batch of {len(batch)}, retried in halves")
        # Outside the except block: the traceback, which holds the failed pass's tensors, is gone.
        self._free_memory()
        indices = batch.indices.tolist()
        halves = (indices[: len(indices) // 2], indices[len(indices) // 2 :]) if len(indices) > 1 else (indices,)
        pieces = [piece for half in halves for piece in scorer.batches_of(half)]
        return [result for piece in pieces for result in self.in_pieces(scorer, piece, compute)]

    @staticmethod
    def _free_memory() -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _reduce_memory(self, batch: Batch, error: BaseException) -> None:
        if len(batch) == 1 and self.checkpointed:
            text = " ".join(str(error).split())
            raise ZeroTuningError(
                f"{batch.examples[0].origin}: not enough memory for this example alone ({text})"
            ) from None
        if len(batch) == 1:
            self.checkpointed = True
            self.note("not enough memory for a single example, activations are computed twice instead of kept")
            return
        self.max_batch_size = max(1, len(batch) // 2)
        self.note(f"not enough memory for a batch of {len(batch)}, retried with at most {self.max_batch_size}")


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Checkpoint a patched model's layers: autograd keeps their inputs only, and the backward pass runs them again.

    Unlike transformers' gradient checkpointing, this context needs no training mode, so dropout stays off.
    """
    layers = _layers_with_attention(model)
    instance_forwards = [vars(layer).get("forward") for layer in layers]  # set by a hook, such as accelerate's
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, instance_forwards, strict=True):
            del layer.forward  # the class's forward is used again
            if forward is not None:
                layer.forward = forward


def _layers_with_attention(model: nn.Module) -> list[nn.Module]:
    """The members of the model's stacks of layers that contain an attention layer."""
    return [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        if any(hasattr(module, CHILD) for module in layer.modules())
    ]
