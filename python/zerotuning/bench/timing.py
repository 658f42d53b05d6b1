"""How a benchmark measures time: peers take turns, round by round, on a CPU's clock or between a GPU's events.

Peers take turns round by round, so that whatever else the machine does hits all alike; a figure is the median of its
rounds, a ratio the median of the rounds' ratios to the first peer of the same round. On a GPU a call is captured in a CUDA
graph, so that no figure holds the time Python takes.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Peers = Mapping[str, Callable[[], object]]
#: Of a measurement between a GPU's events.
ROUNDS = 25


def take_turns(
    peers: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: int = 5,
    within: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each peer and its median ratio to the first, from interleaved rounds.

    Each timed call follows one that is not timed: what the peer before it left in caches and page tables would count
    for whoever comes next (up to 1.4 times the time after a peer that keeps a [H, T, T] matrix).

    rounds    at least, however few seconds there are
    within    what a peer's calls go on in; entering it is not timed
    wait      returns when all work that was started is done: on a GPU `torch.cuda.synchronize`
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
        for name, peer in peers.items():
            with (within or {}).get(name, nullcontext)():
                peer()
                wait()
                started = time.perf_counter()
                peer()
                wait()
                times[name].append(time.perf_counter() - started)
    return summary(times)


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    first = next(iter(times.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, first, strict=True)),
        }
        for name, own in times.items()
    }


def turns_on_gpu(peers: Peers, flush: bool = True) -> dict[str, dict[str, float]]:
    cache = torch.empty(2**26 if flush else 0, dtype=torch.int32, device="cuda")
    for peer in peers.values():
        for _ in range(3):
            peer()
    events: dict[str, list[Any]] = {name: [] for name in peers}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(peers), len(peers)):  # what went before a call leaves the card hotter or cooler
            cache.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            peers[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return summary({name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()})


def graph_of(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """Replays a CUDA graph of so many calls."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph.replay


def turns_of_graphs(peers: Peers, calls: int = 1, flush: bool = True) -> dict[str, dict[str, float]]:
    """`turns_on_gpu` over CUDA graphs of `calls` calls each; milliseconds of one call."""
    replays = {name: graph_of(peer, calls) for name, peer in peers.items()}
    figures = turns_on_gpu(replays, flush)
    return {name: {"ms": own["ms"] / calls, "ratio": own["ratio"]} for name, own in figures.items()}


def free_memory() -> None:
    """Returns to the GPU what earlier calls left in torch's cache."""
    gc.collect()
    torch.cuda.empty_cache()
