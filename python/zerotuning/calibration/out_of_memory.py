"""What went wrong on the way and was survived: batches too large for the memory, losses that are no number."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from zerotuning.calibration.checkpointing import checkpointed_layers
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.device_maps import is_offloaded
from zerotuning.models.tensor_parallel import is_tensor_parallel

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU (there it says so in words only)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


@dataclass
class OutOfMemoryRetry:
    """Retries batches in halves, and keeps note for the report.

    largest         examples that a batch may have since memory ran out; None: it never did
    together        candidates that may share a pass since memory ran out for more; None: it never did
    checkpointed    whether memory ran out for a single example: from then on no activations are kept for gradients
    notes           what happened, each once
    """

    largest: int | None = None
    together: int | None = None
    checkpointed: bool = False
    notes: list[str] = field(default_factory=list)

    def saving_memory(self, model: nn.Module) -> AbstractContextManager[None]:
        """What a pass with gradients goes on in. Without checkpoints a graph would keep offloaded weights on the device."""
        return nullcontext() if self.keeps_activations(model) else checkpointed_layers(model)

    def keeps_activations(self, model: nn.Module) -> bool:
        return not (self.checkpointed or is_offloaded(model))

    @staticmethod
    def is_retryable(error: BaseException, model: nn.Module) -> bool:
        """Whether less at once may help where memory ran out. Of processes that share a model the others, whose memory
        may have sufficed, wait in the same pass."""
        return is_out_of_memory(error) and not is_tensor_parallel(model)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def batch_size(self, wanted: int) -> int:
        return wanted if self.largest is None else min(wanted, self.largest)

    def ran_out_of_memory_for(self, candidates: int) -> None:
        """To be told where so many did not fit into a pass: half of them are tried next."""
        self.together = candidates // 2
        self.note(f"not enough memory for {candidates} candidates in a pass, retried with at most {self.together}")
        self._free_memory()

    def in_pieces(
        self, scorer: LabelScorer, batch: Batch, compute: Callable[[Batch], T | None]
    ) -> list[tuple[Batch, T]]:
        """`compute` of the batch or, where memory runs out or it gives None (no finite number), of its halves.

        An example that gives None by itself is left out. Errors: ZeroTuningError for an example that is too
        large for the memory by itself. Of a tensor-parallel model running out of memory is an error at once.
        """
        try:
            value = compute(batch)
        except (RuntimeError, MemoryError) as error:
            if not self.is_retryable(error, scorer.model):
                raise
            value = None
            self._ran_out_of_memory(batch, error)
        else:
            if value is not None:
                return [(batch, value)]
            if len(batch) == 1:
                self.note(f"{batch.examples[0].origin}: no finite loss at some scales, left out there")
                return []
            self.note(f"no finite loss in a batch of {len(batch)}, retried in halves")
        # Outside the except block: the failed pass's tensors, held by its traceback, are free again.
        self._free_memory()
        places = batch.indices.tolist()
        halves = (places[: len(places) // 2], places[len(places) // 2 :]) if len(places) > 1 else (places,)
        pieces = [piece for half in halves for piece in scorer.batches_of(half)]
        return [done for piece in pieces for done in self.in_pieces(scorer, piece, compute)]

    @staticmethod
    def _free_memory() -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _ran_out_of_memory(self, batch: Batch, error: BaseException) -> None:
        if len(batch) == 1 and self.checkpointed:
            text = " ".join(str(error).split())
            raise ZeroTuningError(
                f"{batch.examples[0].origin}: not enough memory for this example alone ({text})"
            ) from None
        if len(batch) == 1:
            self.checkpointed = True
            self.note("not enough memory for a single example, activations are computed twice instead of kept")
            return
        self.largest = max(1, len(batch) // 2)
        self.note(f"not enough memory for a batch of {len(batch)}, retried with at most {self.largest}")
