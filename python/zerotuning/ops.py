"""The operators: their Python functions, fake kernels and gradients. The kernels are C++ (csrc/ops, csrc/attention).

Both operators compute causal attention in which ``log_scale`` is added to each head's logit of the initial token. That
equals ZeroTuning's scaling of the attention weight by γ = exp(log_scale) and renormalising (arXiv 2505.11739, section
3), and needs no (Tq, Tk) matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zerotuning.cuda_routes import LIBRARIES, torch_gradient_lengths

__all__ = ["attention", "decode_attention", "runs_on"]

torch.ops.load_library(str(LIBRARIES / "libzerotuning_ops.so"))
if torch.version.cuda is not None and (LIBRARIES / "libzerotuning_ops_cuda.so").exists():
    torch.ops.load_library(str(LIBRARIES / "libzerotuning_ops_cuda.so"))

# The overloads, resolved once: through torch.ops Python would look up an overload at every call.
_attention = torch.ops.zerotuning.attention.default
_attention_with_output_minus_initial_value = torch.ops.zerotuning._attention_with_output_minus_initial_value.default
# The same kernels without the Python that torch.library runs around an operator with a gradient.
_attention_by_route = torch.ops.zerotuning._attention_by_route.default
_AUTOMATIC = 0
_attention_backward = torch.ops.zerotuning.attention_backward.default
_decode_attention = torch.ops.zerotuning.decode_attention.default
_decode_attention_transposed = torch.ops.zerotuning._decode_attention_transposed.default
#: encode_key_mask(mask, keys, query_start): the key mask of a decode step as a patched model's layers get it, int64
#: (B, 1, words, 1) (csrc/attention/key_mask_layout.h). mask: a bool attention mask (B, any number); keys: the number of
#: keys; query_start: the position of the first query among the keys.
encode_key_mask = torch.ops.zerotuning._encode_key_mask.default


class Geometry(NamedTuple):
    """The keys that each query attends to and those that are scaled: :func:`attention`'s arguments in schema order."""

    key_mask: Tensor | None = None
    span: Tensor | None = None
    query_start: Tensor | None = None
    window: int = 0


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
    """Compute causal attention with a scaled initial token; differentiable in query, key, value and log_scale.

    With s the logits, and γ_j = exp(log_scale) for the initial token and 1 for every other key:

        o_i = Σ_j a'_ij v_j        a'_ij = γ_j exp(s_ij) / Σ_k γ_k exp(s_ik)

    Args:
        query: (B, H, Tq, D), float32, bfloat16, float16 or float64.
        key: (B, Hkv, Tk, D) with H a multiple of Hkv, dtype and device of query.
        value: (B, Hkv, Tk, Dv).
        log_scale: (H) or (B, H), the natural logarithm of γ; float32 (float64 with a float64 query).
        key_mask: (B, Tk) bool (or uint8, 0 and 1), False for padding. The initial token is each sample's first real
            key.
        span: (B, 2) int64, the keys [first, end) that are scaled instead of the initial token; first == end: none.
        query_start: (B) int64, the position of the first query among the keys; query i attends to keys up to
            query_start + i. Default Tk - Tq: the queries are the last keys.
        window: number of keys that a query attends to, its own included (sliding window); 0 for all.
        scale: factor of the logits, default D ** -0.5.

    Returns:
        output (B, H, Tq, Dv) in query's dtype; logsumexp (B, H, Tq), natural logarithm, in log_scale's dtype, not
        differentiable. A query that attends to no key gives output 0 and logsumexp -inf.

    Raises:
        ValueError or RuntimeError: an argument has a wrong shape, dtype or device; the message names the argument.
            On the CPU, positions outside the keys and a log_scale that is not finite are errors too. A check of these
            values on a GPU would synchronise: there positions are clamped to the keys, and a log_scale of NaN gives
            outputs of NaN.
    """
    arguments = (query, key, value, log_scale, key_mask, span, query_start, window, softmax_scale(query, scale))
    if torch.compiler.is_compiling():
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, log_scale))
        results = (_attention_with_output_minus_initial_value if needs_gradient else _attention)(*arguments)
    elif torch._C._are_functorch_transforms_active():
        results = _TransformedAttention.apply(*arguments)
    elif torch.is_grad_enabled():
        results = _Attention.apply(*arguments)
    else:
        results = _attention_by_route(*arguments, False, _AUTOMATIC)
    return results[0], results[1]


