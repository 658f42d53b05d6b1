"""The operators against the paper's formula written out in float64, over shapes, dtypes, sinks and scales."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
import torch
from formula import error, formula, inputs_with_sink, poison, random_inputs, rounding_scale
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from zerotuning import ops


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test makes its tensors on this device."""
    torch.set_default_device(request.param)
    if request.param == "cuda":  # memory that a kernel forgets to write shows up as NaN
        poison()
    yield request.param
    torch.set_default_device(None)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Relative error ||out - ref|| / ||ref|| that rounding explains.
OUTPUT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
GRADIENT_ERROR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def cpu_routes(inputs: list[Tensor], geometry: dict[str, object]) -> Iterator[Tensor]:
    """The output by each way the CPU has: torch's kernel always, our own where the processor and the call allow it."""
    if inputs[0].is_cuda:
        return
    scale = geometry.get("scale") or inputs[0].shape[-1] ** -0.5
    names = ("key_mask", "span", "query_start")
    arguments = (*inputs, *(geometry.get(name) for name in names), geometry.get("window", 0), scale)
    yield torch.ops.zerotuning._attention_by_route(*arguments, False, 1)[0]
    try:
        yield torch.ops.zerotuning._attention_by_route(*arguments, False, 2)[0]
    except (RuntimeError, ValueError) as refusal:
        if "does not support this call" not in str(refusal):
            raise


