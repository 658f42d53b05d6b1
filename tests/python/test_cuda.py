"""What only a GPU shows: the routes against each other, CUDA graphs, waiting, whole models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import error, formula, inputs_with_sink, poison, random_inputs, rounding_scale
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, masking_utils
from zerotuning import ops
from zerotuning.attention import dense_masks, packed_sequences
from zerotuning.bench import attention_cuda as bench_cuda
from zerotuning.bench.peers import attention_inputs
from zerotuning.patching import packed_mask
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import apply_scales, head_parameters, patch, unpatch

pytestmark = pytest.mark.gpu
PLAIN, HOPPER, CUDNN, FLASH = 1, 2, 3, 4
RINGS, BULK = 1, 2  # of decoding
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
needs_hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs a Hopper GPU")
needs_cudnn = pytest.mark.skipif(not (9, 0) <= CAPABILITY < (12, 0), reason="needs a GPU that cuDNN's kernels know")
cudnn = pytest.param(CUDNN, marks=needs_cudnn, id="cudnn")
either_stock_kernel = pytest.mark.parametrize("stock", [cudnn, pytest.param(FLASH, id="flash")])
HEAD_SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


@pytest.fixture(autouse=True)
def on_cuda() -> Any:
    torch.set_default_device("cuda")
    poison()
    yield
    torch.set_default_device(None)


def by_route(inputs: list[Tensor], grad_output: Tensor, forward: int, backward: int, **geometry: Any) -> list[Tensor]:
    """Output and gradients by chosen routes."""
    options = (geometry.get("key_mask"), geometry.get("span"), geometry.get("query_start"), geometry.get("window", 0))
    scale = inputs[0].shape[-1] ** -0.5
    poison()
    output, logsumexp, output_minus_initial_value = torch.ops.zerotuning._attention_by_route(
        *inputs, *options, scale, True, forward
    )
    gradients = torch.ops.zerotuning._attention_backward_by_route(
        grad_output, *inputs, output, logsumexp, *options, scale, output_minus_initial_value, backward
    )
    return [output, *gradients]


def reference(inputs: list[Tensor], grad_output: Tensor, **geometry: Any) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in inputs]
    output = formula(*leaves, **geometry)[0]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.double())]


def compare(
    inputs: list[Tensor], forward: int, backward: int, floor: float = 1e-2, scales_limit: float = 5e-3, **geometry: Any
) -> None:
    """Errors relative to the result and to `floor` times the terms that cancel in it where a key has all the weight."""
    batch, heads, rows, _ = inputs[0].shape
    grad_output = torch.randn(batch, rows, heads, inputs[2].shape[-1]).to(inputs[0].dtype).transpose(1, 2)
    got, wanted = (
        by_route(inputs, grad_output, forward, backward, **geometry),
        reference(inputs, grad_output, **geometry),
    )
    assert error(got[0], wanted[0]) <= 3e-3
    terms = rounding_scale([t.double() for t in inputs], grad_output.double())
    for name, a, b, cancelling in zip(("query", "key", "value", "log_scale"), got[1:], wanted[1:], terms, strict=True):
        assert not a.isnan().any(), name
        size = b.norm() + floor * cancelling
        limit = scales_limit if name == "log_scale" else 5e-3
        assert ((a.double() - b).norm() / size).item() <= limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("rows", [64, 129, 1000])
def test_routes_equal_the_formula_at_every_head_size(size, rows, dtype) -> None:
    torch.manual_seed(rows)
    inputs = random_inputs((2, 4, 2, rows, rows, *size), dtype)
    compare(inputs, PLAIN, PLAIN)
    if CAPABILITY == (9, 0):
        compare(inputs, HOPPER, PLAIN)


@either_stock_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [2, 64, 129, 1000])
def test_torchs_kernels_equal_the_formula_at_every_head_size(rows, size, dtype, stock) -> None:
    torch.manual_seed(rows)
    inputs = random_inputs((2, 4, 2, rows, rows, size, size), dtype)
    compare(inputs, stock, PLAIN if stock == CUDNN and size > 128 else stock)


SINKS = pytest.mark.parametrize("sink", [0.05, 0.5, 0.9, 0.99])
GAMMAS = pytest.mark.parametrize("gamma", [0.02, 0.3, 1.0, 3.0, 50.0])


def inputs_with_scaled_sink(sink: float, gamma: float, length: int = 200) -> list[Tensor]:
    log_scale = torch.full((4,), math.log(gamma)) + torch.linspace(-0.1, 0.1, 4)
    return [*(t.bfloat16() for t in inputs_with_sink(sink, "cuda", length)), log_scale]


@either_stock_kernel
@GAMMAS
@SINKS
def test_routes_equal_the_formula_for_weak_and_strong_sinks(sink, gamma, stock) -> None:
    inputs = inputs_with_scaled_sink(sink, gamma)
    compare(inputs, PLAIN, PLAIN, floor=0.0)
    for forward in (PLAIN, stock, *([HOPPER] if CAPABILITY == (9, 0) else [])):
        # γ's gradient is the sum of few rows that cancel here, and what was kept of each is rounded: by the draw of the
        # gradients up to 1.2e-2 of it; 5e-3 holds for longer sequences.
        compare(inputs, forward, stock, floor=0.0, scales_limit=1.5e-2)


@needs_hopper
@GAMMAS
@SINKS
def test_hopper_gradients_equal_the_formula_for_weak_and_strong_sinks(sink, gamma) -> None:
    inputs = inputs_with_scaled_sink(sink, gamma)
    compare(inputs, HOPPER, HOPPER, floor=0.0)


@pytest.mark.parametrize("route", [PLAIN, pytest.param(HOPPER, marks=needs_hopper)])
@GAMMAS
@SINKS
def test_gradients_of_padded_and_chosen_sinks_equal_the_formula(sink, gamma, route) -> None:
    query, key, value, log_scale = inputs_with_scaled_sink(sink, gamma)
    turned = [query, key.roll(70, 2), value.roll(70, 2), log_scale]  # the sink in the middle of the second tile
    mask = (torch.arange(200) >= 70)[None]
    compare(turned, 0, route, floor=0.0, key_mask=mask)
    for end in (71, 75):
        compare(turned, 0, route, floor=0.0, span=torch.tensor([[70, end]]))
    compare(turned, 0, route, floor=0.0, span=torch.tensor([[70, 71]]), window=100)


@pytest.mark.parametrize("size", HEAD_SIZES, ids=str)
def test_the_departure_is_the_output_less_the_initial_tokens_value(size) -> None:
    torch.manual_seed(5)
    rows = 200
    inputs = random_inputs((2, 4, 2, rows, rows, *size), torch.bfloat16)
    key = torch.arange(rows)
    routes = [PLAIN, *([HOPPER] if CAPABILITY == (9, 0) else [])]
    stocks = [FLASH, *([CUDNN] if (9, 0) <= CAPABILITY < (12, 0) else [])]
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [0, 0]),
        ({"key_mask": key >= torch.tensor([0, 70])[:, None]}, [0, 70]),
        ({"span": torch.tensor([[3, 9], [66, 67]])}, [3, 66]),
    ]
    for geometry, first in cases:
        options = (geometry.get("key_mask"), geometry.get("span"), None, 0, size[0] ** -0.5)
        wide = [t.double() for t in inputs]
        output = formula(*wide, **geometry)[0]
        value = torch.stack([wide[2][sample, :, place] for sample, place in enumerate(first)])
        wanted = output - value.repeat_interleave(2, 1)[:, :, None]
        seen = torch.ones(2, rows, dtype=torch.bool)
        if "key_mask" in geometry:
            seen = key >= torch.tensor(first)[:, None]
        for route in [*routes, *(stocks if not geometry and size[0] == size[1] else [])]:
            got = torch.ops.zerotuning._attention_by_route(*inputs, *options, True, route)[2]
            for sample in range(2):
                assert error(got[sample][:, seen[sample]], wanted[sample][:, seen[sample]]) <= 3e-3


def test_the_fake_departure_has_the_shape_of_the_real_one() -> None:
    operator = torch.ops.zerotuning._attention_with_output_minus_initial_value
    for rows, size, dtype in (
        *((rows, (64, 64), torch.bfloat16) for rows in (15, 16, 64, 4096, 4097)),
        *((4224, size, torch.float16) for size in ((64, 128), (72, 72), (128, 128), (136, 136), (256, 256), (60, 60))),
        (4224, (64, 64), torch.float32),
    ):
        inputs = random_inputs((1, 2, 1, rows, rows, *size), dtype)
        for geometry in (
            (None, None, None, 0),
            (torch.ones(1, rows, dtype=torch.bool), None, None, 0),
            (None, torch.tensor([[0, 1]]), None, 0),
            (None, None, torch.tensor([0]), 0),
            (None, None, None, rows - 1),
            (None, None, None, rows),
        ):
            real = operator(*inputs, *geometry, 0.125)[2]
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (*inputs, *geometry)]
                fake = operator(*fakes, 0.125)[2]
            assert real.shape == fake.shape, (rows, size, dtype, geometry)
            assert real.stride() == fake.stride(), (rows, size, dtype, geometry)


@pytest.mark.parametrize("length", [200, 4224])  # the second is torch's kernel's on Hopper
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_a_strong_sink_has_exact_gradients(compiled, length) -> None:
    inputs = [t.requires_grad_() for t in inputs_with_scaled_sink(0.99, 3.0, length)]
    attend = torch.compile(ops.attention, fullgraph=True) if compiled else ops.attention
    grad_output = torch.randn_like(inputs[0])
    got = torch.autograd.grad(attend(*inputs)[0], inputs, grad_output)
    for a, b in zip(got, reference([t.detach() for t in inputs], grad_output)[1:], strict=True):
        assert error(a, b) <= 5e-3


@either_stock_kernel
@pytest.mark.parametrize("layout", ["rows", "heads"])
@pytest.mark.parametrize("rows", [2, 64, 4224])  # the last is long enough for the automatic choice
def test_gradients_of_torchs_kernel_equal_the_formula_in_either_layout(rows, layout, stock) -> None:
    torch.manual_seed(rows)
    inputs = random_inputs((1, 4, 2, rows, rows, 64, 64), torch.bfloat16)
    if layout == "heads":
        inputs[:3] = [t.contiguous() for t in inputs[:3]]
    else:
        inputs[:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:3]]
    compare(inputs, 0, stock)
    compare(inputs, 0, 0)


@either_stock_kernel
@pytest.mark.parametrize("sink", [0.5, 0.9, 0.99])
def test_gradients_of_torchs_kernel_where_the_second_key_is_the_strong_one(sink, stock) -> None:
    # It stands in the place of the first as well there, and its part is taken away again.
    query, key, value = (t.bfloat16() for t in inputs_with_sink(sink, "cuda"))
    order = [1, 0, *range(2, key.shape[2])]
    log_scale = torch.linspace(-4.0, 4.0, 4)
    inputs = [query, key[:, :, order], value[:, :, order], log_scale]
    compare(inputs, 0, stock, floor=1.0)
    # What rounding the output does to that part goes away with it, also where the output_minus_initial_value was kept.
    options = (None, None, None, 0, 0.125)
    grad_output = torch.randn_like(query)
    output, logsumexp, output_minus_initial_value = torch.ops.zerotuning._attention_by_route(
        *inputs, *options, True, PLAIN
    )
    wanted = reference(inputs, grad_output)[1]
    errors = [
        error(
            torch.ops.zerotuning._attention_backward_by_route(
                grad_output, *inputs, output, logsumexp, *options, kept, stock
            )[0],
            wanted,
        )
        for kept in (None, output_minus_initial_value)
    ]
    assert errors[1] <= 1.1 * errors[0]


@either_stock_kernel
def test_a_first_row_to_which_the_second_key_would_be_infinite_leaves_the_others_as_they_are(stock) -> None:
    torch.manual_seed(4)
    query, key, value, log_scale = random_inputs((1, 2, 1, 200, 200, 64, 64), torch.bfloat16)
    key[:, :, 1] = 40 * query[:, :1, 0]  # a logit of 320
    compare([query, key, value, log_scale], 0, stock, floor=1.0)


@needs_cudnn
@pytest.mark.parametrize("size", [(64, 64), (128, 128)], ids=str)
def test_padded_gradients_of_torchs_kernel_equal_the_formula(size) -> None:
    torch.manual_seed(1)
    mask = torch.arange(300) >= torch.tensor([0, 1, 170, 299])[:, None]
    inputs = random_inputs((4, 4, 2, 300, 300, *size), torch.bfloat16, per_sample=True)
    compare(inputs, 0, CUDNN, key_mask=mask)
    mask = torch.rand(4, 300) > 0.4
    mask[2] = False
    compare(inputs, 0, CUDNN, key_mask=mask)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 63, 64, 65, 128, 129, 200, 256, 500, 1000])
def test_hopper_gradients_equal_the_formula_at_every_length_and_head_grouping(rows, size, dtype) -> None:
    torch.manual_seed(rows)
    for heads, key_heads in ((2, 2), (8, 2), (6, 1)):
        compare(random_inputs((2, heads, key_heads, rows, rows, size, size), dtype), HOPPER, HOPPER)


@needs_hopper
@pytest.mark.parametrize("size", [(80, 80), (96, 96), (8, 8), (24, 40), (64, 128), (128, 64)], ids=str)
def test_hopper_gradients_equal_the_formula_at_head_sizes_that_fill_no_tile(size) -> None:
    torch.manual_seed(8)
    compare(random_inputs((2, 4, 2, 150, 150, *size), torch.bfloat16, per_sample=True), HOPPER, HOPPER)


@needs_hopper
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("rows", [64, 129, 300, 700])
def test_hopper_gradients_equal_the_formula_for_every_geometry(rows, size) -> None:
    torch.manual_seed(9)
    key = torch.arange(rows)
    some = torch.tensor([0, 1, rows * 4 // 7, rows - 1])[:, None]
    holes = torch.rand(4, rows) > 0.4
    holes[2] = False
    span = torch.tensor([[0, 1], [3, rows // 2], [5, 5], [rows // 3, rows]])
    inputs = random_inputs((4, 4, 2, rows, rows, size, size), torch.bfloat16, per_sample=True)
    for geometry in (
        {"key_mask": key >= some},
        {"key_mask": key < rows - some},
        {"key_mask": holes},
        {"window": 1},
        {"window": 33},
        {"window": 150},
        {"span": span},
        {"span": span, "key_mask": holes, "window": 90},
    ):
        compare(inputs, HOPPER, HOPPER, **geometry)  # type: ignore[arg-type]
    start = torch.tensor([0, 1, rows - rows // 2, rows // 4])
    others = random_inputs((4, 4, 2, rows // 2, rows, size, size), torch.bfloat16, per_sample=True)
    compare(others, HOPPER, HOPPER)
    for geometry in ({}, {"window": 70}, {"key_mask": key >= some}):
        compare(others, HOPPER, HOPPER, query_start=start, **geometry)  # type: ignore[arg-type]


@needs_hopper
def test_hopper_gradients_of_strided_inputs_equal_those_of_copies() -> None:
    torch.manual_seed(10)
    joint = torch.randn(2, 200, 4 + 2 + 2, 128).bfloat16().transpose(1, 2)
    parts = joint.split((4, 2, 2), dim=1)
    turned = torch.randn(2, 4, 200, 128).bfloat16()
    log_scale = torch.randn(4)
    for query, key, value in (parts, (turned, parts[1], turned[:, :2]), (turned[:, :, 8:], parts[1], parts[2])):
        grad_output = torch.randn(2, 4, query.shape[2], 128).bfloat16()
        copies = [t.clone(memory_format=torch.contiguous_format) for t in (query, key, value)]
        got = by_route([query, key, value, log_scale], grad_output, HOPPER, HOPPER)
        wanted = by_route([*copies, log_scale], grad_output, HOPPER, HOPPER)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        compare([query, key, value, log_scale], HOPPER, HOPPER)


@needs_hopper
def test_hopper_gradients_are_the_same_from_run_to_run_and_the_choice_for_short_or_padded_sequences() -> None:
    torch.manual_seed(11)
    for batch, rows in ((16, 128), (3, 500), (2, 3000), (1, 5000)):
        inputs = random_inputs((batch, 8, 2, rows, rows, 128, 128), torch.bfloat16)
        grad_output = torch.randn_like(inputs[0])
        first, *others = [by_route(inputs, grad_output, HOPPER, HOPPER) for _ in range(4)]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        mask = torch.arange(rows) >= torch.arange(batch)[:, None]
        for geometry in ({"key_mask": mask}, {"window": 100}, *([{}] if rows <= 4096 else [])):
            chosen, own = (by_route(inputs, grad_output, HOPPER, route, **geometry) for route in (0, HOPPER))
            assert all(torch.equal(a, b) for a, b in zip(chosen, own, strict=True))


@needs_hopper
def test_the_choice_of_route_follows_what_was_measured() -> None:
    names = {"forward, by route": 0, "forward + backward, by backward's route": 1}
    measured = json.loads((Path(__file__).parents[2] / "docs/results/bench_attention_h100.json").read_text())
    rows = [row for row in measured["rows"] if row["what"] in names]
    assert {row["what"] for row in rows} == set(names)
    for row in rows:
        batch, length = map(int, row["shape"].split(",")[0].split(" x "))
        ratios = {name: figures["ratio"] for name, figures in row["peers"].items() if name in bench_cuda.ROUTES}
        inputs = attention_inputs(bench_cuda.HEADS, length, torch.bfloat16, batch, "cuda")
        grad_output = torch.randn_like(inputs[0])
        chosen, hopper, cudnn_s = (
            by_route(inputs, grad_output, HOPPER if names[row["what"]] else route, route)[names[row["what"]]]
            for route in (0, HOPPER, CUDNN)
        )
        own = "hopper" if torch.equal(chosen, hopper) else "cuDNN"
        assert own == "hopper" or error(chosen, cudnn_s.double()) <= 1e-3, row["shape"]
        assert ratios[own] <= 1.05 * min(ratios.values()), row["shape"]


@needs_hopper
def test_the_choice_for_heads_that_hoppers_backward_does_not_know_is_flash() -> None:
    torch.manual_seed(16)
    inputs = random_inputs((2, 4, 2, 300, 300, 256, 256), torch.bfloat16)
    grad_output = torch.randn_like(inputs[0])
    chosen, flash, plain = (by_route(inputs, grad_output, HOPPER, route) for route in (0, FLASH, PLAIN))
    assert torch.equal(chosen[3], flash[3])  # value's gradient, which flash sums in a fixed order
    assert not torch.equal(chosen[3], plain[3])
    leaves = [t.requires_grad_() for t in inputs]
    output, _, output_minus_initial_value = torch.ops.zerotuning._attention_with_output_minus_initial_value(
        *leaves, None, None, None, 0, 1 / 16
    )
    assert output_minus_initial_value.shape == output.shape


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


def test_outputs_are_the_same_from_run_to_run() -> None:
    torch.manual_seed(2)
    inputs = random_inputs((2, 8, 2, 1500, 1500, 128, 128), torch.bfloat16)
    outputs = [ops.attention(*inputs)[0] for _ in range(3)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    cache = random_inputs((3, 8, 2, 2, 5000, 128, 128), torch.bfloat16)
    steps = [ops.decode_attention(*cache) for _ in range(3)]
    assert all(torch.equal(steps[0], other) for other in steps[1:])
    grad_output = torch.randn_like(outputs[0])
    gradients = [by_route(inputs, grad_output, 0, PLAIN) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("length", [64, 192, 320, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_that_are_all_far_below_zero(length, padded) -> None:
    """Where the last tile of keys is half empty, exp(0 - logsumexp) of what is missing overflows (pytorch issue 196678)."""
    torch.manual_seed(12)
    query, key, value, log_scale = random_inputs((2, 4, 2, length, length, 64, 64), torch.bfloat16)
    query[..., 0] += 32
    key[..., 0] -= 32
    geometry = {"key_mask": torch.arange(length) >= torch.tensor([0, 5])[:, None]} if padded else {}
    compare([query, key, value, log_scale], 0, 0, floor=1.0, **geometry)  # type: ignore[arg-type]


def decode_by_route(inputs: list[Tensor], route: int, **geometry: Any) -> Tensor:
    options = (geometry.get("key_mask"), geometry.get("span"), geometry.get("query_start"), geometry.get("window", 0))
    return torch.ops.zerotuning._decode_attention_by_route(*inputs, *options, inputs[0].shape[-1] ** -0.5, route)


@pytest.mark.parametrize(
    ("size", "route"),
    [
        *((size, 0) for size in [*HEAD_SIZES, (64, 128)]),
        *(pytest.param(size, BULK, marks=needs_hopper) for size in ((64, 64), (128, 128))),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_equals_the_formula(size, route, dtype) -> None:
    torch.manual_seed(3)
    limit = 3e-3 if dtype == torch.bfloat16 else 6e-4
    for heads, key_heads in ((8, 2), (4, 4), (32, 1), (9, 3)):
        for rows, keys in ((1, 1), (1, 40), (1, 3001), (4, 700), (16, 1025)):
            inputs = random_inputs((3, heads, key_heads, rows, keys, *size), dtype, per_sample=True)
            mask = torch.arange(keys) >= torch.tensor([0, min(17, keys - 1), keys - 1])[:, None]
            room = max(keys - rows, 0)
            start = torch.tensor([room, room // 2, room // 3])
            for geometry in (
                {},
                {"key_mask": mask},
                {"window": 33},
                {"query_start": start},
                {"query_start": start, "span": torch.tensor([[0, 1], [0, 5], [1, 1]]).clamp(max=keys), "window": 100},
                {"key_mask": torch.rand(3, keys) > 0.5},
            ):
                expected = formula(*(t.double() for t in inputs), **geometry)[0]  # type: ignore[arg-type]
                got = decode_by_route(inputs, route, **geometry)
                assert (got.double() - expected).norm() <= limit * expected.norm() + 1e-12, (
                    heads,
                    rows,
                    keys,
                    geometry,
                )


@pytest.mark.parametrize("route", [0, pytest.param(BULK, marks=needs_hopper)])
@pytest.mark.parametrize("size", [64, 128])
def test_decoding_reads_nothing_of_what_a_static_cache_does_not_hold_yet(size, route) -> None:
    torch.manual_seed(13)
    query, key, value, log_scale = random_inputs((3, 8, 2, 2, 1000, size, size), torch.bfloat16)
    # A cache [B, T, H, D], as some models keep it.
    key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    start = torch.tensor([0, 300, 997])
    expected = formula(*(t.double() for t in (query, key, value, log_scale)), query_start=start)[0]
    for batch, first in enumerate(start.tolist()):
        key[batch, :, first + 2 :] = math.nan
        value[batch, :, first + 2 :] = math.nan
    outputs = [decode_by_route([query, key, value, log_scale], route, query_start=start) for _ in range(3)]
    assert error(outputs[0], expected) <= 3e-3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_decoding_of_a_cache_that_floods_level_2() -> None:
    torch.manual_seed(14)
    inputs = random_inputs((8, 16, 8, 1, 9001, 128, 128), torch.bfloat16, per_sample=True)
    mask = torch.arange(9001) >= torch.arange(8)[:, None] * 700
    for geometry in ({}, {"key_mask": mask, "window": 8500}):
        expected = formula(*(t.double() for t in inputs), **geometry)[0]  # type: ignore[arg-type]
        assert error(ops.decode_attention(*inputs, **geometry), expected) <= 3e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("route", [RINGS, pytest.param(BULK, marks=needs_hopper)])
@pytest.mark.parametrize("keys", [3000, 3003])
def test_decoding_of_long_shares_with_holes_in_the_padding(route, keys) -> None:
    """A block for each sample and its keys not split: a warp goes through 47 tiles, whose padding it reads 32 at a time."""
    torch.manual_seed(15)
    samples = torch.cuda.get_device_properties(0).multi_processor_count
    inputs = random_inputs((samples, 4, 1, 1, keys, 64, 64), torch.bfloat16)
    mask = torch.arange(keys) >= torch.arange(samples)[:, None] * 20
    mask &= (torch.rand(samples, keys) > 0.3) | (torch.arange(samples) % 2 == 0)[:, None]
    mask[:, -300:-200] = True
    # As a step of `generate` has it: behind other words of a row.
    behind = torch.zeros(samples, 16 + -(-keys // 8) * 8, dtype=torch.uint8)
    behind[:, 16 : 16 + keys] = mask
    first = mask.int().argmax(dim=1)
    span = torch.stack((first, first + 1), dim=1)
    for geometry in ({}, {"span": span}, {"window": 2901}):
        expected = formula(*(t.double() for t in inputs), key_mask=mask, **geometry)[0]  # type: ignore[arg-type]
        for key_mask in (mask, behind[:, 16 : 16 + keys]):
            assert error(decode_by_route(inputs, route, key_mask=key_mask, **geometry), expected) <= 3e-3


@pytest.mark.parametrize("route", [RINGS, pytest.param(BULK, marks=needs_hopper)])
def test_decoding_gives_the_same_bits_in_a_captured_graph_and_on_several_streams(route) -> None:
    """The last block of a head's merges its splits, in a captured graph and of many rows a second kernel."""
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


