"""The look of every picture: colours, text sizes, titled axes, and how a figure is written.

The colours are Okabe and Ito's, which colour-blind readers can tell apart. Line styles and markers repeat the
distinction.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from pathlib import Path
from typing import Any, Literal

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_bytes_atomically

#: Text and axes; secondary text and tick labels.
INK, QUIET = "#22262b", "#6b7480"
BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY_BLUE, GREY = "#cc79a7", "#e69f00", "#56b4e9", "#999999"
#: Colours of series that are compared, highest contrasts first, with a marker and a line style for each.
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
#: matplotlib's colour map for changes: blue below zero, red above.
DIVERGING = "RdBu_r"
TITLE_SIZE, LABEL_SIZE, SMALL_SIZE = 10, 9, 8
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def can_plot() -> bool:
    """Whether matplotlib is installed (the package's extra "plot")."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """An empty matplotlib figure with a canvas of its own: pyplot and its global state are not touched.

    Args:
        width: Inches.
        height: Inches.
        layout: matplotlib's layout engine; None where the axes are placed by hand.

    Raises:
        ZeroTuningError: matplotlib is not installed.
    """
    if not can_plot():
        raise ZeroTuningError('plots need matplotlib: pip install "zerotuning[plot]"')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def check_picture_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path, if its suffix is one of `PICTURE_SUFFIXES`.

    Args:
        path: Where a picture is to be written.
        name: The argument that errors name.

    Raises:
        ZeroTuningError: The suffix is not in `PICTURE_SUFFIXES`.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ZeroTuningError(f"{name} must end in {' or '.join(PICTURE_SUFFIXES)}, got {path}")
    return path


def save_figure(figure: Any, path: Path, dpi: int = 150) -> Path:
    """Write a figure, whole or not at all. The same figure gives the same bytes, whenever it is written.

    Warnings about letters that the font does not have are suppressed.

    Args:
        figure: A matplotlib figure.
        path: The file; its suffix, one of `PICTURE_SUFFIXES`, is the format.
        dpi: Resolution of a .png file.

    Raises:
        ZeroTuningError: The file cannot be written.
    """
    import matplotlib

    suffix = path.suffix.lower()
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    picture = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": path.stem}):
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(picture, format=suffix[1:], dpi=dpi, metadata=metadata, facecolor="white")
    return write_bytes_atomically(path, picture.getvalue())


def label_axes(axes: Any, title: str, across: str, up: str) -> None:
    """Title a panel and name its axes, units included."""
    axes.set_title(title, fontsize=TITLE_SIZE, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(across, fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel(up, fontsize=LABEL_SIZE, color=INK)
    axes.tick_params(labelsize=SMALL_SIZE, colors=QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def add_legend(axes: Any, **placement: Any) -> None:
    """Draw a panel's legend without a frame."""
    axes.legend(fontsize=SMALL_SIZE, frameon=False, **placement)
