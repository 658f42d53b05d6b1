"""`zerotuning bench attention --routes`: which kernel computes which call on which card; needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zerotuning.cuda_routes import CARDS, backward_route, decode_route, forward_route

HEADS = (32, 8)
HEAD_SIZES = (64, 128, 256)
#: (batch, length) of square causal calls, and of caches that one query attends to.
SHAPES = ((16, 8), (16, 128), (1, 4096), (1, 8192))
CACHES = ((1, 8192), (16, 8192))


def _both_ways(*sizes: int, **options: Any) -> list[str]:
    passes = (forward_route, backward_route)
    return [" / ".join(route(card, *sizes, **options).name.lower() for route in passes) for card in CARDS]


def route_rows() -> Iterator[tuple[str, list[str]]]:
    """Yield (call, the route on each of CARDS): forward / backward of an attention call, or a decode step's route."""
    for head_size in HEAD_SIZES:
        for batch, length in SHAPES:
            sizes = (batch, *HEADS, length, length, head_size)
            for has_key_mask in (False, True):
                padding = ", key_mask" if has_key_mask else ""
                routes = _both_ways(*sizes, has_key_mask=has_key_mask)
                yield f"attention {batch} x {length}, head size {head_size}{padding}", routes
    wide = _both_ways(1, *HEADS, 4096, 4096, 128, dtype=torch.float32)
    yield "attention 1 x 4096, head size 128, float32", wide
    for batch, length in CACHES:
        routes = [decode_route(card, batch, *HEADS, 1, length, 128).name.lower() for card in CARDS]
        yield f"decode {batch} x {length}, head size 128", routes


def route_table() -> str:
    """The routes of bfloat16 calls with 32 heads and 8 key heads as a table, a line for each call."""
    header = ("forward / backward, or decode", [f"sm_{card}" for card in CARDS])
    rows = [header, *route_rows()]
    first = max(len(call) for call, _ in rows)
    widths = [max(len(routes[column]) for _, routes in rows) for column in range(len(CARDS))]
    lines = (
        "  ".join((call.ljust(first), *(route.ljust(width) for route, width in zip(routes, widths, strict=True))))
        for call, routes in rows
    )
    return "\n".join(line.rstrip() for line in lines)
