"""Gradients on a GPU by the plain kernels and by torch's kernels, against the formula."""

from __future__ import annotations

import pytest
import torch
from cuda_calls import (
    CUDNN,
    GAMMAS,
    HOPPER,
    PLAIN,
    SINKS,
    by_route,
    compare,
    either_torch_kernel,
    inputs_with_scaled_sink,
    needs_cudnn,
    needs_hopper,
    reference,
)
from formula import error, inputs_with_sink, random_inputs
from zerotuning import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("route", [PLAIN, pytest.param(HOPPER, marks=needs_hopper)])
@GAMMAS
@SINKS
def test_gradients_of_padded_and_chosen_sinks_equal_the_formula(sink, gamma, route) -> None:
    query, key, value, log_scale = inputs_with_scaled_sink(sink, gamma)
    turned = [query, key.roll(70, 2), value.roll(70, 2), log_scale]  # the sink in the middle of the second tile
    mask = (torch.arange(200) >= 70)[None]
    compare(turned, 0, route, floor=0.0, key_mask=mask)
    for end in (71, 75):
        compare(turned, 0, route, floor=0.0, span=torch.tensor([[70, end]]))
    compare(turned, 0, route, floor=0.0, span=torch.tensor([[70, 71]]), window=100)


@pytest.mark.parametrize("length", [200, 4224])  # on Hopper torch's kernel runs at the second length
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_a_strong_sink_has_exact_gradients(compiled, length) -> None:
    inputs = [t.requires_grad_() for t in inputs_with_scaled_sink(0.99, 3.0, length)]
    attend = torch.compile(ops.attention, fullgraph=True) if compiled else ops.attention
    grad_output = torch.randn_like(inputs[0])
    got = torch.autograd.grad(attend(*inputs)[0], inputs, grad_output)
    for a, b in zip(got, reference([t.detach() for t in inputs], grad_output)[1:], strict=True):
        assert error(a, b) <= 5e-3


@either_torch_kernel
@pytest.mark.parametrize("layout", ["rows", "heads"])
@pytest.mark.parametrize("rows", [2, 64, 4224])  # at the last length the automatic choice is torch's kernel
def test_gradients_of_torchs_kernel_equal_the_formula_in_either_layout(rows, layout, torch_kernel) -> None:
    torch.manual_seed(rows)
    inputs = random_inputs((1, 4, 2, rows, rows, 64, 64), torch.bfloat16)
    if layout == "heads":
        inputs[:3] = [t.contiguous() for t in inputs[:3]]
    else:
        inputs[:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:3]]
    compare(inputs, 0, torch_kernel)
    compare(inputs, 0, 0)


@either_torch_kernel
@pytest.mark.parametrize("sink", [0.5, 0.9, 0.99])
def test_gradients_of_torchs_kernel_are_exact_where_the_second_key_is_the_sink(sink, torch_kernel) -> None:
    # torch's kernel runs with key 0 replaced by key 1; the duplicate contribution of key 1 is subtracted afterwards.
    query, key, value = (t.bfloat16() for t in inputs_with_sink(sink, "cuda"))
    order = [1, 0, *range(2, key.shape[2])]
    log_scale = torch.linspace(-4.0, 4.0, 4)
    inputs = [query, key[:, :, order], value[:, :, order], log_scale]
    compare(inputs, 0, torch_kernel, floor=1.0)
    # The subtraction removes the rounding error of key 1's duplicate too, also with output_minus_initial_value.
    options = (None, None, None, 0, 0.125)
    grad_output = torch.randn_like(query)
    output, logsumexp, output_minus_initial_value = torch.ops.zerotuning._attention_by_route(
        *inputs, *options, True, PLAIN
    )
    wanted = reference(inputs, grad_output)[1]
    errors = [
        error(
            torch.ops.zerotuning._attention_backward_by_route(
                grad_output, *inputs, output, logsumexp, *options, kept, torch_kernel
            )[0],
            wanted,
        )
        for kept in (None, output_minus_initial_value)
    ]
    assert errors[1] <= 1.1 * errors[0]


@either_torch_kernel
def test_an_infinite_second_logit_in_the_first_row_does_not_change_other_rows(torch_kernel) -> None:
    torch.manual_seed(4)
    query, key, value, log_scale = random_inputs((1, 2, 1, 200, 200, 64, 64), torch.bfloat16)
    key[:, :, 1] = 40 * query[:, :1, 0]  # a logit of 320
    compare([query, key, value, log_scale], 0, torch_kernel, floor=1.0)


@needs_cudnn
@pytest.mark.parametrize("size", [(64, 64), (128, 128)], ids=str)
def test_padded_gradients_of_torchs_kernel_equal_the_formula(size) -> None:
    torch.manual_seed(1)
    mask = torch.arange(300) >= torch.tensor([0, 1, 170, 299])[:, None]
    inputs = random_inputs((4, 4, 2, 300, 300, *size), torch.bfloat16, per_sample=True)
    compare(inputs, 0, CUDNN, key_mask=mask)
    mask = torch.rand(4, 300) > 0.4
    mask[2] = False
    compare(inputs, 0, CUDNN, key_mask=mask)


def test_scales_expanded_over_the_batch_get_a_gradient_for_each_sample() -> None:
    torch.manual_seed(7)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, log_scale = random_inputs((3, 4, 2, 90, 90, 64, 64), dtype)
        grad_output = torch.randn(3 * 4 * 90 * 64 + 1)[1:].to(dtype).view(3, 90, 4, 64).transpose(1, 2)
        expanded = [query, key, value, log_scale.expand(3, 4)]
        whole = [query, key, value, log_scale.repeat(3, 1)]
        for a, b in zip(by_route(expanded, grad_output, 0, 0), by_route(whole, grad_output, 0, 0), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
