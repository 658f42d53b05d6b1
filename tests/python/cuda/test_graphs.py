"""Attention in captured CUDA graphs and on several streams."""

from __future__ import annotations

import pytest
import torch
from cuda_calls import (
    BULK,
    HOPPER,
    RINGS,
    by_route,
    decode_by_route,
    decode_on_many_streams,
    needs_hopper,
)
from formula import error, formula, poison, random_inputs
from torch import Tensor
from zerotuning import ops

pytestmark = pytest.mark.gpu


@needs_hopper
def test_hopper_gradients_follow_positions_on_the_device_in_a_captured_graph() -> None:
    torch.manual_seed(12)
    inputs = random_inputs((2, 8, 2, 100, 300, 128, 128), torch.bfloat16)
    grad_output = torch.randn_like(inputs[0])
    start = torch.tensor([3, 100])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        by_route(inputs, grad_output, HOPPER, HOPPER, query_start=start)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = by_route(inputs, grad_output, HOPPER, HOPPER, query_start=start)
    for positions in ([0, 200], [130, 1], [64, 128]):
        start.copy_(torch.tensor(positions))
        graph.replay()
        for a, b in zip(got, by_route(inputs, grad_output, HOPPER, HOPPER, query_start=start), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("route", [RINGS, pytest.param(BULK, marks=needs_hopper)])
def test_decoding_gives_the_same_bits_in_a_captured_graph_and_on_several_streams(route) -> None:
    """A head's last thread block merges its splits; for a captured graph or many rows, a second kernel does so."""
    torch.manual_seed(16)
    shapes = (
        (1, 8, 2, 1, 3000, 128, 128),
        (3, 8, 2, 4, 700, 64, 64),
        (1, 32, 1, 1, 9000, 128, 128),
        (2, 9, 3, 16, 1025, 64, 64),
    )
    for shape in (*shapes, (1, 8, 2, 1, 2000, 96, 96), (1, 4, 1, 1, 2000, 192, 192)) if route == RINGS else shapes:
        calls = [random_inputs(shape, torch.bfloat16) for _ in range(4)]
        torch.cuda.synchronize()
        graph, captured = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            captured += [decode_by_route(inputs, route) for inputs in calls]
        poison()
        graph.replay()
        torch.cuda.synchronize()
        for inputs, output in zip(calls, captured, strict=True):
            assert error(output, formula(*(t.double() for t in inputs))[0]) <= 3e-3
        streams = [torch.cuda.Stream() for _ in calls]
        outputs: list[list[Tensor]] = [[] for _ in calls]
        for _ in range(10):
            for inputs, stream, found in zip(calls, streams, outputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(decode_by_route(inputs, route))
        torch.cuda.synchronize()
        for output, found in zip(captured, outputs, strict=True):
            assert all(torch.equal(output, other) for other in found), shape


def test_decoding_on_more_streams_than_counters_gives_the_same_output() -> None:
    """Run in a new process, since a stream keeps its counters. From the 65th stream on, a second kernel merges."""
    torch.multiprocessing.spawn(decode_on_many_streams)


def test_a_captured_graph_follows_positions_on_the_device() -> None:
    torch.manual_seed(4)
    inputs = random_inputs((2, 8, 2, 1, 900, 128, 128), torch.bfloat16)
    start = torch.tensor([3, 100])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.decode_attention(*inputs, query_start=start)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.decode_attention(*inputs, query_start=start)
    for positions in ([0, 899], [500, 1], [64, 128]):
        start.copy_(torch.tensor(positions))
        graph.replay()
        expected = formula(*(t.double() for t in inputs), query_start=start)[0]
        assert error(output, expected) <= 3e-3
