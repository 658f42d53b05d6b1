"""The paper's formula written out: what every fast path is compared with, and the route of masks that have no fast one.

Dense: a [B, H, Tq, Tk] matrix of weights, in the inputs' dtype. ZeroTuning (arXiv 2505.11739, section 3): softmax, multiply
the weight of the initial token by γ, renormalise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_start: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Which keys each query sees: bool (B, 1, Tq, Tk). Arguments as in `ops.attention`."""
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    start = query.new_full((batch,), keys - rows, dtype=torch.long) if query_start is None else query_start
    position = start[:, None, None] + torch.arange(rows, device=query.device)[:, None]
    column = torch.arange(keys, device=query.device)
    visible = column <= position
    if window:
        visible = visible & (column > position - window)
    if key_mask is not None:
        visible = visible & key_mask[:, None, :]
    return visible[:, None]


def scaled_keys(query: Tensor, key: Tensor, *, key_mask: Tensor | None = None, span: Tensor | None = None) -> Tensor:
    """Which keys are scaled: bool (B, 1, 1, Tk); the first real key of each sample, or those of `span`."""
    batch, keys = query.shape[0], key.shape[2]
    if span is None:
        first = (
            torch.zeros(batch, dtype=torch.long, device=query.device)
            if key_mask is None
            else key_mask.int().argmax(dim=1)
        )
        span = torch.stack((first, first + 1), dim=1)
    column = torch.arange(keys, device=query.device)
    return ((column >= span[:, :1]) & (column < span[:, 1:]))[:, None, None]


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    *,
    visible: Tensor,
    scaled: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax over the visible keys, γ times the weights of the scaled ones, renormalised.

    Args:
        query, key, value, log_scale, scale: as in `ops.attention`.
        visible, scaled: bool, broadcastable to (B, H, Tq, Tk).
        bias: added to the logits, likewise; finite where a key is visible.

    Returns:
        output (B, H, Tq, Dv), logsumexp (B, H, Tq); 0 and -inf for a query that sees nothing.
    """
    batch, heads, _, size = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias
    blind = ~visible.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(logits.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    gamma = torch.exp(log_scale.to(query.dtype)).expand(batch, heads)[:, :, None, None]
    weights = weights * torch.where(scaled, gamma, torch.ones_like(gamma))
    total = weights.sum(dim=-1, keepdim=True)
    output = (weights / total.masked_fill(blind, 1.0)) @ value
    return output, torch.logsumexp(logits, dim=-1) + torch.log(total.squeeze(-1))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    *,
    key_mask: Tensor | None = None,
    span: Tensor | None = None,
    query_start: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.attention` by the formula: the same arguments and results."""
    visible = visible_keys(query, key, key_mask=key_mask, query_start=query_start, window=window)
    scaled = scaled_keys(query, key, key_mask=key_mask, span=span)
    return scaled_attention(query, key, value, log_scale, visible=visible, scaled=scaled, scale=scale)
