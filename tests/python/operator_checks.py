"""The comparison of the operators with the formula that tests in ops/ share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from formula import error, formula, rounding_scale
from torch import Tensor
from zerotuning import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Relative error ||out - ref|| / ||ref|| that rounding explains.
OUTPUT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
GRADIENT_ERROR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def cpu_routes(inputs: list[Tensor], geometry: dict[str, object]) -> Iterator[Tensor]:
    """Yield the output of each CPU route: torch's kernel, and our kernel where the processor and the call allow it."""
    if inputs[0].is_cuda:
        return
    scale = geometry.get("scale") or inputs[0].shape[-1] ** -0.5
    names = ("key_mask", "span", "query_start")
    arguments = (*inputs, *(geometry.get(name) for name in names), geometry.get("window", 0), scale)
    yield torch.ops.zerotuning._attention_by_route(*arguments, False, 1)[0]
    try:
        yield torch.ops.zerotuning._attention_by_route(*arguments, False, 2)[0]
    except (RuntimeError, ValueError) as refusal:
        if "does not support this call" not in str(refusal):
            raise


def check(inputs: list[Tensor], saturated: bool = False, **geometry: object) -> None:
    """Compare output, log-sum-exp and gradients with the formula; if `saturated`, relative to the terms that cancel."""
    dtype = inputs[0].dtype
    reference = [t.detach().double().requires_grad_() for t in inputs]
    inputs = [t.detach().requires_grad_() for t in inputs]
    output, logsumexp = ops.attention(*inputs, **geometry)  # type: ignore[arg-type]
    expected, expected_logsumexp = formula(*reference, **geometry)  # type: ignore[arg-type]
    assert output.dtype == dtype
    if output.is_cuda and dtype == torch.bfloat16:
        assert error(output, expected) <= 3e-3
    assert error(output, expected) <= OUTPUT_ERROR[dtype]
    seen = torch.isfinite(expected_logsumexp)
    assert torch.equal(torch.isfinite(logsumexp), seen)
    torch.testing.assert_close(logsumexp[seen].double(), expected_logsumexp[seen], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for by_route in cpu_routes(inputs, geometry):
            assert error(by_route, expected) <= OUTPUT_ERROR[dtype]
        assert error(ops.decode_attention(*inputs, **geometry), expected) <= OUTPUT_ERROR[dtype]  # type: ignore[arg-type]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((output.double() * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), reference)
    floors = rounding_scale(reference, weight)
    for gradient, want, floor in zip(got, wanted, floors, strict=True):
        assert not gradient.isnan().any()
        size = want.norm() + floor * (1.0 if saturated else 1e-2)
        assert ((gradient.double() - want).norm() / size).item() <= GRADIENT_ERROR[dtype]