def decode_on_many_streams(_rank: int) -> None:
    torch.set_default_device("cuda")
    torch.manual_seed(17)
    inputs = random_inputs((1, 8, 2, 1, 3000, 128, 128), torch.bfloat16)
    streams = {torch.cuda.Stream(priority=-(n % 4)) for n in range(128)}
    assert len({stream.cuda_stream for stream in streams}) > 64
    outputs = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            outputs.append(decode_by_route(inputs, RINGS))
    torch.cuda.synchronize()
    assert error(outputs[0], formula(*(t.double() for t in inputs))[0]) <= 3e-3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_decoding_on_more_streams_than_have_counters() -> None:
    """In a process of its own, as the streams keep their counters. What comes after 64 streams has its splits merged by
    a second kernel."""
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


def tiny_llama(**settings: Any) -> Any:
    torch.manual_seed(5)
    values: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        **settings,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False).to("cuda")


def random_scales() -> HeadScales:
    torch.manual_seed(6)
    return HeadScales(torch.exp(torch.randn(3, 4)).cpu())


def test_a_patched_model_gives_what_sdpa_gives_and_what_the_cpu_gives() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 500, (3, 200))
    mask = (torch.arange(200) >= torch.tensor([0, 7, 150])[:, None]).long()
    with torch.no_grad():
        plain = [model(ids).logits, model(ids, attention_mask=mask).logits]
        patch(model)
        patched = [model(ids).logits, model(ids, attention_mask=mask).logits]
        model.double()
        exact = [model(ids).logits, model(ids, attention_mask=mask).logits]
        model.bfloat16()
        for a, b, c in zip(patched, plain, exact, strict=True):  # no further from float64 than sdpa is
            assert (a.double() - c)[mask > 0].norm() <= 1.2 * (b.double() - c)[mask > 0].norm()
        apply_scales(model, random_scales())
        tuned = model.float()(ids, attention_mask=mask).logits
        on_cpu = model.cpu()(ids.cpu(), attention_mask=mask.cpu()).logits.cuda()
    torch.testing.assert_close(tuned[mask > 0], on_cpu[mask > 0], rtol=1e-3, atol=1e-3)
    unpatch(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_head_gradients_equal_float64_s(checkpointing) -> None:
    model = patch(tiny_llama())
    apply_scales(model, random_scales())
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        model.enable_input_require_grads()
    ids = torch.randint(0, 500, (3, 120))
    mask = (torch.arange(120) >= torch.tensor([0, 7, 100])[:, None]).long()

    def gradients() -> Tensor:
        with head_parameters(model) as parameters:
            loss = model(ids, attention_mask=mask).logits[:, -1].float().log_softmax(-1)[:, 3].sum()
            return torch.stack(torch.autograd.grad(loss, parameters)).double()

    got = gradients()
    model.double()
    wanted = gradients()
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.05


def packed_batch() -> tuple[Tensor, Tensor]:
    """input_ids and position_ids of three rows of 200 tokens: sequences of several lengths, of one token, and one alone."""
    lengths = [[1, 120, 3, 1, 75], [200], [50] * 4]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return torch.randint(0, 500, (3, 200)), positions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_sequences_give_what_they_give_alone_and_the_same_head_gradients(dtype) -> None:
    model = patch(tiny_llama().to(dtype))
    ids, positions = packed_batch()

    def logits_alone() -> Tensor:
        rows = []
        for row, places in zip(ids, positions, strict=True):
            begins = (places == 0).nonzero().squeeze(1).tolist()
            parts = [model(part[None], use_cache=False).logits[0] for part in row.tensor_split(begins[1:])]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def outcome(packed: bool) -> tuple[Tensor, Tensor]:
        with head_parameters(model) as parameters:
            for seed, parameter in enumerate(parameters):
                parameter.data.normal_(generator=torch.Generator("cuda").manual_seed(seed))
            logits = model(ids, position_ids=positions, use_cache=False).logits if packed else logits_alone()
            gradients = torch.autograd.grad(logits.float().log_softmax(-1)[..., 3].sum(), parameters)
        return logits.detach().double(), torch.stack(gradients).double()

    got, alone = outcome(packed=True), outcome(packed=False)
    model.double()
    for a, b, c in zip(got, alone, outcome(packed=False), strict=True):  # no further from float64 than alone
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-5 * c.norm()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_without_a_mask_follows_the_sequences_of_each_run(mode, monkeypatch) -> None:
    model = apply_scales(tiny_llama().float(), random_scales())
    ids, packed = packed_batch()
    whole = torch.arange(200).expand(3, -1)
    for name in ("attention_by_formula", "gradients_by_formula"):
        monkeypatch.delattr(dense_masks, name)  # are not needed

    def loss(positions: Tensor) -> Tensor:
        logits = model(ids, position_ids=positions, use_cache=False).logits
        return logits.log_softmax(-1)[..., 3].sum()

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    with head_parameters(model) as parameters:
        for positions in (whole, packed, packed.flip(0), whole, packed):
            want = loss(positions)
            wanted = torch.stack(torch.autograd.grad(want, parameters))
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(positions)
            gradients = torch.stack(torch.autograd.grad(got, parameters))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert error(gradients, wanted) <= 1e-3


def test_layers_of_packed_sequences_do_not_wait_for_the_gpu() -> None:
    _, positions = packed_batch()
    numbers = masking_utils.find_packed_sequence_indices(positions)
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(numbers)
    )
    encoded = packed_mask.read_packed_mask(function, None, 3, 200, "cuda")
    assert encoded is not None
    layout = packed_sequences.layout_of(encoded)
    inputs = [t.requires_grad_() for t in random_inputs((3, 4, 2, 200, 200, 64, 64), torch.bfloat16)]
    grad_output = torch.randn(3, 4, 200, 64, dtype=torch.bfloat16)
    torch.autograd.grad(packed_sequences.attend(*inputs, layout), inputs, grad_output)  # plans are made at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(packed_sequences.attend(*inputs, layout), inputs, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generation_is_the_same_with_every_cache_and_alone_or_padded() -> None:
    model = apply_scales(tiny_llama().float(), random_scales())
    ids = torch.randint(1, 500, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(input_ids=ids, attention_mask=mask, **options)
    alone = model.generate(input_ids=ids[:1, 15:], **options)
    assert torch.equal(batch[0, 40:], alone[0, 25:])
    half = model.bfloat16()
    dynamic = half.generate(input_ids=ids, attention_mask=mask, **options)
    torch._dynamo.utils.counters.clear()
    static = half.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **options)
    assert (dynamic == static).float().mean().item() > 0.95
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] > 0  # transformers compiles the steps, with CUDA graphs
    assert not counted["graph_break"]
    assert not counted["inductor"]["cudagraph_skips"]


