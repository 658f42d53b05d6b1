"""Logits of a whole model by the paper's formula: eager attention in float64 with the model's own dense mask."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import (
    is_patched,
    unpatch,
)

_eager_gamma: dict[int, Tensor] = {}
_eager_spans: list[Tensor] = []


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax in float64 with the model's own dense mask, scale the spans' columns, renormalise."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    logits = query.double() @ key.transpose(-1, -2) * scaling
    assert attention_mask is not None
    weights = torch.softmax(logits + attention_mask.double(), dim=-1)
    column, spans = torch.arange(key.shape[2]), _eager_spans[0]
    scaled = (column >= spans[:, :1]) & (column < spans[:, 1:])
    gamma = _eager_gamma[module.layer_idx].double()[None, :, None, None]
    weights = weights * torch.where(scaled[:, None, None], gamma, torch.ones_like(gamma))
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights @ value).to(query.dtype).transpose(1, 2), None


AttentionInterface.register("eager_formula", eager_attention)
AttentionMaskInterface.register("eager_formula", eager_mask)


@torch.no_grad()
def formula_logits(
    model: Any, scales: HeadScales, ids: Tensor, mask: Tensor, spans: Tensor | None = None, **arguments: Any
) -> Tensor:
    first = mask.int().argmax(-1)
    copied = copy.deepcopy(model)
    if is_patched(copied):
        unpatch(copied)
    copied.set_attn_implementation("eager_formula")
    _eager_gamma.update(dict(enumerate(scales.gamma)))
    _eager_spans[:] = [torch.stack((first, first + 1), dim=1) if spans is None else spans]
    return copied(input_ids=ids, attention_mask=mask, **arguments).logits


def left_padded(lengths: list[int], longest: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 128, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp_min(0)
