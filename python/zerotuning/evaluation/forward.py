"""From a batch of token sequences to logits: the forward object of a LabelScorer.

`PlainForward` runs the model on whole sequences. `prefix_cache.PrefixForward` computes their shared prefix once.
`cuda_graphs.RecordedForward` wraps either of the two and replays its passes as CUDA graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerotuning.evaluation.batches import Batch
from zerotuning.models.device_maps import input_device
from zerotuning.models.inspection import forward_arguments
from zerotuning.models.tensor_parallel import gather_rows

#: input_ids, attention_mask and, where the model accepts them, position_ids: int64 [S, T] on the model's device.
Inputs = Mapping[str, Tensor]
#: Maps the inputs of a pass to logits [S, positions, tokens].
Pass = Callable[[Inputs], Tensor]


class Forward(ABC):
    """A way to compute logits of a batch under one causal language model.

    Attributes:
        model: A transformers causal language model.
        prefix_length: Number of tokens that all sequences begin with and that a pass reads once for all; 0 where each
            sequence is read whole.
    """

    model: nn.Module
    prefix_length: int = 0

    @abstractmethod
    def logits(self, batch: Batch, positions: int, token_ids: tuple[int, ...] | None = None) -> Tensor:
        """Logits at the last positions of each sequence, differentiable when gradients are enabled.

        Args:
            batch: S sequences.
            positions: How many of the last positions have logits.
            token_ids: The tokens whose logits are needed, in ascending order; None for the whole vocabulary.

        Returns:
            float32 (float64 for a float64 model) [S, positions, len(token_ids) or the vocabulary's size].
        """

    @abstractmethod
    def wrap(self, inner: PlainForward) -> Forward:
        """`inner`, wrapped as this object wraps its own inner forward; `inner` itself for a PlainForward."""


class PlainForward(Forward):
    """Runs the model on whole sequences, without CUDA graphs."""

    #: The tokens of `prefix_length`.
    prefix: tuple[int, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._accepted = forward_arguments(model)

    def logits(self, batch: Batch, positions: int, token_ids: tuple[int, ...] | None = None) -> Tensor:
        """See Forward."""
        return self.logits_of(self.inputs(batch), positions, token_ids)

    def wrap(self, inner: PlainForward) -> PlainForward:
        """`inner` itself."""
        return inner

    def inputs(self, batch: Batch) -> Inputs:
        """The model's input tensors for a batch, on the model's device."""
        tensors = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "position_ids" in self._accepted:
            tensors["position_ids"] = batch.position_ids
        device = input_device(self.model)
        return {name: tensor.to(device) for name, tensor in self._without_prefix(tensors).items()}

    def logits_of(self, inputs: Inputs, positions: int, token_ids: tuple[int, ...] | None) -> Tensor:
        """`logits` of a batch's `inputs`."""
        with needed_logits(self.model, token_ids) as select:
            return self._run(self._arguments_after_cached_prefix(inputs), positions, select)

    @contextmanager
    def recordable(self, positions: int, token_ids: tuple[int, ...] | None) -> Iterator[Pass]:
        """A pass that a CUDA graph can record: the logits depend on the inputs and the model's parameters alone.

        The yielded function may be called within the context only; its recording may be replayed afterwards.
        """
        with needed_logits(self.model, token_ids) as select:
            yield lambda inputs: self._run(self._arguments_after_new_prefix(inputs), positions, select)

    def _without_prefix(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sequences [S, T] without the shared prefix."""
        return tensors

    def _arguments_after_cached_prefix(self, inputs: Inputs) -> Mapping[str, Any]:
        """The model's arguments for `inputs`, after a prefix that an earlier pass of this object may have computed."""
        return self._arguments_after_new_prefix(inputs)

    def _arguments_after_new_prefix(self, inputs: Inputs) -> Mapping[str, Any]:
        """The model's arguments for `inputs`, after a prefix that is computed now."""
        return inputs

    def _run(self, arguments: Mapping[str, Any], positions: int, select: Callable[[Tensor], Tensor]) -> Tensor:
        options: dict[str, Any] = {}
        if "use_cache" in self._accepted:
            options["use_cache"] = False
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = positions
        logits = select(self.model(**{**options, **arguments}).logits[:, -positions:])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _SelectedRows(nn.Module):
    """An output layer cut down to some tokens' rows: hidden states [..., d] to float32 logits [..., len(token_ids)].

    The logits are computed in float32 or float64 for every dtype of the layer: bfloat16 resolves a logit near 20 only
    to 1/16, so labels would tie. The cost is small, because the rows are few.
    """

    def __init__(self, layer: nn.Linear, token_ids: tuple[int, ...]) -> None:
        super().__init__()
        index = torch.tensor(token_ids, device=layer.weight.device)
        # Plain attributes, not parameters: a gradient still reaches the layer's own weight.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.weight = gather_rows(layer.weight, index, layer.out_features).to(dtype)
        self.bias = None if layer.bias is None else gather_rows(layer.bias, index, layer.out_features).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.weight), self.weight, self.bias)


@contextmanager
def needed_logits(model: nn.Module, token_ids: tuple[int, ...] | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the context the model's output layer computes the logits of `token_ids` only, where the layer allows it.

    The model's own scaling or soft-capping of logits still applies, since both follow the output layer. An output layer
    that is not a plain nn.Linear with its weights in memory (adapters, quantized or offloaded layers) stays as it is.

    Yields:
        A function from the model's logits [..., rows] to those of `token_ids` [..., len(token_ids)].
    """
    if token_ids is None:
        yield _all_logits
        return
    layer = model.get_output_embeddings()  # type: ignore[operator]
    place = next((name for name, module in model.named_modules() if module is layer), None)
    if type(layer) is not nn.Linear or not place or layer.weight.is_meta:
        yield _LogitSelection(token_ids)
        return
    parent_name, _, attribute = place.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, attribute, _SelectedRows(layer, token_ids))
    try:
        yield _all_logits
    finally:
        setattr(parent, attribute, layer)


def _all_logits(logits: Tensor) -> Tensor:
    return logits


class _LogitSelection:
    """Picks some tokens' logits out of the whole vocabulary's."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._index: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self._index is None:  # made in the first pass: a copy to the GPU cannot be part of a recording
            self._index = torch.tensor(self._token_ids, device=logits.device)
        return logits.index_select(-1, self._index)
