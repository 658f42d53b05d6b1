"""Gradients by Hopper's own kernel against the formula."""

from __future__ import annotations

import pytest
import torch
from cuda_calls import (
    GAMMAS,
    HOPPER,
    SINKS,
    by_route,
    compare,
    inputs_with_scaled_sink,
    needs_hopper,
)
from formula import random_inputs

pytestmark = pytest.mark.gpu


@needs_hopper
@GAMMAS
@SINKS
def test_hopper_gradients_equal_the_formula_for_weak_and_strong_sinks(sink, gamma) -> None:
    inputs = inputs_with_scaled_sink(sink, gamma)
    compare(inputs, HOPPER, HOPPER, floor=0.0)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 63, 64, 65, 128, 129, 200, 256, 500, 1000])
def test_hopper_gradients_equal_the_formula_at_every_length_and_head_grouping(rows, size, dtype) -> None:
    torch.manual_seed(rows)
    for heads, key_heads in ((2, 2), (8, 2), (6, 1)):
        compare(random_inputs((2, heads, key_heads, rows, rows, size, size), dtype), HOPPER, HOPPER)


@needs_hopper
@pytest.mark.parametrize("size", [(80, 80), (96, 96), (8, 8), (24, 40), (64, 128), (128, 64)], ids=str)
def test_hopper_gradients_equal_the_formula_at_head_sizes_that_fill_no_tile(size) -> None:
    torch.manual_seed(8)
    compare(random_inputs((2, 4, 2, 150, 150, *size), torch.bfloat16, per_sample=True), HOPPER, HOPPER)


@needs_hopper
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("rows", [64, 129, 300, 700])
def test_hopper_gradients_equal_the_formula_for_every_geometry(rows, size) -> None:
    torch.manual_seed(9)
    key = torch.arange(rows)
    some = torch.tensor([0, 1, rows * 4 // 7, rows - 1])[:, None]
    holes = torch.rand(4, rows) > 0.4
    holes[2] = False
    span = torch.tensor([[0, 1], [3, rows // 2], [5, 5], [rows // 3, rows]])
    inputs = random_inputs((4, 4, 2, rows, rows, size, size), torch.bfloat16, per_sample=True)
    for geometry in (
        {"key_mask": key >= some},
        {"key_mask": key < rows - some},
        {"key_mask": holes},
        {"window": 1},
        {"window": 33},
        {"window": 150},
        {"span": span},
        {"span": span, "key_mask": holes, "window": 90},
    ):
        compare(inputs, HOPPER, HOPPER, **geometry)  # type: ignore[arg-type]
    start = torch.tensor([0, 1, rows - rows // 2, rows // 4])
    others = random_inputs((4, 4, 2, rows // 2, rows, size, size), torch.bfloat16, per_sample=True)
    compare(others, HOPPER, HOPPER)
    for geometry in ({}, {"window": 70}, {"key_mask": key >= some}):
        compare(others, HOPPER, HOPPER, query_start=start, **geometry)  # type: ignore[arg-type]


@needs_hopper
def test_hopper_gradients_of_strided_inputs_equal_those_of_copies() -> None:
    torch.manual_seed(10)
    joint = torch.randn(2, 200, 4 + 2 + 2, 128).bfloat16().transpose(1, 2)
    parts = joint.split((4, 2, 2), dim=1)
    turned = torch.randn(2, 4, 200, 128).bfloat16()
    log_scale = torch.randn(4)
    for query, key, value in (parts, (turned, parts[1], turned[:, :2]), (turned[:, :, 8:], parts[1], parts[2])):
        grad_output = torch.randn(2, 4, query.shape[2], 128).bfloat16()
        copies = [t.clone(memory_format=torch.contiguous_format) for t in (query, key, value)]
        got = by_route([query, key, value, log_scale], grad_output, HOPPER, HOPPER)
        wanted = by_route([*copies, log_scale], grad_output, HOPPER, HOPPER)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        compare([query, key, value, log_scale], HOPPER, HOPPER)


@needs_hopper
def test_hopper_gradients_are_deterministic_and_chosen_for_short_or_padded_sequences() -> None:
    torch.manual_seed(11)
    for batch, rows in ((16, 128), (3, 500), (2, 3000), (1, 5000)):
        inputs = random_inputs((batch, 8, 2, rows, rows, 128, 128), torch.bfloat16)
        grad_output = torch.randn_like(inputs[0])
        first, *others = [by_route(inputs, grad_output, HOPPER, HOPPER) for _ in range(4)]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        mask = torch.arange(rows) >= torch.arange(batch)[:, None]
        for geometry in ({"key_mask": mask}, {"window": 100}, *([{}] if rows <= 4096 else [])):
            chosen, own = (by_route(inputs, grad_output, HOPPER, route, **geometry) for route in (0, HOPPER))
            assert all(torch.equal(a, b) for a, b in zip(chosen, own, strict=True))