def decode_attention(
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
) -> Tensor:
    """Compute :func:`attention` of few queries over a long cache (generation), without a gradient.

    Keys and values are read once for the query heads that share them: on a GPU for up to 32 rows (heads times queries),
    16 above head size 128.

    Args:
        query: as in :func:`attention`, like all other arguments.
        key: as in attention.
        value: as in attention.
        log_scale: as in attention.
        key_mask: as in attention.
        span: as in attention.
        query_start: as in attention.
        window: as in attention.
        scale: as in attention.

    Returns:
        output (B, H, Tq, Dv).

    Raises:
        ValueError or RuntimeError: as in attention.
    """
    factor = softmax_scale(query, scale)
    return _decode_attention(query, key, value, log_scale, key_mask, span, query_start, window, factor)  # type: ignore[no-any-return]


def decode_attention_transposed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    geometry: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    scale: float | None,
) -> Tensor:
    """Compute :func:`decode_attention` with the output transposed to (B, Tq, H, Dv), as models use it.

    The operator allocates this layout: a transposed view of (B, H, Tq, D) would cost time in each decode step.

    Args:
        query: as in decode_attention, like all other arguments.
        key: as in decode_attention.
        value: as in decode_attention.
        log_scale: as in decode_attention.
        geometry: key_mask, span, query_start and window: a :class:`Geometry`, or a tuple of them.
        scale: as in decode_attention.

    Returns:
        output (B, Tq, H, Dv).
    """
    return _decode_attention_transposed(query, key, value, log_scale, *geometry, softmax_scale(query, scale))  # type: ignore[no-any-return]


def gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    *,
    key_mask: Tensor | None = None,
    span: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key, value and log_scale from :func:`attention`'s two results.

    Args:
        grad_output: gradient of output, (B, H, Tq, Dv).
        query: as in attention, like all arguments but the results.
        key: as in attention.
        value: as in attention.
        log_scale: as in attention.
        output: first result of attention.
        logsumexp: second result of attention.
        key_mask: as in attention.
        span: as in attention.
        window: as in attention.
        scale: as in attention.

    Returns:
        The gradients, of the shapes of query, key, value and log_scale.
    """
    inputs, geometry = (query, key, value, log_scale), Geometry(key_mask, span, None, window)
    options = (*geometry, softmax_scale(query, scale))
    output_minus_initial_value = None
    if _needs_output_minus_initial_value(query, key, value, geometry):
        output_minus_initial_value = _attention_by_route(*inputs, *options, True, _AUTOMATIC)[2]
    return _attention_backward(grad_output, *inputs, output, logsumexp, *options, output_minus_initial_value)  # type: ignore[no-any-return]


def runs_on(device_type: str) -> bool:
    """Return whether this build has operators for a type of device, "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("zerotuning::attention", device_type.upper())


def softmax_scale(query: Tensor, scale: float | None) -> float:
    """Return the factor of the logits: `scale`, by default D ** -0.5."""
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


# Fake kernels: shapes, dtypes and strides of the results, for torch.compile and torch.export.


def empty_bthd(like: Tensor, batch: int, heads: int, rows: int, columns: int) -> Tensor:
    """Allocate (B, H, T, D) in memory order (B, T, H, D), as csrc/ops/layout.h does."""
    return like.new_empty(batch, rows, heads, columns).transpose(1, 2)


