"""Short batches on a GPU: forward and backward passes, recorded as a CUDA graph for each shape and replayed.

A pass over few tokens takes longer to launch than to compute, and a search repeats the same passes many times.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.forward import Forward, Inputs, Pass, PlainForward
from zerotuning.models.tensor_parallel import is_tensor_parallel

#: Sequences x tokens beyond which the GPU never waits for launches: recording would cost memory and gain nothing.
MAX_RECORDED_TOKENS = 6144
#: Lengths and numbers of sequences are rounded up to multiples of 8, so that few shapes are recorded. Long sequences
#: are rounded to larger steps, which lengthen them by an eighth at most.
STEP = 8
#: The values that pad the tensors of a pass, on the left and in added sequences, whose logits are discarded.
PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0}


class RecordedForward(Forward):
    """Replays recorded passes of another forward; passes that cannot be recorded run through that forward."""

    def __init__(self, inner: PlainForward, recordings: Recordings) -> None:
        """Wrap a forward.

        Args:
            inner: Computes the passes. Those of short batches are recorded; those of long batches run from Python.
            recordings: The recordings of `inner`'s model, which several forwards may share.
        """
        self.model = inner.model
        self.prefix_length = inner.prefix_length
        self.inner = inner
        self.recordings = recordings

    def logits(self, batch: Batch, positions: int, token_ids: tuple[int, ...] | None = None) -> Tensor:
        """See Forward."""
        inputs = self.inner.inputs(batch)
        if self.recordings.supports(inputs["input_ids"], batch.copies, self.prefix_length):
            recordable = partial(self.inner.recordable, positions, token_ids)
            key = (self.inner.prefix, positions, token_ids)
            logits = self.recordings.replay(inputs, recordable, key, batch.copies)
            if logits is not None:
                return logits
        return self.inner.logits_of(inputs, positions, token_ids)

    def wrap(self, inner: PlainForward) -> RecordedForward:
        """A RecordedForward of `inner` with the same recordings."""
        return RecordedForward(inner, self.recordings)


class Recordings:
    """CUDA graphs of one model's passes. A replay reads the current values of the model's log γ.

    A replay is differentiable in the log γ alone.
    """

    def __init__(self, model: nn.Module, log_scales: Sequence[Tensor], note: Callable[[str], None]) -> None:
        """Start without recordings.

        Args:
            model: A patched model in evaluation mode, all of it on one GPU (`supports_recording`).
            log_scales: The model's log γ as leaves of autograd, from `patch.head_parameters`. The recordings are valid
                within that context.
            note: Receives the reason when something is not recorded.
        """
        self.model = model
        self.log_scales = [leaf for leaf in log_scales if leaf.is_cuda]
        self._note = note
        self._recorded: dict[tuple[Hashable, ...], tuple[Callable[..., Tensor], object]] = {}
        self._refused: set[tuple[Hashable, ...]] = set()
        self._pool = torch.cuda.graph_pool_handle() if self.log_scales else None

    def supports(self, input_ids: Tensor, copies: int = 1, prefix_length: int = 0) -> bool:
        """Whether a batch and the prefix before it are short enough to be recorded."""
        return self._pool is not None and prefix_length + recorded_tokens(input_ids, copies) <= MAX_RECORDED_TOKENS

    def replay(
        self,
        inputs: Inputs,
        recordable: Callable[[], AbstractContextManager[Pass]],
        key: tuple[Hashable, ...],
        copies: int = 1,
    ) -> Tensor | None:
        """The logits of a replayed pass. The first pass of each shape and key is recorded.

        Args:
            inputs: input_ids, attention_mask and perhaps position_ids, int64 [S, T].
            recordable: Returns a context manager that yields the pass to record and stays open during the recording.
            key: Distinguishes the pass from other passes over inputs of the same shape.
            copies: Number of candidates in the batch (see `patch.candidates`), whose parts are padded alike. With
                several candidates the pass is not differentiable.

        Returns:
            [S, positions, tokens]; None where recording failed: the model runs an operation that cannot be
            recorded, or earlier recordings occupy the memory.
        """
        sequences, length = _rounded(inputs["input_ids"], copies)
        padded = {name: _padded(tensor, sequences, length, PADDING[name], copies) for name, tensor in inputs.items()}
        key = (sequences, length, copies, *key)
        if key in self._refused:
            return None
        if key not in self._recorded and not self._record(key, padded, recordable, copies == 1):
            return None
        replay, _ = self._recorded[key]
        logits = replay(*padded.values(), *self.log_scales)
        count = len(inputs["input_ids"]) // copies
        if copies == 1:
            return logits[:count]
        return logits.unflatten(0, (copies, sequences))[:, :count].flatten(0, 1)

    def _record(
        self,
        key: tuple[Hashable, ...],
        inputs: dict[str, Tensor],
        recordable: Callable[[], AbstractContextManager[Pass]],
        differentiable: bool,
    ) -> bool:
        """Record a pass; False where recording fails."""
        if not self._has_room(inputs["input_ids"].device):
            self._refused.add(key)
            return False
        generator = torch.cuda.default_generators[inputs["input_ids"].get_device()]
        before = generator.clone_state()
        try:
            with recordable() as compute:
                # The graph reads the memory of the pass and of the output layer that is in place within this context.
                memory_owners = (self.model.get_output_embeddings(), compute)  # type: ignore[operator]
                self._recorded[key] = self._graph_of(inputs, compute, differentiable), memory_owners
        except RuntimeError as error:
            # After a failed recording the GPU's random number generator is still in capture mode.
            generator.graphsafe_set_state(before)
            self._give_up(error)
            return False
        return True

    def _has_room(self, device: torch.device) -> bool:
        """Whether a quarter of the memory is free. Passes that are not recorded need that quarter.

        A recording keeps a pass's activations: 1.2 MiB a token of SmolLM2-135M.
        """
        free, total = torch.cuda.mem_get_info(device)
        if free < total // 4:
            gc.collect()
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
        if free >= total // 4:
            return True
        self._note("passes of further lengths are not recorded as CUDA graphs: a quarter of the GPU's memory is left")
        return False

    def _graph_of(self, inputs: dict[str, Tensor], compute: Pass, differentiable: bool) -> Callable[..., Tensor]:
        names = list(inputs)

        def run(*tensors: Tensor) -> Tensor:
            with torch.set_grad_enabled(differentiable):  # False: no activations are kept for a backward pass
                return compute(dict(zip(names, tensors, strict=False)))

        samples = {name: tensor.clone() for name, tensor in inputs.items()}
        # Warm-up and recording always run with padding: batches of later replays may have padding.
        samples["attention_mask"][:, 0] = 0
        with torch.enable_grad(), warnings.catch_warnings(), _without_garbage_collection():
            # Earlier recordings keep the leaves' AccumulateGrad nodes of another stream, which no backward pass uses.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
            # The layers read the leaves in place; as arguments the leaves only make a replay differentiable in them.
            return torch.cuda.make_graphed_callables(  # type: ignore[no-any-return,return-value]
                run, (*samples.values(), *self.log_scales), num_warmup_iters=2, allow_unused_input=True, pool=self._pool
            )

    def _give_up(self, error: RuntimeError) -> None:
        self._recorded.clear()
        self._pool = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._note(f"passes are not recorded as CUDA graphs: {' '.join(str(error).split())[:200]}")


def supports_recording(model: nn.Module) -> bool:
    """Whether a model's passes can be recorded.

    The whole model must be on one GPU, in evaluation mode, without hooks that move its weights and without
    communication with other GPUs.
    """
    tensors = [*model.parameters(), *model.buffers()]
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked or model.training or is_tensor_parallel(model):
        return False
    return len({t.device for t in tensors}) == 1 and tensors[0].is_cuda


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: a CUDA graph of an earlier search that is freed meanwhile breaks a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def recorded_tokens(input_ids: Tensor, copies: int = 1) -> int:
    """Tokens of the recording that replays a batch [S, T] of `copies` candidates."""
    sequences, length = _rounded(input_ids, copies)
    return copies * sequences * length


def _rounded(input_ids: Tensor, copies: int) -> tuple[int, int]:
    """Sequences of each copy, and length, of the recording that replays a batch [S, T]."""
    sequences, length = input_ids.shape[0] // copies, input_ids.shape[1]
    power_of_two = 1 << (sequences - 1).bit_length()
    step = max(STEP, 1 << max(0, length.bit_length() - 4))
    rounded = power_of_two if power_of_two <= STEP else -(-sequences // STEP) * STEP
    return rounded, -(-length // step) * step


def _padded(tensor: Tensor, sequences: int, length: int, value: int, copies: int) -> Tensor:
    """[copies * S, T] to [copies * sequences, length]: padded on the left, then each copy's first sequence again."""
    wide = F.pad(tensor, (length - tensor.shape[1], 0), value=value).unflatten(0, (copies, -1))
    return torch.cat((wide, wide[:, :1].expand(-1, sequences - wide.shape[1], -1)), dim=1).flatten(0, 1)
