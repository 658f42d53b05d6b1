"""The paper's formula written out, and the inputs and errors that tests of the operators share."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_scale: Tensor,
    key_mask: Tensor | None = None,
    span: Tensor | None = None,
    query_start: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the paper's steps densely in the inputs' dtype: softmax, scale the span's weights by γ, renormalize."""
    batch, heads, rows, size = query.shape
    keys = key.shape[2]
    key, value = (t.repeat_interleave(heads // key.shape[1], dim=1) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * (scale or size**-0.5)
    start = torch.full((batch,), keys - rows) if query_start is None else query_start
    position = start[:, None, None] + torch.arange(rows)[:, None]
    column = torch.arange(keys)
    visible = column <= position
    if window:
        visible = visible & (column > position - window)
    if key_mask is not None:
        visible = visible & key_mask[:, None, :]
    if span is None:
        first = torch.zeros(batch, dtype=torch.long) if key_mask is None else key_mask.int().argmax(dim=1)
        span = torch.stack((first, first + 1), dim=1)
    scaled = (column >= span[:, :1]) & (column < span[:, 1:])
    logits = logits.masked_fill(~visible[:, None], -math.inf)
    blind = ~visible.any(-1)[:, None, :, None]
    weights = torch.softmax(logits.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    gamma = torch.exp(log_scale).expand(batch, heads)[:, :, None, None]
    weights = weights * torch.where(scaled[:, None, None, :], gamma, torch.ones_like(gamma))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return weights @ value, torch.logsumexp(logits, -1) + torch.log(total.squeeze(-1))


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert not got.isnan().any()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(
    shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype, per_sample: bool = False
) -> list[Tensor]:
    batch, heads, key_heads, rows, keys, size, value_size = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(batch, heads, rows, size, dtype=torch.float64).to(dtype),
        torch.randn(batch, key_heads, keys, size, dtype=torch.float64).to(dtype),
        torch.randn(batch, key_heads, keys, value_size, dtype=torch.float64).to(dtype),
        torch.randn((batch, heads) if per_sample else (heads,), dtype=torch.float64).to(wide),
    ]


def rounding_scale(inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return the size of the terms that cancel in each gradient: ds = a (do·v - do·o) cancels for a saturated sink."""
    query, key, value, _ = inputs
    longest = [t.norm(dim=-1).max() for t in (query, key, value)]
    change = weight.norm() * longest[2]
    scale = query.shape[-1] ** -0.5
    return [change * longest[1] * scale, change * longest[0] * scale, torch.zeros(()), change]


@cache
def inputs_with_sink(sink: float, device: str, length: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key, value (1, 4|2, length, 64) whose initial token has the mean attention weight `sink`."""
    torch.manual_seed(1)
    query, key, value, _ = random_inputs((1, 4, 2, length, length, 64, 64), torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(64, dtype=torch.float64), dim=0)
    query = query - (query @ direction)[..., None] * direction + 8 * direction
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)[:, :, 1:]

    low, high = -40.0, 60.0  # strength of key 0 along the queries' common direction, by bisection
    for _ in range(40):
        middle = (low + high) / 2
        logits[..., 0] = middle
        weight = torch.softmax(logits, -1)[..., 0].mean().item()
        low, high = (middle, high) if weight < sink else (low, middle)
    assert abs(weight - sink) < 0.01
    key[:, :, 0] = low * direction
    return query, key, value


def poison() -> None:
    """Fill with NaN the memory of the next allocations, of large ones and of those below a megabyte (another pool)."""
    large = torch.full((2**28,), 255, dtype=torch.uint8)
    small = [torch.full((2**19,), 255, dtype=torch.uint8) for _ in range(64)]
    del large, small
