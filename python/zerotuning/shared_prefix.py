"""Label scores of prompts that begin alike (shots, distractors): what they share goes through the model once, into a cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from zerotuning.device_maps import input_device
from zerotuning.scoring import LabelScorer, forward_arguments
from zerotuning.tokenizing import TokenizedPrompt

#: How many times longer than the rest of a prompt its shared beginning must be. Prompts are read one by one behind it, which
#: a processor does nearly as fast a token as in batches; a GPU does not.
WORTH_SHARING = 3


def is_worth_sharing(scorer: LabelScorer) -> bool:
    """Whether `scores_behind_prefix` gives the scorer's scores sooner: many shots, on the CPU."""
    model: Any = scorer.model
    known = forward_arguments(model)
    takes_cache = "use_cache" in known and bool(known & {"cache", "past_key_values"})
    keeps_keys = takes_cache and not getattr(model, "_is_stateful", False)
    if not (can_share(scorer) and keeps_keys and input_device(model).type == "cpu"):
        return False
    shared = shared_length(scorer.examples)
    left = [len(example.prompt) - shared for example in scorer.examples]
    return shared >= WORTH_SHARING * sum(left) / len(left)


@torch.no_grad()
def scores_behind_prefix(model: Any, scorer: LabelScorer) -> Tensor:
    """`scorer.scores` of all examples in their order, float32 [N, C], for labels scored by the sum over their tokens.

    The examples' prompts are read one by one behind the cached tokens that all begin with.
    """
    length = shared_length(scorer.examples)
    reader = _Reader(model)
    if length:
        reader.read(scorer.examples[0].prompt[:length], positions=1)
    rows = torch.full((len(scorer), scorer.num_labels), -torch.inf)
    for place, example in enumerate(scorer.examples):
        for beginning in example.beginnings:
            tokens_left = example.prompt[length:] + beginning
            logits = reader.read(tokens_left, positions=len(beginning) + 1)
            reader.forget(len(tokens_left))
            known = torch.log_softmax(logits, dim=-1)
            for column, tokens in enumerate(example.labels):
                if beginning[: len(tokens) - 1] == tokens[:-1]:
                    rows[place, column] = known[torch.arange(len(tokens)), torch.tensor(tokens)].sum()
    return torch.log_softmax(rows, dim=-1)


def can_share(scorer: LabelScorer) -> bool:
    """Whether the task scores its labels as `scores_behind_prefix` does."""
    return scorer.task.scoring == "sum" and not scorer.task.continuation


def shared_length(examples: Sequence[TokenizedPrompt]) -> int:
    """How many tokens all prompts begin with, at least one of each left over."""
    shortest = min(len(example.prompt) for example in examples) - 1
    first = examples[0].prompt
    for place in range(shortest):
        if any(example.prompt[place] != first[place] for example in examples):
            return place
    return shortest


class _Reader:
    """Reads tokens of one sequence on from a cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = DynamicCache()  # without a window: what it holds can be cut
        known = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # the older name warns since 5.20
        self._keeps = "logits_to_keep" in known

    def read(self, tokens: Sequence[int], positions: int) -> Tensor:
        """Logits after the last `positions` tokens: float32 [positions, V], on the CPU."""
        device = input_device(self.model)
        options: dict[str, Any] = {self._cache_name: self.cache, "use_cache": True}
        if self._keeps:
            options["logits_to_keep"] = positions
        ids = torch.tensor([list(tokens)], device=device)
        logits: Tensor = self.model(input_ids=ids, **options).logits
        return logits[0, -positions:].float().cpu()

    def forget(self, count: int) -> None:
        """Drops the `count` tokens read last."""
        if count == self.cache.get_seq_length():
            self.cache = DynamicCache()
        else:
            self.cache.crop(-count)
