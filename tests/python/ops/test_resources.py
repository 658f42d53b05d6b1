"""Determinism and peak memory of the operators."""

from __future__ import annotations

import torch
from formula import random_inputs
from zerotuning import ops


def test_results_are_the_same_from_run_to_run_and_for_any_number_of_threads(device) -> None:
    torch.manual_seed(11)
    inputs = [t.requires_grad_() for t in random_inputs((2, 4, 2, 700, 700, 32, 32), torch.float32)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        output = ops.attention(*inputs, window=300)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs[3:])))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_peak_memory_grows_linearly_with_the_length(device) -> None:
    """With a T×T float32 matrix, T = 4096 would take 64 MiB a head; the operator allocates a few MiB."""
    inputs = [t.requires_grad_() for t in random_inputs((1, 1, 1, 4096, 4096, 16, 16), torch.float32)]
    for window in (0, 1000):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ops.attention(*inputs, window=window)[0].sum().backward()
            assert torch.cuda.max_memory_allocated() - before < 16 * 2**20
            continue
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ops.attention(*inputs, window=window)[0].sum().backward()
        largest = max(abs(event.cpu_memory_usage) for event in profile.events())
        assert largest < 16 * 2**20
