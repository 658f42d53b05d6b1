"""Attention on a GPU: each route against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_calls import (
    CAPABILITY,
    CUDNN,
    FLASH,
    GAMMAS,
    HEAD_SIZES,
    HOPPER,
    PLAIN,
    SINKS,
    by_route,
    compare,
    either_torch_kernel,
    inputs_with_scaled_sink,
)
from formula import error, formula, random_inputs
from zerotuning import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("rows", [64, 129, 1000])
def test_routes_equal_the_formula_at_every_head_size(size, rows, dtype) -> None:
    torch.manual_seed(rows)
    inputs = random_inputs((2, 4, 2, rows, rows, *size), dtype)
    compare(inputs, PLAIN, PLAIN)
    if CAPABILITY == (9, 0):
        compare(inputs, HOPPER, PLAIN)


@either_torch_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [2, 64, 129, 1000])
def test_torchs_kernels_equal_the_formula_at_every_head_size(rows, size, dtype, torch_kernel) -> None:
    torch.manual_seed(rows)
    inputs = random_inputs((2, 4, 2, rows, rows, size, size), dtype)
    compare(inputs, torch_kernel, PLAIN if torch_kernel == CUDNN and size > 128 else torch_kernel)


@either_torch_kernel
@GAMMAS
@SINKS
def test_routes_equal_the_formula_for_weak_and_strong_sinks(sink, gamma, torch_kernel) -> None:
    inputs = inputs_with_scaled_sink(sink, gamma)
    compare(inputs, PLAIN, PLAIN, floor=0.0)
    for forward in (PLAIN, torch_kernel, *([HOPPER] if CAPABILITY == (9, 0) else [])):
        # γ's gradient is a sum of few rows that cancel, and each saved row is rounded: the error is up to 1.2e-2,
        # depending on grad_output. 5e-3 holds for longer sequences.
        compare(inputs, forward, torch_kernel, floor=0.0, scales_limit=1.5e-2)


@pytest.mark.parametrize("size", HEAD_SIZES, ids=str)
def test_output_minus_initial_value_equals_the_difference(size) -> None:
    torch.manual_seed(5)
    rows = 200
    inputs = random_inputs((2, 4, 2, rows, rows, *size), torch.bfloat16)
    key = torch.arange(rows)
    routes = [PLAIN, *([HOPPER] if CAPABILITY == (9, 0) else [])]
    torch_kernels = [FLASH, *([CUDNN] if (9, 0) <= CAPABILITY < (12, 0) else [])]
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [0, 0]),
        ({"key_mask": key >= torch.tensor([0, 70])[:, None]}, [0, 70]),
        ({"span": torch.tensor([[3, 9], [66, 67]])}, [3, 66]),
    ]
    for geometry, first in cases:
        options = (geometry.get("key_mask"), geometry.get("span"), None, 0, size[0] ** -0.5)
        wide = [t.double() for t in inputs]
        output = formula(*wide, **geometry)[0]
        value = torch.stack([wide[2][sample, :, place] for sample, place in enumerate(first)])
        wanted = output - value.repeat_interleave(2, 1)[:, :, None]
        seen = torch.ones(2, rows, dtype=torch.bool)
        if "key_mask" in geometry:
            seen = key >= torch.tensor(first)[:, None]
        for route in [*routes, *(torch_kernels if not geometry and size[0] == size[1] else [])]:
            got = torch.ops.zerotuning._attention_by_route(*inputs, *options, True, route)[2]
            for sample in range(2):
                assert error(got[sample][:, seen[sample]], wanted[sample][:, seen[sample]]) <= 3e-3


def test_outputs_are_the_same_from_run_to_run() -> None:
    torch.manual_seed(2)
    inputs = random_inputs((2, 8, 2, 1500, 1500, 128, 128), torch.bfloat16)
    outputs = [ops.attention(*inputs)[0] for _ in range(3)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    cache = random_inputs((3, 8, 2, 2, 5000, 128, 128), torch.bfloat16)
    steps = [ops.decode_attention(*cache) for _ in range(3)]
    assert all(torch.equal(steps[0], other) for other in steps[1:])
    grad_output = torch.randn_like(outputs[0])
    gradients = [by_route(inputs, grad_output, 0, PLAIN) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("length", [64, 192, 320, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_far_below_zero_do_not_overflow(length, padded) -> None:
    """If the last tile of keys is half empty, exp(0 - logsumexp) of the missing keys overflows (pytorch #196678)."""
    torch.manual_seed(12)
    query, key, value, log_scale = random_inputs((2, 4, 2, length, length, 64, 64), torch.bfloat16)
    query[..., 0] += 32
    key[..., 0] -= 32
    geometry = {"key_mask": torch.arange(length) >= torch.tensor([0, 5])[:, None]} if padded else {}
    compare([query, key, value, log_scale], 0, 0, floor=1.0, **geometry)  # type: ignore[arg-type]


def test_tensors_on_different_devices_are_refused_by_name() -> None:
    query, key, value, log_scale = random_inputs((1, 2, 2, 8, 8, 64, 64), torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match="log_scale must be on query's device, cuda:0, got cpu"):
        ops.attention(query, key, value, log_scale.cpu())
    for name, tensor in {
        "key_mask": torch.ones(1, 8, dtype=torch.bool),
        "span": torch.tensor([[0, 1]]),
        "query_start": torch.tensor([0]),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=f"{name} must be on query's device, cuda:0, got cpu"):
            ops.attention(query, key, value, log_scale, **{name: tensor.cpu()})
    for own, others, named in (
        (query, (key.cpu(), value), "key must be on query's device, cuda:0, got cpu"),
        (query.cpu(), (key, value), "key must be on query's device, cpu, got cuda:0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=named):
            ops.attention(own, *others, log_scale)
    output, logsumexp = ops.attention(query, key, value, log_scale)
    backward, rest = torch.ops.zerotuning.attention_backward, (None, None, None, 0, 0.125)
    with pytest.raises((ValueError, RuntimeError), match="grad_output must be on query's device, cuda:0, got cpu"):
        backward(output.cpu(), query, key, value, log_scale, output, logsumexp, *rest)
    with pytest.raises((ValueError, RuntimeError), match="grad_output must be on query's device, cpu, got cuda:0"):
        backward(output, query.cpu(), key.cpu(), value.cpu(), log_scale.cpu(), output.cpu(), logsumexp.cpu(), *rest)
    with pytest.raises((ValueError, RuntimeError), match="head sizes on a GPU go up to 256"):
        ops.attention(*random_inputs((1, 1, 1, 8, 8, 264, 264), torch.bfloat16))
