"""Attention under a mask written out for every query and key: the formula itself, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from zerotuning.attention import reference
from zerotuning.attention.mask_encoding import CallerMask, DenseMask

#: An additive mask hides a key by this value or less: some masks hold -10,000, and float16 ends at -65,504.
HIDDEN = -1e4


def initial_keys(visible: Tensor) -> Tensor:
    """Find the initial token of each query from the keys that it sees: the first visible key.

    With as many queries as keys, the first visible key's own first visible key is looked up, and so on. A sliding
    window thus leads back to the beginning of its sequence, and packed sequences keep their own initial tokens.

    Args:
        visible: (…, Tq, Tk) bool.

    Returns:
        (…, Tq) int64.
    """
    first = visible.int().argmax(dim=-1)
    if visible.shape[-2] == visible.shape[-1]:
        # Each round doubles the distance looked back. A traced graph must not depend on the length.
        rounds = 24 if torch.compiler.is_compiling() else visible.shape[-1].bit_length()
        for _ in range(rounds):
            first = first.gather(-1, first)
    return first


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: DenseMask | CallerMask,
    span: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled attention under a dense mask; differentiable.

    Args:
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D).
        value: (B, Hkv, Tk, Dv).
        log_scale: (H) or (B, H), as in `ops.attention`.
        mask: in a mask of the caller's own, `initial_keys` are scaled, and the values of an additive mask above HIDDEN
            are added to the logits.
        span: (B, 2) int64, the keys [first, end) that are scaled in place of the initial token.
        scale: factor of the logits, default D ** -0.5.

    Returns:
        output (B, H, Tq, Dv).
    """
    return attention_by_formula(query, key, value, log_scale, mask, span, scale)[0].to(query.dtype)


def attention_by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: DenseMask | CallerMask,
    span: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute output and logsumexp as `attend`, in float32 or query's wider dtype."""
    visible, scaled = _visible_and_scaled(query, key, mask, span)
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (tensor.to(wide) for tensor in (query, key, value))
    bias = None
    if isinstance(mask, CallerMask) and mask.mask.is_floating_point():
        bias = mask.mask.to(wide).masked_fill(~visible, 0.0)
    return reference.scaled_attention(
        query, key, value, log_scale, visible=visible, scaled=scaled, bias=bias, scale=scale
    )


def _visible_and_scaled(
    query: Tensor, key: Tensor, mask: DenseMask | CallerMask, span: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which keys a query sees, and which of them are scaled: bool (B, 1 or H, Tq, Tk)."""
    if isinstance(mask, DenseMask):
        visible, scaled = mask
    else:
        visible = mask.mask if mask.mask.dtype == torch.bool else mask.mask > HIDDEN
        scaled = visible & torch.zeros_like(visible).scatter(-1, initial_keys(visible)[..., None], True)
    if span is not None:
        scaled = visible & reference.scaled_keys(query, key, span=span)
    return visible, scaled


def gradients_by_formula(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: DenseMask,
    span: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key, value and log_scale without autograd, for the backward of an operator."""
    visible, scaled = _visible_and_scaled(query, key, mask, span)
    batch, heads, key_heads = *query.shape[:2], key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grad, q = grad_output.to(wide), query.to(wide)
    k, v = (tensor.to(wide).repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))
    bias = log_scale.to(wide).expand(batch, heads)[:, :, None, None] * scaled
    logits = (scale * q @ k.transpose(-1, -2) + bias).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(logits, dim=-1).masked_fill(~visible, 0.0)  # softmax is NaN where a query sees no key
    grad_logits = weights * (grad @ v.transpose(-1, -2))
    grad_logits = grad_logits - weights * grad_logits.sum(dim=-1, keepdim=True)

    def of_key_heads(gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (key_heads, -1)).sum(dim=2)

    grad_key = of_key_heads(scale * grad_logits.transpose(-1, -2) @ q)
    grad_value = of_key_heads(weights.transpose(-1, -2) @ grad)
    grad_log_scale = (grad_logits * scaled).sum(dim=(-2, -1))
    if log_scale.dim() == 1:
        grad_log_scale = grad_log_scale.sum(dim=0)
    return scale * grad_logits @ k, grad_key, grad_value, grad_log_scale
