"""Calls of the operators by route on a GPU, and their comparison with the formula, that tests in cuda/ share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import error, formula, inputs_with_sink, poison, random_inputs, rounding_scale
from torch import Tensor
from zerotuning import ops  # noqa: F401 - registers the operators, also in processes that a test spawns

#: Measured figures that the choice of a route is compared with.
MEASURED = Path(__file__).parents[2] / "docs/results"
PLAIN, HOPPER, CUDNN, FLASH = 1, 2, 3, 4
RINGS, BULK = 1, 2  # routes of decode attention
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
needs_hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs a Hopper GPU")
needs_cudnn = pytest.mark.skipif(not (9, 0) <= CAPABILITY < (12, 0), reason="needs a GPU with cuDNN's kernels")
cudnn = pytest.param(CUDNN, marks=needs_cudnn, id="cudnn")
either_torch_kernel = pytest.mark.parametrize("torch_kernel", [cudnn, pytest.param(FLASH, id="flash")])
HEAD_SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


def by_route(inputs: list[Tensor], grad_output: Tensor, forward: int, backward: int, **geometry: Any) -> list[Tensor]:
    """Return the output and the gradients by the given routes."""
    options = (geometry.get("key_mask"), geometry.get("span"), geometry.get("query_start"), geometry.get("window", 0))
    scale = inputs[0].shape[-1] ** -0.5
    poison()
    output, logsumexp, output_minus_initial_value = torch.ops.zerotuning._attention_by_route(
        *inputs, *options, scale, True, forward
    )
    gradients = torch.ops.zerotuning._attention_backward_by_route(
        grad_output, *inputs, output, logsumexp, *options, scale, output_minus_initial_value, backward
    )
    return [output, *gradients]


def reference(inputs: list[Tensor], grad_output: Tensor, **geometry: Any) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in inputs]
    output = formula(*leaves, **geometry)[0]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())]


def compare(
    inputs: list[Tensor], forward: int, backward: int, floor: float = 1e-2, scales_limit: float = 5e-3, **geometry: Any
) -> None:
    """Bound errors relative to the result plus `floor` times its terms that cancel if one key has all the weight."""
    batch, heads, rows, _ = inputs[0].shape
    grad_output = torch.randn(batch, rows, heads, inputs[2].shape[-1]).to(inputs[0].dtype).transpose(1, 2)
    got, wanted = (
        by_route(inputs, grad_output, forward, backward, **geometry),
        reference(inputs, grad_output, **geometry),
    )
    assert error(got[0], wanted[0]) <= 3e-3
    terms = rounding_scale([t.double() for t in inputs], grad_output.double())
    for name, a, b, cancelling in zip(("query", "key", "value", "log_scale"), got[1:], wanted[1:], terms, strict=True):
        assert not a.isnan().any(), name
        size = b.norm() + floor * cancelling
        limit = scales_limit if name == "log_scale" else 5e-3
        assert ((a.double() - b).norm() / size).item() <= limit, name


SINKS = pytest.mark.parametrize("sink", [0.05, 0.5, 0.9, 0.99])


GAMMAS = pytest.mark.parametrize("gamma", [0.02, 0.3, 1.0, 3.0, 50.0])


def inputs_with_scaled_sink(sink: float, gamma: float, length: int = 200) -> list[Tensor]:
    log_scale = torch.full((4,), math.log(gamma)) + torch.linspace(-0.1, 0.1, 4)
    return [*(t.bfloat16() for t in inputs_with_sink(sink, "cuda", length)), log_scale]


def decode_by_route(inputs: list[Tensor], route: int, **geometry: Any) -> Tensor:
    options = (geometry.get("key_mask"), geometry.get("span"), geometry.get("query_start"), geometry.get("window", 0))
    return torch.ops.zerotuning._decode_attention_by_route(*inputs, *options, inputs[0].shape[-1] ** -0.5, route)


def decode_on_many_streams(_rank: int) -> None:
    torch.set_default_device("cuda")
    torch.manual_seed(17)
    inputs = random_inputs((1, 8, 2, 1, 3000, 128, 128), torch.bfloat16)
    streams = {torch.cuda.Stream(priority=-(n % 4)) for n in range(128)}
    assert len({stream.cuda_stream for stream in streams}) > 64
    outputs = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            outputs.append(decode_by_route(inputs, RINGS))
    torch.cuda.synchronize()
    assert error(outputs[0], formula(*(t.double() for t in inputs))[0]) <= 3e-3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
