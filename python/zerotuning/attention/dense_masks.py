"""Attention under a mask that is written out, [B, 1, Tq, Tk].

That is the formula itself, as dense as the mask, in float32, unless a graph is traced. A graph that is traced has such a mask wherever transformers was given neither a mask nor a cache: every row may then hold
packed sequences, which is not known before the graph runs. There attention is an operator, which looks at the mask when it
runs: what says causal sequences, perhaps windowed, is attended to as `packed_sequences` does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zerotuning import ops
from zerotuning.attention import packed_sequences, reference
from zerotuning.errors import ZeroTuningError

#: What hides a key in an additive mask, and all that is less: some write -10,000 for it, float16 ends at -65,504.
HIDDEN = -1e4


def initial_keys(visible: Tensor) -> Tensor:
    """The initial token of each query, (…, Tq), from which keys it sees, bool (…, Tq, Tk).

    The first key that it sees: in packed sequences that of its own. With as many queries as keys it is asked on which
    key the query there sees first, so that a sliding window leads back to where its sequence begins.
    """
    first = visible.int().argmax(dim=-1)
    if visible.shape[-2] == visible.shape[-1]:
        # Each round doubles the way back. A traced graph's must not depend on the length.
        rounds = 24 if torch.compiler.is_compiling() else visible.shape[-1].bit_length()
        for _ in range(rounds):
            first = first.gather(-1, first)
    return first


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: Tensor,
    span: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled attention under a dense mask; differentiable.

    Args:
        query (B, H, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv), log_scale, scale: as in `ops.attention`.
        mask: (B, 1, Tq, Tk): codes of `zerotuning_mask`, int8, 0 hidden, 1 visible, 2 visible and scaled; or the caller's
            own, bool or additive (HIDDEN and less hides a key, the rest is added to the logits), then (B, 1 or H, Tq, Tk):
            the initial token of a query is the first key that it sees or, with as many queries as keys, that the query
            there sees, and so on. In a graph that is traced also the code of `packed_sequences`.
        span: (B, 2) int64, the keys [first, end) that are scaled in place of the initial token.

    Returns:
        output (B, H, Tq, Dv).

    Raises: ZeroTuningError for a mask of another shape or dtype.
    """
    if torch.compiler.is_compiling() and _can_be_sequences(mask, query):
        return _attention_under_mask(query, key, value, log_scale, mask, span, ops.softmax_scale(query, scale))[0]
    if mask.dim() != 4 or mask.shape[-1] != key.shape[2]:
        raise ZeroTuningError(f"attention_mask must be [B, 1, Tq, Tk] with Tk = {key.shape[2]}, got {list(mask.shape)}")
    if mask.dtype not in (torch.int8, torch.bool) and not mask.is_floating_point():
        raise ZeroTuningError(f"attention_mask must be bool or floating point in four dimensions, got {mask.dtype}")
    return _by_formula(query, key, value, log_scale, mask, span, scale)[0].to(query.dtype)


def _can_be_sequences(mask: Tensor, query: Tensor) -> bool:
    """Codes of as many queries as keys, or a code, whose sequences' lengths the shapes in a graph must not depend on."""
    rows = query.shape[2]
    codes = mask.dtype == torch.int8 and mask.shape == (query.shape[0], 1, rows, rows)
    return codes or packed_sequences.is_packed_code(mask, query)


def _by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: Tensor,
    span: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """output and logsumexp, in float32 or what is wider."""
    visible, scaled = _meaning(query, key, mask, span)
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (tensor.to(wide) for tensor in (query, key, value))
    bias = mask.to(wide).masked_fill(~visible, 0.0) if mask.is_floating_point() else None
    return reference.scaled_attention(
        query, key, value, log_scale, visible=visible, scaled=scaled, bias=bias, scale=scale
    )


