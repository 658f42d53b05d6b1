"""Attention within packed sequences against the formula with a dense mask; layouts of packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packings import PACKINGS, encoded_packed_mask, numbers_and_positions, packed_mask, packed_mask_function
from torch import Tensor
from transformers.masking_utils import sdpa_mask
from zerotuning.attention import packed_sequences, reference
from zerotuning.attention.packed_sequences import layout_of

LENGTH = 24


def visible_and_initial(
    lengths: Sequence[Sequence[int]], window: int = 0, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return two bool masks (B, 1, T, T): each query's visible keys, and the initial token of the query's sequence."""
    numbers, _ = numbers_and_positions(lengths)
    real = torch.ones_like(numbers) if real is None else real
    batch, length = numbers.shape
    visible = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    initial = torch.zeros_like(visible)
    for b in range(batch):
        for i in range(length):
            own = [j for j in range(i + 1) if numbers[b, j] == numbers[b, i] and real[b, j]]
            seen = [j for j in own if not window or j > i - window]
            visible[b, 0, i, seen] = True
            initial[b, 0, i, [j for j in own[:1] if j in seen]] = True
    return visible, initial


def random_inputs(batch: int, per_row: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, LENGTH, 4, 8), (batch, LENGTH, 2, 8), (batch, LENGTH, 2, 6)]
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    return [*tensors, torch.randn((batch, 4) if per_row else (4,), generator=generator)]


def output_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def attend(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, encoded: Tensor, **options: Any) -> Tensor:
    return packed_sequences.attend(query, key, value, log_scale, layout_of(encoded), **options)


def assert_equal_to_formula(
    inputs: Sequence[Tensor],
    encoded: Tensor,
    visible: Tensor,
    scaled: Tensor,
    span: Tensor | None = None,
    rows_that_count: Tensor | None = None,
) -> None:
    weights = torch.randn(inputs[0].shape[0], 4, LENGTH, 6, generator=torch.Generator().manual_seed(1))
    if rows_that_count is not None:
        weights = weights * rows_that_count[:, None, :, None]
    got = output_and_gradients(lambda *tensors: attend(*tensors, encoded, span=span), inputs, weights)
    want = output_and_gradients(
        lambda *tensors: reference.scaled_attention(*tensors, visible=visible, scaled=scaled)[0],
        [tensor.double() for tensor in inputs],
        weights,
    )
    if rows_that_count is not None:
        got[0], want[0] = (output.transpose(1, 2)[rows_that_count > 0] for output in (got[0], want[0]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("packing", PACKINGS)
def test_outputs_and_gradients_equal_the_formula(packing, window, per_row) -> None:
    lengths = PACKINGS[packing]
    inputs = random_inputs(len(lengths), per_row)
    assert_equal_to_formula(inputs, encoded_packed_mask(lengths, window), *visible_and_initial(lengths, window))


@pytest.mark.parametrize("window", [0, 5])
def test_padding_is_hidden_and_the_first_real_token_is_the_initial_token(window) -> None:
    lengths = [[11, 13], [4, 12, 8]]
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[0, :3] = real[0, 20:] = real[1, 4:6] = real[1, 9] = real[1, 16:] = 0  # a hole, and a sequence of padding alone
    visible, initial = visible_and_initial(lengths, window, real)
    assert_equal_to_formula(
        random_inputs(2), encoded_packed_mask(lengths, window, real), visible, initial, rows_that_count=real
    )


@pytest.mark.parametrize("window", [0, 5])
def test_scaled_keys_are_positions_in_the_row_for_queries_that_attend_to_them(window) -> None:
    lengths = PACKINGS["uneven_rows"]
    span = torch.tensor(
        [[0, 5], [7, 7], [6, 19]]
    )  # two sequences in part, none, one in full and its neighbours in part
    visible, _ = visible_and_initial(lengths, window)
    column = torch.arange(LENGTH)
    chosen = ((column >= span[:, :1]) & (column < span[:, 1:]))[:, None, None]
    assert_equal_to_formula(
        random_inputs(3), encoded_packed_mask(lengths, window), visible, visible & chosen, span=span
    )


@pytest.mark.parametrize("window", [0, 5])
def test_a_dense_copy_of_a_packed_mask_equals_transformers_mask_and_marks_initial_tokens(window) -> None:
    lengths = PACKINGS["uneven_rows"]
    numbers, positions = numbers_and_positions(lengths)
    real = torch.ones_like(numbers)
    real[1, :3] = real[2, 20:] = 0
    function = packed_mask_function(numbers, positions, window)
    mask = sdpa_mask(
        batch_size=3, q_length=LENGTH, kv_length=LENGTH, mask_function=function, attention_mask=real.bool(),
        allow_is_causal_skip=False,
    )  # fmt: skip
    dense = packed_mask(lengths, window, real).to_dense()
    assert torch.equal(dense.visible, mask)
    assert torch.equal(dense.scaled, visible_and_initial(lengths, window, real)[1])


def test_a_copy_of_an_encoded_mask_gives_the_same_output() -> None:
    inputs = random_inputs(3)
    encoded = encoded_packed_mask(PACKINGS["uneven_rows"], 5)
    assert torch.equal(attend(*inputs, encoded.clone()), attend(*inputs, encoded))


def test_a_layout_lives_as_long_as_its_mask() -> None:
    before = len(packed_sequences._layouts)
    encoded = encoded_packed_mask(PACKINGS["uneven_rows"])
    assert len(packed_sequences._layouts) == before + 1
    del encoded
    assert len(packed_sequences._layouts) == before
