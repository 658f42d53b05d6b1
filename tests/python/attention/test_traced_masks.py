"""The operator of traced graphs against the formula, and the packed sequences that are found in dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packings import PACKINGS, encoded_packed_mask, ids_of, packed_mask
from random_models import random_scales, small_model
from torch import Tensor
from zerotuning import ops
from zerotuning.attention import dense_masks, traced_masks
from zerotuning.attention.mask_encoding import DenseMask, PackedMask, decode
from zerotuning.patching.patch import apply_scales, head_parameters, patch, scaled_keys


def encoded_dense_mask(lengths: list[list[int]], window: int = 0) -> Tensor:
    return packed_mask(lengths, window).to_dense().encode()


def as_dense(encoded: Tensor, length: int) -> DenseMask:
    mask = decode(encoded, length, length)
    assert isinstance(mask, (DenseMask, PackedMask))
    return mask if isinstance(mask, DenseMask) else mask.to_dense()


def layout_of(encoded: Tensor, length: int) -> Any:
    return traced_masks._layout_of_dense_mask(encoded, as_dense(encoded, length))


def attend_in_graph(
    query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, mask: Tensor, span: Tensor | None
) -> Tensor:
    """Call the operator that a compiled graph calls."""
    return traced_masks.attend(query, key, value, log_scale, mask, span)


LENGTHS = {"whole": [[12], [12]], "packed": [[5, 1, 6], [2, 10]], "many": [[1, 1, 4, 3, 3], [12]]}


@pytest.mark.parametrize("window", [0, 2, 4, 11, 12])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_are_found_in_a_dense_mask(lengths, window) -> None:
    layout = layout_of(encoded_dense_mask(lengths, window), 12)
    assert layout is not None
    begins = sorted(place for group in layout.groups for place in torch.stack((group.row, group.begin), 1).tolist())
    assert begins == [[row, sum(own[:n])] for row, own in enumerate(lengths) for n in range(len(own))]
    assert layout.is_identity == (lengths == LENGTHS["whole"])


def test_no_sequences_are_found_in_a_mask_that_differs_in_one_place() -> None:
    torch.manual_seed(0)
    for lengths in LENGTHS.values():
        encoded = encoded_dense_mask(lengths)
        for _ in range(40):
            row, query, key = (int(torch.randint(n, ())) for n in (2, 12, 12))
            other = encoded.clone()
            place = (row, 0, 12 * query + key, 0)
            other[place] = (int(encoded[place]) + 1 + int(torch.randint(2, ()))) % 3
            assert layout_of(other, 12) is None


def masks() -> dict[str, Tensor]:
    torch.manual_seed(1)
    own = (torch.rand(2, 1, 12, 12) > 0.4).to(torch.int8)
    own[:, :, 3] = 0  # all keys are hidden from this query
    own[..., 2] *= 2
    windows = {f"{name}, window 4": encoded_dense_mask(lengths, 4) for name, lengths in LENGTHS.items()}
    whole = {name: encoded_dense_mask(lengths) for name, lengths in LENGTHS.items()}
    window_1 = encoded_dense_mask(LENGTHS["packed"], 1)  # such a mask has no trace of the sequences
    packed = encoded_packed_mask(LENGTHS["packed"])
    return {**whole, **windows, "window 1": window_1, "packed mask": packed, "own": own.view(2, 1, 144, 1)}


@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_the_operator_of_traced_graphs_equals_the_formula(mask, per_sample, spanned) -> None:
    torch.manual_seed(2)
    shapes = ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 16), (2, 4) if per_sample else (4,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    span = torch.tensor([[1, 3], [4, 7]]) if spanned else None
    want, got = dense_masks.attend(*inputs, as_dense(mask, 12), span), attend_in_graph(*inputs, mask, span)
    torch.testing.assert_close(got, want)
    grad_output = torch.randn_like(want)
    gradients = (torch.autograd.grad(output, inputs, grad_output) for output in (got, want))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("lengths", [[[70, 1, 129], [200]], [[300], [300]]], ids=["packed", "whole"])
def test_the_operator_of_traced_graphs_equals_the_formula_in_16_bits(lengths, per_sample, device) -> None:
    torch.manual_seed(5)
    rows = sum(lengths[0])
    shapes = ((2, rows, 4, 64), (2, rows, 2, 64), (2, rows, 2, 64))
    tensors = [torch.randn(shape).bfloat16().transpose(1, 2).to(device) for shape in shapes]
    tensors.append(torch.randn((2, 4) if per_sample else (4,)).to(device))
    grad_output = torch.randn(2, rows, 4, 64).bfloat16().transpose(1, 2).to(device)
    for window, span in ((0, None), (50, None), (0, torch.tensor([[3, 9], [60, 72]]).to(device))):
        encoded = encoded_dense_mask(lengths, window).to(device)
        results = []
        for attend, mask, dtype in (
            (attend_in_graph, encoded, None),
            (dense_masks.attend, as_dense(encoded, rows), torch.float64),
        ):
            inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
            output = attend(*inputs, mask, span)
            gradients = torch.autograd.grad(output, inputs, grad_output.to(dtype or grad_output.dtype))
            results.append([output.detach(), *gradients])
        for name, got, want in zip(("output", "query", "key", "value", "log_scale"), *results, strict=True):
            assert (got.double() - want).norm() <= (2e-2 if name == "log_scale" else 6e-3) * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes_for_the_operators_of_traced_graphs(dtype) -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(shape).to(dtype) for shape in ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 16))]
    inputs = [tensor.requires_grad_() for tensor in (*tensors, torch.randn(4))]
    for mask in masks().values():
        torch.library.opcheck(torch.ops.zerotuning._attention_under_mask.default, (*inputs, mask, None, 0.3))
    torch.library.opcheck(
        torch.ops.zerotuning._find_packed_sequences.default, (encoded_dense_mask(LENGTHS["packed"]), 12)
    )


def test_gradients_outside_autograd_equal_those_of_autograd() -> None:
    torch.manual_seed(4)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (4,))]
    output, logsumexp = ops.attention(*inputs, window=4)
    grad_output = torch.randn_like(output)
    with torch.no_grad():
        got = ops.gradients(grad_output, *inputs, output, logsumexp, window=4)
    assert all(map(torch.equal, got, torch.autograd.grad(output, inputs, grad_output)))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_compiled_model_without_a_mask_reads_its_mask_once_a_run(kind, monkeypatch) -> None:
    model = patch(small_model(kind))
    apply_scales(model, random_scales(model))
    read: list[Tensor] = []
    find = traced_masks._layout_of_dense_mask
    monkeypatch.setattr(traced_masks, "_layout_of_dense_mask", lambda *mask: read.append(mask[0]) or find(*mask))
    monkeypatch.delattr(dense_masks, "attention_by_formula")  # so that a call of the slow formula fails
    monkeypatch.delattr(dense_masks, "gradients_by_formula")

    def loss(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with head_parameters(model) as parameters:
        for packing in ([[24]] * 3, PACKINGS["uneven_rows"], [[24]] * 3):
            want, got = (call(*ids_of(packing)) for call in (loss, compiled))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            gradients = (torch.autograd.grad(value, parameters) for value in (got, want))
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert len(read) == 3 * (2 if kind == "gemma3_text" else 1)  # Gemma's windowed layers have a second mask


def test_scaled_keys_apply_in_a_compiled_model_without_a_mask() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    ids, positions = ids_of(PACKINGS["uneven_rows"])
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad(), scaled_keys(model, torch.tensor([[3, 9]] * len(ids))):
        want = model(**arguments).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**arguments).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
