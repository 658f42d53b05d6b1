"""Short batches on a GPU: the model's pass, forward and backward, recorded once a shape as CUDA graphs and replayed.

A pass over few tokens takes longer to launch than to compute; a search makes the same passes many times over.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerotuning.models.tensor_parallel import is_tensor_parallel

#: Sequences x tokens beyond which the GPU is busy all the time, and recording only takes memory.
MOST_TOKENS = 6144
#: Lengths and numbers of sequences are rounded up, so that few shapes are recorded: by 8, lengths by up to an eighth.
STEP = 8
#: What the tensors of a pass are padded with, on the left and for sequences that nobody reads.
PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0}
#: input_ids, attention_mask (and position_ids), each [S, T] -> logits
Forward = Callable[[dict[str, Tensor]], Tensor]


class RecordedPasses:
    """Replays passes of one model at whatever log γ its leaves hold; differentiable in those leaves alone.

    model           a patched model in evaluation mode, all of it on one GPU
    log_scales      its leaves, from `patch.head_parameters`; the recordings are of no use when that context is closed
    note            is told why something is not recorded
    """

    def __init__(self, model: nn.Module, log_scales: Sequence[Tensor], note: Callable[[str], None]) -> None:
        self.model = model
        self.log_scales = [leaf for leaf in log_scales if leaf.is_cuda]
        self._note = note
        self._recorded: dict[tuple[object, ...], tuple[Callable[..., Tensor], object]] = {}
        self._refused: set[tuple[object, ...]] = set()
        self._pool = torch.cuda.graph_pool_handle() if self.log_scales else None

    @staticmethod
    def possible(model: nn.Module) -> bool:
        """Whether the model is on one GPU as a whole, with nothing that moves its weights about or talks to other GPUs."""
        tensors = [*model.parameters(), *model.buffers()]
        hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
        if hooked or model.training or is_tensor_parallel(model):
            return False
        return len({t.device for t in tensors}) == 1 and tensors[0].is_cuda

    def takes(self, input_ids: Tensor, copies: int = 1, read_first: int = 0) -> bool:
        """Whether a batch is short enough, together with so many tokens that its pass reads first."""
        return self._pool is not None and read_first + recorded_tokens(input_ids, copies) <= MOST_TOKENS

    def logits(
        self, inputs: Mapping[str, Tensor], forward: Forward, kind: tuple[object, ...], copies: int = 1
    ) -> Tensor | None:
        """forward(inputs), [S, positions, rows], replayed; recorded first if no batch of the shape and kind came before.

        inputs: input_ids, attention_mask and perhaps position_ids, int64 [S, T]. copies: of how many candidates (see
        `patch.candidates`), whose equal parts are padded alike; with more than one the pass is not differentiable. None
        where recording failed: the model does what cannot be recorded, or the recordings before took the memory.
        """
        sequences, length = _rounded(inputs["input_ids"], copies)
        padded = {name: _padded(tensor, sequences, length, PADDING[name], copies) for name, tensor in inputs.items()}
        key = (sequences, length, copies, *kind)
        if key in self._refused:
            return None
        if key not in self._recorded:
            if not self._has_room(padded["input_ids"].device):
                self._refused.add(key)
                return None
            generator = torch.cuda.default_generators[padded["input_ids"].get_device()]
            before = generator.clone_state()
            try:
                held = (self.model.get_output_embeddings(), forward)  # type: ignore[operator]  # what it reads
                self._recorded[key] = self._record(padded, forward, copies == 1), held
            except RuntimeError as error:
                # A recording that broke off leaves the GPU's random numbers waiting for its end.
                generator.graphsafe_set_state(before)
                self._give_up(error)
                return None
        replay, _ = self._recorded[key]
        found = replay(*padded.values(), *self.log_scales)
        wanted = len(inputs["input_ids"]) // copies
        return found[:wanted] if copies == 1 else found.unflatten(0, (copies, sequences))[:, :wanted].flatten(0, 1)

    def _has_room(self, device: torch.device) -> bool:
        """Whether the quarter of the memory that is left for passes which are not recorded is free. A recording keeps a
        pass's activations: 1.2 MiB a token of SmolLM2-135M."""
        free, total = torch.cuda.mem_get_info(device)
        if free < total // 4:
            gc.collect()
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
        if free >= total // 4:
            return True
        self._note("passes of further lengths are not recorded as CUDA graphs: a quarter of the GPU's memory is left")
        return False

    def _record(self, inputs: Mapping[str, Tensor], forward: Forward, differentiable: bool) -> Callable[..., Tensor]:
        names = list(inputs)

        def run(*tensors: Tensor) -> Tensor:
            with torch.set_grad_enabled(differentiable):  # without: nothing is kept for a backward pass
                return forward(dict(zip(names, tensors, strict=False)))

        samples = {name: tensor.clone() for name, tensor in inputs.items()}
        samples["attention_mask"][:, 0] = 0  # rehearsed with padding, as recorded, whatever this batch has
        with torch.enable_grad(), warnings.catch_warnings(), _without_collection():
            # Earlier recordings keep the leaves' nodes, made on another stream; nothing accumulates through them.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
            # The leaves are inputs in name only: the layers hold them, and replays read them where they are.
            return torch.cuda.make_graphed_callables(  # type: ignore[no-any-return,return-value]
                run, (*samples.values(), *self.log_scales), num_warmup_iters=2, allow_unused_input=True, pool=self._pool
            )

    def _give_up(self, error: RuntimeError) -> None:
        self._recorded.clear()
        self._pool = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._note(f"passes are not recorded as CUDA graphs: {' '.join(str(error).split())[:200]}")


@contextmanager
def _without_collection() -> Iterator[None]:
    """Graphs of an earlier search, which cycles keep, stay for so long: one that goes breaks a recording off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def recorded_tokens(input_ids: Tensor, copies: int = 1) -> int:
    """Tokens of the recording that a batch [S, T] of so many candidates' copies is run by."""
    sequences, length = _rounded(input_ids, copies)
    return copies * sequences * length


def _rounded(input_ids: Tensor, copies: int) -> tuple[int, int]:
    """Sequences of each copy, and length, of the recording that a batch [S, T] is run by."""
    sequences, length = input_ids.shape[0] // copies, input_ids.shape[1]
    few = 1 << (sequences - 1).bit_length()
    step = max(STEP, 1 << max(0, length.bit_length() - 4))
    return few if few <= STEP else -(-sequences // STEP) * STEP, -(-length // step) * step


def _padded(tensor: Tensor, sequences: int, length: int, value: int, copies: int) -> Tensor:
    """[copies * S, T] -> [copies * sequences, length]: padded on the left, then each copy's first sequence again."""
    wide = F.pad(tensor, (length - tensor.shape[1], 0), value=value).unflatten(0, (copies, -1))
    return torch.cat((wide, wide[:, :1].expand(-1, sequences - wide.shape[1], -1)), dim=1).flatten(0, 1)
