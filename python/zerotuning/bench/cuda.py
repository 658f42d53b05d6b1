"""The benchmarks on a GPU: attention and decoding beside their peers, and a model of Llama-3.1-8B's shape.

Each call is captured in a CUDA graph, so that no figure holds the time Python takes; events around its replay, the
level-2 cache overwritten before it, peers by turns in a random order. Decoding also as ten calls in one graph on one cache: what fits the
level-2 cache is then read from there. A ratio is the median of its rounds' ratios to the first peer.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from zerotuning import ops
from zerotuning.attention import reference
from zerotuning.bench.runner import (
    OURS,
    Row,
    _summary,
    additive_mask,
    attention_inputs,
    flex_attention_peer,
    ours,
    paper_eager,
    take_turns,
)
from zerotuning.evaluation import objectives
from zerotuning.evaluation.cuda_graphs import RecordedPasses
from zerotuning.evaluation.label_scorer import GRADIENT_TOKENS, Batch, LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix
from zerotuning.patching.patch import head_parameters
from zerotuning.tasks.task import Record, Task

CUDNN, FLASH, FLEX = "untuned cuDNN", "untuned flash", "FlexAttention"
HEADS = (32, 8, 128)
SHAPES = ((16, 128), (8, 256), (4, 1024), (1, 4096), (4, 4096), (1, 16384))
CACHES = ((1, 1024), (1, 8192), (1, 32768), (16, 1024), (16, 8192), (64, 4096))
#: Ways to the same result (csrc/ops/attention_cuda.h): all keys by our kernels, or all but the initial token's by torch's.
ROUTES = {"hopper": 2, "plain": 1, "cuDNN": 3, "flash": 4}
ROUTE_SHAPES = ((16, 128), (4, 1024), (1, 2048), (1, 4096), (4, 4096), (1, 8192), (1, 16384))
LARGEST_PLAIN = 2**20
SHOTS = 4
GRADIENT = "forward + gradient of every head"
LONGEST_ATOMICS = 4096
LARGEST_MATRIX = 8 * 2**30
ROUNDS = 25
Peers = Mapping[str, Callable[[], object]]


def card() -> dict[str, Any]:
    """The GPU, and the two rates that bound what it can do, measured."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = _turns({"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}, flush=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "copy TB/s": 2 * 2**30 / times["copy"]["ms"] / 1e9,
        "bf16 TFLOP/s": 2 * 8192**3 / times["product"]["ms"] / 1e9,
    }


def _turns(peers: Peers, flush: bool = True) -> dict[str, dict[str, float]]:
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
    return _summary({name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()})


