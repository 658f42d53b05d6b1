"""Patching a transformers model, applying scales to it, and contexts that change the scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zerotuning.errors import ZeroTuningError
from zerotuning.models.tensor_parallel import head_shard
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.implementation import (
    IMPLEMENTATION,
    implementations,
    restore_implementations,
    switch_implementation,
    text_config,
)
from zerotuning.patching.layer_scales import CHILD, LayerScales
from zerotuning.patching.probe import AttentionLayer, find_attention_layers


@dataclass
class PatchState:
    """What `patch` adds to a model: the scales of its layers, and what `unpatch` restores."""

    layers: list[LayerScales | None]  # by layer index; None where `partial` left a layer out
    modules: list[nn.Module]  # attention layers that have LayerScales as a child
    heads: int
    implementations: list[tuple[Any, Any]]  # before patching, of each configuration
    settings: list[str] = field(default_factory=lambda: [""])
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def scaled_layers(self) -> list[LayerScales]:
        """The scales of the layers that were not left out."""
        return [layer for layer in self.layers if layer is not None]


def is_patched(model: nn.Module) -> bool:
    """Return whether `patch` switched the model to scaled attention."""
    return isinstance(getattr(model, "_zerotuning", None), PatchState)


def patch(model: nn.Module, *, partial: bool = False) -> nn.Module:
    """Switch a transformers causal language model to scaled attention with every γ = 1: outputs stay those of `sdpa`.

    Args:
        model: any transformers model that looks its attention function up by name (transformers >= 5.6). A model that
            is patched already stays as it is.
        partial: accept a model (hybrids) in which some layers have no such attention; their rows of γ must stay 1.

    Returns:
        The same model.

    Raises:
        ZeroTuningError: a layer cannot be reached or has an attention that cannot be scaled; the message names the
            layer, and the model is left unpatched.
    """
    if is_patched(model):
        if text_config(model)._attn_implementation != IMPLEMENTATION:  # other code has switched it since
            switch_implementation(model, IMPLEMENTATION)
        return model
    _refuse_unsupported_model(model)
    before = implementations(model)
    try:
        switch_implementation(model, IMPLEMENTATION)
        found = find_attention_layers(model, partial)
        layers = [None if layer is None else _layer_scales(model, layer) for layer in found]
        heads = _common_heads(model, layers)
    except BaseException:
        restore_implementations(before)
        raise
    modules = []
    for layer, scales in zip(found, layers, strict=True):
        if layer is not None and scales is not None:
            layer.module.add_module(CHILD, scales)
            modules.append(layer.module)
    # A model that was loaded with this implementation goes back to transformers' default.
    before = [(config, "sdpa" if name == IMPLEMENTATION else name) for config, name in before]
    model._zerotuning = PatchState(layers, modules, heads, before)  # type: ignore[assignment]
    return model


def _refuse_unsupported_model(model: Any) -> None:
    patched = next((name for name, module in model.named_modules() if isinstance(module, LayerScales)), None)
    if patched is not None:
        raise ZeroTuningError(
            f"{patched} was patched through another model, of which {type(model).__name__} is a part or the whole: "
            "unpatch the other model first"
        )
    if not hasattr(model, "set_attn_implementation"):
        raise ZeroTuningError(f"model must be a transformers model, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ZeroTuningError(
            f"{type(model).__name__} has an encoder and cross-attention, which zerotuning does not support"
        )


def _layer_scales(model: Any, layer: AttentionLayer) -> LayerScales:
    shard = head_shard(model, layer.name, layer.heads)
    with torch.inference_mode(False):  # training may use the scales as well
        return LayerScales(layer.name, layer.heads if shard is None else shard.total, layer.device, shard)


def _common_heads(model: Any, layers: Sequence[LayerScales | None]) -> int:
    heads = {layer.heads for layer in layers if layer is not None}
    if len(heads) > 1:
        raise ZeroTuningError(
            f"{type(model).__name__} has layers of {sorted(heads)} heads; "
            "zerotuning needs the same number in all layers"
        )
    return heads.pop()


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`; a model that is not patched stays as it is.

    Returns:
        The same model.
    """
    if is_patched(model):
        state = _state(model)
        for module in model.modules():  # a wrapper, such as PEFT's, shows the attribute of the model inside
            module.__dict__.pop("_zerotuning", None)
        for module in state.modules:
            delattr(module, CHILD)
        restore_implementations(state.implementations)
    return model


