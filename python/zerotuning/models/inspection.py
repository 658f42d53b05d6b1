"""A model's context length, from its configuration, and the arguments of its forward pass, from its signature."""

from __future__ import annotations

import inspect
from typing import Any


def context_length(model: Any) -> int | None:
    """Return the number of tokens that a model can read, from its configuration.

    Args:
        model: A transformers model, or a module that wraps one and has its `config`.

    Returns:
        `max_position_embeddings` of the language model's configuration; None where the configuration sets no limit.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def forward_arguments(model: Any) -> set[str]:
    """Return the names of the arguments of a model's `forward`; for a PEFT adapter, those of the wrapped model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
