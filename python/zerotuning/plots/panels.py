"""Kinds of panels that several pictures share: curves with bands, bars with intervals, a map of all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zerotuning.plots.style import DIVERGING, INK, LABEL_SIZE, LINES, MARKERS, QUIET, SERIES, label_axes


def line_with_band(axes: Any, series: int, across: Sequence[float], means: Any, halves: Any, name: str) -> None:
    """Draw one curve with its 95 % band; no band where the half widths are NaN.

    Args:
        axes: The panel.
        series: Number of the curve; chooses its colour, line style and marker.
        across: Horizontal places.
        means: The curve's values.
        halves: Half widths of the band.
        name: Of the curve, in the legend.
    """
    middle, half = np.asarray(means, dtype=float), np.nan_to_num(np.asarray(halves, dtype=float))
    colour = SERIES[series % len(SERIES)]
    style, marker = LINES[series % len(LINES)], MARKERS[series % len(MARKERS)]
    axes.plot(across, middle, style, color=colour, marker=marker, markersize=4, label=name)
    axes.fill_between(across, middle - half, middle + half, color=colour, alpha=0.15, linewidth=0)


def bars_with_intervals(axes: Any, names: Sequence[str], means: Any, lows: Any, highs: Any, series: int = 0) -> None:
    """Draw horizontal bars, the first name on top, each with its interval [low, high]."""
    middle = np.asarray(means, dtype=float)
    errors = np.abs(np.stack((middle - np.asarray(lows, dtype=float), np.asarray(highs, dtype=float) - middle)))
    rows = np.arange(len(names))
    axes.barh(rows, middle, color=SERIES[series % len(SERIES)], alpha=0.8, height=0.7)
    axes.errorbar(middle, rows, xerr=np.nan_to_num(errors), fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()


def map_of_heads(axes: Any, values: np.ndarray, title: str, unit: str, least_end: float = 1e-12) -> None:
    """Draw a value of each head, layers from left to right, with colours around zero.

    Args:
        axes: The panel.
        values: [layers, heads].
        title: Of the panel.
        unit: Beside the bar of colours.
        least_end: The colours end at the 99 % quantile of |values|, or here if that is smaller.
    """
    end = max(float(np.quantile(np.abs(values), 0.99)), least_end)
    mesh = axes.pcolormesh(values.T, cmap=DIVERGING, vmin=-end, vmax=end)
    axes.invert_yaxis()
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(unit, fontsize=LABEL_SIZE)
    label_axes(axes, title, "layer", "head")


def gamma_axis(axes: Any, gammas: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, labelled at the γ that were measured."""
    axes.set_xscale("log")
    axes.set_xticks(list(gammas), [f"{gamma:g}" for gamma in gammas])
    axes.set_xticks([], minor=True)
