"""`zerotuning bench attention` and `bench decode` on a GPU: time beside the peers, time by route, accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from zerotuning import cuda_routes, ops
from zerotuning.attention import reference
from zerotuning.bench.peers import (
    Peer,
    additive_mask,
    attention_inputs,
    flash_attention_4,
    flex_attention_peer,
    forward_calls,
    ours,
    paper_eager,
    repeated_keys,
    untuned_by,
)
from zerotuning.bench.rows import OURS, Row
from zerotuning.bench.timing import ROUNDS, Peers, free_memory, take_turns_by_graph, take_turns_on_gpu

CUDNN, FLASH, FLEX = "untuned cuDNN", "untuned flash", "FlexAttention"
HEADS = (32, 8, 128)
SHAPES = ((16, 128), (8, 256), (4, 1024), (1, 4096), (4, 4096), (1, 16384))
CACHES = ((1, 1024), (1, 8192), (1, 32768), (16, 1024), (16, 8192), (64, 4096))
#: Routes to the same result (csrc/ops/attention_cuda.h): all keys by our kernels, or by torch's all keys but the
#: initial token's.
ROUTES = {"hopper": 2, "plain": 1, "cuDNN": 3, "flash": 4}
#: On Hopper, the shortest sequence whose gradients torch's kernel computes.
FIRST_TORCH_LENGTH = cuda_routes.torch_gradient_lengths(90, torch.bfloat16, HEADS[2], HEADS[2]).min_queries
ROUTE_SHAPES = ((16, 128), (4, 1024), (1, 2048), (1, 4096), (4, 4096), (1, 8192), (1, 16384))
LARGEST_PLAIN = 2**20
LONGEST_ATOMICS = 4096
LARGEST_MATRIX = 8 * 2**30


def card() -> dict[str, Any]:
    """The GPU's name and versions, and its measured rates of copying and of bfloat16 matrix products."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = take_turns_on_gpu({"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}, flush=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "copy TB/s": 2 * 2**30 / times["copy"]["ms"] / 1e9,
        "bf16 TFLOP/s": 2 * 8192**3 / times["product"]["ms"] / 1e9,
    }


def attention_rows() -> Iterator[Row]:
    """Measure forward and forward + backward at HEADS and SHAPES (head size 64 at two shapes), routes and accuracy."""
    torch.manual_seed(0)
    for heads, shapes in ((HEADS, SHAPES), ((9, 3, 64), ((16, 128), (4, 1024)))):
        for batch, length in shapes:
            # FlexAttention is compiled for each shape; after too many shapes torch would run FlexAttention uncompiled.
            torch.compiler.reset()
            flex = flex_attention_peer()
            inputs = attention_inputs(heads, length, torch.bfloat16, batch, "cuda")
            peers = {
                CUDNN: untuned_by(SDPBackend.CUDNN_ATTENTION),
                FLASH: untuned_by(SDPBackend.FLASH_ATTENTION),
                OURS: ours,
            }
            if heads == HEADS:
                if 4 * batch * heads[0] * length**2 <= LARGEST_MATRIX / 2:
                    peers |= {"paper's eager code": paper_eager, "additive mask": additive_mask}
                peers[FLEX] = flex
                peers |= flash_attention_4()
            shape = f"{batch} x {length}, {'/'.join(map(str, heads))}"
            for what, calls in (
                ("forward", forward_calls(peers, inputs)),
                ("forward + backward", _backward_calls(peers, inputs)),
            ):
                yield {"what": what, "shape": shape, "dtype": "bfloat16", "peers": take_turns_by_graph(calls)}
            free_memory()
    yield from route_rows()
    yield from merge_rows()
    yield from accuracy_rows()


