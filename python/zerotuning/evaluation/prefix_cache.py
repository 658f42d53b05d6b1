"""Passes behind a cached prefix: the beginning that all prompts share (few-shot examples) is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from zerotuning.evaluation.forward import Inputs, PlainForward
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.device_maps import input_device
from zerotuning.models.inspection import forward_arguments

#: The shared prefix must be at least this many times as long as the rest of a prompt. Time of a gradient relative to
#: whole prompts (SmolLM2-135M, two cores with AMX): 1.0 at a ratio of 1/2, 0.7 at 2, 0.35 at 7.
WORTH_SHARING = 2
#: Tokens of a batch x parameters of the model below which a GPU waits for launches, so that a pass over the prefix
#: takes as long as one over the batch. Time of a gradient relative to whole prompts (SmolLM2-135M, H100, recorded):
#: 1.45 at 1,300 tokens, 1.05 at 3,500; with 64 prompts 0.75 with one shot, 0.34 with four.
GPU_WORK = 3.5e11


class PrefixForward(PlainForward):
    """Reads the prefix of all sequences in the first pass and keeps its keys and values for the passes that follow.

    The cache depends on the log scales: an object is valid until they change. With gradients an object is valid for one
    batch, whose backward pass goes through the prefix as well.
    """

    def __init__(self, model: nn.Module, prefix: tuple[int, ...]) -> None:
        """Prepare to read a prefix.

        Args:
            model: A transformers causal language model for which `supports_prefix_cache` holds.
            prefix: The P >= 1 tokens that every sequence begins with. Every sequence has at least one more token.
        """
        super().__init__(model)
        self.prefix = prefix
        self.prefix_length = len(prefix)
        self._ids = torch.tensor([prefix], device=input_device(model))
        # transformers renamed the argument in 5.20, and warns about the older name.
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"
        self._one_logit = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        self._cache: Cache | None = None

    def _without_prefix(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = tensors["attention_mask"].cumsum(dim=-1) > self.prefix_length
        width = int(rest.sum(dim=-1).max())
        cut = {name: tensor[:, -width:] for name, tensor in tensors.items()}
        return {**cut, "attention_mask": rest[:, -width:].to(tensors["attention_mask"].dtype)}

    def _arguments_after_cached_prefix(self, inputs: Inputs) -> Mapping[str, Any]:
        if self._cache is None:
            self._cache = self._read_prefix()
        return self._arguments_after(self._cache, inputs)

    def _arguments_after_new_prefix(self, inputs: Inputs) -> Mapping[str, Any]:
        return self._arguments_after(self._read_prefix(), inputs)

    def _read_prefix(self) -> Cache:
        cache = Cache(layer_class_to_replicate=_PrefixLayer)
        self.model(input_ids=self._ids, **{self._cache_name: cache, "use_cache": True}, **self._one_logit)
        return cache

    def _arguments_after(self, cache: Cache, inputs: Inputs) -> dict[str, Any]:
        mask = torch.nn.functional.pad(inputs["attention_mask"], (self.prefix_length, 0), value=1)
        return {**inputs, "attention_mask": mask, self._cache_name: cache, "use_cache": True}


class _PrefixLayer(DynamicLayer):
    """Keeps the keys and values of the first update, the prefix, and returns them before those of each later update.

    The keys and values of later updates are not kept.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return _after_prefix(self.keys, key_states), _after_prefix(self.values, value_states)


def _after_prefix(prefix: Tensor, rest: Tensor) -> Tensor:
    """[1, H, P, D] and [S, H, T, D] to [S, H, P + T, D]."""
    return torch.cat((prefix.expand(len(rest), -1, -1, -1), rest), dim=-2)


def behind_prefix(scorer: LabelScorer) -> LabelScorer:
    """The same scorer with a forward that reads the prompts' shared prefix once, in the first pass.

    The new scorer is for one setting of the model's log scales; with gradients, for one batch (see PrefixForward). A
    scorer whose prompts share no prefix is returned as it is.
    """
    if not scorer.shared_prefix:
        return scorer
    return scorer.using(scorer.forward.wrap(PrefixForward(scorer.model, scorer.shared_prefix)))


@torch.no_grad()
def scores_behind_prefix(scorer: LabelScorer) -> Tensor:
    """`scorer.scores` of all examples in their given order, their prefix read once: float32 [N, C] on the CPU."""
    scorer = behind_prefix(scorer)
    return scorer.gather([scorer.scores(batch).cpu() for batch in scorer.batches])


def is_worth_sharing(scorer: LabelScorer) -> bool:
    """Whether scores behind a cached prefix take less time than those of whole prompts.

    A cached prefix is faster with many shots; on a GPU a batch or the model must also be large enough to fill the GPU.
    """
    if not supports_prefix_cache(scorer):
        return False
    if input_device(scorer.model).type != "cpu":
        tokens = sum(batch.input_ids.numel() for batch in scorer.batches) / len(scorer.batches)
        if tokens * sum(weight.numel() for weight in scorer.model.parameters()) < GPU_WORK:
            return False
    shared = len(scorer.shared_prefix)
    rest = [len(example.prompt) - shared for example in scorer.examples]
    return shared >= WORTH_SHARING * sum(rest) / len(rest)


def supports_prefix_cache(scorer: LabelScorer) -> bool:
    """Whether the model gives the same scores behind a cached prefix.

    The model must cache keys and values only, accept positions, and have no window or chunks shorter than a prompt:
    the padding between the prefix and the rest of a prompt would move the borders of a window or chunk.
    """
    model: Any = scorer.model
    accepted = forward_arguments(model)
    accepts_cache = {"use_cache", "position_ids"} <= accepted and bool(accepted & {"cache", "past_key_values"})
    config = model.config.get_text_config(decoder=True)
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max(example.longest for example in scorer.examples)
    spans_cover_prompts = all(span is None or span >= longest for span in spans)
    return accepts_cache and spans_cover_prompts and not getattr(model, "_is_stateful", False)
