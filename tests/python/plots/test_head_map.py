"""The picture and the table of head scales: their contents and their errors."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.plots import head_map, style
from zerotuning.plots.head_map import head_table, plot_head_map, title_of

METADATA = {"task": "sst2", "method": "gradient", "model_name": "models/tiny.gguf"}


def spread_scales(layers: int, heads: int) -> HeadScales:
    torch.manual_seed(0)
    return HeadScales(torch.exp(0.5 * torch.randn(layers, heads)), METADATA)


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize(("layers", "heads"), [(30, 9), (32, 32), (18, 4), (1, 1), (80, 64)])
def test_the_picture_grows_with_the_map_and_stays_of_a_readable_size(tmp_path: Path, layers: int, heads: int) -> None:
    width, height = png_size(plot_head_map(spread_scales(layers, heads), tmp_path / "map.png"))
    assert 4 * 150 <= width <= 14 * 150
    assert 2 * 150 <= height <= 11 * 150


def test_the_picture_pairs_each_cell_with_the_log_of_its_gamma() -> None:
    log2_gamma = np.log2(spread_scales(5, 3).gamma.double().numpy())
    figure = head_map._draw(log2_gamma, "title")
    drawn, bars, _ = figure.axes
    mesh = drawn.collections[0]
    np.testing.assert_allclose(mesh.get_array().reshape(3, 5), log2_gamma.T)
    assert mesh.norm.vmin == -mesh.norm.vmax, "γ = 1 is not in the middle of the colours"
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, np.abs(log2_gamma * np.log(2)).mean(axis=1))


def test_the_colour_range_follows_the_scales_and_its_ticks_are_fractions() -> None:
    def labels(gamma: float) -> list[str]:
        figure = head_map._draw(np.full((4, 4), np.log2(gamma)), "title")
        return [text.get_text() for text in figure.axes[2].get_yticklabels()]

    assert labels(3.0) == ["1/4", "1/2", "1", "2", "4"]
    assert labels(1.0) == ["1/1.25", "1/1.1", "1", "1.1", "1.25"]
    assert labels(50.0)[-1] == "64"


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    assert b"<svg" in plot_head_map(spread_scales(3, 2), tmp_path / "map.SVG").read_bytes()
    assert plot_head_map(spread_scales(3, 2), tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ZeroTuningError, match=r"must end in \.png or \.svg or \.pdf, got .*map\.jpg"):
        plot_head_map(spread_scales(3, 2), tmp_path / "map.jpg")


@pytest.mark.parametrize("title", ["$x_{$", "评论分类", "a" * 500])
def test_any_task_name_makes_a_title(tmp_path: Path, title: str, recwarn: pytest.WarningsRecorder) -> None:
    plot_head_map(spread_scales(3, 2), tmp_path / "map.png", title=title)
    assert not list(recwarn)


def test_the_title_names_task_method_and_model() -> None:
    assert title_of(HeadScales.ones(2, 2)) == "head scales"
    assert title_of(spread_scales(2, 2)) == "sst2 · gradient · tiny.gguf"


def test_drawing_does_not_use_pyplots_global_state(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    plot_head_map(spread_scales(3, 2), tmp_path / "map.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(style, "can_plot", lambda: False)
    with pytest.raises(ZeroTuningError, match=r'pip install "zerotuning\[plot\]"'):
        plot_head_map(spread_scales(3, 2), tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroTuningError, match="cannot write"):
        plot_head_map(spread_scales(3, 2), tmp_path / "missing" / "map.png")
    assert not list(tmp_path.iterdir())


def test_the_table_counts_heads_and_ranks_them_by_strength() -> None:
    gamma = torch.ones(2, 3)
    gamma[0, 2], gamma[1, 0], gamma[1, 1] = 1.5, 0.25, 1.01
    lines = head_table(HeadScales(gamma)).splitlines()
    assert lines[0] == "6 heads: 1 up (γ > 1.05), 1 down (γ < 1/1.05), 4 between"
    ranks = lines[lines.index("strongest heads") + 2 :][:3]
    assert [line.split() for line in ranks] == [["1", "0", "0.250"], ["0", "2", "1.500"], ["1", "1", "1.010"]]
    layers = lines[lines.index("mean |log γ| by layer") + 1 :]
    assert [line.split()[1] for line in layers] == ["0.135", "0.465"]
    assert layers[1].count("█") == 40
    assert layers[0].count("█") == round(40 * 0.135 / 0.465)


def test_the_table_of_untouched_scales_has_no_ranks() -> None:
    assert head_table(HeadScales.ones(2, 3)).splitlines() == [
        "6 heads: 0 up (γ > 1.05), 0 down (γ < 1/1.05), 6 between",
        "γ from 1 to 1",
    ]
