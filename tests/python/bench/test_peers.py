"""The peers of the attention benchmarks against the formula."""

from __future__ import annotations

import pytest
import torch
from zerotuning.attention import reference
from zerotuning.bench import peers


@pytest.mark.parametrize("peer", [peers.ours, peers.paper_eager, peers.additive_mask])
def test_every_tuned_peer_computes_the_formula(peer) -> None:
    torch.manual_seed(0)
    inputs = peers.attention_inputs((4, 2, 32), 40, torch.float32)
    want, _ = reference.attention(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(peer(*inputs).double(), want, rtol=1e-5, atol=1e-5)


def test_the_untuned_peer_is_the_formula_at_gamma_1() -> None:
    inputs = peers.attention_inputs((4, 2, 32), 40, torch.float32)
    inputs[3] = torch.zeros(4)
    torch.testing.assert_close(peers.untuned_sdpa(*inputs), peers.ours(*inputs), rtol=1e-5, atol=1e-5)
