"""Attention under a dense or packed mask in a traced graph (torch.compile, torch.export).

If a model is traced with neither a mask nor a cache, every row may hold packed sequences, whose lengths are unknown
until the graph runs; the mask function then returns a dense mask. In the graph, attention under such a mask is one
operator, which reads the mask when the graph runs. If the mask is that of causal sequences, perhaps packed, perhaps in
a sliding window, the operator computes as `packed_sequences` does, and by the formula otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.attention.mask_encoding import DenseMask, PackedMask, decode


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    encoded: Tensor,
    span: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled attention under an encoded mask; differentiable.

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, T, D).
        value: (B, Hkv, T, Dv).
        log_scale: (H) or (B, H), as in `ops.attention`.
        encoded: the encoding of a DenseMask or PackedMask.
        span: (B, 2) int64, the keys [first, end) that are scaled in place of the initial token.
        scale: factor of the logits, default D ** -0.5.

    Returns:
        output (B, H, T, Dv).
    """
    return _attention_under_mask(query, key, value, log_scale, encoded, span, ops.softmax_scale(query, scale))[0]


# The layout of a mask. Layers of one kind get the same tensor, so that a mask made in the graph is read once in a
# forward pass, by `find_packed_sequences`. A mask that is an input of the graph (layers compiled one by one) is read
# in each layer.


#: The layouts of results of `find_packed_sequences`, which nothing writes into; None for other masks. Other tensors may
#: be overwritten between passes.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _layout_of(encoded: Tensor, mask: DenseMask | PackedMask) -> packed_sequences.SequenceLayout | None:
    """Find the sequences in a mask, which may wait for a GPU; None where the formula is to be used."""
    if _is_capturing(encoded):
        return None
    if isinstance(mask, PackedMask):
        stored = packed_sequences.stored_layout(encoded)
        return stored or packed_sequences.make_layout(PackedMask(mask.columns.cpu()), encoded.device)
    return _layouts[encoded] if encoded in _layouts else _layout_of_dense_mask(encoded, mask)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _layout_of_dense_mask(encoded: Tensor, mask: DenseMask) -> packed_sequences.SequenceLayout | None:
    """Find the layout of a mask that is exactly causal, packed and perhaps windowed; None for other masks."""
    visible = mask.visible[:, 0]
    if visible.numel() == 0:
        return None
    begin = packed_sequences.sequence_starts(visible)
    row = torch.arange(visible.shape[1], device=visible.device)
    num_visible = visible.sum(dim=-1)
    window = torch.where(num_visible < row - begin + 1, num_visible, 0).amax()
    columns = torch.stack((begin, torch.ones_like(begin), window.expand_as(begin)), dim=-1)
    if not torch.equal(PackedMask(columns).to_dense().encode(), encoded):
        return None
    return packed_sequences.make_layout(PackedMask(columns.cpu()), visible.device)


# The operators. They wait for a GPU: torch.compile must keep them out of CUDA graphs.


@torch.library.custom_op("zerotuning::_find_packed_sequences", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def find_packed_sequences(encoded: Tensor, length: int) -> Tensor:
    """Copy an encoded dense mask of `length` queries and keys, and find its layout for the layers that get the copy."""
    copy = encoded.clone()
    mask = decode(encoded, length, length)
    if isinstance(mask, DenseMask) and not _is_capturing(encoded):
        _layouts[copy] = _layout_of_dense_mask(encoded, mask)
    return copy


@find_packed_sequences.register_fake
def _(encoded: Tensor, length: int) -> Tensor:
    return torch.empty_like(encoded)


@torch.library.custom_op("zerotuning::_attention_under_mask", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_under_mask(
    query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, encoded: Tensor, span: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and logsumexp."""
    mask = _decode(encoded, query, key)
    layout = _layout_of(encoded, mask)
    if layout is None:
        arguments = (query, key, value, log_scale, _dense(mask), span, scale)
        output, logsumexp = dense_masks.attention_by_formula(*arguments)
    else:
        outputs, sums = [], []
        for group, (q, k, v) in layout.split(query, key, value):
            scales, geometry = group.log_scale(log_scale), group.geometry(span)
            group_output, group_logsumexp = ops.attention(q, k, v, scales, **geometry, scale=scale)
            outputs.append(group_output)
            sums.append(group_logsumexp[..., None])
        output, logsumexp = (layout.join(parts, len(query)) for parts in (outputs, sums))
        logsumexp = logsumexp[..., 0]
    return _in_bthd_order(output, query.dtype), logsumexp.to(log_scale.dtype).contiguous()


@_attention_under_mask.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, encoded: Tensor, span: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    return ops.empty_bthd(query, batch, heads, rows, value.shape[3]), log_scale.new_empty(batch, heads, rows)


@torch.library.custom_op(
    "zerotuning::_attention_under_mask_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _attention_under_mask_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    encoded: Tensor,
    span: Tensor | None,
    scale: float,
    output: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and log_scale."""
    mask = _decode(encoded, query, key)
    layout = _layout_of(encoded, mask)
    if layout is None:
        arguments = (grad_output, query, key, value, log_scale, _dense(mask), span, scale)
        *gradients, grad_log_scale = dense_masks.gradients_by_formula(*arguments)
    else:
        parts: list[tuple[Tensor, ...]] = []
        grad_log_scale = torch.zeros_like(log_scale)
        saved = layout.split(query, key, value, output, logsumexp[..., None])
        for (group, (q, k, v, o, sums)), grad in zip(saved, layout.split_gradient(grad_output), strict=True):
            scales, geometry = group.log_scale(log_scale), group.geometry(span)
            *of_group, of_scales = ops.gradients(grad, q, k, v, scales, o, sums[..., 0], **geometry, scale=scale)
            parts.append(tuple(of_group))
            if log_scale.dim() == 1:
                grad_log_scale += of_scales
            else:
                grad_log_scale.index_add_(0, group.row, of_scales)
        gradients = [layout.join(list(each), len(query)) for each in zip(*parts, strict=True)]
    grad_query, grad_key, grad_value = (_in_bthd_order(gradient, query.dtype) for gradient in gradients)
    return grad_query, grad_key, grad_value, grad_log_scale.to(log_scale.dtype).contiguous()


@_attention_under_mask_backward.register_fake
def _(grad_output, query, key, value, log_scale, encoded, span, scale, output, logsumexp):  # type: ignore[no-untyped-def]
    rows = (ops.empty_bthd(tensor, *tensor.shape) for tensor in (query, key, value))
    return *rows, log_scale.new_empty(log_scale.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _):  # type: ignore[no-untyped-def]
    if grad_output is None:
        return (None,) * 7
    *tensors, output, logsumexp = ctx.saved_tensors
    gradients = _attention_under_mask_backward(grad_output, *tensors, ctx.scale, output, logsumexp)
    return *gradients, None, None, None


_attention_under_mask.register_autograd(_backward, setup_context=_save_for_backward)


def _decode(encoded: Tensor, query: Tensor, key: Tensor) -> DenseMask | PackedMask:
    mask = decode(encoded, query.shape[2], key.shape[2])
    assert isinstance(mask, (DenseMask, PackedMask))
    return mask


def _dense(mask: DenseMask | PackedMask) -> DenseMask:
    return mask if isinstance(mask, DenseMask) else mask.to_dense()


def _in_bthd_order(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) in memory order (B, T, H, D), as the fake kernels declare."""
    return tensor.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
