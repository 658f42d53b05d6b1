"""Which kernel computes a call on a GPU: csrc/ops/cuda_routes.h called from Python, also for GPUs of other machines."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["CARDS", "DecodeRoute", "Lengths", "Route", "backward_route", "decode_route", "forward_route"]

#: Where the build puts the libraries of the operators.
LIBRARIES = Path(__file__).parent / "lib"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of attention::DType
_MIB = 2**20
#: Compute capabilities of the cards that tables of routes show, with the size of the level-2 cache of one such card:
#: A100, A10, L40S, H100, B200, RTX 5090.
CARDS = {80: 40 * _MIB, 86: 6 * _MIB, 89: 96 * _MIB, 90: 50 * _MIB, 100: 126 * _MIB, 120: 96 * _MIB}


class Route(IntEnum):
    """Kernels of forward and backward; `csrc/ops/cuda_routes.h` describes them."""

    AUTOMATIC = 0
    PLAIN = 1
    HOPPER = 2
    CUDNN = 3
    FLASH = 4


class DecodeRoute(IntEnum):
    """Kernels of decode attention; `csrc/attention/decode_route.h` describes them."""

    AUTOMATIC = 0
    RINGS = 1
    BULK = 2
    FORWARD = 3


class _Card(ctypes.Structure):
    _fields_ = [("capability", ctypes.c_int64), ("l2_bytes", ctypes.c_int64)]


class _StaticCall(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("head_size", ctypes.c_int64),
        ("value_head_size", ctypes.c_int64),
        ("has_key_mask", ctypes.c_bool),
        ("has_span", ctypes.c_bool),
        ("has_query_start", ctypes.c_bool),
    ]


class _CudaCall(ctypes.Structure):
    _fields_ = [
        ("fixed", _StaticCall),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("positive_scale", ctypes.c_bool),
        ("aligned_rows", ctypes.c_bool),
        ("positive_strides", ctypes.c_bool),
    ]


class Lengths(ctypes.Structure):
    """A description of lengths, evaluated on sizes that may be symbolic; `csrc/ops/cuda_routes.h` has the same rule."""

    _fields_ = [
        ("any", ctypes.c_bool),
        ("min_queries", ctypes.c_int64),
        ("max_batch", ctypes.c_int64),
        ("max_heads", ctypes.c_int64),
        ("row_multiple", ctypes.c_int64),
        ("row_elements", ctypes.c_int64),
        ("max_elements", ctypes.c_int64),
        ("key_divisor", ctypes.c_int64),
        ("forbidden_key_remainder", ctypes.c_int64),
    ]

    def contain(self, batch: int, heads: int, queries: int, keys: int, window: int) -> bool:
        """Whether a call of these sizes fulfils every condition.

        A condition that no size can violate is left out: each one becomes a guard of a graph of symbolic sizes.
        """
        if not self.any or queries < self.min_queries or batch > self.max_batch or heads > self.max_heads:
            return False
        if self.row_elements:
            rows = (queries + self.row_multiple - 1) // self.row_multiple * self.row_multiple
            if batch * heads * rows * self.row_elements > self.max_elements:
                return False
        if queries != keys or 0 < window < keys:
            return False
        return bool(self.key_divisor == 1 or keys % self.key_divisor != self.forbidden_key_remainder)


def _load() -> Any:
    library = ctypes.CDLL(str(LIBRARIES / "libzerotuning_ops.so"))
    sizes = (ctypes.c_int64 * 3)()
    if hasattr(library, "zerotuning_route_struct_bytes"):
        library.zerotuning_route_struct_bytes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in (_Card, _CudaCall, Lengths)]:
        raise ImportError(
            "libzerotuning_ops.so was built from other sources than zerotuning/cuda_routes.py: build the library again"
        )
    for name in ("forward", "backward", "decode"):
        getattr(library, f"zerotuning_{name}_route").restype = ctypes.c_int64
    library.zerotuning_torch_gradient_lengths.restype = None
    return library


_library = _load()


@cache
def torch_gradient_lengths(
    capability: int,
    dtype: torch.dtype,
    head_size: int,
    value_head_size: int,
    has_key_mask: bool = False,
    has_span: bool = False,
    has_query_start: bool = False,
) -> Lengths:
    """The lengths for which a kernel of torch computes the gradients, and needs output_minus_initial_value.

    Args:
        capability: compute capability of the card, 90 for sm_90.
        dtype: of query, key and value.
        head_size: of query and key.
        value_head_size: of value.
        has_key_mask: whether the call has a key mask.
        has_span: whether the call has a span.
        has_query_start: whether the call has a query start.

    Returns:
        The description; empty (`any` is False) where another kernel computes the gradients for all lengths.
    """
    lengths = Lengths()
    if dtype not in _DTYPES:
        return lengths
    fixed = _StaticCall(_DTYPES.index(dtype), head_size, value_head_size, has_key_mask, has_span, has_query_start)
    arguments = (_CudaCall(fixed=fixed), _Card(capability, 0), lengths)
    _library.zerotuning_torch_gradient_lengths(*(ctypes.byref(argument) for argument in arguments))
    return lengths


def _call(
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    head_size: int,
    value_head_size: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    window: int = 0,
    has_key_mask: bool = False,
    has_span: bool = False,
    has_query_start: bool = False,
    positive_scale: bool = True,
    aligned_rows: bool = True,
    positive_strides: bool = True,
) -> _CudaCall:
    value_head_size = head_size if value_head_size is None else value_head_size
    fixed = _StaticCall(_DTYPES.index(dtype), head_size, value_head_size, has_key_mask, has_span, has_query_start)
    lengths = (batch, heads, key_heads, queries, keys, window)
    return _CudaCall(fixed, *lengths, positive_scale, aligned_rows, positive_strides)


def _route_number(name: str, capability: int, l2_bytes: int | None, call: _CudaCall) -> int:
    card = _Card(capability, CARDS.get(capability, 0) if l2_bytes is None else l2_bytes)
    route: int = getattr(_library, f"zerotuning_{name}_route")(ctypes.byref(call), ctypes.byref(card))
    return route


def forward_route(capability: int, *sizes: int, **options: Any) -> Route:
    """The kernel of a forward pass.

    Args:
        capability: compute capability of the card, 90 for sm_90.
        *sizes: batch, heads, key_heads, queries, keys, head_size and, if it differs, value_head_size.
        **options: dtype (bfloat16), window (0), has_key_mask, has_span, has_query_start (False), positive_scale,
            aligned_rows, positive_strides (True).

    Returns:
        The route, never AUTOMATIC.
    """
    return Route(_route_number("forward", capability, None, _call(*sizes, **options)))


def backward_route(capability: int, *sizes: int, **options: Any) -> Route:
    """The kernel of a backward pass; arguments as in :func:`forward_route`."""
    return Route(_route_number("backward", capability, None, _call(*sizes, **options)))


def decode_route(capability: int, *sizes: int, l2_bytes: int | None = None, **options: Any) -> DecodeRoute:
    """The kernel of decode attention; arguments as in :func:`forward_route`.

    Args:
        capability: compute capability of the card, 90 for sm_90.
        *sizes: as in forward_route.
        l2_bytes: size of the card's level-2 cache; default: CARDS.
        **options: as in forward_route.

    Returns:
        The route, never AUTOMATIC; FORWARD where a forward kernel computes the call.
    """
    return DecodeRoute(_route_number("decode", capability, l2_bytes, _call(*sizes, **options)))
