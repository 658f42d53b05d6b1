"""The paper's formula written out with a dense (B, H, Tq, Tk) matrix of weights, in the inputs' dtype.

ZeroTuning (arXiv 2505.11739, section 3): softmax, multiply the weight of the initial token by γ, renormalise. Tests
compare every kernel with this formula, and attention under dense masks is computed by it.
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
    """Return which keys each query sees, bool (B, 1, Tq, Tk).

    Args:
        query: (B, H, Tq, D), for its shape and device.
        key: (B, Hkv, Tk, D), for its shape.
        key_mask: (B, Tk) bool, True for real keys.
        query_start: (B) int64, the position of the first query among the keys; default Tk - Tq.
        window: number of keys that a query sees, its own included; 0 for all.
    """
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
    """Return which keys are scaled, bool (B, 1, 1, Tk).

    Args:
        query: (B, H, Tq, D), for its shape and device.
        key: (B, Hkv, Tk, D), for its shape.
        key_mask: (B, Tk) bool, True for real keys; without a span the first real key is scaled.
        span: (B, 2) int64, the scaled keys [first, end).
    """
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
    """Compute the softmax over the visible keys, multiply the scaled keys' weights by γ, and renormalise.

    Args:
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D).
        value: (B, Hkv, Tk, Dv).
        log_scale: (H) or (B, H), log γ.
        visible: bool, broadcastable to (B, H, Tq, Tk).
        scaled: bool, broadcastable to (B, H, Tq, Tk).
        bias: added to the logits, broadcastable to (B, H, Tq, Tk); finite where a key is visible.
        scale: factor of the logits, default D ** -0.5.

    Returns:
        output (B, H, Tq, Dv) and logsumexp (B, H, Tq); 0 and -inf for a query that sees no key.
    """
    batch, heads, _, size = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias
    sees_no_key = ~visible.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(logits.masked_fill(sees_no_key, 0.0), dim=-1).masked_fill(sees_no_key, 0.0)
    gamma = torch.exp(log_scale.to(query.dtype)).expand(batch, heads)[:, :, None, None]
    weights = weights * torch.where(scaled, gamma, torch.ones_like(gamma))
    row_sum = weights.sum(dim=-1, keepdim=True)
    output = (weights / row_sum.masked_fill(sees_no_key, 1.0)) @ value
    return output, torch.logsumexp(logits, dim=-1) + torch.log(row_sum.squeeze(-1))


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
    """Compute `ops.attention` by the formula, with the same arguments and results."""
    visible = visible_keys(query, key, key_mask=key_mask, query_start=query_start, window=window)
    scaled = scaled_keys(query, key, key_mask=key_mask, span=span)
    return scaled_attention(query, key, value, log_scale, visible=visible, scaled=scaled, scale=scale)
