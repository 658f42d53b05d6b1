"""Rows of packed sequences that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function
from zerotuning.attention.mask_encoding import PackedMask, decode
from zerotuning.patching.packed_mask import read_packed_mask

#: Lengths of the sequences of each row.
PACKINGS = {
    "one_row": [[11, 13]],
    "uneven_rows": [[1, 20, 1, 2], [24], [3, 4, 8, 9]],
    "single_tokens": [[1] * 24, [1] * 8 + [16]],
}


def numbers_and_positions(lengths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (B, T) tensors: the number of each token's sequence in its row, and the token's place in the sequence."""
    numbers = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    positions = [[place for length in row for place in range(length)] for row in lengths]
    return torch.tensor(numbers), torch.tensor(positions)


def packed_mask_function(numbers: Tensor, positions: Tensor, window: int = 0, base: Any = causal_mask_function) -> Any:
    """Compose the mask function as create_causal_mask and create_sliding_window_causal_mask of transformers do."""
    if window:
        base = masking_utils.sliding_window_causal_mask_function(window)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        base = masking_utils.remap_positions_for_packed_sequence(base, positions)
    return and_masks(base, masking_utils.packed_sequence_mask_function(numbers))


def encoded_packed_mask(lengths: Sequence[Sequence[int]], window: int = 0, real: Tensor | None = None) -> Tensor:
    numbers, positions = numbers_and_positions(lengths)
    encoded = read_packed_mask(packed_mask_function(numbers, positions, window), real, *numbers.shape, "cpu")
    assert encoded is not None
    return encoded


def packed_mask(lengths: Sequence[Sequence[int]], window: int = 0, real: Tensor | None = None) -> PackedMask:
    length = sum(lengths[0])
    mask = decode(encoded_packed_mask(lengths, window, real), length, length)
    assert isinstance(mask, PackedMask)
    return mask


def ids_of(lengths: Sequence[Sequence[int]], seed: int = 5) -> tuple[Tensor, Tensor]:
    numbers, positions = numbers_and_positions(lengths)
    return torch.randint(3, 128, numbers.shape, generator=torch.Generator().manual_seed(seed)), positions