def test_a_decoding_step_does_not_wait_for_the_gpu() -> None:
    model = apply_scales(tiny_llama(), random_scales())
    ids = torch.randint(1, 500, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        step, longer = ids[:, :1], torch.cat((mask, mask[:, :1] + 1), 1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(step, attention_mask=longer.clamp(max=1), past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_tensors_on_different_devices_are_refused_by_name() -> None:
    query, key, value, log_scale = random_inputs((1, 2, 2, 8, 8, 64, 64), torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match="log_scale must be on query's device, cuda:0, got cpu"):
        ops.attention(query, key, value, log_scale.cpu())
    for name, tensor in {
        "key_mask": torch.ones(1, 8, dtype=torch.bool),
        "span": torch.tensor([[0, 1]]),
        "query_start": torch.tensor([0]),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=f"{name} must be on query's device, cuda:0, got cpu"):
            ops.attention(query, key, value, log_scale, **{name: tensor.cpu()})
    for own, others, named in (
        (query, (key.cpu(), value), "key must be on query's device, cuda:0, got cpu"),
        (query.cpu(), (key, value), "key must be on query's device, cpu, got cuda:0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=named):
            ops.attention(own, *others, log_scale)
    output, logsumexp = ops.attention(query, key, value, log_scale)
    backward, rest = torch.ops.zerotuning.attention_backward, (None, None, None, 0, 0.125)
    with pytest.raises((ValueError, RuntimeError), match="grad_output must be on query's device, cuda:0, got cpu"):
        backward(output.cpu(), query, key, value, log_scale, output, logsumexp, *rest)
    with pytest.raises((ValueError, RuntimeError), match="grad_output must be on query's device, cpu, got cuda:0"):
        backward(output, query.cpu(), key.cpu(), value.cpu(), log_scale.cpu(), output.cpu(), logsumexp.cpu(), *rest)
    with pytest.raises((ValueError, RuntimeError), match="head sizes on a GPU go up to 256"):
        ops.attention(*random_inputs((1, 1, 1, 8, 8, 264, 264), torch.bfloat16))


def test_scales_expanded_over_the_batch_get_a_gradient_for_each_sample() -> None:
    torch.manual_seed(7)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, log_scale = random_inputs((3, 4, 2, 90, 90, 64, 64), dtype)
        grad_output = torch.randn(3 * 4 * 90 * 64 + 1)[1:].to(dtype).view(3, 90, 4, 64).transpose(1, 2)
        expanded = [query, key, value, log_scale.expand(3, 4)]
        whole = [query, key, value, log_scale.repeat(3, 1)]
        for a, b in zip(by_route(expanded, grad_output, 0, 0), by_route(whole, grad_output, 0, 0), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
