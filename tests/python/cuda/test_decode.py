"""Decode attention on a GPU against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_calls import (
    BULK,
    HEAD_SIZES,
    RINGS,
    decode_by_route,
    needs_hopper,
)
from formula import error, formula, random_inputs
from zerotuning import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("size", "route"),
    [
        *((size, 0) for size in [*HEAD_SIZES, (64, 128)]),
        *(pytest.param(size, BULK, marks=needs_hopper) for size in ((64, 64), (128, 128))),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_equals_the_formula(size, route, dtype) -> None:
    torch.manual_seed(3)
    limit = 3e-3 if dtype == torch.bfloat16 else 6e-4
    for heads, key_heads in ((8, 2), (4, 4), (32, 1), (9, 3)):
        for rows, keys in ((1, 1), (1, 40), (1, 3001), (4, 700), (16, 1025)):
            inputs = random_inputs((3, heads, key_heads, rows, keys, *size), dtype, per_sample=True)
            mask = torch.arange(keys) >= torch.tensor([0, min(17, keys - 1), keys - 1])[:, None]
            room = max(keys - rows, 0)
            start = torch.tensor([room, room // 2, room // 3])
            for geometry in (
                {},
                {"key_mask": mask},
                {"window": 33},
                {"query_start": start},
                {"query_start": start, "span": torch.tensor([[0, 1], [0, 5], [1, 1]]).clamp(max=keys), "window": 100},
                {"key_mask": torch.rand(3, keys) > 0.5},
            ):
                expected = formula(*(t.double() for t in inputs), **geometry)[0]  # type: ignore[arg-type]
                got = decode_by_route(inputs, route, **geometry)
                assert (got.double() - expected).norm() <= limit * expected.norm() + 1e-12, (
                    heads,
                    rows,
                    keys,
                    geometry,
                )


@pytest.mark.parametrize("route", [0, pytest.param(BULK, marks=needs_hopper)])
@pytest.mark.parametrize("size", [64, 128])
def test_decoding_does_not_read_unwritten_places_of_a_static_cache(size, route) -> None:
    torch.manual_seed(13)
    query, key, value, log_scale = random_inputs((3, 8, 2, 2, 1000, size, size), torch.bfloat16)
    # A cache in memory order (B, T, H, D), as in some models.
    key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    start = torch.tensor([0, 300, 997])
    expected = formula(*(t.double() for t in (query, key, value, log_scale)), query_start=start)[0]
    for batch, first in enumerate(start.tolist()):
        key[batch, :, first + 2 :] = math.nan
        value[batch, :, first + 2 :] = math.nan
    outputs = [decode_by_route([query, key, value, log_scale], route, query_start=start) for _ in range(3)]
    assert error(outputs[0], expected) <= 3e-3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_decoding_of_a_cache_larger_than_the_l2_cache_equals_the_formula() -> None:
    torch.manual_seed(14)
    inputs = random_inputs((8, 16, 8, 1, 9001, 128, 128), torch.bfloat16, per_sample=True)
    mask = torch.arange(9001) >= torch.arange(8)[:, None] * 700
    for geometry in ({}, {"key_mask": mask, "window": 8500}):
        expected = formula(*(t.double() for t in inputs), **geometry)[0]  # type: ignore[arg-type]
        assert error(ops.decode_attention(*inputs, **geometry), expected) <= 3e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("route", [RINGS, pytest.param(BULK, marks=needs_hopper)])
@pytest.mark.parametrize("keys", [3000, 3003])
def test_decoding_without_split_keys_and_with_holes_in_the_padding_equals_the_formula(route, keys) -> None:
    """One block for each sample, keys not split: a warp processes 47 tiles and reads the mask of 32 keys at a time."""
    torch.manual_seed(15)
    samples = torch.cuda.get_device_properties(0).multi_processor_count
    inputs = random_inputs((samples, 4, 1, 1, keys, 64, 64), torch.bfloat16)
    mask = torch.arange(keys) >= torch.arange(samples)[:, None] * 20
    mask &= (torch.rand(samples, keys) > 0.3) | (torch.arange(samples) % 2 == 0)[:, None]
    mask[:, -300:-200] = True
    # As in a decode step of `generate`, the mask is a view that begins inside a longer row.
    behind = torch.zeros(samples, 16 + -(-keys // 8) * 8, dtype=torch.uint8)
    behind[:, 16 : 16 + keys] = mask
    first = mask.int().argmax(dim=1)
    span = torch.stack((first, first + 1), dim=1)
    for geometry in ({}, {"span": span}, {"window": 2901}):
        expected = formula(*(t.double() for t in inputs), key_mask=mask, **geometry)[0]  # type: ignore[arg-type]
        for key_mask in (mask, behind[:, 16 : 16 + keys]):
            assert error(decode_by_route(inputs, route, key_mask=key_mask, **geometry), expected) <= 3e-3
