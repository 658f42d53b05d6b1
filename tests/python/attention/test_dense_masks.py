"""Attention under masks that are written out, and what the operator of traced graphs makes of them."""

from __future__ import annotations

import pytest
import torch
from packings import PACKINGS, code_of, ids_of
from random_models import random_scales, small_model
from torch import Tensor
from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.patching.patch import apply_scales, head_parameters, patch, scaled_keys


def codes_of(lengths: list[list[int]], window: int = 0) -> Tensor:
    return packed_sequences.dense_codes(code_of(lengths, window))


def attend_in_graph(
    query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor, mask: Tensor, span: Tensor | None
) -> Tensor:
    """What a compiled graph runs."""
    scale = ops.softmax_scale(query, None)
    return dense_masks._attention_under_mask(query, key, value, log_scale, mask, span, scale)[0]


LENGTHS = {"whole": [[12], [12]], "packed": [[5, 1, 6], [2, 10]], "many": [[1, 1, 4, 3, 3], [12]]}


@pytest.mark.parametrize("window", [0, 2, 4, 11, 12])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_what_codes_say_is_recognised(lengths, window) -> None:
    layout = dense_masks._layout_of_codes(codes_of(lengths, window))
    assert layout is not None
    begins = sorted(place for group in layout.groups for place in torch.stack((group.row, group.begin), 1).tolist())
    assert begins == [[row, sum(own[:n])] for row, own in enumerate(lengths) for n in range(len(own))]
    assert layout.whole == (lengths == LENGTHS["whole"])


def test_codes_that_say_anything_else_are_not() -> None:
    torch.manual_seed(0)
    for lengths in LENGTHS.values():
        codes = codes_of(lengths)
        for _ in range(40):
            row, query, key = (int(torch.randint(n, ())) for n in (2, 12, 12))
            other = codes.clone()
            other[row, 0, query, key] = (int(codes[row, 0, query, key]) + 1 + int(torch.randint(2, ()))) % 3
            assert dense_masks._layout_of_codes(other) is None


def masks() -> dict[str, Tensor]:
    torch.manual_seed(1)
    own = (torch.rand(2, 1, 12, 12) > 0.4).to(torch.int8)
    own[:, :, 3] = 0  # a query that sees nothing
    own[..., 2] *= 2
    windows = {f"{name}, window 4": codes_of(lengths, 4) for name, lengths in LENGTHS.items()}
    codes = {name: codes_of(lengths) for name, lengths in LENGTHS.items()}
    window_1 = codes_of(LENGTHS["packed"], 1)  # which says nothing of what sequence a token is of
    return {**codes, **windows, "window 1": window_1, "code": code_of(LENGTHS["packed"]), "own": own}


@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_the_operator_of_traced_graphs_equals_the_formula(mask, per_sample, spanned) -> None:
    torch.manual_seed(2)
    shapes = ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 16), (2, 4) if per_sample else (4,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    span = torch.tensor([[1, 3], [4, 7]]) if spanned else None
    dense = mask if mask.dtype == torch.int8 else packed_sequences.dense_codes(mask)
    want, got = dense_masks.attend(*inputs, dense, span), attend_in_graph(*inputs, mask, span)
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
        codes = codes_of(lengths, window).to(device)
        results = []
        for attend, dtype in ((attend_in_graph, None), (dense_masks.attend, torch.float64)):
            inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
            output = attend(*inputs, codes, span)
            gradients = torch.autograd.grad(output, inputs, grad_output.to(dtype or grad_output.dtype))
            results.append([output.detach(), *gradients])
        for name, got, want in zip(("output", "query", "key", "value", "log_scale"), *results, strict=True):
            assert (got.double() - want).norm() <= (2e-2 if name == "log_scale" else 6e-3) * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_what_torch_expects_of_one(dtype) -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(shape).to(dtype) for shape in ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 16))]
    inputs = [tensor.requires_grad_() for tensor in (*tensors, torch.randn(4))]
    for mask in masks().values():
        torch.library.opcheck(torch.ops.zerotuning._attention_under_mask.default, (*inputs, mask, None, 0.3))
    torch.library.opcheck(torch.ops.zerotuning._find_packed_sequences.default, (codes_of(LENGTHS["packed"]),))


def test_gradients_without_what_forward_kept() -> None:
    torch.manual_seed(4)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (4,))]
    output, logsumexp = ops.attention(*inputs, window=4)
    grad_output = torch.randn_like(output)
    with torch.no_grad():
        got = ops.gradients(grad_output, *inputs, output, logsumexp, window=4)
    assert all(map(torch.equal, got, torch.autograd.grad(output, inputs, grad_output)))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_compiled_model_without_a_mask_asks_once_a_run_what_it_says(kind, monkeypatch) -> None:
    model = patch(small_model(kind))
    apply_scales(model, random_scales(model))
    asked: list[Tensor] = []
    layout_of_codes = dense_masks._layout_of_codes
    monkeypatch.setattr(dense_masks, "_layout_of_codes", lambda codes: asked.append(codes) or layout_of_codes(codes))
    monkeypatch.delattr(dense_masks, "_by_formula")  # is not needed
    monkeypatch.delattr(dense_masks, "_gradients_by_formula")

    def loss(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with head_parameters(model) as parameters:
        for packing in ([[24]] * 3, PACKINGS["uneven_rows"], [[24]] * 3):
            want, got = (call(*ids_of(packing)) for call in (loss, compiled))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            gradients = (torch.autograd.grad(value, parameters) for value in (got, want))
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert len(asked) == 3 * (2 if kind == "gemma3_text" else 1)  # its windowed layers have a mask of their own


def test_scaled_keys_of_a_compiled_model_without_a_mask() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    ids, positions = ids_of(PACKINGS["uneven_rows"])
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad(), scaled_keys(model, torch.tensor([[3, 9]] * len(ids))):
        want = model(**arguments).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**arguments).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
