"""Which kernel computes a call, asked from Python for cards that are not here."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from zerotuning import ops
from zerotuning.bench.routes import route_rows, route_table
from zerotuning.cli.main import main
from zerotuning.cuda_routes import (
    CARDS,
    DecodeRoute,
    Route,
    backward_route,
    decode_route,
    forward_route,
    torch_gradient_lengths,
)

HEADS = (32, 8)


def test_hopper_has_kernels_of_its_own_and_other_cards_run_torchs() -> None:
    sizes = (1, *HEADS, 4096, 4096, 128)
    forward = [forward_route(card, *sizes) for card in CARDS]
    backward = [backward_route(card, *sizes) for card in CARDS]
    assert forward == [Route.FLASH, Route.FLASH, Route.FLASH, Route.HOPPER, Route.CUDNN, Route.FLASH]
    assert backward == forward
    assert backward_route(90, 1, *HEADS, 4097, 4097, 128) == Route.CUDNN
    assert {forward_route(card, *sizes, dtype=torch.float32) for card in CARDS} == {Route.PLAIN}


def test_large_caches_are_copied_in_bulk_on_hopper_alone() -> None:
    large = [decode_route(card, 16, *HEADS, 1, 8192, 128) for card in CARDS]
    assert [route == DecodeRoute.BULK for route in large] == [card == 90 for card in CARDS]
    assert decode_route(90, 16, *HEADS, 1, 8192, 128, l2_bytes=2**40) == DecodeRoute.RINGS
    assert decode_route(90, 1, *HEADS, 17, 8192, 128) == DecodeRoute.FORWARD


@pytest.mark.parametrize("has_key_mask", [False, True])
@pytest.mark.parametrize("head_size", [64, 128, 200, 256])
@pytest.mark.parametrize("card", CARDS)
def test_the_description_of_lengths_is_the_choice_of_a_kernel(card, head_size, has_key_mask) -> None:
    lengths = torch_gradient_lengths(card, torch.bfloat16, head_size, head_size, has_key_mask)
    for batch in (1, 64, 65536):
        for rows in (1, 15, 16, 64, 320, 4096, 4097, 8192):
            for keys, window in ((rows, 0), (rows, rows), (rows, rows - 1), (rows + 1, 0)):
                sizes = (batch, *HEADS, rows, keys, head_size)
                route = backward_route(card, *sizes, window=window, has_key_mask=has_key_mask)
                by_torch = route in (Route.CUDNN, Route.FLASH)
                assert lengths.contain(batch, HEADS[0], rows, keys, window) == by_torch, (sizes, window)


def test_unknown_dtypes_have_no_lengths() -> None:
    assert not torch_gradient_lengths(90, torch.int64, 64, 64).any


def test_a_graph_of_symbolic_lengths_is_not_specialised(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    sizes = mode.from_tensor(
        torch.empty(2, 32, 300, 128, dtype=torch.bfloat16, device="meta"), symbolic_context=dynamic
    )
    with mode:
        query = torch.empty_like(sizes, device="cuda")
        assert ops._needs_output_minus_initial_value(query, query, query, ops.Geometry())
    assert not environment.replacements  # no length has become a number
    assert all(isinstance(query.shape[dim], torch.SymInt) for dim in (0, 2))


def test_the_table_has_a_route_for_each_call_and_card(capsys) -> None:
    rows = list(route_rows())
    assert len({call for call, _ in rows}) == len(rows)
    assert all(len(routes) == len(CARDS) for _, routes in rows)
    assert main(["bench", "attention", "--routes"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == route_table().strip()
    assert "sm_120" in printed.splitlines()[0]


def test_routes_are_those_of_bench_attention_alone(capsys) -> None:
    assert main(["bench", "decode", "--routes"]) == 2
    assert "--routes: an option of bench attention alone" in capsys.readouterr().err