def _meaning(query: Tensor, key: Tensor, mask: Tensor, span: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which keys a query sees, and which of them are scaled: bool, of the mask's shape."""
    if mask.dtype == torch.int8:
        visible, scaled = mask > 0, mask == 2
    else:
        visible = mask if mask.dtype == torch.bool else mask > HIDDEN
        scaled = visible & torch.zeros_like(visible).scatter(-1, initial_keys(visible)[..., None], True)
    if span is not None:
        scaled = visible & reference.scaled_keys(query, key, span=span)
    return visible, scaled


def _gradients_by_formula(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: Tensor,
    span: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value and log_scale; an operator's own gradient cannot be asked of autograd."""
    visible, scaled = _meaning(query, key, mask, span)
    batch, heads, key_heads = *query.shape[:2], key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grad, q = grad_output.to(wide), query.to(wide)
    k, v = (tensor.to(wide).repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))
    bias = log_scale.to(wide).expand(batch, heads)[:, :, None, None] * scaled
    logits = (scale * q @ k.transpose(-1, -2) + bias).masked_fill(~visible, -torch.inf)
    weights = torch.softmax(logits, dim=-1).masked_fill(~visible, 0.0)  # no NaN of queries that see nothing
    change = weights * (grad @ v.transpose(-1, -2))
    change = change - weights * change.sum(dim=-1, keepdim=True)

    def of_key_heads(gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (key_heads, -1)).sum(dim=2)

    grad_key = of_key_heads(scale * change.transpose(-1, -2) @ q)
    grad_value = of_key_heads(weights.transpose(-1, -2) @ grad)
    grad_log_scale = (change * scaled).sum(dim=(-2, -1))
    if log_scale.dim() == 1:
        grad_log_scale = grad_log_scale.sum(dim=0)
    return scale * change @ k, grad_key, grad_value, grad_log_scale


# What codes say. All layers of a kind get the same tensor, so that it is asked once a forward pass, where they are made in
# the graph; of codes that came into the graph each layer asks.


#: By codes that came out of `find_packed_sequences`, whose contents nothing changes; other tensors may get new contents unseen.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _layout_of(mask: Tensor) -> packed_sequences.Layout | None:
    """Waits for a GPU where it is not known. None: the formula is to be used; so it is while a graph is captured."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if mask.dtype == torch.int8:
        return _layouts[mask] if mask in _layouts else _layout_of_codes(mask)  # type: ignore[no-any-return]
    return packed_sequences.known_layout(mask) or packed_sequences.lay_out(mask.cpu(), mask.device)


def _layout_of_codes(codes: Tensor) -> packed_sequences.Layout | None:
    """The layout of codes that are exactly causal, packed and perhaps windowed ones."""
    if codes.numel() == 0:
        return None
    visible = codes[:, 0] != 0
    begin = packed_sequences.beginnings_in(visible)
    row = torch.arange(codes.shape[2], device=codes.device)
    seen = visible.sum(dim=-1)
    window = torch.where(seen < row - begin + 1, seen, 0).amax()
    code = torch.stack((begin, torch.ones_like(begin), window.expand_as(begin)), dim=-1)[:, None]
    if not torch.equal(packed_sequences.dense_codes(code), codes):
        return None
    return packed_sequences.lay_out(code.cpu(), codes.device)


# The operators of traced graphs. They wait for the GPU, so that CUDA graphs must leave them out.


@torch.library.custom_op("zerotuning::_find_packed_sequences", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def find_packed_sequences(codes: Tensor) -> Tensor:
    """A copy of codes, of which layers will know what it says."""
    copy = codes.clone()
    if not (codes.is_cuda and torch.cuda.is_current_stream_capturing()):
        _layouts[copy] = _layout_of_codes(codes)
    return copy


@find_packed_sequences.register_fake
def _(codes: Tensor) -> Tensor:
    return torch.empty_like(codes)


@torch.library.custom_op("zerotuning::_attention_under_mask", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_under_mask(
    query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, mask: Tensor, span: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """output and logsumexp."""
    layout = _layout_of(mask)
    if layout is None:
        output, logsumexp = _by_formula(query, key, value, log_scale, _codes(mask), span, scale)
    else:
        outputs, sums = [], []
        for group, (q, k, v) in layout.parts(query, key, value):
            scales, geometry = group.log_scale(log_scale), group.geometry(span)
            part, sum_of_part = ops.attention(q, k, v, scales, **geometry, scale=scale)
            outputs.append(part)
            sums.append(sum_of_part[..., None])
        output, logsumexp = (layout.rows(parts, len(query)) for parts in (outputs, sums))
        logsumexp = logsumexp[..., 0]
    return _in_rows(output, query.dtype), logsumexp.to(log_scale.dtype).contiguous()


@_attention_under_mask.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, mask: Tensor, span: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    return ops.empty_rows(query, batch, heads, rows, value.shape[3]), log_scale.new_empty(batch, heads, rows)


@torch.library.custom_op(
    "zerotuning::_attention_under_mask_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _attention_under_mask_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    mask: Tensor,
    span: Tensor | None,
    scale: float,
    output: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and log_scale."""
    layout = _layout_of(mask)
    if layout is None:
        *found, of_scales = _gradients_by_formula(grad_output, query, key, value, log_scale, _codes(mask), span, scale)
    else:
        parts: list[tuple[Tensor, ...]] = []
        of_scales = torch.zeros_like(log_scale)
        kept = layout.parts(query, key, value, output, logsumexp[..., None])
        for (group, (q, k, v, o, sums)), grad in zip(kept, layout.parts_of_gradient(grad_output), strict=True):
            scales, geometry = group.log_scale(log_scale), group.geometry(span)
            *of_part, of_own_scales = ops.gradients(grad, q, k, v, scales, o, sums[..., 0], **geometry, scale=scale)
            parts.append(tuple(of_part))
            if log_scale.dim() == 1:
                of_scales += of_own_scales
            else:
                of_scales.index_add_(0, group.row, of_own_scales)
        found = [layout.rows(list(each), len(query)) for each in zip(*parts, strict=True)]
    grad_query, grad_key, grad_value = (_in_rows(gradient, query.dtype) for gradient in found)
    return grad_query, grad_key, grad_value, of_scales.to(log_scale.dtype).contiguous()


@_attention_under_mask_backward.register_fake
def _(grad_output, query, key, value, log_scale, mask, span, scale, output, logsumexp):  # type: ignore[no-untyped-def]
    rows = (ops.empty_rows(tensor, *tensor.shape) for tensor in (query, key, value))
    return *rows, log_scale.new_empty(log_scale.shape)


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
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


_attention_under_mask.register_autograd(_backward, setup_context=_keep_for_backward)


def _codes(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.int8 else packed_sequences.dense_codes(mask)


def _in_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) with heads inside rows, as the fake kernels say."""
    return tensor.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
