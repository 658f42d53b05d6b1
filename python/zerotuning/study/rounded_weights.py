"""A model with linear weights rounded as quantized formats round weights, and computed in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Weights of one block of the 4-bit format.
BLOCK = 32


def eight_bit(weight: Tensor) -> Tensor:
    """Round to 255 levels for each row (output channel), symmetric about 0, with steps of max|w| / 127."""
    step = weight.abs().amax(dim=-1, keepdim=True) / 127
    return _to_steps(weight, step, torch.zeros_like(step))


def four_bit(weight: Tensor) -> Tensor:
    """Round to 16 levels for each block of 32 weights of a row, from minimum to maximum, as GGUF's Q4_1 does."""
    if weight.shape[-1] % BLOCK:
        return weight
    blocks = weight.unflatten(-1, (-1, BLOCK))
    least, most = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
    return _to_steps(blocks, (most - least) / 15, least).flatten(-2)


def bfloat16(weight: Tensor) -> Tensor:
    """Round to 8 significant bits."""
    return weight.to(torch.bfloat16).to(weight.dtype)


def _to_steps(weight: Tensor, step: Tensor, origin: Tensor) -> Tensor:
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return origin + torch.round((weight - origin) / safe) * step


ROUNDINGS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "as loaded": None,
    "bfloat16": bfloat16,
    "8-bit": eight_bit,
    "4-bit": four_bit,
}


@contextmanager
def rounded_weights(model: Any, name: str) -> Iterator[None]:
    """Within the context the weights of all nn.Linear but the output layer are rounded by ROUNDINGS[name]."""
    rounding = ROUNDINGS[name]
    output = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]
    before = [layer.weight.data for layer in layers]
    try:
        if rounding is not None:
            for layer in layers:
                layer.weight.data = rounding(layer.weight.data.float()).to(layer.weight.dtype)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.data = weight
