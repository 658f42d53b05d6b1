"""One style for all studies' pictures: labelled axes, a palette that colour-blind eyes tell apart, intervals as bands or bars."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_bytes_atomically
from zerotuning.plots.calibration_page import INK, QUIET, label
from zerotuning.plots.head_map import can_plot

__all__ = [
    "INK",
    "QUIET",
    "bars_with_intervals",
    "distinct",
    "label",
    "legend",
    "line_with_band",
    "map_of_heads",
    "new_figure",
    "save",
    "scale_of_gamma",
]

#: Okabe and Ito's palette, darkest contrasts first; line styles and markers say the same once more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
#: Diverging colours around "no change" that colour-blind eyes tell apart.
DIVERGING = "RdBu_r"
SUFFIXES = (".png", ".svg")


def new_figure(columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Any, list[Any]]:
    """(figure, axes): `rows` x `columns` panels of the given inches, in reading order."""
    if not can_plot():
        raise ZeroTuningError('plots need matplotlib: pip install "zerotuning[plot]"')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    return figure, axes


def line_with_band(axes: Any, place: int, across: Sequence[float], means: Any, halves: Any, name: str) -> None:
    """One curve in style `place` with its 95 % band; no band where the half widths are NaN."""
    middle, half = np.asarray(means, dtype=float), np.nan_to_num(np.asarray(halves, dtype=float))
    colour = COLOURS[place % len(COLOURS)]
    style = LINES[place % len(LINES)]
    axes.plot(across, middle, style, color=colour, marker=MARKERS[place % len(MARKERS)], markersize=4, label=name)
    axes.fill_between(across, middle - half, middle + half, color=colour, alpha=0.15, linewidth=0)


def bars_with_intervals(axes: Any, names: Sequence[str], means: Any, lows: Any, highs: Any, place: int = 0) -> None:
    """Horizontal bars, the first name on top, each with its interval."""
    middle = np.asarray(means, dtype=float)
    errors = np.abs(np.stack((middle - np.asarray(lows, dtype=float), np.asarray(highs, dtype=float) - middle)))
    rows = np.arange(len(names))
    axes.barh(rows, middle, color=COLOURS[place % len(COLOURS)], alpha=0.8, height=0.7)
    axes.errorbar(middle, rows, xerr=np.nan_to_num(errors), fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()


def map_of_heads(axes: Any, values: np.ndarray, title: str, unit: str) -> None:
    """values [L, H], layers from left to right, colours around 0 ending at the 99 % quantile of |values|."""
    end = max(float(np.quantile(np.abs(values), 0.99)), 1e-12)
    mesh = axes.pcolormesh(values.T, cmap=DIVERGING, vmin=-end, vmax=end)
    axes.invert_yaxis()
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(unit, fontsize=9)
    label(axes, title, "layer", "head")


def scale_of_gamma(axes: Any, gammas: Sequence[float]) -> None:
    """A logarithmic horizontal axis, labelled at the γ that were measured."""
    axes.set_xscale("log")
    axes.set_xticks(list(gammas), [f"{gamma:g}" for gamma in gammas])
    axes.set_xticks([], minor=True)


def legend(axes: Any) -> None:
    axes.legend(fontsize=8, frameon=False)


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """The figure as PNG (150 dpi) and SVG, each written whole; the same figure gives the same bytes."""
    import matplotlib

    written = []
    for suffix in SUFFIXES:
        picture = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if suffix == ".svg" else {}
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(picture, format=suffix[1:], dpi=150, metadata=metadata)
        written.append(write_bytes_atomically(folder / f"{name}{suffix}", picture.getvalue()))
    return written


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(values))
