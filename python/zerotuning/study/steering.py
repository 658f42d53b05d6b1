"""Other interventions in a frozen model's attention, which the studies compare with head scales; computed densely.

    with steered(model, CalibratedSinks(), strength):
        scores = scorer.scores(batch)

An intervention replaces the attention weights of all heads of a layer. `strength` [layers, heads] selects the heads: 1
is the intervention, 0 the head's own weights, and a value between mixes them. The strength is differentiable, so that
one backward pass ranks all heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from zerotuning.errors import ZeroTuningError
from zerotuning.patching.attention_function import refuse_unsupported
from zerotuning.patching.implementation import attention_implementation

IMPLEMENTATION = "zerotuning_steered"


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one layer in one pass over B samples of T tokens.

    Attributes:
        layer: Index of the layer.
        logits: (B, H, T, T) before the softmax, scaled; -inf at hidden keys; float32 or float64.
        weights: (B, H, T, T), the softmax of the logits over visible keys; 0 in rows of padding.
        visible: Which keys each query sees, bool (B, 1, T, T).
    """

    layer: int
    logits: Tensor
    weights: Tensor
    visible: Tensor

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding: bool (B, T)."""
        return self.visible.any(dim=-2)[:, 0]


class Intervention(Protocol):
    """Attention maps of a layer -> the weights (B, H, T, T) that replace its own; rows sum to 1, or 0 for padding."""

    def __call__(self, maps: AttentionMaps) -> Tensor:
        """The new weights (B, H, T, T)."""
        ...


@dataclass(frozen=True)
class Temperature:
    """softmax(logits / temperature): flatter above 1, sharper below 1.

    Attributes:
        temperature: One number > 0 for all heads, or one for each head: [layers, heads].

    Raises:
        ZeroTuningError: A temperature is not positive.
    """

    temperature: float | Tensor

    def __post_init__(self) -> None:
        if not bool((torch.as_tensor(self.temperature) > 0).all()):
            raise ZeroTuningError(f"temperature must be positive, got {self.temperature}")

    def __call__(self, maps: AttentionMaps) -> Tensor:
        """The softmax of the divided logits."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(maps.logits)[maps.layer][:, None, None]
        return _softmax(maps.logits / temperature, maps.visible)


@dataclass(frozen=True)
class CalibratedSinks:
    """ACT (Yu et al. 2024, arXiv 2406.15765): less weight for attention sinks other than the initial token.

    A key of an input is a sink of a head if its mean weight, over the queries that see the key, exceeds alpha / N,
    where N is the number of the input's tokens. In every row the weights of sinks are multiplied by beta, and the freed
    weight goes to the row's other keys, the initial token included, in proportion to their weights. The authors' code
    (github.com/GATECH-EIC/ACT, models/llama_modelling_aug.py) redistributes the same way, with 0.1 in place of
    alpha / N.

    Attributes:
        alpha: The default is the paper's value.
        beta: The default is the paper's value.

    Raises:
        ZeroTuningError: alpha is not positive, or beta is outside [0, 1].
    """

    alpha: float = 5.0
    beta: float = 0.4

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ZeroTuningError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.beta <= 1:
            raise ZeroTuningError(f"beta must be in [0, 1], got {self.beta}")

    def __call__(self, maps: AttentionMaps) -> Tensor:
        """The weights with those of sinks reduced."""
        weights = maps.weights
        sinks = self.sinks(maps)[:, :, None, :]
        others = (weights * ~sinks).sum(dim=-1, keepdim=True)
        freed = (1 - self.beta) * (weights * sinks).sum(dim=-1, keepdim=True)
        # A row in which all other weights vanish stays as it is: no key could receive the freed weight.
        possible = others > torch.finfo(weights.dtype).eps
        grown = weights * (1 + freed / others.masked_fill(~possible, 1.0))
        return torch.where(possible, torch.where(sinks, self.beta * weights, grown), weights)

    def sinks(self, maps: AttentionMaps) -> Tensor:
        """Which keys are sinks of which head: bool (B, H, T)."""
        real = maps.real
        seen = maps.visible.sum(dim=-2).clamp_min(1)  # (B, 1, T): how many queries see each key
        mean = maps.weights.sum(dim=-2) / seen
        threshold = self.alpha / real.sum(dim=-1).clamp_min(1)
        places = torch.arange(real.shape[-1], device=real.device)
        later = places > real.int().argmax(dim=-1, keepdim=True)  # (B, T): not the initial token
        return (mean > threshold[:, None, None]) & later[:, None]


