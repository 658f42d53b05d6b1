"""Activations made again in the backward pass instead of kept: memory for time, when memory asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from zerotuning.patching.layer_scales import CHILD


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Within it a patched model's blocks with attention keep their inputs only and are computed twice, for a gradient.

    Unlike transformers' gradient checkpointing it needs no training mode, so that dropout stays off.
    """
    blocks = _blocks(model)
    own = [vars(block).get("forward") for block in blocks]  # a hook's, such as accelerate's
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward  # the class's own again
            if forward is not None:
                block.forward = forward


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the model's stacks that hold an attention layer."""
    return [
        block
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for block in stack
        if any(hasattr(module, CHILD) for module in block.modules())
    ]