def check(inputs: list[Tensor], saturated: bool = False, **geometry: object) -> None:
    """Compares output, log-sum-exp and every gradient with the formula; saturated: relative to the terms that cancel."""
    dtype = inputs[0].dtype
    reference = [t.detach().double().requires_grad_() for t in inputs]
    inputs = [t.detach().requires_grad_() for t in inputs]
    output, logsumexp = ops.attention(*inputs, **geometry)  # type: ignore[arg-type]
    expected, expected_logsumexp = formula(*reference, **geometry)  # type: ignore[arg-type]
    assert output.dtype == dtype
    if output.is_cuda and dtype == torch.bfloat16:
        assert error(output, expected) <= 3e-3
    assert error(output, expected) <= OUTPUT_ERROR[dtype]
    seen = torch.isfinite(expected_logsumexp)
    assert torch.equal(torch.isfinite(logsumexp), seen)
    torch.testing.assert_close(logsumexp[seen].double(), expected_logsumexp[seen], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for by_route in cpu_routes(inputs, geometry):
            assert error(by_route, expected) <= OUTPUT_ERROR[dtype]
        assert error(ops.decode_attention(*inputs, **geometry), expected) <= OUTPUT_ERROR[dtype]  # type: ignore[arg-type]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((output.double() * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), reference)
    floors = rounding_scale(reference, weight)
    for gradient, want, floor in zip(got, wanted, floors, strict=True):
        assert not gradient.isnan().any()
        size = want.norm() + floor * (1.0 if saturated else 1e-2)
        assert ((gradient.double() - want).norm() / size).item() <= GRADIENT_ERROR[dtype]


SHAPES = [  # B, H, Hkv, Tq, Tk, D, Dv
    (1, 1, 1, 1, 1, 64, 64),
    (2, 4, 4, 37, 37, 16, 16),
    (2, 6, 2, 65, 65, 64, 64),
    (1, 4, 1, 33, 33, 80, 80),
    (1, 2, 1, 31, 31, 96, 96),
    (2, 4, 2, 129, 129, 128, 128),
    (1, 2, 2, 41, 41, 192, 128),
    (1, 2, 2, 41, 41, 64, 96),
    (1, 4, 1, 45, 45, 256, 256),
    (2, 4, 2, 1, 57, 64, 64),
    (2, 4, 2, 5, 58, 64, 64),
    (1, 3, 3, 30, 47, 24, 40),
    (1, 2, 1, 777, 777, 32, 32),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_formula_for_every_head_size_length_and_head_grouping(shape, dtype) -> None:
    torch.manual_seed(hash(shape) % 1000)
    check(random_inputs(shape, dtype))
    check(random_inputs(shape, dtype, per_sample=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.02, 0.3, 3.0, 50.0])
@pytest.mark.parametrize("sink", [0.05, 0.5, 0.9, 0.99])
def test_attention_equals_the_formula_for_weak_and_strong_sinks_and_every_scale(sink, gamma, dtype, device) -> None:
    query, key, value = inputs_with_sink(sink, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scales = torch.full((4,), math.log(gamma), dtype=wide) + torch.linspace(-0.1, 0.1, 4).to(wide)
    check([query.to(dtype), key.to(dtype), value.to(dtype), scales], saturated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_scales_the_first_real_token_of_each_sample(dtype) -> None:
    torch.manual_seed(2)
    mask = torch.arange(50) >= torch.tensor([0, 1, 17, 49])[:, None]
    check(random_inputs((4, 4, 2, 50, 50, 64, 64), dtype), key_mask=mask)
    check(random_inputs((4, 4, 2, 1, 50, 64, 64), dtype, per_sample=True), key_mask=mask)
    long = torch.arange(1300) >= torch.tensor([0, 700])[:, None]
    check(random_inputs((2, 2, 1, 1300, 1300, 16, 16), dtype), key_mask=long)


def test_a_padded_sample_gives_what_it_gives_alone() -> None:
    torch.manual_seed(3)
    query, key, value, log_scale = random_inputs((1, 4, 2, 40, 40, 64, 64), torch.float32)
    alone = ops.attention(query[:, :, 15:], key[:, :, 15:], value[:, :, 15:], log_scale)[0]
    mask = torch.arange(40)[None] >= 15
    padded = ops.attention(query, key, value, log_scale, key_mask=mask)[0][:, :, 15:]
    torch.testing.assert_close(padded, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_with_holes_and_samples_without_any_real_key(dtype) -> None:
    torch.manual_seed(4)
    mask = torch.rand(3, 61) > 0.4
    mask[1] = False
    check(random_inputs((3, 4, 2, 61, 61, 32, 32), dtype), key_mask=mask)
    check(random_inputs((3, 4, 2, 20, 61, 32, 32), dtype), key_mask=mask, window=7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 7, 32, 63, 64, 100])
def test_sliding_windows_equal_the_formula(window, dtype) -> None:
    torch.manual_seed(5)
    check(random_inputs((2, 4, 2, 64, 64, 32, 32), dtype), window=window)
    check(random_inputs((2, 4, 2, 21, 64, 32, 48), dtype), window=window)
    mask = torch.arange(64) >= torch.tensor([0, 30])[:, None]
    check(random_inputs((2, 4, 2, 64, 64, 32, 32), dtype), window=window, key_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_may_start_anywhere_in_the_keys_and_differently_in_each_sample(dtype) -> None:
    torch.manual_seed(6)
    for rows in (1, 6):
        inputs = random_inputs((3, 4, 2, rows, 40, 32, 32), dtype)
        check(inputs, query_start=torch.tensor([0, 11, 34]))
        check(inputs, query_start=torch.tensor([20, 20, 20]), window=9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_span_of_keys_is_scaled_instead_of_the_initial_token(dtype) -> None:
    torch.manual_seed(7)
    inputs = random_inputs((3, 4, 2, 48, 48, 32, 32), dtype)
    span = torch.tensor([[3, 9], [0, 48], [5, 5]])
    check(inputs, span=span)
    check(inputs, span=span, window=11)


def test_gradcheck_in_float64() -> None:
    torch.manual_seed(8)
    inputs = [t.requires_grad_() for t in random_inputs((2, 2, 1, 4, 5, 3, 4), torch.float64)]
    mask = torch.arange(5) >= torch.tensor([0, 2])[:, None]
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t)[0], inputs)
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, key_mask=mask, window=3)[0], inputs)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (3, 1), (8, 2), (7, 1), (32, 1)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (20, 7), (64, 64), (72, 200), (256, 256), (264, 264)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_against_a_cache_equals_the_formula(dtype, size, heads, device) -> None:
    if device == "cuda" and max(size) > 256:
        pytest.skip("refused on a GPU")
    torch.manual_seed(17)
    for keys in (1, 130, 700):
        inputs = random_inputs((3, *heads, 1, keys, *size), dtype, per_sample=True)
        inputs[3] *= 3
        mask = torch.rand(3, keys) > 0.4
        mask[2] = False  # a row that sees nothing
        start = torch.tensor([keys - 1, keys // 2, 0])
        span = torch.tensor([[0, 1], [0, 5], [1, 1]]).clamp(max=keys)
        for geometry in ({}, {"key_mask": mask, "window": 150}, {"query_start": start, "span": span}):
            expected = formula(*(t.double() for t in inputs), **geometry)[0]
            got = ops.decode_attention(*inputs, **geometry)
            # Beside a mean of 700 values their rounding counts for more.
            assert error(got, expected) <= 2 * OUTPUT_ERROR[dtype], (keys, geometry)
            if "key_mask" in geometry:
                assert not got[2].any()


@pytest.mark.parametrize(("rows", "keys"), [(1, 40), (1, 3000), (5, 900), (17, 30)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decoding_step_s_output_as_models_go_on_with_it(rows, keys, dtype) -> None:
    inputs = random_inputs((2, 4, 2, rows, keys, 64, 64), dtype)
    output = ops.decode_attention_transposed(*inputs, ops.Geometry(), None)
    assert output.is_contiguous()
    assert torch.equal(output, ops.decode_attention(*inputs).transpose(1, 2))


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
def test_an_exported_program_takes_square_and_other_lengths(needs_gradient) -> None:
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


BAD = {
    "query must be [B, H, Tq, D], got [4, 9, 16]": lambda q, k, v, s: (q[0], k, v, s, {}),
    "key must be [B, Hkv, Tk, D] = [2, 2, 12, 16], got [2, 2, 12, 8]": lambda q, k, v, s: (
        q,
        k[..., :8],
        v,
        s,
        {},
    ),
    "value must be [B, Hkv, Tk, Dv] = [2, 2, 12, 24], got [2, 2, 11, 24]": lambda q, k, v, s: (
        q,
        k,
        v[:, :, 1:],
        s,
        {},
    ),
    "query's heads must be a multiple of key's heads, got 3 and 2": lambda q, k, v, s: (
        q[:, :3],
        k,
        v,
        s[:3],
        {},
    ),
    "key must be float32, got bfloat16": lambda q, k, v, s: (q, k.bfloat16(), v, s, {}),
    "query must be float32, bfloat16, float16 or float64, got int64": lambda q, k, v, s: (
        q.long(),
        k,
        v,
        s,
        {},
    ),
    "log_scale must be [H] or [B, H] with B = 2, H = 4, got [1, 16]": lambda q, k, v, s: (
        q,
        k,
        v,
        torch.zeros(1, 16),
        {},
    ),
    "log_scale must be float32, got bfloat16": lambda q, k, v, s: (q, k, v, s.bfloat16(), {}),
    "log_scale must be finite, got nan at index 2": lambda q, k, v, s: (
        q,
        k,
        v,
        torch.tensor([0, 0, math.nan, 0]),
        {},
    ),
    "log_scale must be finite, got -inf at index 0": lambda q, k, v, s: (
        q,
        k,
        v,
        torch.full((4,), -math.inf),
        {},
    ),
    "key_mask must be [B, Tk] = [2, 12], got [2, 9]": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"key_mask": torch.ones(2, 9) > 0},
    ),
    "key_mask must be bool or uint8, got float32": lambda q, k, v, s: (q, k, v, s, {"key_mask": torch.ones(2, 12)}),
    "span[1] must be [first, end) within the 12 keys, got [3, 13)": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"span": torch.tensor([[0, 1], [3, 13]])},
    ),
    "query_start[0] must be between 0 and Tk - Tq = 3, got -1": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"query_start": torch.tensor([-1, 0])},
    ),
    "query must not be longer than key without query_start, got Tq = 9 and Tk = 8": lambda q, k, v, s: (
        q,
        k[:, :, :8],
        v[:, :, :8],
        s,
        {},
    ),
    "window must be 0 (none) or the number of keys a query sees, got -3": lambda q, k, v, s: (
        q,
        k,
        v,
        s,
        {"window": -3},
    ),
    "scale must be finite, got nan": lambda q, k, v, s: (q, k, v, s, {"scale": math.nan}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("operator", [ops.attention, ops.decode_attention])
def test_a_bad_argument_gets_one_error_that_names_it(operator, message, device) -> None:
    if device == "cuda" and message.startswith(("log_scale must be finite", "span[", "query_start[")):
        pytest.skip("values are not read back from a GPU")
    *tensors, options = BAD[message](*random_inputs((2, 4, 2, 9, 12, 16, 24), torch.float32))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        operator(*tensors, **options)
    assert message in str(raised.value)


def test_empty_batches_and_queries_give_empty_outputs() -> None:
    for shape in ((0, 2, 2, 4, 4, 16, 16), (2, 2, 2, 0, 4, 16, 16)):
        inputs = [t.requires_grad_() for t in random_inputs(shape, torch.float32)]
        output = ops.attention(*inputs)[0]
        assert output.numel() == 0
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(output.sum(), inputs))


def test_what_a_backward_pass_gets_is_checked(device) -> None:
    inputs = random_inputs((2, 4, 2, 9, 9, 16, 24), torch.float32)
    output, logsumexp = ops.attention(*inputs)
    rest = (None, None, None, 0, 0.25)
    backward = torch.ops.zerotuning.attention_backward
    for wrong, message in (
        (
            (output[:, :, :8], output, logsumexp),
            "grad_output must be [B, H, Tq, Dv] = [2, 4, 9, 24], got [2, 4, 8, 24]",
        ),
        ((output, output.double(), logsumexp), "output must be float32, got float64"),
        ((output, output, logsumexp[:1]), "logsumexp must be [B, H, Tq] = [2, 4, 9], got [1, 4, 9]"),
        ((output, output, logsumexp.half()), "logsumexp must be float32, got float16"),
    ):
        grad_output, *kept = wrong
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            backward(grad_output, *inputs, *kept, *rest)
    if device == "cuda":  # no other device keeps a output_minus_initial_value
        with pytest.raises((ValueError, RuntimeError), match="output_minus_initial_value must be"):
            backward(output, *inputs, output, logsumexp, *rest, output[:1])


def test_which_gradients_want_the_departure_on_cards_that_are_not_here(monkeypatch) -> None:
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
    # cuDNN takes padding, but not where the last of its tiles is half empty; flash-attention 2 takes none.
    assert [wanted(blackwell, *case, masked=True) for case in ((300, 128), (320, 128), (300, 256))] == [
        True,
        False,
        False,
    ]
    assert [wanted(ada, 300, size) for size in (128, 192, 200, 224, 256)] == [True, True, False, False, True]
    assert wanted(ampere, 300, 200)
    assert not wanted(ampere, 300, 128, masked=True)
    assert [wanted(ampere, 8192, 128, batch=batch) for batch in (63, 64)] == [True, False]  # 2^31 sums
    assert not wanted(ampere, 16, 64, batch=65536)
    assert not wanted((7, 5), 300, 64)
