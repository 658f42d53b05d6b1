"""Errors that name a bad argument."""

from __future__ import annotations

import math
import re

import pytest
import torch
from formula import random_inputs
from zerotuning import ops

BAD = {
    "query must be [B, H, Tq, D], got [4, 9, 16]": lambda q, k, v, s: (q[0], k, v, s, {}),
    "key must be [B, Hkv, Tk, D] = [2, 2, 12, 16], got [2, 2, 12, 8]": lambda q, k, v, s: (
        q,
        k[..., :8],
        v,
        s,
        {},
    ),
    "value must be [B, Hkv, Tk, Dv] = [2, 2, 12, 24], got [2, 2, 11, 24]": lambda q, k, v, s: (
        q,
        k,
        v[:, :, 1:],
        s,
        {},
    ),
    "query's heads must be a multiple of key's heads, got 3 and 2": lambda q, k, v, s: (
        q[:, :3],
        k,
        v,
        s[:3],
        {},
    ),
    "key must be float32, got bfloat16": lambda q, k, v, s: (q, k.bfloat16(), v, s, {}),
    "query must be float32, bfloat16, float16 or float64, got int64": lambda q, k, v, s: (
        q.long(),
        k,
        v,
        s,
        {},
    ),
    "log_scale must be [H] or [B, H] with B = 2, H = 4, got [1, 16]": lambda q, k, v, s: (
        q,
        k,
        v,
        torch.zeros(1, 16),
        {},
    ),
    "log_scale must be float32, got bfloat16": lambda q, k, v, s: (q, k, v, s.bfloat16(), {}),
    "log_scale must be finite, got nan at index 2": lambda q, k, v, s: (
        q,
        k,
        v,
        torch.tensor([0, 0, math.nan, 0]),
        {},
    ),
    "log_scale must be finite, got -inf at index 0": lambda q, k, v, s: (
        q,
        k,
        v,
        torch.full((4,), -math.inf),
        {},
    ),
    "key_mask must be [B, Tk] = [2, 12], got [2, 9]": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"key_mask": torch.ones(2, 9) > 0},
    ),
    "key_mask must be bool or uint8, got float32": lambda q, k, v, s: (q, k, v, s, {"key_mask": torch.ones(2, 12)}),
    "span[1] must be [first, end) within the 12 keys, got [3, 13)": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"span": torch.tensor([[0, 1], [3, 13]])},
    ),
    "query_start[0] must be between 0 and Tk - Tq = 3, got -1": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"query_start": torch.tensor([-1, 0])},
    ),
    "query must not be longer than key without query_start, got Tq = 9 and Tk = 8": lambda q, k, v, s: (
        q,
        k[:, :, :8],
        v[:, :, :8],
        s,
        {},
    ),
    "window must be 0 (none) or the number of keys that a query attends to, got -3": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"window": -3},
    ),
    "scale must be finite, got nan": lambda q, k, v, s: (q, k, v, s, {"scale": math.nan}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("operator", [ops.attention, ops.decode_attention])
def test_a_bad_argument_gets_one_error_that_names_it(operator, message, device) -> None:
    if device == "cuda" and message.startswith(("log_scale must be finite", "span[", "query_start[")):
        pytest.skip("the operators do not read values back from a GPU")
    *tensors, options = BAD[message](*random_inputs((2, 4, 2, 9, 12, 16, 24), torch.float32))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        operator(*tensors, **options)
    assert message in str(raised.value)


def test_the_backward_operator_checks_its_arguments(device) -> None:
    inputs = random_inputs((2, 4, 2, 9, 9, 16, 24), torch.float32)
    output, logsumexp = ops.attention(*inputs)
    rest = (None, None, None, 0, 0.25)
    backward = torch.ops.zerotuning.attention_backward
    for wrong, message in (
        (
            (output[:, :, :8], output, logsumexp),
            "grad_output must be [B, H, Tq, Dv] = [2, 4, 9, 24], got [2, 4, 8, 24]",
        ),
        ((output, output.double(), logsumexp), "output must be float32, got float64"),
        ((output, output, logsumexp[:1]), "logsumexp must be [B, H, Tq] = [2, 4, 9], got [1, 4, 9]"),
        ((output, output, logsumexp.half()), "logsumexp must be float32, got float16"),
    ):
        grad_output, *kept = wrong
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            backward(grad_output, *inputs, *kept, *rest)
    if device == "cuda":  # on the CPU the operator does not save output_minus_initial_value
        with pytest.raises((ValueError, RuntimeError), match="output_minus_initial_value must be"):
            backward(output, *inputs, output, logsumexp, *rest, output[:1])
