"""The attention function of patched models: query, key and value go to the operators as they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.errors import ZeroTuningError
from zerotuning.patching import probe
from zerotuning.patching.layer_scales import CHILD, LayerScales, repeat_for_batch
from zerotuning.patching.mask_function import DECODE_QUERIES, HEADER, SPAN_HEADER, _words


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
    """What a patched model calls in place of its attention: query (B, H, Tq, D) -> output (B, Tq, H, Dv)."""
    probing = probe.running()
    if probing is not None:
        probing.record_call(module, query, sliding_window)
    refuse_unsupported(module, dropout, is_causal, kwargs)
    if not query.dtype == key.dtype == value.dtype and torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    scaling_of_layer: Any = module._modules.get(CHILD)
    if scaling_of_layer is None:
        if probing is None:
            raise ZeroTuningError(
                f"{_describe(module)} was not reached when the model was patched (or shares its config with one that is): "
                "unpatch and patch it again"
            )
        log_scale, span = torch.zeros(query.shape[1], device=query.device), None
    else:
        log_scale = scaling_of_layer.current(query.shape[0])
        span = _span_of(scaling_of_layer, query, key, sliding_window)
    if query.dtype == torch.float64:
        log_scale = log_scale.double()
    known = None if attention_mask is None else _read_geometry(attention_mask, key.shape[2])
    if attention_mask is None or known is not None:
        known = known or _NOTHING_KNOWN
        return _attend(query, key, value, log_scale, known, span, sliding_window or 0, scaling), None
    if packed_sequences.is_packed_code(attention_mask, query) and not torch.compiler.is_compiling():
        output = packed_sequences.attend(query, key, value, log_scale, attention_mask, span, scaling)
    else:
        output = dense_masks.attend(query, key, value, log_scale, attention_mask, span, scaling)
    return output.transpose(1, 2), None


def _span_of(layer: LayerScales, query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """The keys that `scaled_keys` chose, [B, 2]; None: the initial token."""
    if layer.span is None:
        return None
    if window is not None and key.shape[2] != query.shape[2]:
        raise ZeroTuningError(
            f"{layer.layer_name} has a sliding-window cache, whose keys move: scaled_keys is for passes without one"
        )
    return repeat_for_batch(layer.span, query.shape[0], "scaled_keys names the keys")


class _Geometry(NamedTuple):
    """What `zerotuning_mask` says, as the operators' arguments."""

    key_mask: Tensor | None
    span: Tensor | None
    query_start: Tensor | None


_NOTHING_KNOWN = _Geometry(None, None, None)
#: The mask read last, its number of keys and what it says: all layers of a forward pass get the same one, and generating
#: a token takes longer to make its views than to use them.
_latest: tuple[Tensor, int, _Geometry] | None = None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    known: _Geometry,
    span: Tensor | None,
    window: int,
    scale: float | None,
) -> Tensor:
    key_mask, initial, query_start = known
    span = initial if span is None else span
    rows = query.shape[2]
    few = key.shape[2] > rows and rows <= DECODE_QUERIES
    if few and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, log_scale))):
        geometry = ops.Geometry(key_mask, span, query_start, window)
        return ops.decode_attention_transposed(query, key, value, log_scale, geometry, scale)
    output, _ = ops.attention(
        query,
        key,
        value,
        log_scale,
        key_mask=key_mask,
        span=span,
        query_start=query_start,
        window=window,
        scale=scale,
    )
    return output.transpose(1, 2)


def _read_geometry(mask: Tensor, keys: int) -> _Geometry | None:
    """What `zerotuning_mask` packed, in views, which follow the tensor's contents. None: a mask of another kind."""
    global _latest
    compiling = torch.compiler.is_compiling()
    latest = _latest  # which another thread may replace
    if not compiling and latest is not None and latest[0] is mask and latest[1] == keys:
        return latest[2]
    header = mask.shape[-1] - _words(keys)
    if mask.dtype != torch.long or mask.shape[1:-1] != (1, 1) or header not in (0, SPAN_HEADER, HEADER):
        return None
    words = mask[:, 0, 0]
    known = _Geometry(
        words[:, header:].view(torch.uint8)[:, :keys],
        words[:, header - SPAN_HEADER : header] if header else None,
        words[:, 0] if header == HEADER else None,
    )
    if not compiling:
        _latest = (mask, keys, known)
    return known


_UNSUPPORTED = {
    "softcap": "soft-caps its logits",
    "s_aux": "has learned sinks",
    "position_bias": "has a position bias",
}


def refuse_unsupported(module: nn.Module, dropout: float, is_causal: bool | None, kwargs: Mapping[str, Any]) -> None:
    """Raises ZeroTuningError, which names the layer, for what an attention function is asked beyond causal attention."""
    for name in _UNSUPPORTED.keys() & kwargs.keys():
        if kwargs[name] is not None:
            raise ZeroTuningError(
                f"{_describe(module)} {_UNSUPPORTED[name]} ({name}), which zerotuning does not support"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ZeroTuningError(f"{_describe(module)} is not causal: it has no initial token to scale")
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