def _recorded(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
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


def _replays(peers: Peers, calls: int = 1, flush: bool = True) -> dict[str, dict[str, float]]:
    """`_turns` over CUDA graphs of `calls` calls each; milliseconds of one call."""
    replays = {name: _recorded(peer, calls) for name, peer in peers.items()}
    figures = _turns(replays, flush)
    return {name: {"ms": own["ms"] / calls, "ratio": own["ratio"]} for name, own in figures.items()}


def _untuned(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            causal = query.shape[2] > 1
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return attend


def _flash_attention_4() -> dict[str, Callable[..., Tensor]]:
    """FlashAttention-4, untuned, where it is installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return {}

    def attend(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
        rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        output = flash_attn_func(*rows, causal=True)
        output = output[0] if isinstance(output, tuple) else output  # some releases return the log-sum-exp as well
        return output.transpose(1, 2)

    return {"untuned FlashAttention-4": attend}


def attention_rows() -> Iterator[Row]:
    """Forward and forward + backward at HEADS and SHAPES, head size 64 at two of them; the routes; accuracy."""
    torch.manual_seed(0)
    for heads, shapes in ((HEADS, SHAPES), ((9, 3, 64), ((16, 128), (4, 1024)))):
        for batch, length in shapes:
            torch.compiler.reset()  # FlexAttention is compiled for each shape; past a limit it would run dense
            flex = flex_attention_peer()
            inputs = attention_inputs(heads, length, torch.bfloat16, batch, "cuda")
            peers = {
                CUDNN: _untuned(SDPBackend.CUDNN_ATTENTION),
                FLASH: _untuned(SDPBackend.FLASH_ATTENTION),
                OURS: ours,
            }
            if heads == HEADS:
                if 4 * batch * heads[0] * length**2 <= LARGEST_MATRIX / 2:
                    peers |= {"paper's eager code": paper_eager, "additive mask": additive_mask}
                peers[FLEX] = flex
                peers |= _flash_attention_4()
            shape = f"{batch} x {length}, {'/'.join(map(str, heads))}"
            for what, calls in (("forward", _forward(peers, inputs)), ("forward + backward", _backward(peers, inputs))):
                yield {"what": what, "shape": shape, "dtype": "bfloat16", "peers": _replays(calls)}
            _free()
    yield from route_rows()
    yield from merge_rows()
    yield from accuracy_rows()


def _forward(peers: Mapping[str, Any], inputs: list[Tensor]) -> Peers:
    def call(peer: Any) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            return peer(*inputs)

        return run

    return {name: call(peer) for name, peer in peers.items()}


def _backward(peers: Mapping[str, Any], inputs: list[Tensor]) -> Peers:
    """Gradients of query, key and value, and of log γ where the peer has them."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grad_output = torch.randn_like(inputs[0])

    def call(peer: Any, wanted: list[Tensor]) -> Callable[[], object]:
        def run() -> object:
            return torch.autograd.grad(
                peer(*wanted), [t for t in wanted if t.requires_grad], grad_output, allow_unused=True
            )

        return run

    # FlexAttention sums a captured tensor's gradient by atomics on one address: shown without γ's gradient and, where
    # that takes less than half a second a call, with it.
    fixed = [*leaves[:3], inputs[3]]
    calls = {name: call(peer, fixed if name == FLEX else leaves) for name, peer in peers.items()}
    if FLEX in peers and inputs[0].shape[0] * inputs[0].shape[2] ** 2 <= LONGEST_ATOMICS**2:
        calls[f"{FLEX}, γ's gradient too"] = call(peers[FLEX], leaves)
    return calls


def _forward_by_route(inputs: list[Tensor], route: int, keep: bool = False) -> Any:
    """output, logsumexp and, where backward is to find it, the output_minus_initial_value."""
    scale = inputs[0].shape[-1] ** -0.5
    return torch.ops.zerotuning._attention_by_route(*inputs, None, None, None, 0, scale, keep, route)


def _backward_by_route(inputs: list[Tensor], route: int, grad_output: Tensor, kept: Any) -> Any:
    output, logsumexp, output_minus_initial_value = kept
    options = (None, None, None, 0, inputs[0].shape[-1] ** -0.5, output_minus_initial_value, route)
    return torch.ops.zerotuning._attention_backward_by_route(grad_output, *inputs, output, logsumexp, *options)


def route_rows() -> Iterator[Row]:
    """What choose_forward and choose_backward choose from, as far as this card has it."""
    for batch, length in ROUTE_SHAPES:
        inputs = attention_inputs(HEADS, length, torch.bfloat16, batch, "cuda")
        grad_output = torch.randn_like(inputs[0])
        untuned = {CUDNN: _untuned(SDPBackend.CUDNN_ATTENTION)}
        forward, backward = dict(_forward(untuned, inputs)), dict(_backward(untuned, inputs))

        def both(
            own_forward: int, route: int, keep: bool, x: list[Tensor] = inputs, gradient: Tensor = grad_output
        ) -> object:
            return _backward_by_route(x, route, gradient, _forward_by_route(x, own_forward, keep))

        for name, route in ROUTES.items():
            if name == "plain" and batch * length**2 > LARGEST_PLAIN:
                continue
            call = partial(_forward_by_route, inputs, route)
            try:
                call()
            except RuntimeError as error:
                if "does not take this call" not in str(error):
                    raise
                continue
            forward[name] = call
            # The fastest forward before each backward; our own kernels' wants no output_minus_initial_value.
            own_forward = ROUTES["hopper"] if "hopper" in forward else route
            backward[name] = partial(both, own_forward, route, name in ("cuDNN", "flash"))
        shape = f"{batch} x {length}, {'/'.join(map(str, HEADS))}"
        yield {"what": "forward, by route", "shape": shape, "dtype": "bfloat16", "peers": _replays(forward)}
        what = "forward + backward, by backward's route"
        yield {"what": what, "shape": shape, "dtype": "bfloat16", "peers": _replays(backward)}
        _free()


def merge_rows() -> Iterator[Row]:
    """Our two kernels around torch's, one pass over memory each: their own time, the rate at which they read and write,
    and that as a part of the card's copy rate and of a copy's of as many bytes."""
    copy_rate = card()["copy TB/s"]
    route = ROUTES["cuDNN" if (9, 0) <= torch.cuda.get_device_capability() < (12, 0) else "flash"]
    for batch, length in ((4, 1024), (4, 4096), (1, 16384)):
        inputs = attention_inputs(HEADS, length, torch.bfloat16, batch, "cuda")
        forward = partial(_forward_by_route, inputs, route)
        backward = partial(_backward_by_route, inputs, route, torch.randn_like(inputs[0]), forward(True))
        peers: dict[str, dict[str, float]] = {}
        # Of query, torch's output and the result; of query, its gradient before and after, the output's and output_minus_initial_value.
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
        _free()


def _kernel_ms(calls: list[Callable[[], object]], names: list[str]) -> list[float]:
    """Median milliseconds of the kernels whose names contain these, while the calls take turns."""
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
    """Relative error of output and gradients against the formula in float64, by length, γ and mean a_0; of torch's own
    attention with an additive mask as well, whose gradients of a saturated sink are what rounding its output leaves."""
    for length, sink in product((1024, ops.LONGEST_HOPPER_BACKWARD + 128), (0.05, 0.5, 0.9, 0.99)):
        query, key, value = _inputs_with_sink(sink, length)
        for gamma in (0.02, 0.3, 3.0, 50.0):
            inputs = [query, key, value, torch.full((4,), math.log(gamma), device="cuda")]
            leaves = [t.detach().requires_grad_() for t in inputs]
            wide = [t.double().requires_grad_() for t in inputs]
            grad_output = torch.randn_like(query)
            expected = reference.attention(*wide)[0]
            want = (expected, *torch.autograd.grad(expected, wide, grad_output.double()))
            errors = {}
            for name, peer in ((OURS, ours), ("additive mask", additive_mask)):
                output = peer(*leaves)
                got = (output, *torch.autograd.grad(output, leaves, grad_output, allow_unused=True))
                errors[name] = {
                    of: ((a.double() - b).norm() / b.norm()).item()
                    for of, a, b in zip(("output", "query", "key", "value", "log_scale"), got, want, strict=True)
                    if a is not None
                }
            shape = f"1 x {length}, γ {gamma}, a_0 {sink}"
            yield {"what": "accuracy", "shape": shape, "dtype": "bfloat16", "peers": errors}
        _free()


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
    for _ in range(40):  # strength of key 0 along the queries' common direction, by bisection
        middle = (low + high) / 2
        logits[..., 0] = middle
        low, high = (middle, high) if torch.softmax(logits, -1)[..., 0].mean().item() < sink else (low, middle)
    key[:, :, 0] = low * direction
    return [t.bfloat16() for t in (query, key, value)]


def decode_rows() -> Iterator[Row]:
    """One query of HEADS against CACHES, from a cold level-2 cache and in replays of a CUDA graph; ours also as a step of
    `generate` calls it, with a key mask."""
    torch.manual_seed(0)
    copy_rate = card()["copy TB/s"]
    for batch, length in CACHES:
        query, key, value, log_scale = attention_inputs(HEADS, length, torch.bfloat16, batch, "cuda")
        query, key, value = query[:, :, -1:], key.contiguous(), value.contiguous()
        inputs = [query, key, value, log_scale]
        mask = torch.ones(batch, length, dtype=torch.uint8, device="cuda")
        span = torch.tensor([[0, 1]], device="cuda").repeat(batch, 1)
        peers = {
            CUDNN: _untuned(SDPBackend.CUDNN_ATTENTION),
            FLASH: _untuned(SDPBackend.FLASH_ATTENTION),
            OURS: ops.decode_attention,
            f"{OURS}, with a key mask": partial(ops.decode_attention, key_mask=mask, span=span),
            "repeat_kv": _repeated,
        }
        for what, calls in (("decode", 1), ("decode, 10 calls", 10)):
            figures = _replays(_forward(peers, inputs), calls, flush=calls == 1)
            for own in figures.values():
                own["of copy"] = 4 * key.numel() / own["ms"] / 1e9 / copy_rate
            yield {"what": what, "shape": f"{batch} x {length}", "dtype": "bfloat16", "peers": figures}
        _free()


def _repeated(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """transformers' way: keys and values repeated for every query head, untuned."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value)


# A whole model.


def calibration_rows() -> Iterator[Row]:
    """A model of Llama-3.1-8B's shape with random weights, bf16: prefill, the objective and its gradient, generation."""
    model = _llama_8b()
    for part in (_prefill, _objective, _behind_shots, _sensitivities, _generation):
        try:
            yield from part(model)
        except Exception as error:  # one part's failure leaves the others' figures
            failure = {OURS: {"error": f"{type(error).__name__}: {error}"[:300]}}
            yield {"what": part.__name__.strip("_"), "shape": "", "dtype": "bfloat16", "peers": failure}
        _free()


def _llama_8b() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=32768,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


@contextmanager
def _tuned(model: Any) -> Iterator[None]:
    from zerotuning.patching.head_scales import HeadScales
    from zerotuning.patching.patch import apply_scales, unpatch

    config = model.config
    torch.manual_seed(0)
    gamma = torch.exp(0.3 * torch.randn(config.num_hidden_layers, config.num_attention_heads, device="cpu"))
    apply_scales(model, HeadScales(gamma))
    try:
        yield
    finally:
        unpatch(model)


Within = Callable[[], AbstractContextManager[None]]


def _compared(peers: Peers, within: Mapping[str, Within] | None = None, rounds: int = 7) -> dict[str, dict[str, Any]]:
    """Milliseconds on the clock, by turns: a card that is hot is slower."""
    return {**take_turns(peers, 0.0, rounds, within, torch.cuda.synchronize)}


def _prefill(model: Any) -> Iterator[Row]:
    ids = torch.randint(0, 128000, (1, 4096), device="cuda")

    @torch.no_grad()
    def run() -> object:
        return model(ids, use_cache=False, logits_to_keep=1)

    figures = _compared({"sdpa": run, OURS: run}, within={OURS: partial(_tuned, model)})
    yield {"what": "prefill", "shape": "1 x 4096", "dtype": "bfloat16", "peers": figures}


def _generation(model: Any, context: int = 8192) -> Iterator[Row]:
    """Tokens a second of `generate` after a prompt of `context` tokens, of the median step. With a growing cache also of
    a first run: cuDNN plans each length that it has not seen."""
    for batch, cache in product((1, 16), ("dynamic", "static")):
        ids = torch.randint(1, 128000, (batch, context), device="cuda")
        peers: dict[str, dict[str, Any]] = {"sdpa": {}, OURS: {}}
        try:
            (_growing_cache if cache == "dynamic" else _static_cache)(model, ids, peers)
        except Exception as error:
            for figures in peers.values():
                if "tokens/s" not in figures:
                    figures["error"] = f"{type(error).__name__}: {error}"[:300]
        _free()
        yield {
            "what": "generation",
            "shape": f"{batch} x {context}, {cache} cache",
            "dtype": "bfloat16",
            "peers": peers,
        }


def _growing_cache(model: Any, ids: Tensor, peers: dict[str, dict[str, Any]], new: int = 96, runs: int = 4) -> None:
    tuned = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    with _tuned(tuned):
        found = steps_by_turns({"sdpa": model, OURS: tuned}, ids, new, runs)
    seconds = {name: [step for steps in of_runs[1:] for step in steps] for name, of_runs in found.items()}
    for name, figures in peers.items():
        figures["tokens/s"] = len(ids) / statistics.median(seconds[name])
        figures["tokens/s, first run"] = len(ids) / statistics.median(found[name][0])
        pairs = zip(seconds[name], seconds["sdpa"], strict=True)
        low, figures["ratio"], high = statistics.quantiles((step / of_sdpa for step, of_sdpa in pairs), n=4)
        figures |= {"ratio, lower quartile": low, "ratio, upper quartile": high}


def _static_cache(model: Any, ids: Tensor, peers: dict[str, dict[str, Any]], new: int = 24, runs: int = 3) -> None:
    # A compiled model runs again before the other one is compiled.
    for name, figures in peers.items():
        try:
            with _tuned(model) if name == OURS else nullcontext():
                of_runs = steps_by_turns({name: model}, ids, new, runs, cache_implementation="static")[name]
        finally:
            torch.compiler.reset()
            _free()
        figures["tokens/s"] = len(ids) / min(statistics.median(steps) for steps in of_runs[1:])


def steps_by_turns(
    models: Mapping[str, Any], ids: Tensor, new: int, runs: int, **options: Any
) -> dict[str, list[list[float]]]:
    """Seconds of each model's steps in several runs of `generate`, of `new` tokens behind ids [B, T] each, the first
    token's left out.

    Several models take their steps by turns, one at a time on one core: a host that others use is half as fast for seconds
    at a time, one core more than another, and so it is for all of them. Each has a thread of its own, as cuDNN's plans are
    a thread's.
    """
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    order = deque(models)
    turn = threading.Condition()
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(runs)] for name in models}
    began = dict.fromkeys(models, 0.0)

    def take_turn(name: str) -> None:
        with turn:
            turn.wait_for(lambda: order[0] == name)
        began[name] = time.perf_counter()

    def generate(name: str, steps: list[float]) -> None:
        def stop(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            wait()
            steps.append(time.perf_counter() - began[name])
            with turn:
                order.rotate(-1)
                turn.notify_all()
            take_turn(name)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        models[name].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            max_length=None,
            stopping_criteria=[stop],
            **options,
        )

    def all_runs(name: str) -> None:
        try:
            take_turn(name)
            for steps in seconds[name]:
                generate(name, steps)
        finally:
            with turn:
                order.remove(name)
                turn.notify_all()

    def share_a_core() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the calling thread's

    if len(models) == 1:  # in this thread, of which a compiled model's CUDA graphs are
        all_runs(*models)
    else:
        with ThreadPoolExecutor(len(models), initializer=share_a_core) as threads:
            for done in [threads.submit(all_runs, name) for name in models]:
                done.result()
    return {name: [steps[1:] for steps in of_runs] for name, of_runs in seconds.items()}


def _scorer(model: Any, prompts: int, tokens: int = 64, shots: int = 0) -> LabelScorer:
    """As `calibrate` makes one, of prompts of random tokens with two labels, behind so many more that are solved."""
    records = [
        Record({"text": " ".join(map(str, torch.randint(2, 10000, (tokens,)).tolist())), "label": n % 2}, f"prompt {n}")
        for n in range(prompts + shots)
    ]
    task = Task("numbers", "{text}", (" 0", " 1"))
    behind = task.with_shots(records[:shots]) if shots else task
    return LabelScorer(model, _numbers(), behind, records[shots:], batch_size=prompts, batch_tokens=GRADIENT_TOKENS)


@torch.no_grad()
def _forward_passes(scorer: LabelScorer, batches: list[Batch], within: Within = nullcontext) -> None:
    with within():
        for batch in batches:
            scorer.scores(batch)


def _gradient_passes(
    scorer: LabelScorer, parameters: list[Tensor], batches: list[Batch], within: Within = nullcontext
) -> None:
    for batch in batches:
        with within():
            loss = objectives.task_loss(scorer.scores(batch), batch.labels.cuda())
            torch.autograd.grad(loss, parameters)


def _objective(model: Any) -> Iterator[Row]:
    """The task loss of 16 prompts: as a search computes it, replaying passes that it recorded as CUDA graphs, and with
    passes that are launched from Python. A pass has GRADIENT_TOKENS tokens at most."""
    for tokens in (64, 128, 512):
        scorer = _scorer(model, 16, tokens)
        for recorded in (True, False):
            with _tuned(model), head_parameters(model) as parameters:
                notes: list[str] = []
                scorer.recorded = RecordedPasses(model, parameters, notes.append) if recorded else None
                forward = partial(_forward_passes, scorer, scorer.batches)
                gradient = partial(_gradient_passes, scorer, parameters, scorer.batches)
                torch.cuda.reset_peak_memory_stats()
                gradient()
                peak = torch.cuda.max_memory_allocated() / 2**30
                figures = _compared({"forward": forward, GRADIENT: gradient})
                figures[GRADIENT] |= {"GiB": peak, "passes": len(scorer.batches)}
                if notes:
                    figures[GRADIENT]["error"] = notes[0]
            what = "objective" if recorded else "objective, from Python"
            yield {"what": what, "shape": f"16 x {tokens}", "dtype": "bfloat16", "peers": figures}
            scorer.recorded = None
            _free()


def _behind_shots(model: Any) -> Iterator[Row]:
    """Prompts of 64 tokens behind four more that are solved, which are read with each prompt or once a pass."""
    for prompts in (16, 64):
        scorer = _scorer(model, prompts, shots=SHOTS)
        whole = scorer.batches
        scorer.tokens_read_once = scorer.shared_length
        once = scorer.batches_of(range(prompts))
        shape = f"{prompts} x {scorer.examples[0].longest}, {scorer.shared_length} of them shots"
        with _tuned(model), head_parameters(model) as parameters:
            passes = {
                "forward": partial(_forward_passes, scorer),
                GRADIENT: partial(_gradient_passes, scorer, parameters),
            }
            for what, call in passes.items():
                peers = {
                    "whole prompts": partial(call, whole),
                    "shots read once": partial(call, once, partial(behind_prefix, scorer)),
                }
                yield {"what": what, "shape": shape, "dtype": "bfloat16", "peers": _compared(peers)}
        _free()


def _numbers() -> Any:
    """A tokenizer whose tokens are numbers from 0 to 9,999."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(10000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _sensitivities(model: Any) -> Iterator[Row]:
    scorer = _scorer(model, 100, 128)
    with _tuned(model), head_parameters(model) as parameters:
        figures = _compared({OURS: partial(_gradient_passes, scorer, parameters, scorer.batches)}, rounds=3)
    peers = {OURS: {"s": figures[OURS]["ms"] / 1e3}}
    yield {"what": "sensitivities", "shape": "1024 heads, 100 x 128", "dtype": "bfloat16", "peers": peers}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "attention": attention_rows,
    "decode": decode_rows,
    "calibration": calibration_rows,
}