def _state(model: nn.Module) -> PatchState:
    if not is_patched(model):
        raise ZeroTuningError("the model is not patched; call zerotuning.patch(model) first")
    return model._zerotuning  # type: ignore[return-value]


def patched_shape(model: nn.Module) -> tuple[int, int]:
    """Return (layers, heads) of a patched model.

    Raises:
        ZeroTuningError: the model is not patched.
    """
    state = _state(model)
    return len(state.layers), state.heads


# Scales.


def apply_scales(model: nn.Module, scales: HeadScales | Mapping[str, HeadScales]) -> nn.Module:
    """Set γ of every head, and patch the model if needed.

    Args:
        model: a transformers model, patched or not.
        scales: one setting, or several by name: `select_scales` then chooses a setting for each sample, and outside of
            `select_scales` the first setting applies.

    Returns:
        The same model.

    Raises:
        ZeroTuningError: scales of another shape or model type; the message names both.
    """
    patch(model)
    state = _state(model)
    named = {"": scales} if isinstance(scales, HeadScales) else dict(scales)
    if not named:
        raise ZeroTuningError("scales must name at least one HeadScales, got an empty mapping")
    for name, setting in named.items():
        _check_scales(model, state, name, setting)
    for index, layer in enumerate(state.layers):
        if layer is not None:
            with torch.inference_mode(False):  # training may use the scales as well
                values = torch.stack([setting.log_scale[index] for setting in named.values()])
                layer.log_scale = values.to(layer.log_scale.device)
            layer.sample_settings = None
    state.settings = list(named)
    state.metadata = dict(next(iter(named.values())).metadata)
    return model


def _check_scales(model: Any, state: PatchState, name: str, scales: HeadScales) -> None:
    if not isinstance(scales, HeadScales):
        raise ZeroTuningError(f"scales must be HeadScales or a mapping of them, got {type(scales).__name__}")
    label = f"scales {name!r}" if name else "scales"
    shape = (len(state.layers), state.heads)
    if tuple(scales.gamma.shape) != shape:
        raise ZeroTuningError(
            f"{label} are for {scales.num_layers} layers x {scales.num_heads} heads, "
            f"the model has {shape[0]} x {shape[1]}"
        )
    check_model_type(model, scales, f"{label} were")
    for index, layer in enumerate(state.layers):
        if layer is None and bool((scales.gamma[index] != 1).any()):
            raise ZeroTuningError(f"{label} change layer {index}, which has no attention that zerotuning can reach")


def check_model_type(model: Any, scales: HeadScales, subject: str) -> None:
    """Check that scales were made for models of this type.

    Args:
        model: a transformers model.
        scales: metadata without a model_type fit every model.
        subject: how the error message begins.

    Raises:
        ZeroTuningError: the metadata name another type of model.
    """
    expected, model_type = scales.metadata.get("model_type"), getattr(model.config, "model_type", "")
    if expected and expected != model_type:
        raise ZeroTuningError(f"{subject} made for a {expected} model, this is a {model_type} model")


def head_scales(model: nn.Module) -> HeadScales:
    """Return the applied scales; of several named settings the first.

    Raises:
        ZeroTuningError: the model is not patched.
    """
    state = _state(model)
    log_scales = [torch.zeros(state.heads) if layer is None else layer.log_scale[0].cpu() for layer in state.layers]
    return HeadScales(torch.stack(log_scales).exp(), state.metadata)


# Contexts that change the scales while they are open.


