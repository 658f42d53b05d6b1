"""The operators under torch.compile, torch.export and torch.func."""

from __future__ import annotations

import pytest
import torch
from formula import random_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from zerotuning import ops


@pytest.mark.parametrize("geometry", [{}, {"window": 4}, {"key_mask": True}, {"span": True, "query_start": True}])
def test_opcheck_passes_for_every_operator(geometry) -> None:
    torch.manual_seed(9)
    inputs = [t.requires_grad_() for t in random_inputs((2, 4, 2, 9, 12, 16, 24), torch.float32)]
    options = (
        torch.arange(12) >= torch.tensor([[0], [3]]) if "key_mask" in geometry else None,
        torch.tensor([[0, 1], [2, 5]]) if "span" in geometry else None,
        torch.tensor([1, 2]) if "query_start" in geometry else None,
        geometry.get("window", 0),
        0.25,
    )
    for operator in (torch.ops.zerotuning.attention, torch.ops.zerotuning._attention_with_output_minus_initial_value):
        torch.library.opcheck(operator.default, (*inputs, *options))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.zerotuning.decode_attention.default, (*plain, *options))
    torch.library.opcheck(torch.ops.zerotuning._decode_attention_transposed.default, (*plain, *options))
    torch.library.opcheck(torch.ops.zerotuning._attention_by_route.default, (*plain, *options, True, 0))
    mask = torch.arange(12) >= torch.tensor([[0], [3]])
    torch.library.opcheck(torch.ops.zerotuning._encode_key_mask.default, (mask, 12, geometry.get("window", 0)))
    output, logsumexp = torch.ops.zerotuning.attention(*plain, *options)
    arguments = (torch.randn_like(output), *plain, output, logsumexp, *options)
    torch.library.opcheck(torch.ops.zerotuning.attention_backward.default, arguments)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_an_exported_program_accepts_square_and_other_lengths(needs_gradient) -> None:
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
            return ops.attention(query, key, value, log_scale)[0]

    def inputs(rows: int, keys: int) -> list[Tensor]:
        torch.manual_seed(11)
        return [t.requires_grad_(needs_gradient) for t in random_inputs((2, 4, 2, rows, keys, 16, 16), torch.float32)]

    rows, keys = torch.export.Dim("rows", min=2), torch.export.Dim("keys", min=2)
    lengths = ({2: rows}, {2: keys}, {2: keys}, None)
    exported = torch.export.export(Attend(), tuple(inputs(7, 11)), dynamic_shapes=lengths).module()
    compiled = torch.compile(ops.attention, dynamic=True, fullgraph=True)
    for sizes in ((7, 11), (9, 9), (5, 12)):
        tensors = inputs(*sizes)
        wanted = ops.attention(*tensors)[0]
        torch.testing.assert_close(exported(*tensors), wanted)
        torch.testing.assert_close(compiled(*tensors)[0], wanted)


def test_torch_func_grad_gives_the_gradients_of_autograd() -> None:
    torch.manual_seed(10)
    inputs = [t.requires_grad_() for t in random_inputs((2, 4, 2, 9, 12, 16, 24), torch.float32)]

    def loss(*tensors: Tensor) -> Tensor:
        return ops.attention(*tensors)[0].square().sum()

    wanted = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(t.detach() for t in inputs))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_without_graph_breaks_gives_the_same_output_and_gradients() -> None:
    torch.manual_seed(10)
    inputs = [t.requires_grad_() for t in random_inputs((2, 4, 2, 33, 33, 32, 32), torch.float32)]

    def loss(*tensors: Tensor) -> Tensor:
        return ops.attention(*tensors)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_which_gradients_need_output_minus_initial_value_on_cards_that_are_not_here(monkeypatch) -> None:
    def wanted(capability: tuple[int, int], rows: int, size: int, masked: bool = False, batch: int = 2) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        with FakeTensorMode():
            query, key = (torch.empty(batch, h, rows, size, dtype=torch.bfloat16, device="cuda") for h in (32, 8))
            key_mask = torch.empty(batch, rows, dtype=torch.bool, device="cuda") if masked else None
            return ops._needs_output_minus_initial_value(query, key, key, ops.Geometry(key_mask))

    hopper, blackwell, ampere, ada = (9, 0), (10, 0), (8, 0), (8, 9)
    assert [wanted(hopper, *case) for case in ((4096, 128), (4097, 128), (300, 256))] == [False, True, True]
    assert not any(wanted(hopper, rows, size, masked=True) for rows, size in ((5000, 128), (300, 256)))
    assert [wanted(blackwell, *case) for case in ((15, 64), (16, 64), (300, 256))] == [False, True, True]
    # cuDNN's kernel supports padding unless its last tile of keys is half empty; flash-attention 2 does not.
    assert [wanted(blackwell, *case, masked=True) for case in ((300, 128), (320, 128), (300, 256))] == [
        True,
        False,
        False,
    ]
    assert [wanted(ada, 300, size) for size in (128, 192, 200, 224, 256)] == [True, True, False, False, True]
    assert wanted(ampere, 300, 200)
    assert not wanted(ampere, 300, 128, masked=True)
    assert [wanted(ampere, 8192, 128, batch=batch) for batch in (63, 64)] == [
        True,
        False,
    ]  # at batch 64 query has 2^31 elements
    assert not wanted(ampere, 16, 64, batch=65536)
    assert not wanted((7, 5), 300, 64)
