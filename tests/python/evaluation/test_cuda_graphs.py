"""What a recording is as large as; recordings themselves: test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from zerotuning.evaluation.cuda_graphs import recorded_tokens


@pytest.mark.parametrize(
    ("sequences", "length", "copies", "tokens"),
    [
        (16, 128, 1, 16 * 128),  # multiples of a step stay as they are
        (16, 129, 1, 16 * 144),
        (8, 512, 1, 8 * 512),
        (9, 57, 1, 16 * 64),
        (3, 1, 1, 4 * 8),
        (6, 40, 2, 2 * 4 * 40),  # two copies of three sequences, each rounded up to four
    ],
)
def test_few_shapes_are_recorded(sequences: int, length: int, copies: int, tokens: int) -> None:
    assert recorded_tokens(torch.zeros(sequences, length), copies) == tokens


def test_a_recording_is_at_most_an_eighth_longer_than_its_batch() -> None:
    for length in range(64, 3000):
        assert length <= recorded_tokens(torch.zeros(8, length)) / 8 <= length * 9 / 8
