"""Decode attention against the formula."""

from __future__ import annotations

import pytest
import torch
from formula import error, formula, random_inputs
from operator_checks import DTYPES, OUTPUT_ERROR
from zerotuning import ops


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (3, 1), (8, 2), (7, 1), (32, 1)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (20, 7), (64, 64), (72, 200), (256, 256), (264, 264)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_against_a_cache_equals_the_formula(dtype, size, heads, device) -> None:
    if device == "cuda" and max(size) > 256:
        pytest.skip("head sizes above 256 are refused on a GPU")
    torch.manual_seed(17)
    for keys in (1, 130, 700):
        inputs = random_inputs((3, *heads, 1, keys, *size), dtype, per_sample=True)
        inputs[3] *= 3
        mask = torch.rand(3, keys) > 0.4
        mask[2] = False  # a row without keys
        start = torch.tensor([keys - 1, keys // 2, 0])
        span = torch.tensor([[0, 1], [0, 5], [1, 1]]).clamp(max=keys)
        for geometry in ({}, {"key_mask": mask, "window": 150}, {"query_start": start, "span": span}):
            expected = formula(*(t.double() for t in inputs), **geometry)[0]
            got = ops.decode_attention(*inputs, **geometry)
            # A mean of 700 values is small: relative to the mean, the rounding of the values is larger.
            assert error(got, expected) <= 2 * OUTPUT_ERROR[dtype], (keys, geometry)
            if "key_mask" in geometry:
                assert not got[2].any()


@pytest.mark.parametrize(("rows", "keys"), [(1, 40), (1, 3000), (5, 900), (17, 30)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_transposed_decode_output_is_contiguous_and_equal(rows, keys, dtype) -> None:
    inputs = random_inputs((2, 4, 2, rows, keys, 64, 64), dtype)
    output = ops.decode_attention_transposed(*inputs, ops.Geometry(), None)
    assert output.is_contiguous()
    assert torch.equal(output, ops.decode_attention(*inputs).transpose(1, 2))