@contextmanager
def _set_on_layers(model: nn.Module, name: str, values: Sequence[Any]) -> Iterator[nn.Module]:
    """Set an attribute of each layer's scales within the context; restore the previous values at its end."""
    layers = _state(model).scaled_layers
    before = [getattr(layer, name) for layer in layers]
    try:
        for layer, value in zip(layers, values, strict=True):
            setattr(layer, name, value)
        yield model
    finally:
        for layer, value in zip(layers, before, strict=True):
            setattr(layer, name, value)


@contextmanager
def untuned(model: nn.Module) -> Iterator[nn.Module]:
    """Run a patched model with every γ = 1 while the context is open."""
    with _set_on_layers(model, "enabled", [False] * len(_state(model).scaled_layers)):
        yield model


@contextmanager
def select_scales(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Use the scales called names[i] for sample i of each batch while the context is open.

    Args:
        model: a patched model to which several named scales are applied.
        names: one applied setting for each sample; a beam search repeats each name for its beams.

    Raises:
        ZeroTuningError: a name was not applied, or no names; in a forward pass, a batch of another number of samples.
    """
    state = _state(model)
    unknown = [name for name in names if name not in state.settings]
    if unknown:
        applied = ", ".join(repr(name) for name in state.settings)
        raise ZeroTuningError(f"names must be applied scales ({applied}), got {unknown[0]!r}")
    if not names:
        raise ZeroTuningError("names must give the scales of at least one sample, got none")
    index = torch.tensor([state.settings.index(name) for name in names])
    on_devices = [index.to(layer.log_scale.device) for layer in state.scaled_layers]
    with _set_on_layers(model, "sample_settings", on_devices):
        yield model


#: The former name of `select_scales`, kept for one version.
rows = select_scales


@contextmanager
def scaled_keys(model: nn.Module, spans: Tensor) -> Iterator[nn.Module]:
    """Scale other keys than the initial token while the context is open: of sample i the keys [first, end) = spans[i].

    Args:
        model: a patched model.
        spans: (B, 2) int64, positions in the batch as it is padded; first == end scales no key. A beam search repeats
            each sample's span for its beams.

    Raises:
        ZeroTuningError: spans of another shape or dtype; in a forward pass, a batch of another number of samples, or a
            layer with a sliding-window cache.
    """
    if spans.dim() != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64 or spans.shape[0] == 0:
        raise ZeroTuningError(f"spans must be int64 [B, 2], got {spans.dtype} {list(spans.shape)}")
    on_devices = [spans.to(layer.log_scale.device) for layer in _state(model).scaled_layers]
    with _set_on_layers(model, "span", on_devices):
        yield model


@contextmanager
def head_parameters(model: nn.Module) -> Iterator[list[Tensor]]:
    """Replace the applied scales by leaves that autograd differentiates, for a search.

    The context yields log γ of each layer, float32 (H). Values written into a leaf (under no_grad) change the model.
    No layer reads the leaf of a layer that `partial` left out.
    """
    state = _state(model)
    parameters = []
    for layer in state.layers:
        if layer is None:
            parameters.append(torch.zeros(state.heads, requires_grad=True))
        else:
            layer.parameter = torch.zeros(state.heads, device=layer.log_scale.device, requires_grad=True)
            parameters.append(layer.parameter)
    try:
        yield parameters
    finally:
        for layer in state.scaled_layers:
            layer.parameter = None


@contextmanager
def candidates(model: nn.Module, log_scale: Tensor) -> Iterator[nn.Module]:
    """Evaluate C settings in each batch, for a search inside `head_parameters`.

    Of C equal parts of a batch the first uses log_scale[0], the second log_scale[1], and so on.

    Args:
        model: a patched model.
        log_scale: float32 (C, layers, H). Forward passes read this tensor in place: a recorded CUDA graph uses
            values that are written into it later.

    Raises:
        ZeroTuningError: in a forward pass, a batch that has no C equal parts.
    """
    of_layers = [
        log_scale[:, index].to(layer.log_scale.device)
        for index, layer in enumerate(_state(model).layers)
        if layer is not None
    ]
    with _set_on_layers(model, "parameter", of_layers):
        yield model
