"""HeadScales: accepted values, saved files that are read back unchanged, and errors for damaged files."""

from __future__ import annotations

import math

import pytest
import torch
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import CONFIG_FILE, SCALES_FILE, HeadScales


def test_saved_scales_come_back_the_same(tmp_path) -> None:
    scales = HeadScales(torch.rand(3, 4) + 0.5, {"model_type": "llama", "task": "sst2"})
    scales.save_pretrained(tmp_path / "out")
    read = HeadScales.from_pretrained(tmp_path / "out")
    assert torch.equal(read.gamma, scales.gamma)
    assert read.metadata == scales.metadata
    assert (read.num_layers, read.num_heads) == (3, 4)


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ([1.0, 2.0], r"\[layers, heads\], got \[2\]"),
        ([[1.0, math.nan]], "got nan at layer 0, head 1"),
        ([[1.0], [0.0]], "got 0.0 at layer 1, head 0"),
        ([[-1.0]], "positive and finite"),
        ([[math.inf]], "positive and finite"),
        ("text", "must be numbers"),
    ],
)
def test_anything_but_positive_numbers_by_layer_and_head_is_refused(gamma, message) -> None:
    with pytest.raises(ZeroTuningError, match=message):
        HeadScales(gamma)


def test_counts_and_metadata_of_another_kind_are_refused() -> None:
    for layers, heads, named in ((-1, 4, "layers"), (2, 0, "heads"), (2, 1.5, "heads"), (True, 4, "layers")):
        with pytest.raises(ZeroTuningError, match=f"^{named} must be a positive integer, got "):
            HeadScales.ones(layers, heads)
    with pytest.raises(ZeroTuningError, match=r"^metadata must be a mapping, got 5$"):
        HeadScales([[1.0]], metadata=5)


def test_saved_scales_are_not_overwritten_without_overwrite(tmp_path) -> None:
    HeadScales.ones(2, 2).save_pretrained(tmp_path)
    with pytest.raises(ZeroTuningError, match="already holds head scales"):
        HeadScales.ones(3, 3).save_pretrained(tmp_path)
    assert HeadScales.from_pretrained(tmp_path).num_layers == 2


@pytest.mark.parametrize("file", [SCALES_FILE, CONFIG_FILE])
def test_a_missing_or_damaged_file_is_named(tmp_path, file) -> None:
    HeadScales.ones(2, 2).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"\x05half")
    with pytest.raises(ZeroTuningError, match="cannot be read"):
        HeadScales.from_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"[" * 100_000)
    with pytest.raises(ZeroTuningError, match="cannot be read"):
        HeadScales.from_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ZeroTuningError, match=f"{file} is missing"):
        HeadScales.from_pretrained(tmp_path)
