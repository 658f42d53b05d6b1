"""Switching a transformers model to attention with scaled initial tokens, and back.

transformers looks its attention function up by name. Registered here under "zerotuning": the attention function, which
hands query, key and value as they come (K/V unrepeated) to `ops`, and the mask function, which says in O(T) numbers what
a dense mask would say in O(T²). `packed_sequences` does both for rows of several sequences. Each attention layer gets a
child module that holds its scales.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.errors import ZeroTuningError
from zerotuning.models.device_maps import input_device
from zerotuning.models.tensor_parallel import HeadShare, head_share
from zerotuning.patching.head_scales import HeadScales

IMPLEMENTATION = "zerotuning"
#: Name of the child module of each attention layer.
CHILD = "zerotuning"
#: Cached generation steps of up to so many queries take the decode operator.
DECODE_QUERIES = 16
#: int64 numbers in front of the key mask in a geometry tensor: first scaled key, end of the scaled keys; or query_start
#: before both.
SPAN_HEADER, HEADER = 2, 3
#: Bytes of the key mask that one int64 holds.
BYTES = 8


class LayerScales(nn.Module):
    """The scales of one attention layer: log γ of one or several named settings, float32 whatever the model's dtype.

    Those of all heads, also where this process has a share of them alone.
    """

    log_scale: Tensor
    rows: Tensor | None

    def __init__(self, layer_name: str, heads: int, device: torch.device, share: HeadShare | None = None) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.heads = heads
        self.share = share
        self.enabled = True
        # [settings, heads]. Not persistent: a patched model saves as it did before.
        self.register_buffer("log_scale", torch.zeros(1, heads, device=device), persistent=False)
        self.register_buffer("rows", None, persistent=False)  # [B] int64: the setting of each sample
        self.parameter: Tensor | None = None  # [heads] or [C, heads], in place of the settings while a search is on
        self.span: Tensor | None = None  # [B, 2] int64: keys that are scaled in place of the initial token
        self._only: tuple[Tensor, Tensor] | None = None  # log_scale and its row 0, not looked up anew for each token

    def _apply(self, fn: Any, recurse: bool = True) -> LayerScales:
        exact = self.log_scale
        super()._apply(fn, recurse)
        if self.log_scale.dtype != torch.float32:  # model.half(), model.to(torch.bfloat16)
            self.log_scale = exact.to(self.log_scale.device)
        return self

    def current(self, batch: int) -> Tensor:
        """log γ for a batch, of this process's heads: [heads], or [batch, heads] where `rows` or `candidates` chose."""
        if not self.enabled:
            return self._own(torch.zeros_like(self.log_scale[0]))
        if self.parameter is not None:
            alone = self.parameter.dim() == 1
            chosen = self.parameter if alone else _for_batch(self.parameter, batch, "candidates names the scales")
            return self._own(chosen)
        rows = self._buffers["rows"]  # as an attribute it would be looked for elsewhere first
        if rows is None:
            return self._first_setting()
        return self._own(self.log_scale[_for_batch(rows, batch, "rows names the scales")])

    def _own(self, log_scale: Tensor) -> Tensor:
        return log_scale if self.share is None else self.share.of(log_scale)

    def _first_setting(self) -> Tensor:
        settings: Any = self._buffers["log_scale"]
        if torch.compiler.is_compiling():
            return self._own(settings[0])
        only = self._only
        if only is None or only[0] is not settings:
            with torch.inference_mode(False):  # a view that training may use as well
                only = self._only = settings, self._own(settings[0])
        return only[1]


# The attention function.


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
    if _probe.active and _is_probing():  # every layer asks: the first costs less
        _probe.record(module, query, sliding_window)
    refuse_unsupported(module, dropout, is_causal, kwargs)
    if not query.dtype == key.dtype == value.dtype and torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    scaling_of_layer: Any = module._modules.get(CHILD)
    if scaling_of_layer is None:
        if not _is_probing():
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
    return _for_batch(layer.span, query.shape[0], "scaled_keys names the keys")


