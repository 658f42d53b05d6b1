"""Tests of this folder run on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from formula import poison


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make every test's tensors on this device."""
    torch.set_default_device(request.param)
    if request.param == "cuda":  # memory that a kernel does not write is NaN
        poison()
    yield request.param
    torch.set_default_device(None)