def _backward_calls(peers: Mapping[str, Any], inputs: list[Tensor]) -> Peers:
    """The peers' forward + backward passes: gradients of query, key and value, and of log γ if the peer has it."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grad_output = torch.randn_like(inputs[0])

    def call(peer: Any, wanted: list[Tensor]) -> Callable[[], object]:
        def run() -> object:
            return torch.autograd.grad(
                peer(*wanted), [t for t in wanted if t.requires_grad], grad_output, allow_unused=True
            )

        return run

    # FlexAttention sums the gradient of a captured tensor by atomics on one address. FlexAttention is measured
    # without γ's gradient and, where a call takes less than half a second, with γ's gradient too.
    fixed = [*leaves[:3], inputs[3]]
    calls = {name: call(peer, fixed if name == FLEX else leaves) for name, peer in peers.items()}
    if FLEX in peers and inputs[0].shape[0] * inputs[0].shape[2] ** 2 <= LONGEST_ATOMICS**2:
        calls[f"{FLEX}, γ's gradient too"] = call(peers[FLEX], leaves)
    return calls


def _forward_by_route(inputs: list[Tensor], route: int, for_backward: bool = False) -> Any:
    """Return (output, logsumexp, output_minus_initial_value); the last is empty without `for_backward`."""
    scale = inputs[0].shape[-1] ** -0.5
    return torch.ops.zerotuning._attention_by_route(*inputs, None, None, None, 0, scale, for_backward, route)


def _backward_by_route(inputs: list[Tensor], route: int, grad_output: Tensor, forward_results: Any) -> Any:
    output, logsumexp, output_minus_initial_value = forward_results
    options = (None, None, None, 0, inputs[0].shape[-1] ** -0.5, output_minus_initial_value, route)
    return torch.ops.zerotuning._attention_backward_by_route(grad_output, *inputs, output, logsumexp, *options)


def route_rows() -> Iterator[Row]:
    """Measure each route that choose_forward and choose_backward can choose on this GPU."""
    for batch, length in ROUTE_SHAPES:
        inputs = attention_inputs(HEADS, length, torch.bfloat16, batch, "cuda")
        grad_output = torch.randn_like(inputs[0])
        untuned = {CUDNN: untuned_by(SDPBackend.CUDNN_ATTENTION)}
        forward, backward = dict(forward_calls(untuned, inputs)), dict(_backward_calls(untuned, inputs))

        def both(
            forward_route: int, route: int, for_backward: bool, x: list[Tensor] = inputs, gradient: Tensor = grad_output
        ) -> object:
            return _backward_by_route(x, route, gradient, _forward_by_route(x, forward_route, for_backward))

        for name, route in ROUTES.items():
            if name == "plain" and batch * length**2 > LARGEST_PLAIN:
                continue
            call = partial(_forward_by_route, inputs, route)
            try:
                call()
            except RuntimeError as error:
                if "this call" not in str(error):  # the operator refuses a route that does not support the call
                    raise
                continue
            forward[name] = call
            # Each backward follows the fastest forward. Only the backward passes of torch's kernels need
            # output_minus_initial_value.
            forward_route = ROUTES["hopper"] if "hopper" in forward else route
            backward[name] = partial(both, forward_route, route, name in ("cuDNN", "flash"))
        shape = f"{batch} x {length}, {'/'.join(map(str, HEADS))}"
        yield {"what": "forward, by route", "shape": shape, "dtype": "bfloat16", "peers": take_turns_by_graph(forward)}
        what = "forward + backward, by backward's route"
        yield {"what": what, "shape": shape, "dtype": "bfloat16", "peers": take_turns_by_graph(backward)}
        free_memory()


def merge_rows() -> Iterator[Row]:
    """Measure our two kernels around torch's kernel, each of which reads and writes its tensors once.

    A row has each kernel's time and rate of reading and writing, also as a fraction of the GPU's copy rate and of the
    rate of a copy of as many bytes.
    """
    copy_rate = card()["copy TB/s"]
    route = ROUTES["cuDNN" if (9, 0) <= torch.cuda.get_device_capability() < (12, 0) else "flash"]
    for batch, length in ((4, 1024), (4, 4096), (1, 16384)):
        inputs = attention_inputs(HEADS, length, torch.bfloat16, batch, "cuda")
        forward = partial(_forward_by_route, inputs, route)
        backward = partial(_backward_by_route, inputs, route, torch.randn_like(inputs[0]), forward(True))
        peers: dict[str, dict[str, float]] = {}
        # merge reads query and torch's output and writes the result. backward reads query, its gradient, the output's
        # gradient and output_minus_initial_value, and writes query's gradient.
        calls: tuple[tuple[str, int, Callable[[], object]], ...] = (("merge", 3, forward), ("backward", 5, backward))
        for kernel, count, call in calls:
            source = torch.empty(count * inputs[0].numel() // 2, dtype=torch.bfloat16, device="cuda")
            target = torch.empty_like(source)
            name = f"initial_token::(anonymous namespace)::{kernel}<"
            ms = _kernel_ms([call, partial(target.copy_, source)], [name, "Memcpy DtoD"])
            rate = 4 * source.numel() / ms[0] / 1e9
            peers[kernel] = {"ms": ms[0], "TB/s": rate, "of copy": rate / copy_rate, "of same-size copy": ms[1] / ms[0]}
        shape = f"{batch} x {length}, {'/'.join(map(str, HEADS))}"
        yield {"what": "around torch's kernel", "shape": shape, "dtype": "bfloat16", "peers": peers}
        free_memory()


def _kernel_ms(calls: list[Callable[[], object]], names: list[str]) -> list[float]:
    """Median milliseconds of the kernels whose names contain `names`, while the calls take turns."""
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for call in calls:
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls * ROUNDS:
            cache.zero_()
            call()
        torch.cuda.synchronize()
    events = profiler.events()
    return [statistics.median(e.time_range.elapsed_us() for e in events if name in e.name) / 1e3 for name in names]


def accuracy_rows() -> Iterator[Row]:
    """Measure the relative error of output and gradients against the formula in float64, by length, γ and mean a_0.

    torch's attention with an additive mask is measured too: with a saturated sink the rounding of the output dominates
    the gradients of that peer.
    """
    for length, sink in product((1024, FIRST_TORCH_LENGTH + 127), (0.05, 0.5, 0.9, 0.99)):
        query, key, value = _inputs_with_sink(sink, length)
        for gamma in (0.02, 0.3, 3.0, 50.0):
            inputs = [query, key, value, torch.full((4,), math.log(gamma), device="cuda")]
            leaves = [t.detach().requires_grad_() for t in inputs]
            wide = [t.double().requires_grad_() for t in inputs]
            grad_output = torch.randn_like(query)
            expected = reference.attention(*wide)[0]
            exact = (expected, *torch.autograd.grad(expected, wide, grad_output.double()))
            errors = {}
            for name, peer in ((OURS, ours), ("additive mask", additive_mask)):
                output = peer(*leaves)
                computed = (output, *torch.autograd.grad(output, leaves, grad_output, allow_unused=True))
                errors[name] = {
                    of: ((a.double() - b).norm() / b.norm()).item()
                    for of, a, b in zip(("output", "query", "key", "value", "log_scale"), computed, exact, strict=True)
                    if a is not None
                }
            shape = f"1 x {length}, γ {gamma}, a_0 {sink}"
            yield {"what": "accuracy", "shape": shape, "dtype": "bfloat16", "peers": errors}
        free_memory()


def _inputs_with_sink(sink: float, length: int) -> list[Tensor]:
    """Query (1, 4, T, 64), key and value (1, 2, T, 64) whose initial token has the mean attention weight `sink`."""
    torch.manual_seed(1)
    query, key, value, _ = (t.double() for t in attention_inputs((4, 2, 64), length, torch.float32, device="cuda"))
    direction = F.normalize(torch.randn(64, dtype=torch.float64, device="cuda"), dim=0)
    query = query - (query @ direction)[..., None] * direction + 8 * direction
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1), -math.inf)[
        :, :, 1:
    ]
    low, high = -40.0, 60.0
    for _ in range(40):  # bisection of key 0's component along the queries' common direction
        middle = (low + high) / 2
        logits[..., 0] = middle
        low, high = (middle, high) if torch.softmax(logits, -1)[..., 0].mean().item() < sink else (low, middle)
    key[:, :, 0] = low * direction
    return [t.bfloat16() for t in (query, key, value)]


def decode_rows() -> Iterator[Row]:
    """Measure one query of HEADS against CACHES, with a cold level-2 cache and in replays of a graph of ten calls.

    Our operator is also measured with a key mask, as in a step of `generate`.
    """
    torch.manual_seed(0)
    copy_rate = card()["copy TB/s"]
    for batch, length in CACHES:
        query, key, value, log_scale = attention_inputs(HEADS, length, torch.bfloat16, batch, "cuda")
        query, key, value = query[:, :, -1:], key.contiguous(), value.contiguous()
        inputs = [query, key, value, log_scale]
        mask = torch.ones(batch, length, dtype=torch.uint8, device="cuda")
        span = torch.tensor([[0, 1]], device="cuda").repeat(batch, 1)
        peers: dict[str, Peer] = {
            CUDNN: untuned_by(SDPBackend.CUDNN_ATTENTION),
            FLASH: untuned_by(SDPBackend.FLASH_ATTENTION),
            OURS: ops.decode_attention,
            f"{OURS}, with a key mask": partial(ops.decode_attention, key_mask=mask, span=span),
            "repeat_kv": repeated_keys,
        }
        for what, calls in (("decode", 1), ("decode, 10 calls", 10)):
            figures = take_turns_by_graph(forward_calls(peers, inputs), calls, flush=calls == 1)
            for of_peer in figures.values():
                of_peer["of copy"] = 4 * key.numel() / of_peer["ms"] / 1e9 / copy_rate
            yield {"what": what, "shape": f"{batch} x {length}", "dtype": "bfloat16", "peers": figures}
        free_memory()