@dataclass(frozen=True)
class MarkedSpan:
    """PASTA (Zhang et al. 2023, arXiv 2311.02262): weights of keys outside the marked span times alpha, renormalized.

    As in the authors' code (github.com/QingruZhang/PASTA, pastalib/pasta.py), log alpha is added to these keys' logits.
    The weights of a query that sees no key of the span do not change. AutoPASTA (arXiv 2409.10790) weakens only keys
    that lie in the context and outside the span: `within`.

    Attributes:
        spans: Marked keys [first, end) of each sample, as positions in the padded batch: int64 [B, 2].
        alpha: In (0, 1]; the default is the paper's value.
        within: Keys that may be weakened: int64 [B, 2]; None: all keys.

    Raises:
        ZeroTuningError: alpha is outside (0, 1], or spans have another type or shape.
    """

    spans: Tensor
    alpha: float = 0.01
    within: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ZeroTuningError(f"alpha must be in (0, 1], got {self.alpha}")
        for name, spans in (("spans", self.spans), ("within", self.within)):
            if spans is not None and (spans.dim() != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64):
                raise ZeroTuningError(f"{name} must be int64 [B, 2], got {spans.dtype} {list(spans.shape)}")

    def __call__(self, maps: AttentionMaps) -> Tensor:
        """The weights with those outside the span reduced."""
        batch, keys = maps.logits.shape[0], maps.logits.shape[-1]
        if self.spans.shape[0] != batch:
            raise ZeroTuningError(f"spans mark the keys of {self.spans.shape[0]} samples, the batch has {batch}")
        weakened = ~_inside(self.spans, keys)
        if self.within is not None:
            weakened = weakened & _inside(self.within, keys)
        bias = math.log(self.alpha) * weakened.to(maps.logits)
        return _softmax(maps.logits + bias[:, None, None], maps.visible)


def _inside(spans: Tensor, keys: int) -> Tensor:
    """bool [B, keys]."""
    places = torch.arange(keys, device=spans.device)
    return (places >= spans[:, :1]) & (places < spans[:, 1:])


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible keys; 0 in the rows of queries that see no key."""
    sees_no_key = ~visible.any(dim=-1, keepdim=True)
    hidden = logits.masked_fill(~visible, -torch.inf)
    return torch.softmax(hidden.masked_fill(sees_no_key, 0.0), dim=-1).masked_fill(sees_no_key, 0.0)


# Switching a model over.


@dataclass(frozen=True)
class _Steering:
    intervention: Intervention
    strength: Tensor | None


_active: _Steering | None = None


@contextmanager
def steered(model: nn.Module, intervention: Intervention, strength: Tensor | None = None) -> Iterator[nn.Module]:
    """Within the context an intervention replaces the model's attention weights.

    The context is for passes without a cache. Attention is computed in float32 (float64 for a float64 model) with all
    T × T weights.

    Args:
        model: A transformers causal language model, patched or not; applied head scales have no effect within the
            context.
        intervention: Makes the weights.
        strength: s in (1 - s) · own weights + s · the intervention's weights, float [layers, heads]; None: 1
            everywhere.

    Raises:
        ZeroTuningError: The strength has another shape, or the model cannot be steered.
    """
    global _active
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    shape = (text.num_hidden_layers, text.num_attention_heads)
    if strength is not None and tuple(strength.shape) != shape:
        raise ZeroTuningError(f"strength must be [layers, heads] = {list(shape)}, got {list(strength.shape)}")
    before = _active
    with attention_implementation(model, IMPLEMENTATION):
        _active = _Steering(intervention, strength)
        try:
            yield model
        finally:
            _active = before


def steered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a steered model: query (B, H, T, D) -> output (B, T, H, Dv)."""
    refuse_unsupported(module, dropout, is_causal, kwargs)
    steering, layer = _active, getattr(module, "layer_idx", None)
    if steering is None or layer is None:
        raise ZeroTuningError(f"attention {IMPLEMENTATION!r} is for models within steered(), with numbered layers")
    if key.shape[2] != query.shape[2] or attention_mask is None:
        raise ZeroTuningError(f"steered() is for passes without a cache, got {query.shape[2]} of {key.shape[2]} tokens")
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    keys, values = (tensor.to(wide).repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (query.to(wide) @ keys.transpose(-1, -2) * scale).masked_fill(~attention_mask, -torch.inf)
    maps = AttentionMaps(int(layer), logits, _softmax(logits, attention_mask), attention_mask)
    weights = _mixed(maps, steering)
    return (weights @ values).to(query.dtype).transpose(1, 2), None


def _mixed(maps: AttentionMaps, steering: _Steering) -> Tensor:
    if steering.strength is None:
        return steering.intervention(maps)
    strength = steering.strength[maps.layer]
    if not strength.requires_grad and not bool(strength.any()):
        return maps.weights
    return torch.lerp(maps.weights, steering.intervention(maps), strength.to(maps.weights)[:, None, None])


def steered_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function of a steered model: which keys each query sees, always dense: bool (B, 1, T, T)."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    visible: Tensor = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )
    return visible


AttentionInterface.register(IMPLEMENTATION, steered_attention)
AttentionMaskInterface.register(IMPLEMENTATION, steered_mask)
