"""The route of a call on the present GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from cuda_calls import (
    CAPABILITY,
    CUDNN,
    FLASH,
    HOPPER,
    MEASURED,
    PLAIN,
    by_route,
    needs_hopper,
)
from formula import error, random_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from zerotuning.bench import attention_cuda as bench_cuda
from zerotuning.bench.peers import attention_inputs

pytestmark = pytest.mark.gpu


def test_the_fake_output_minus_initial_value_has_the_shape_of_the_real_tensor() -> None:
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


@needs_hopper
def test_the_chosen_route_is_within_5_percent_of_the_fastest_measured_one() -> None:
    names = {"forward, by route": 0, "forward + backward, by backward's route": 1}
    measured = json.loads((MEASURED / "bench_attention_h100.json").read_text())
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
def test_the_choice_for_heads_that_hoppers_backward_does_not_support_is_flash() -> None:
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


def test_an_environment_variable_prints_each_distinct_call_once() -> None:
    program = """
import torch
from zerotuning import ops
query, key = (torch.randn(1, heads, 8, 64, device="cuda") for heads in (4, 2))
for _ in range(3):
    ops.attention(query, key, key, torch.zeros(4, device="cuda"))
ops.decode_attention(query[:, :, :1].bfloat16(), key.bfloat16(), key.bfloat16(), torch.zeros(4, device="cuda"))
"""
    environment = {**os.environ, "ZEROTUNING_PRINT_ROUTES": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    printed = [line for line in done.stderr.splitlines() if line.startswith("zerotuning: ")]
    card = f"sm_{10 * CAPABILITY[0] + CAPABILITY[1]}"
    sizes = "1 x 4/2 heads x {} queries x 8 keys, head size 64, {}, " + card
    assert printed == [
        f"zerotuning: forward {sizes.format(8, 'float32')}: plain",
        f"zerotuning: decode {sizes.format(1, 'bfloat16')}: rings",
    ]
