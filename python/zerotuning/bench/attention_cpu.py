"""`zerotuning bench attention` and `bench decode` on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from zerotuning import ops
from zerotuning.bench.peers import (
    additive_mask,
    attention_inputs,
    flex_attention_peer,
    forward_calls,
    ours,
    paper_eager,
    untuned_sdpa,
)
from zerotuning.bench.rows import OURS, UNTUNED, Row
from zerotuning.bench.timing import take_turns

#: Query heads, key heads and head size of SmolLM2-135M and of Llama-3.1-8B.
HEADS = ((9, 3, 64), (32, 8, 128))
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
#: Peers that allocate a float32 [H, T, T] matrix are left out where the matrix would exceed this many bytes.
LARGEST_MATRIX = 2**29
#: FlexAttention is compiled for every shape, which takes half a minute each on the CPU.
FLEX_LENGTHS = (1024,)


def attention_rows(
    all_heads: Iterable[tuple[int, int, int]] = HEADS,
    lengths: Sequence[int] = LENGTHS,
    seconds: float = 2.0,
    flex: bool = True,
) -> Iterator[Row]:
    """Measure forward, and forward + backward, of every peer; then the memory of our operator by length.

    Args:
        all_heads: Query heads, key heads and head size of each shape.
        lengths: Tokens of each shape.
        seconds: Of each measurement.
        flex: Measure FlexAttention too.
    """
    torch.manual_seed(0)
    compiled = flex_attention_peer() if flex else None
    for heads in all_heads:
        for dtype in (torch.bfloat16, torch.float32):
            for length in lengths:
                inputs = attention_inputs(heads, length, dtype)
                peers: dict[str, Callable[..., Tensor]] = {UNTUNED: untuned_sdpa, OURS: ours}
                if heads[0] * length * length * 4 <= LARGEST_MATRIX:
                    peers |= {"paper's eager code": paper_eager, "additive mask": additive_mask}
                forward = dict(peers)
                if compiled is not None and length in FLEX_LENGTHS:
                    forward["FlexAttention"] = compiled
                yield _row("forward", heads, length, dtype, forward_calls(forward, inputs), seconds)
                yield _row("forward + backward", heads, length, dtype, _backward_calls(peers, inputs), seconds)
    yield from memory_rows()


def _backward_calls(
    peers: Mapping[str, Callable[..., Tensor]], inputs: Sequence[Tensor]
) -> dict[str, Callable[[], object]]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def call(peer: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            output = peer(*leaves)
            return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

        return run

    return {name: call(peer) for name, peer in peers.items()}


def _row(
    what: str,
    heads: tuple[int, int, int],
    length: int,
    dtype: torch.dtype,
    calls: dict[str, Callable[[], object]],
    seconds: float,
) -> Row:
    shape = f"{heads[0]}/{heads[1]}/{heads[2]} x {length}"
    figures = take_turns(calls, seconds)
    return {"what": what, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "peers": figures}


def memory_rows(lengths: Sequence[int] = (1024, 2048, 4096, 8192)) -> Iterator[Row]:
    """Measure how much one forward + backward of our operator allocates in total: linear in the length.

    Args:
        lengths: Tokens; the heads are 4/2/64, in float32.
    """
    for length in lengths:
        call = _backward_calls({OURS: ours}, attention_inputs((4, 2, 64), length, torch.float32))[OURS]
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        allocated = sum(event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0)
        figures = {OURS: {"MiB": allocated / 2**20, "KiB per token": allocated / 2**10 / length}}
        yield {"what": "memory", "shape": f"4/2/64 x {length}", "dtype": "float32", "peers": figures}


def decode_rows(lengths: Sequence[int] = (1024, 8192, 32768), seconds: float = 2.0) -> Iterator[Row]:
    """Measure one query of 32/8/128 heads against a long cache, in bfloat16.

    Args:
        lengths: Keys in the cache.
        seconds: Of each measurement.
    """
    torch.manual_seed(0)
    for batch in (1, 4):
        for length in lengths:
            query, key, value, log_scale = attention_inputs((32, 8, 128), length, torch.bfloat16, batch)
            query, key, value = query[:, :, -1:], key.contiguous(), value.contiguous()

            def untuned(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> object:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            def tuned(q: Tensor = query, k: Tensor = key, v: Tensor = value, s: Tensor = log_scale) -> object:
                return ops.decode_attention(q, k, v, s)

            figures = take_turns({UNTUNED: untuned, OURS: tuned}, seconds)
            shape = f"{batch} x 32/8/128 x {length}"
            yield {"what": "decode", "shape": shape, "dtype": "bfloat16", "peers": figures}