def _for_batch(chosen: Tensor, batch: int, what: str) -> Tensor:
    """One row a sample, repeated for the beams of a beam search."""
    samples = chosen.shape[0]
    if batch % samples:
        raise ZeroTuningError(f"{what} of {samples} samples, the batch has {batch}")
    return chosen if batch == samples else chosen.repeat_interleave(batch // samples, dim=0)


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
        return ops.decode_attention_transposed(query, key, value, log_scale, key_mask, span, query_start, window, scale)
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
    name = child.layer_name if child is not None else _probe.names.get(id(module))
    if name is None:
        name = f"layer {getattr(module, 'layer_idx', '?')}"
    return f"{name} ({type(module).__name__})"


# The mask function.


def zerotuning_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What the attention function needs to know of padding and caches.

    None: nothing, the queries are the last keys and all keys are real. Else the geometry, int64 [B, 1, 1, words]: the key
    mask, 8 keys a word, a byte each; in front of it, where that does not say all, the scaled keys [first, end), and before
    them query_start where the queries may not be the last keys. Packed sequences: the code of `packed_sequences`, int64
    [B, 1, T, 3]. Masks of another kind (chunks, custom mask functions, packed sequences in a graph that is traced): int8
    [B, 1, Tq, Tk], 0 hidden, 1 visible, 2 visible and scaled.
    """
    chunked = getattr(config, "attention_chunk_size", None) is not None
    if local_size is not None and not chunked and _is_probing():
        _probe.windows.add(local_size)
    sliding = local_size is not None and not chunked and (allow_is_causal_skip or q_length == 1)
    if not (mask_function is causal_mask_function or sliding):
        if q_length == kv_length and kv_offset == 0 and isinstance(q_offset, int) and q_offset == 0:
            code = packed_sequences.packed_code(mask_function, attention_mask, batch_size, q_length, device)
            if code is not None:
                return code
        codes = _dense_codes(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            chunked,
            device,
            kwargs,
        )
        return (
            dense_masks.find_packed_sequences(codes)
            if torch.compiler.is_compiling() and q_length == kv_length
            else codes
        )
    ends_at_queries = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    decoding = q_length < kv_length and q_length <= DECODE_QUERIES  # an export's lengths are settled by the first
    if ends_at_queries and (attention_mask is None or _is_all_real(attention_mask, decoding)):
        return None
    traced = torch.compiler.is_compiling()
    if decoding and kv_offset == 0 and isinstance(q_offset, int) and attention_mask is not None and not traced:
        real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
        return ops.step_geometry(real, kv_length, None if ends_at_queries else q_offset)
    words = _key_mask_words(attention_mask, batch_size, kv_length, kv_offset, device)
    if not (ends_at_queries and not decoding):
        start = _first_real(attention_mask, batch_size, device) - kv_offset
        present = start >= 0  # a sliding cache drops old keys, the initial token among them
        header = [torch.where(present, start, 0), torch.where(present, start + 1, 0)]
        if not ends_at_queries:
            header.insert(0, torch.zeros_like(start) + (q_offset - kv_offset))
        words = torch.cat((torch.stack(header, dim=1), words), dim=1)
    return words[:, None, None]


def _is_all_real(attention_mask: Tensor, decoding: bool) -> bool:
    """Whether there is no padding; False where it cannot be known (tracing, capturing) or is not worth waiting for a GPU."""
    if torch.compiler.is_compiling():
        return False
    if attention_mask.is_cuda and (decoding or torch.cuda.is_current_stream_capturing()):
        return False
    return bool(attention_mask.all())


def _first_real(attention_mask: Tensor | None, batch: int, device: torch.device | str) -> Tensor:
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return attention_mask.int().argmax(dim=-1)


def _words(keys: int) -> int:
    return (keys + BYTES - 1) // BYTES


def _key_mask_words(
    attention_mask: Tensor | None, batch: int, length: int, offset: int, device: torch.device | str
) -> Tensor:
    """Keys [offset, offset + length) of the 2-D mask, a byte each, as int64 [B, words]; keys beyond it are not written yet."""
    if attention_mask is None:
        attention_mask = torch.ones(batch, offset + length, dtype=torch.bool, device=device)
    missing = offset + BYTES * _words(length) - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    # A copy: of one sample, also a part of a row counts as contiguous, and may begin where no int64 does.
    real = attention_mask[:, offset : offset + BYTES * _words(length)].bool()
    return real.clone(memory_format=torch.contiguous_format).view(torch.long)


def _dense_codes(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    chunked: bool,
    device: torch.device | str,
    kwargs: Mapping[str, Any],
) -> Tensor:
    visible = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=kwargs.get("use_vmap", False),
        device=device,
    )
    traced = torch.compiler.is_compiling()
    if chunked or q_length != kv_length or (traced and attention_mask is not None):
        initial = (_first_real(attention_mask, batch_size, device) - kv_offset)[:, None].expand(-1, q_length)
    elif traced:
        initial = packed_sequences.beginnings_in(visible[:, 0])  # each row may hold sequences
    else:
        initial = dense_masks.initial_keys(visible[:, 0])  # packed sequences each have an initial token
    scaled = torch.arange(kv_length, device=device) == initial[:, None, :, None]
    return visible.to(torch.int8) + (visible & scaled).to(torch.int8)


AttentionInterface.register(IMPLEMENTATION, zerotuning_attention)
AttentionMaskInterface.register(IMPLEMENTATION, zerotuning_mask)


# Patching.


class _Reached(NamedTuple):
    """An attention layer as it ran: how many heads this process has of it, and where."""

    module: nn.Module
    heads: int
    device: torch.device


@dataclass
class _Probe:
    """What a forward pass over two tokens shows of a model: which modules call the attention function, and how."""

    active: bool = False
    thread: int = field(default_factory=threading.get_ident)
    names: dict[int, str] = field(default_factory=dict)
    reached: list[_Reached] = field(default_factory=list)
    sliding: set[int] = field(default_factory=set)  # windows the layers pass
    windows: set[int] = field(default_factory=set)  # windows the masks are made for

    def record(self, module: nn.Module, query: Tensor, sliding_window: int | None) -> None:
        self.reached.append(_Reached(module, query.shape[1], query.device))
        if sliding_window is not None:
            self.sliding.add(sliding_window)


_probe = _Probe()
_one_probe = threading.Lock()


def _is_probing() -> bool:
    """Whether this thread finds a model's layers; others may run theirs."""
    return _probe.active and _probe.thread == threading.get_ident()


@dataclass
class _Patched:
    """What a patched model carries: its layers' scales and the way back."""

    layers: list[LayerScales | None]  # by layer index; None where `partial` left a layer out
    modules: list[nn.Module]
    heads: int
    implementations: list[tuple[Any, Any]]
    settings: list[str] = field(default_factory=lambda: [""])
    metadata: dict[str, Any] = field(default_factory=dict)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` switched the model."""
    return isinstance(getattr(model, "_zerotuning", None), _Patched)


def patch(model: nn.Module, *, partial: bool = False) -> nn.Module:
    """Switches a transformers causal language model to scaled attention, every γ = 1: outputs stay what `sdpa` gives.

    Args:
        model: any transformers model that looks its attention up (transformers >= 5.6). Patched already: nothing happens.
        partial: accept a model some of whose layers have no such attention (hybrids); their rows of γ must stay 1.

    Raises:
        ZeroTuningError: a layer cannot be reached or has an attention that cannot be scaled; the message names it, and
            the model is as it was.
    """
    if is_patched(model):
        if _text_config(model)._attn_implementation != IMPLEMENTATION:  # set since, by others
            _switch(model, IMPLEMENTATION)
        return model
    held = next((name for name, module in model.named_modules() if isinstance(module, LayerScales)), None)
    if held is not None:
        raise ZeroTuningError(
            f"{held} was patched through another model, of which {type(model).__name__} is a part or the whole: unpatch "
            "that one first"
        )
    if not hasattr(model, "set_attn_implementation"):
        raise ZeroTuningError(f"model must be a transformers model, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ZeroTuningError(
            f"{type(model).__name__} has an encoder and cross-attention, which zerotuning does not support"
        )
    implementations = _implementations(model)
    try:
        _switch(model, IMPLEMENTATION)
        with _one_probe:
            probe = _run_probe(model)
        layers, modules, heads = _layers(model, probe, partial)
    except BaseException:
        _restore(implementations)
        raise
    for layer, module in zip([layer for layer in layers if layer is not None], modules, strict=True):
        module.add_module(CHILD, layer)
    # Loaded with this implementation, it goes back to transformers' default.
    before = [(config, "sdpa" if name == IMPLEMENTATION else name) for config, name in implementations]
    model._zerotuning = _Patched(layers, modules, heads, before)  # type: ignore[assignment]
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`; a model that is not patched stays as it is."""
    if is_patched(model):
        patched = _patched(model)
        for module in model.modules():  # a wrapper, such as PEFT's, shows the mark of the model in it
            module.__dict__.pop("_zerotuning", None)
        for module in patched.modules:
            delattr(module, CHILD)
        _restore(patched.implementations)
    return model


def _implementations(model: nn.Module) -> list[tuple[Any, Any]]:
    """Every configuration in the model with the attention implementation it asks for."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = (config, config._attn_implementation_internal)
            waiting += [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return list(found.values())


def _restore(implementations: Sequence[tuple[Any, Any]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _switch(model: Any, implementation: str) -> None:
    """Asks for another attention in the language model; vision and audio towers keep theirs."""
    text = _text_config(model)
    keys = [key for key in getattr(model.config, "sub_configs", {}) if getattr(model.config, key, None) is text]
    try:
        model.set_attn_implementation({keys[0]: implementation} if keys else implementation)
    except (ValueError, ImportError, AttributeError) as error:
        raise ZeroTuningError(f"{type(model).__name__} does not let its attention be replaced: {error}") from error
    if text._attn_implementation != implementation:
        raise ZeroTuningError(
            f"{type(model).__name__} does not look its attention up by name (AttentionInterface): no layer can be reached"
        )


@torch.no_grad()
def _run_probe(model: Any) -> _Probe:
    """Runs two tokens through the model, in eval mode, and returns what was seen."""
    global _probe
    device = input_device(model)
    _check_device(device)
    training = [module for module in model.modules() if module.training]
    _probe = _Probe(active=True, names={id(module): name for name, module in model.named_modules()})
    try:
        model.eval()
        model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
        return _probe
    except ZeroTuningError:
        raise
    except Exception as error:
        raise ZeroTuningError(f"{type(model).__name__} could not run two tokens to find its layers: {error}") from error
    finally:
        for module in training:
            module.training = True
        _probe = _Probe()


def _check_device(device: torch.device) -> None:
    if not ops.runs_on(device.type):
        raise ZeroTuningError(
            f"the model is on {device}, where this build of zerotuning has no operators; move it to the CPU"
        )


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Within it the language model's attention is the one registered under `name`; afterwards what it was, patched or not.

    Raises: ZeroTuningError for a model that does not look its attention up.
    """
    before = _implementations(model)
    try:
        _switch(model, name)
        yield model
    finally:
        _restore(before)


def _layers(model: Any, probe: _Probe, partial: bool) -> tuple[list[LayerScales | None], list[nn.Module], int]:
    """The scales of every layer, by layer index, and the attention modules that get them."""
    total = _text_config(model).num_hidden_layers
    named: list[Any] = [getattr(one.module, "layer_idx", None) for one in probe.reached]
    places: list[int] = list(range(len(named))) if None in named else named
    if len(set(places)) < len(places) or len({id(one.module) for one in probe.reached}) < len(places):
        raise ZeroTuningError(
            f"{type(model).__name__} runs one attention layer several times, which zerotuning does not support"
        )
    missing = [index for index in range(total) if index not in places]
    if not probe.reached or (missing and not partial):
        raise ZeroTuningError(_missing_text(model, missing, total))
    if probe.windows - probe.sliding:
        raise ZeroTuningError(
            f"{type(model).__name__} masks a sliding window of {min(probe.windows - probe.sliding)} keys that no layer names"
        )
    layers: list[LayerScales | None] = [None] * total
    modules = []
    for place, one in sorted(zip(places, probe.reached, strict=True), key=lambda pair: pair[0]):
        layers[place] = _layer_scales(model, probe.names[id(one.module)], one)
        modules.append(one.module)
    heads = {layer.heads for layer in layers if layer is not None}
    if len(heads) > 1:
        raise ZeroTuningError(
            f"{type(model).__name__} has layers of {sorted(heads)} heads; zerotuning needs one number"
        )
    return layers, modules, heads.pop()


def _layer_scales(model: Any, name: str, reached: _Reached) -> LayerScales:
    """The scales of a layer, where it computes: its weights may be elsewhere until then."""
    _check_device(reached.device)
    share = head_share(model, name, reached.heads)
    with torch.inference_mode(False):  # training may use it as well
        return LayerScales(name, reached.heads if share is None else share.total, reached.device, share)


def _missing_text(model: Any, missing: Sequence[int], total: int) -> str:
    blocks = next(
        (
            [f"{name}.{index} ({type(stack[index]).__name__})" for index in missing]
            for name, stack in model.named_modules()
            if isinstance(stack, nn.ModuleList) and len(stack) == total
        ),
        [f"layer {index}" for index in missing],
    )
    shown = ", ".join(blocks[:4]) + (f" and {len(blocks) - 4} more" if len(blocks) > 4 else "")
    advice = "" if len(missing) == total else "; partial=True tunes the others"
    return f"{len(missing)} of {total} layers of {type(model).__name__} have no attention that zerotuning can reach: {shown}{advice}"


# Scales.


def _patched(model: nn.Module) -> _Patched:
    if not is_patched(model):
        raise ZeroTuningError("the model is not patched; call zerotuning.patch(model) first")
    return model._zerotuning  # type: ignore[return-value]


def patched_shape(model: nn.Module) -> tuple[int, int]:
    """(layers, heads) of a patched model."""
    patched = _patched(model)
    return len(patched.layers), patched.heads


def apply_scales(model: nn.Module, scales: HeadScales | Mapping[str, HeadScales]) -> nn.Module:
    """Sets γ of every head, patching the model if needed. With a mapping of names, `rows` picks one for each sample;
    without it the first is used.

    Raises:
        ZeroTuningError: scales of another shape or model type, named beside the model's.
    """
    patch(model)
    patched = _patched(model)
    named = {"": scales} if isinstance(scales, HeadScales) else dict(scales)
    if not named:
        raise ZeroTuningError("scales must name at least one HeadScales, got an empty mapping")
    for name, setting in named.items():
        _check_scales(model, patched, name, setting)
    for index, layer in enumerate(patched.layers):
        if layer is not None:
            with torch.inference_mode(False):  # training may use them as well
                values = torch.stack([setting.log_scale[index] for setting in named.values()])
                layer.log_scale = values.to(layer.log_scale.device)
            layer.rows = None
    patched.settings = list(named)
    patched.metadata = dict(next(iter(named.values())).metadata)
    return model


def _check_scales(model: Any, patched: _Patched, name: str, scales: HeadScales) -> None:
    if not isinstance(scales, HeadScales):
        raise ZeroTuningError(f"scales must be HeadScales or a mapping of them, got {type(scales).__name__}")
    label = f"scales {name!r}" if name else "scales"
    shape = (len(patched.layers), patched.heads)
    if tuple(scales.gamma.shape) != shape:
        raise ZeroTuningError(
            f"{label} are for {scales.num_layers} layers x {scales.num_heads} heads, the model has {shape[0]} x {shape[1]}"
        )
    check_model_type(model, scales, f"{label} were")
    for index, layer in enumerate(patched.layers):
        if layer is None and bool((scales.gamma[index] != 1).any()):
            raise ZeroTuningError(f"{label} change layer {index}, which has no attention that zerotuning can reach")


def check_model_type(model: Any, scales: HeadScales, subject: str) -> None:
    """Raises ZeroTuningError, which begins with `subject`, where the metadata say that another type of model was meant."""
    made_for, have = scales.metadata.get("model_type"), getattr(model.config, "model_type", "")
    if made_for and made_for != have:
        raise ZeroTuningError(f"{subject} made for a {made_for} model, this is a {have} model")


def head_scales(model: nn.Module) -> HeadScales:
    """The scales applied now (the first, if several are named)."""
    patched = _patched(model)
    rows = [torch.zeros(patched.heads) if layer is None else layer.log_scale[0].cpu() for layer in patched.layers]
    return HeadScales(torch.stack(rows).exp(), patched.metadata)


@contextmanager
def untuned(model: nn.Module) -> Iterator[nn.Module]:
    """Within it every γ is 1."""
    layers = [layer for layer in _patched(model).layers if layer is not None]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def rows(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within it sample i of a batch uses the scales called names[i]; beam search repeats each for its beams."""
    patched = _patched(model)
    unknown = [name for name in names if name not in patched.settings]
    if unknown or not names:
        known = ", ".join(repr(name) for name in patched.settings)
        raise ZeroTuningError(
            f"rows must name applied scales ({known}), got {unknown[0]!r}" if unknown else "rows is empty"
        )
    index = torch.tensor([patched.settings.index(name) for name in names])
    layers = [layer for layer in patched.layers if layer is not None]
    before = [layer.rows for layer in layers]
    try:
        for layer in layers:
            layer.rows = index.to(layer.log_scale.device)
        yield model
    finally:
        for layer, chosen in zip(layers, before, strict=True):
            layer.rows = chosen


@contextmanager
def scaled_keys(model: nn.Module, spans: Tensor) -> Iterator[nn.Module]:
    """Within it γ scales other keys than the initial token: of sample i the keys [first, end) = spans[i].

    spans    int64 [B, 2], places in the batch as it is padded; first == end: none. Beam search repeats each.
    Raises: ZeroTuningError for spans of another shape or type; in a forward pass, for another number of samples and in
        layers with a sliding-window cache.
    """
    if spans.dim() != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64 or spans.shape[0] == 0:
        raise ZeroTuningError(f"spans must be int64 [B, 2], got {spans.dtype} {list(spans.shape)}")
    layers = [layer for layer in _patched(model).layers if layer is not None]
    before = [layer.span for layer in layers]
    try:
        for layer in layers:
            layer.span = spans.to(layer.log_scale.device)
        yield model
    finally:
        for layer, span in zip(layers, before, strict=True):
            layer.span = span


@contextmanager
def head_parameters(model: nn.Module) -> Iterator[list[Tensor]]:
    """For a search: log γ of each layer as a float32 leaf [heads] that takes gradients, used in place of the applied
    scales while the context is open. Written in place (under no_grad), they change the model. A layer that `partial`
    left out has a leaf that nothing reads."""
    patched = _patched(model)
    parameters = []
    for layer in patched.layers:
        if layer is None:
            parameters.append(torch.zeros(patched.heads, requires_grad=True))
        else:
            layer.parameter = torch.zeros(patched.heads, device=layer.log_scale.device, requires_grad=True)
            parameters.append(layer.parameter)
    try:
        yield parameters
    finally:
        for layer in patched.layers:
            if layer is not None:
                layer.parameter = None


@contextmanager
def candidates(model: nn.Module, log_scale: Tensor) -> Iterator[nn.Module]:
    """For a search: within it, inside `head_parameters`, several settings share each batch. Of C equal parts of the batch
    the first uses log_scale[0], the next log_scale[1] …

    log_scale    float32 [C, layers, heads], read where it is in every pass: a recorded pass follows what is written into it
    Raises: ZeroTuningError in a forward pass whose batch has no C equal parts.
    """
    found = [(index, layer) for index, layer in enumerate(_patched(model).layers) if layer is not None]
    before = [layer.parameter for _, layer in found]
    try:
        for index, layer in found:
            layer.parameter = log_scale[:, index].to(layer.log_scale.device)
        yield model
    finally:
        for (_, layer), parameter in zip(found, before, strict=True):
            layer.parameter = parameter
