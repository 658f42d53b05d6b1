"""The operator against the paper's formula written out in float64, over shapes, dtypes, sinks and scales."""

from __future__ import annotations

import math

import pytest
import torch
from formula import inputs_with_sink, random_inputs
from operator_checks import DTYPES, check
from zerotuning import ops

SHAPES = [  # B, H, Hkv, Tq, Tk, D, Dv
    (1, 1, 1, 1, 1, 64, 64),
    (2, 4, 4, 37, 37, 16, 16),
    (2, 6, 2, 65, 65, 64, 64),
    (1, 4, 1, 33, 33, 80, 80),
    (1, 2, 1, 31, 31, 96, 96),
    (2, 4, 2, 129, 129, 128, 128),
    (1, 2, 2, 41, 41, 192, 128),
    (1, 2, 2, 41, 41, 64, 96),
    (1, 4, 1, 45, 45, 256, 256),
    (2, 4, 2, 1, 57, 64, 64),
    (2, 4, 2, 5, 58, 64, 64),
    (1, 3, 3, 30, 47, 24, 40),
    (1, 2, 1, 777, 777, 32, 32),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_formula_for_every_head_size_length_and_head_grouping(shape, dtype) -> None:
    torch.manual_seed(hash(shape) % 1000)
    check(random_inputs(shape, dtype))
    check(random_inputs(shape, dtype, per_sample=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.02, 0.3, 3.0, 50.0])
@pytest.mark.parametrize("sink", [0.05, 0.5, 0.9, 0.99])
def test_attention_equals_the_formula_for_weak_and_strong_sinks_and_every_scale(sink, gamma, dtype, device) -> None:
    query, key, value = inputs_with_sink(sink, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scales = torch.full((4,), math.log(gamma), dtype=wide) + torch.linspace(-0.1, 0.1, 4).to(wide)
    check([query.to(dtype), key.to(dtype), value.to(dtype), scales], saturated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_scales_the_first_real_token_of_each_sample(dtype) -> None:
    torch.manual_seed(2)
    mask = torch.arange(50) >= torch.tensor([0, 1, 17, 49])[:, None]
    check(random_inputs((4, 4, 2, 50, 50, 64, 64), dtype), key_mask=mask)
    check(random_inputs((4, 4, 2, 1, 50, 64, 64), dtype, per_sample=True), key_mask=mask)
    long = torch.arange(1300) >= torch.tensor([0, 700])[:, None]
    check(random_inputs((2, 2, 1, 1300, 1300, 16, 16), dtype), key_mask=long)


def test_a_padded_sample_gives_the_same_output_as_without_padding() -> None:
    torch.manual_seed(3)
    query, key, value, log_scale = random_inputs((1, 4, 2, 40, 40, 64, 64), torch.float32)
    alone = ops.attention(query[:, :, 15:], key[:, :, 15:], value[:, :, 15:], log_scale)[0]
    mask = torch.arange(40)[None] >= 15
    padded = ops.attention(query, key, value, log_scale, key_mask=mask)[0][:, :, 15:]
    torch.testing.assert_close(padded, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_with_holes_and_samples_without_real_keys_equal_the_formula(dtype) -> None:
    torch.manual_seed(4)
    mask = torch.rand(3, 61) > 0.4
    mask[1] = False
    check(random_inputs((3, 4, 2, 61, 61, 32, 32), dtype), key_mask=mask)
    check(random_inputs((3, 4, 2, 20, 61, 32, 32), dtype), key_mask=mask, window=7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 7, 32, 63, 64, 100])
def test_sliding_windows_equal_the_formula(window, dtype) -> None:
    torch.manual_seed(5)
    check(random_inputs((2, 4, 2, 64, 64, 32, 32), dtype), window=window)
    check(random_inputs((2, 4, 2, 21, 64, 32, 48), dtype), window=window)
    mask = torch.arange(64) >= torch.tensor([0, 30])[:, None]
    check(random_inputs((2, 4, 2, 64, 64, 32, 32), dtype), window=window, key_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_may_start_anywhere_in_the_keys_and_differently_in_each_sample(dtype) -> None:
    torch.manual_seed(6)
    for rows in (1, 6):
        inputs = random_inputs((3, 4, 2, rows, 40, 32, 32), dtype)
        check(inputs, query_start=torch.tensor([0, 11, 34]))
        check(inputs, query_start=torch.tensor([20, 20, 20]), window=9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_span_of_keys_is_scaled_instead_of_the_initial_token(dtype) -> None:
    torch.manual_seed(7)
    inputs = random_inputs((3, 4, 2, 48, 48, 32, 32), dtype)
    span = torch.tensor([[3, 9], [0, 48], [5, 5]])
    check(inputs, span=span)
    check(inputs, span=span, window=11)


def test_gradcheck_in_float64() -> None:
    torch.manual_seed(8)
    inputs = [t.requires_grad_() for t in random_inputs((2, 2, 1, 4, 5, 3, 4), torch.float64)]
    mask = torch.arange(5) >= torch.tensor([0, 2])[:, None]
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t)[0], inputs)
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, key_mask=mask, window=3)[0], inputs)


def test_empty_batches_and_queries_give_empty_outputs() -> None:
    for shape in ((0, 2, 2, 4, 4, 16, 16), (2, 2, 2, 0, 4, 16, 16)):
        inputs = [t.requires_grad_() for t in random_inputs(shape, torch.float32)]
        output = ops.attention(*inputs)[0]
        assert output.numel() == 0
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(output.sum(), inputs))
