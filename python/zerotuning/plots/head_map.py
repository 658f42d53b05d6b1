"""A picture of head scales, γ by layer and head, and a table of them in text."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from zerotuning.plots.style import DIVERGING, INK, QUIET, check_picture_path, new_figure, save_figure


class ScalesOfHeads(Protocol):
    """The fields of :class:`zerotuning.HeadScales` that pictures show."""

    gamma: Tensor  # (layers, heads), > 0
    metadata: dict[str, Any]


# Inches. The map's cells are squares; the figure grows with their number within these bounds.
_LARGEST_CELL = 0.34
_LARGEST_MAP = (11.0, 8.0)
_SMALLEST_WIDTH = 4.6
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.86, 1.0, 0.58, 0.74
_LABELS = 0.44  # from the map's left edge to the labels beside it
_BARS, _GAP = 0.72, 0.10

_BAR_COLOUR, _LINE_COLOUR = "#8a94a0", "#c9ced4"
#: γ at the end of the colour scale -> the γ labelled on the colour bar, beside 1 and the inverses of these γ. The
#: picture uses the first end that covers all but the most extreme hundredth of the heads.
_COLOUR_ENDS = {
    1.25: (1.1, 1.25),
    1.5: (1.25, 1.5),
    2.0: (1.4, 2),
    4.0: (2, 4),
    8.0: (2, 4, 8),
    16.0: (2, 4, 8, 16),
    64.0: (4, 16, 64),
}


def plot_head_map(scales: ScalesOfHeads, path: str | os.PathLike[str], title: str | None = None) -> Path:
    """Draw γ by layer and head, coloured by log2 γ around γ = 1, with mean |log γ| of each layer above the map.

    Args:
        scales: A `HeadScales`.
        path: The picture: .png (150 dpi), .svg or .pdf; written whole or not at all.
        title: Default: task, method and model from the scales' metadata.

    Returns:
        The path.

    Raises:
        ZeroTuningError: matplotlib is missing, the suffix is another one, or the file cannot be written.
    """
    path = check_picture_path(path)
    figure = _draw(np.log2(scales.gamma.double().numpy()), title or title_of(scales))
    return save_figure(figure, path)


def title_of(scales: ScalesOfHeads) -> str:
    """Task, method and model of the scales, as far as their metadata has them."""
    names = [scales.metadata.get(name) for name in ("task", "method")]
    model = scales.metadata.get("model_name") or scales.metadata.get("model_type")
    parts = [*names, Path(str(model)).name if model else None]
    return " · ".join(str(part) for part in parts if part) or "head scales"


def _draw(log2_gamma: np.ndarray, title: str) -> Any:
    """The figure of log2 γ [layers, heads]."""
    layers, heads = log2_gamma.shape
    cell = min(_LARGEST_CELL, _LARGEST_MAP[0] / layers, _LARGEST_MAP[1] / heads)
    map_width, map_height = layers * cell, heads * cell
    width = _LEFT + max(map_width, _SMALLEST_WIDTH - _LEFT - _RIGHT) + _RIGHT
    height = _BOTTOM + map_height + _GAP + _BARS + _TOP
    figure = new_figure(width, height, layout=None)

    def axes(left: float, bottom: float, across: float, up: float, **sharing: Any) -> Any:
        place = (left / width, bottom / height, across / width, up / height)
        return figure.add_axes(place, **sharing)

    head_map = axes(_LEFT, _BOTTOM, map_width, map_height)
    bars = axes(_LEFT, _BOTTOM + map_height + _GAP, map_width, _BARS, sharex=head_map)
    # The colour bar has a readable height even beside a map of very few heads.
    colours = axes(_LEFT + map_width + 0.22, _BOTTOM, 0.15, max(map_height, 1.1))
    mesh, end = _draw_map(head_map, log2_gamma, cell)
    _draw_bars(bars, np.abs(log2_gamma).mean(axis=1) * math.log(2))
    _draw_colours(colours, mesh, end, bool((np.abs(log2_gamma) > math.log2(end)).any()), max(map_height, 1.1))
    for labelled in (head_map, bars):
        labelled.yaxis.set_label_coords(-_LABELS / map_width, 0.5)

    figure.text(
        0.18 / width,
        1 - 0.2 / height,
        _shorten(title, width / 0.105),
        fontsize=11.5,
        fontweight="bold",
        color=INK,
        va="top",
        parse_math=False,
    )
    figure.text(
        0.18 / width,
        1 - 0.47 / height,
        f"γ of {layers} layers × {heads} heads" if width < 6 else _legend(layers, heads),
        fontsize=8.5,
        color=QUIET,
        va="top",
    )
    return figure


def _legend(layers: int, heads: int) -> str:
    return f"γ of {layers} layers × {heads} heads: red attends to the initial token more, blue less than untuned"


def _draw_map(axes: Any, log2_gamma: np.ndarray, cell: float) -> tuple[Any, float]:
    layers, heads = log2_gamma.shape
    extreme = float(np.quantile(np.abs(log2_gamma), 0.99))
    end = next((end for end in _COLOUR_ENDS if extreme <= math.log2(end)), max(_COLOUR_ENDS))
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5,
        np.arange(heads + 1) - 0.5,
        log2_gamma.T,
        cmap=DIVERGING,
        vmin=-math.log2(end),
        vmax=math.log2(end),
        edgecolors="white",
        linewidth=min(1.1, 3.2 * cell),
    )
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(heads - 0.5, -0.5)
    axes.set_xticks(_tick_places(layers, cell))
    axes.set_yticks(_tick_places(heads, cell))
    axes.set_xlabel("layer", fontsize=9.5, color=INK, labelpad=5)
    axes.set_ylabel("head", fontsize=9.5, color=INK, labelpad=5)
    _remove_frame(axes)
    return mesh, end


def _draw_bars(axes: Any, mean_change: np.ndarray) -> None:
    """mean_change: mean |log γ| of each layer, [layers]."""
    axes.bar(np.arange(len(mean_change)), mean_change, width=0.76, color=_BAR_COLOUR, linewidth=0)
    top = float(mean_change.max()) or 1.0
    axes.set_ylim(0, top * 1.12)
    axes.set_yticks([0, top], ["0", f"{top:.2g}" if mean_change.any() else ""])
    axes.set_ylabel("mean\n|log γ|", fontsize=8, color=QUIET, labelpad=5)
    _remove_frame(axes)
    axes.tick_params(axis="x", labelbottom=False)
    axes.spines["bottom"].set(visible=True, color=_LINE_COLOUR, linewidth=0.8)


def _draw_colours(axes: Any, mesh: Any, end: float, beyond: bool, height: float) -> None:
    """Draw the bar of colours, `height` inches high, with pointed ends where heads lie beyond the colours' end."""
    bar = axes.figure.colorbar(mesh, cax=axes, extend="both" if beyond else "neither", extendfrac=0.12 / height)
    named = _COLOUR_ENDS[end]
    ticks = {-math.log2(gamma): f"1/{gamma:g}" for gamma in reversed(named)}
    ticks |= {0.0: "1", **{math.log2(gamma): f"{gamma:g}" for gamma in named}}
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=8.5, colors=INK, length=0, pad=5)
    axes.set_title("γ", fontsize=11, color=INK, pad=7)


