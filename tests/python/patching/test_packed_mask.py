"""Reading packed masks out of transformers' mask functions, and the functions that are not read as packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packings import PACKINGS, encoded_packed_mask, numbers_and_positions, packed_mask_function
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function, or_masks
from zerotuning.patching import packed_mask
from zerotuning.patching.packed_mask import read_packed_mask

LENGTH = 24


def test_masks_that_older_transformers_compose_without_positions_are_read() -> None:
    numbers, _ = numbers_and_positions(PACKINGS["uneven_rows"])
    same = masking_utils.packed_sequence_mask_function(numbers)
    windowed = masking_utils.sliding_window_causal_mask_function(5)
    for function, window in ((causal_mask_function, 0), (windowed, 5)):
        encoded = read_packed_mask(and_masks(function, same), None, 3, LENGTH, "cpu")
        assert encoded is not None
        assert torch.equal(encoded, encoded_packed_mask(PACKINGS["uneven_rows"], window))


def always(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= 0


def other_masks() -> dict[str, Any]:
    numbers, positions = numbers_and_positions([[11, 13]])
    same = masking_utils.packed_sequence_mask_function(numbers)
    packed = packed_mask_function(numbers, positions)
    torn = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 1] * 12]))
    chunked = masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long))
    masks = {
        "not_packed": and_masks(causal_mask_function, always),
        "not_causal": same,
        "united": or_masks(packed, always),
        "with_another_part": and_masks(packed, always),
        "with_another_part_inside": packed_mask_function(
            numbers, positions, base=or_masks(causal_mask_function, always)
        ),
        "chunked": packed_mask_function(numbers, positions, base=chunked),
        "torn_sequences": and_masks(causal_mask_function, torn),
        "packed_twice": and_masks(packed, same),
        "of_another_length": and_masks(
            causal_mask_function, masking_utils.packed_sequence_mask_function(torch.zeros(1, 30, dtype=torch.long))
        ),
        "window_in_a_tensor": and_masks(packed, masking_utils.sliding_window_overlay(torch.tensor(3))),
        "numbers_that_are_not_whole": and_masks(
            causal_mask_function, masking_utils.packed_sequence_mask_function(numbers / 2)
        ),
        "no_function": None,
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        remap = masking_utils.remap_positions_for_packed_sequence
        masks |= {
            "positions_that_do_not_count_up": and_masks(remap(causal_mask_function, positions.flip(1)), same),
            "sequences_taken_at_positions": remap(and_masks(causal_mask_function, same), positions),
            "positions_of_positions": and_masks(remap(remap(causal_mask_function, positions), positions), same),
        }
    return masks


@pytest.mark.parametrize("name", other_masks())
def test_other_masks_are_not_read_as_packed(name) -> None:
    assert read_packed_mask(other_masks()[name], None, 1, LENGTH, "cpu") is None


def test_mask_functions_changed_by_another_transformers_version_are_not_read(monkeypatch) -> None:
    numbers, positions = numbers_and_positions([[11, 13]])

    def inclusive(window: int) -> Any:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx >= q_idx - window

        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", inclusive)
    packed_mask._factories_are_as_expected.cache_clear()
    try:
        assert read_packed_mask(packed_mask_function(numbers, positions), None, 1, LENGTH, "cpu") is None
    finally:
        packed_mask._factories_are_as_expected.cache_clear()
