"""How the benchmarks measure time.

Peers take turns, round by round, so that a disturbance of the machine affects all peers. A peer's figure is the median
of its rounds; its ratio is the median of the rounds' ratios to the first peer in the same round. On a GPU a call is
captured in a CUDA graph, which excludes the time of Python and of launches, and the level-2 cache is overwritten before
each replay.
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
#: Rounds of a measurement between a GPU's events.
ROUNDS = 25


def take_turns(
    peers: Peers,
    seconds: float,
    rounds: int = 5,
    within: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Measure peers by the CPU's clock, in interleaved rounds.

    Each timed call follows an untimed call of the same peer. Otherwise the caches and page tables that the previous
    peer left would slow down the next peer: up to 1.4 times the time after a peer that allocates a [H, T, T] matrix.

    Args:
        peers: Calls by name.
        seconds: How long to measure.
        rounds: The least number of rounds, however few seconds there are.
        within: Contexts of some peers' calls; entering a context is not timed.
        wait: Blocks until all launched work is done; on a GPU `torch.cuda.synchronize`.

    Returns:
        For each peer "ms", its median milliseconds, and "ratio", its median ratio to the first peer.
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
    return _medians(times)


def _medians(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Seconds by round of each peer -> median milliseconds, and median ratio to the first peer."""
    first = next(iter(times.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(of_peer),
            "ratio": statistics.median(a / b for a, b in zip(of_peer, first, strict=True)),
        }
        for name, of_peer in times.items()
    }


def take_turns_on_gpu(peers: Peers, flush: bool = True) -> dict[str, dict[str, float]]:
    """Measure peers between CUDA events, in ROUNDS rounds.

    The order of a round's peers is random: the previous call leaves the GPU hotter or cooler.

    Args:
        peers: Calls by name, which launch work on the current stream.
        flush: Overwrite the level-2 cache before each call.

    Returns:
        As `take_turns`.
    """
    cache = torch.empty(2**26 if flush else 0, dtype=torch.int32, device="cuda")
    for peer in peers.values():
        for _ in range(3):
            peer()
    events: dict[str, list[Any]] = {name: [] for name in peers}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(peers), len(peers)):
            cache.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            peers[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return _medians({name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()})


def take_turns_by_graph(peers: Peers, calls: int = 1, flush: bool = True) -> dict[str, dict[str, float]]:
    """Measure peers on a GPU by replays of CUDA graphs.

    Args:
        peers: Calls by name.
        calls: How many calls a graph holds. Of several calls, the later ones read whatever the level-2 cache holds.
        flush: Overwrite the level-2 cache before each replay.

    Returns:
        As `take_turns`; the milliseconds are those of one call.
    """
    replays = {name: _captured(peer, calls) for name, peer in peers.items()}
    figures = take_turns_on_gpu(replays, flush)
    return {name: {"ms": of_peer["ms"] / calls, "ratio": of_peer["ratio"]} for name, of_peer in figures.items()}


def _captured(call: Callable[[], object], calls: int) -> Callable[[], object]:
    """Return a function that replays a CUDA graph of this number of calls."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph.replay


def free_memory() -> None:
    """Collect garbage and return torch's cached memory to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