def _tick_places(count: int, cell: float) -> list[int]:
    """Ticks far enough apart for their numbers: every place, or every 2nd, 4th, 8th … place."""
    step = 1
    while step * cell < 0.24:
        step *= 2
    return list(range(0, count, step))


def _remove_frame(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=QUIET)


def _shorten(text: str, characters: float) -> str:
    return text if len(text) <= characters else text[: max(1, int(characters) - 1)] + "…"


# Head scales as text.

#: |log γ| from which a head counts as tuned: 5 % up or down.
TUNED = math.log(1.05)


def head_table(scales: ScalesOfHeads, strongest: int = 10) -> str:
    """Count the heads with γ above and below 1, list the strongest, and draw mean |log γ| by layer as bars of text.

    Args:
        scales: A `HeadScales`.
        strongest: How many heads are listed.
    """
    log_scale = scales.gamma.double().log().numpy()
    up, down = int((log_scale > TUNED).sum()), int((log_scale < -TUNED).sum())
    near = log_scale.size - up - down
    lines = [
        f"{log_scale.size} heads: {up} up (γ > 1.05), {down} down (γ < 1/1.05), {near} between",
        f"γ from {math.exp(log_scale.min()):.3g} to {math.exp(log_scale.max()):.3g}",
    ]
    if log_scale.any():
        lines += ["", *_strongest_lines(log_scale, strongest), "", *_layer_lines(log_scale)]
    return "\n".join(lines)


def _strongest_lines(log_scale: np.ndarray, count: int) -> list[str]:
    order = np.argsort(-np.abs(log_scale), axis=None, kind="stable")[:count]
    lines = ["strongest heads", "  layer  head        γ"]
    for layer, head in zip(*np.unravel_index(order, log_scale.shape), strict=True):
        if log_scale[layer, head] != 0:
            lines.append(f"  {layer:5d}  {head:4d}  {math.exp(log_scale[layer, head]):7.3f}")
    return lines


def _layer_lines(log_scale: np.ndarray, width: int = 40) -> list[str]:
    change = np.abs(log_scale).mean(axis=1)
    lines = ["mean |log γ| by layer"]
    for layer, value in enumerate(change):
        lines.append(f"  {layer:5d}  {value:6.3f}  {'█' * round(width * value / change.max())}".rstrip())
    return lines
