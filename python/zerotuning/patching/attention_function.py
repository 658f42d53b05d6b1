"""The attention function of patched models: calls the operators with the layer's scales and decoded mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences, traced_masks
from zerotuning.attention.mask_encoding import CallerMask, DenseMask, KeyMask, PackedMask, decode
from zerotuning.errors import ZeroTuningError
from zerotuning.patching import probe
from zerotuning.patching.layer_scales import CHILD, LayerScales, repeat_for_batch
from zerotuning.patching.mask_function import DECODE_QUERIES


def zerotuning_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention in a layer of a patched model, in place of the model's own attention function.

    Args:
        module: the attention layer, which has LayerScales as a child.
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D), not repeated for the query heads.
        value: (B, Hkv, Tk, Dv).
        attention_mask: what `zerotuning_mask` returned, or a mask of the caller's own, bool or floating point
            (B, 1 or H, Tq, Tk).
        scaling: factor of the logits, default D ** -0.5.
        dropout: must be 0 in training.
        sliding_window: number of keys that a query sees; None for all.
        is_causal: must not be False; None: the layer's own setting.
        kwargs: further arguments of the layer; those that change attention are refused.

    Returns:
        output (B, Tq, H, Dv), and None in place of the attention weights.

    Raises:
        ZeroTuningError: the layer was not patched, or its attention cannot be scaled.
    """
    probing = probe.running()
    if probing is not None:
        probing.record_call(module, query, sliding_window)
    refuse_unsupported(module, dropout, is_causal, kwargs)
    if not query.dtype == key.dtype == value.dtype and torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    layer: Any = module._modules.get(CHILD)
    if layer is None:
        log_scale, span = _scales_during_probe(module, query), None
    else:
        log_scale = layer.current(query.shape[0])
        span = None if layer.span is None else _chosen_span(layer, query, key, sliding_window)
    if query.dtype == torch.float64:
        log_scale = log_scale.double()
    key_mask = initial = query_start = None
    if attention_mask is not None:
        mask = decode(attention_mask, query.shape[2], key.shape[2])
        if not isinstance(mask, KeyMask):
            output = _attend_under_mask(query, key, value, log_scale, attention_mask, mask, span, scaling)
            return output.transpose(1, 2), None
        key_mask, initial, query_start = mask
    geometry = (key_mask, initial if span is None else span, query_start, sliding_window or 0)
    return _attend(query, key, value, log_scale, geometry, scaling), None


def _scales_during_probe(module: nn.Module, query: Tensor) -> Tensor:
    if probe.running() is None:
        raise ZeroTuningError(
            f"{_describe(module)} was not found when its model was patched, or another patched model shares its "
            "config: unpatch the model and patch the model again"
        )
    return torch.zeros(query.shape[1], device=query.device)


def _chosen_span(layer: LayerScales, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return the keys that `scaled_keys` chose, (B, 2)."""
    assert layer.span is not None
    if window is not None and key.shape[2] != query.shape[2]:
        raise ZeroTuningError(
            f"{layer.layer_name} has a sliding-window cache, whose keys move: use scaled_keys without such a cache"
        )
    return repeat_for_batch(layer.span, query.shape[0], "scaled_keys names the keys")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    geometry: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    scale: float | None,
) -> Tensor:
    """Causal attention, (B, Tq, H, Dv).

    `geometry` holds the fields of ops.Geometry in a plain tuple. Making an ops.Geometry takes ten times as long, in
    every layer of a decode step.
    """
    queries = query.shape[2]
    is_decode_step = key.shape[2] > queries and queries <= DECODE_QUERIES
    if is_decode_step and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, log_scale))
    ):
        return ops.decode_attention_transposed(query, key, value, log_scale, geometry, scale)
    output, _ = ops.attention(query, key, value, log_scale, **ops.Geometry(*geometry)._asdict(), scale=scale)
    return output.transpose(1, 2)


def _attend_under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    encoded: Tensor,
    mask: PackedMask | DenseMask | CallerMask,
    span: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention under a packed, dense or caller's mask, (B, H, Tq, Dv)."""
    if torch.compiler.is_compiling() and _may_hold_packed_sequences(mask, query, key):
        return traced_masks.attend(query, key, value, log_scale, encoded, span, scale)
    if isinstance(mask, PackedMask):
        layout = packed_sequences.layout_of(encoded)
        return packed_sequences.attend(query, key, value, log_scale, layout, span, scale)
    return dense_masks.attend(query, key, value, log_scale, mask, span, scale)


def _may_hold_packed_sequences(mask: PackedMask | DenseMask | CallerMask, query: Tensor, key: Tensor) -> bool:
    """Whether the mask may hold packed sequences when the graph runs; its shapes must not depend on their lengths."""
    return isinstance(mask, PackedMask) or (isinstance(mask, DenseMask) and query.shape[2] == key.shape[2])


_UNSUPPORTED = {
    "softcap": "soft-caps its logits",
    "s_aux": "has learned sinks",
    "position_bias": "has a position bias",
}


def refuse_unsupported(module: nn.Module, dropout: float, is_causal: bool | None, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of the attention function that is not plain causal attention.

    Args:
        module: the attention layer.
        dropout: of the attention weights.
        is_causal: as the layer passes it; None: the layer's own setting.
        kwargs: further arguments of the layer.

    Raises:
        ZeroTuningError: the attention is of another kind; the message names the layer and this kind.
    """
    for name in _UNSUPPORTED.keys() & kwargs.keys():
        if kwargs[name] is not None:
            raise ZeroTuningError(
                f"{_describe(module)} {_UNSUPPORTED[name]} ({name}), which zerotuning does not support"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ZeroTuningError(
            f"{_describe(module)} is not causal: without a causal mask there is no initial token to scale"
        )
    if dropout and module.training:
        raise ZeroTuningError(
            f"{_describe(module)} has attention dropout {dropout}: set attention_dropout to 0 to train"
        )


def _describe(module: nn.Module) -> str:
    child = getattr(module, CHILD, None)
    probing = probe.running()
    name = None if probing is None else probing.module_names.get(id(module))
    if child is not None:
        name = child.layer_name
    if name is None:
        name = f"layer {getattr(module, 'layer_idx', '?')}"
    return f"{name} ({type(module).__name__})"