@torch.library.register_fake("zerotuning::_attention_with_output_minus_initial_value")
@torch.library.register_fake("zerotuning::_attention_by_route")
def _(query, key, value, log_scale, *rest):  # type: ignore[no-untyped-def]
    geometry, (_scale, for_backward, route) = Geometry(*rest[:4]), (*rest[4:], True, _AUTOMATIC)[:3]
    results = _fake_attention(query, key, value, log_scale, *rest)
    needed = for_backward and (route != _AUTOMATIC or _needs_output_minus_initial_value(query, key, value, geometry))
    return *results, torch.empty_like(results[0]) if needed and query.is_cuda else query.new_empty(0)


def _needs_output_minus_initial_value(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> bool:
    """Whether backward will need output_minus_initial_value: where a kernel of torch computes the gradients.

    A traced graph with gradients belongs to the card that it was traced on. Its lengths may be symbolic; its dtype,
    head sizes and the presence of optional arguments are fixed.
    """
    if not query.is_cuda:
        return False
    major, minor = torch.cuda.get_device_capability(query.device)
    given = (argument is not None for argument in geometry[:3])
    batch, heads, rows, head_size = query.shape
    lengths = torch_gradient_lengths(10 * major + minor, query.dtype, int(head_size), int(value.shape[3]), *given)
    return lengths.contain(batch, heads, rows, key.shape[2], geometry.window)


@torch.library.register_fake("zerotuning::attention")
def _fake_attention(query, key, value, log_scale, *_geometry):  # type: ignore[no-untyped-def]
    batch, heads, rows, _ = query.shape
    output = empty_bthd(query, batch, heads, rows, value.shape[-1])
    if query.is_cuda:
        return output, log_scale.new_empty(batch, heads, rows)
    return output, log_scale.new_empty(batch, rows, heads).transpose(1, 2)


@torch.library.register_fake("zerotuning::decode_attention")
def _(query, key, value, log_scale, *_geometry):  # type: ignore[no-untyped-def]
    batch, heads, rows, _ = query.shape
    return empty_bthd(query, batch, heads, rows, value.shape[-1])


@torch.library.register_fake("zerotuning::_decode_attention_transposed")
def _(query, key, value, log_scale, *_geometry):  # type: ignore[no-untyped-def]
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


@torch.library.register_fake("zerotuning::_encode_key_mask")
def _(key_mask, keys, query_start):  # type: ignore[no-untyped-def]
    return key_mask.new_empty(key_mask.shape[0], 1, 3 + (keys + 7) // 8, 1, dtype=torch.int64)


@torch.library.register_fake("zerotuning::attention_backward")
def _(grad_output, query, key, value, log_scale, *_results_and_geometry):  # type: ignore[no-untyped-def]
    gradients = (empty_bthd(tensor, *tensor.shape) for tensor in (query, key, value))
    return *gradients, log_scale.new_empty(log_scale.shape)


# Gradients (docs/how-it-works.md, "Backward"). Saved are the inputs, the output and its log-sum-exp, and for some
# routes output_minus_initial_value (csrc/ops/attention_cuda.h).


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_others):  # type: ignore[no-untyped-def]
    if grad_output is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # read once: under checkpointing a second read is refused
    inputs, geometry, (output, logsumexp, *output_minus_initial_value) = saved[:4], saved[4:7], saved[7:]
    options = (*geometry, ctx.window, ctx.scale)
    gradients = _attention_backward(grad_output, *inputs, output, logsumexp, *options, *output_minus_initial_value)
    return *gradients, None, None, None, None, None


torch.library.register_autograd("zerotuning::attention", _backward, setup_context=_save_for_backward)
torch.library.register_autograd(
    "zerotuning::_attention_with_output_minus_initial_value", _backward, setup_context=_save_for_backward
)


class _Attention(torch.autograd.Function):
    """`attention` and its gradient without torch.library's Python, which takes longer than a short attention."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        results = _attention_by_route(*arguments, any(ctx.needs_input_grad), _AUTOMATIC)
        _save_for_backward(ctx, arguments, results)
        return results

    backward = staticmethod(_backward)


class _TransformedAttention(torch.autograd.Function):
    """`_Attention` with a separate setup_context, which torch.func's transforms require; each call costs more time."""

    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        return _attention_with_output_minus_initial_value(*arguments)

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)
