"""The attention implementation "zerotuning": its registration with transformers, and switching a model to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from zerotuning.errors import ZeroTuningError
from zerotuning.patching.attention_function import zerotuning_attention
from zerotuning.patching.mask_function import zerotuning_mask

#: The name under which transformers finds the attention function and the mask function.
IMPLEMENTATION = "zerotuning"

AttentionInterface.register(IMPLEMENTATION, zerotuning_attention)
AttentionMaskInterface.register(IMPLEMENTATION, zerotuning_mask)


def text_config(model: Any) -> Any:
    """Return the configuration of the language model in a model that may have vision and audio towers beside it."""
    return model.config.get_text_config(decoder=True)


def implementations(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return every configuration in the model beside the name of its attention implementation."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = (config, config._attn_implementation_internal)
            waiting += [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return list(found.values())


def restore_implementations(before: Sequence[tuple[Any, Any]]) -> None:
    """Set each configuration's attention implementation to the name beside it."""
    for config, name in before:
        config._attn_implementation_internal = name


def switch_implementation(model: Any, name: str) -> None:
    """Switch the language model to another attention implementation; vision and audio towers keep theirs.

    Raises:
        ZeroTuningError: the model's code does not look its attention function up by name.
    """
    text = text_config(model)
    keys = [key for key in getattr(model.config, "sub_configs", {}) if getattr(model.config, key, None) is text]
    try:
        model.set_attn_implementation({keys[0]: name} if keys else name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ZeroTuningError(f"{type(model).__name__} does not let its attention be replaced: {error}") from error
    if text._attn_implementation != name:
        raise ZeroTuningError(
            f"{type(model).__name__} does not look its attention up by name (AttentionInterface): "
            "no layer can be reached"
        )


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Use another attention implementation in the language model while the context is open.

    Args:
        model: a transformers model, patched or not.
        name: a name registered with `AttentionInterface`.

    Raises:
        ZeroTuningError: the model's code does not look its attention function up by name.
    """
    before = implementations(model)
    try:
        switch_implementation(model, name)
        yield model
    finally:
        restore_implementations(before)
