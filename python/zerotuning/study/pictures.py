"""The pictures of a study: panels of one size, written as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zerotuning.plots.style import new_figure, save_figure

SUFFIXES = (".png", ".svg")


def new_panels(columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.4) -> tuple[Any, list[Any]]:
    """An empty figure of `rows` x `columns` panels.

    Args:
        columns: Panels in a row.
        rows: Rows of panels.
        width: Of a panel, inches.
        height: Of a panel, inches.

    Returns:
        (figure, axes), the axes in reading order.
    """
    figure = new_figure(width * columns, height * rows)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    return figure, axes


def save_pictures(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write the figure as NAME.png and NAME.svg in the folder; the same figure gives the same bytes."""
    return [save_figure(figure, folder / f"{name}{suffix}") for suffix in SUFFIXES]
