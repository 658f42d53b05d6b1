"""Label scores of prompts that begin alike (shots, distractors): what they share goes through the model once, into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from zerotuning.evaluation.label_scorer import LabelScorer, forward_arguments
from zerotuning.models.device_maps import input_device

#: How many times longer than the rest of a prompt its shared beginning must be. SmolLM2-135M on two cores with AMX: nothing
#: gained at half the rest, 0.7 of a gradient's time at twice, 0.35 at seven times.
WORTH_SHARING = 2


#: Tokens of a batch x parameters of the model below which a GPU waits for launches, so that a pass for the prefix costs
#: as much as one for the batch. SmolLM2-135M on an H100, recorded: 1.45 of a gradient's time at 1,300 tokens, 1.05 at 3,500;
#: of 64 prompts 0.75 with one shot, 0.34 with four.
GPU_WORK = 3.5e11


def is_worth_sharing(scorer: LabelScorer) -> bool:
    """Whether scores behind the prefix come sooner than those of whole prompts: many shots, and on a GPU a batch or a
    model that keeps it busy."""
    if not can_share(scorer):
        return False
    if input_device(scorer.model).type != "cpu":
        tokens = sum(batch.input_ids.numel() for batch in scorer.batches) / len(scorer.batches)
        if tokens * sum(weight.numel() for weight in scorer.model.parameters()) < GPU_WORK:
            return False
    shared = scorer.shared_length
    left = [len(example.prompt) - shared for example in scorer.examples]
    return shared >= WORTH_SHARING * sum(left) / len(left)


def can_share(scorer: LabelScorer) -> bool:
    """Whether the model gives the same scores behind a cache: it keeps keys alone, takes positions, and has no window
    or chunks that the padding between the prefix and the rest of a prompt would move."""
    model: Any = scorer.model
    known = forward_arguments(model)
    takes_cache = {"use_cache", "position_ids"} <= known and bool(known & {"cache", "past_key_values"})
    config = model.config.get_text_config(decoder=True)
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max(example.longest for example in scorer.examples)
    in_sight = all(span is None or span >= longest for span in spans)
    return takes_cache and in_sight and not getattr(model, "_is_stateful", False)


@torch.no_grad()
def scores_behind_prefix(scorer: LabelScorer) -> Tensor:
    """`scorer.scores` of all examples in their order, float32 [N, C], on the CPU."""
    with behind_prefix(scorer):
        return scorer.gather([scorer.scores(batch).cpu() for batch in scorer.batches])


@contextmanager
def behind_prefix(scorer: LabelScorer) -> Iterator[None]:
    """Within it the scorer reads what all its prompts begin with once, before the first batch, and of every prompt the
    rest alone: at the scales of that moment, which must stay. With gradients, for one batch: its backward pass goes
    through the prefix as well."""
    scorer.prefix = SharedPrefix(scorer) if scorer.shared_length else None
    try:
        yield
    finally:
        scorer.prefix = None


class SharedPrefix:
    """What all prompts of a scorer begin with.

    length    tokens of it, P
    """

    def __init__(self, scorer: LabelScorer) -> None:
        self._model: Any = scorer.model
        self.length = scorer.shared_length
        self._ids = torch.tensor([scorer.examples[0].prompt[: self.length]], device=input_device(self._model))
        known = forward_arguments(self._model)
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # the older name warns since 5.20
        self._keep_one = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._kept: Cache | None = None

    def rest_of(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch of whole, left-padded prompts [S, T] what comes after the prefix, left-padded: [S, longest rest]."""
        rest = inputs["attention_mask"].cumsum(dim=-1) > self.length
        width = int(rest.sum(dim=-1).max())
        cut = {name: tensor[:, -width:] for name, tensor in inputs.items()}
        return {**cut, "attention_mask": rest[:, -width:].to(inputs["attention_mask"].dtype)}

    def read(self) -> Cache:
        cache = Cache(layer_class_to_replicate=_PrefixLayer)
        self._model(input_ids=self._ids, **{self._cache_name: cache, "use_cache": True}, **self._keep_one)
        return cache

    def kept(self) -> Cache:
        """What `read` gave the first time."""
        if self._kept is None:
            self._kept = self.read()
        return self._kept

    def before(self, rest: Mapping[str, Tensor], cache: Cache) -> dict[str, Any]:
        """What the model is given to read `rest` after the prefix, which is in `cache`."""
        mask = torch.nn.functional.pad(rest["attention_mask"], (self.length, 0), value=1)
        return {**rest, "attention_mask": mask, self._cache_name: cache, "use_cache": True}


class _PrefixLayer(DynamicLayer):
    """Keeps what is read first, one sequence. What is read behind it sees it, in each of its rows, and is not kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return _behind(self.keys, key_states), _behind(self.values, value_states)


def _behind(kept: Tensor, new: Tensor) -> Tensor:
    return torch.cat((kept.expand(len(new), -1, -1, -1), new), dim=-2)
