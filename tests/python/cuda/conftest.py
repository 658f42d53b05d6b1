"""Tests of this folder make their tensors on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from formula import poison


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    """Make new tensors on the GPU, in memory that is filled with NaN."""
    torch.set_default_device("cuda")
    poison()
    yield
    torch.set_default_device(None)
