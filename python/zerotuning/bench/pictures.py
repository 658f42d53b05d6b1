"""Pictures of a benchmark's rows: ratios between peers, accuracies of methods."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_bytes_atomically
from zerotuning.plots.head_map import can_plot

#: Colours that colour-blind readers can tell apart.
OKABE_ITO = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")


def plot_ratios(result: Mapping[str, Any], path: Path) -> None:
    """Ratios to the first peer, one panel for each `what`, bars grouped by shape."""
    figure_class = _figure_class()
    rows = [row for row in result["rows"] if any("ratio" in figures for figures in row["peers"].values())]
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    figure = figure_class(figsize=(9, 3 * max(len(kinds), 1)), layout="constrained")
    for number, kind in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, number + 1)
        own = [row for row in rows if row["what"] == kind]
        names = list(dict.fromkeys(name for row in own for name in row["peers"]))
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            heights = [row["peers"].get(name, {}).get("ratio", float("nan")) for row in own]
            middles = [i + (place - (len(names) - 1) / 2) * width for i in range(len(own))]
            label = None if number else name
            axes.bar(middles, heights, width, label=label, color=OKABE_ITO[place % len(OKABE_ITO)])
        axes.set_yscale("log")
        axes.axhline(1, color="black", linewidth=0.8)
        shapes = [f"{row['shape']}, {row['dtype']}".replace(", ", "\n") for row in own]
        axes.set_xticks(range(len(own)), shapes, fontsize=7)
        axes.set_ylabel("time / untuned")
        axes.set_title(kind)
    figure.legend(loc="outside upper center", fontsize=8, ncols=6)
    _save(figure, path)


def plot_accuracies(result: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy over tasks of each method of `bench search`, with its 95 % interval."""
    figure_class = _figure_class()
    means = [(row["shape"], *item) for row in result["rows"] if row["what"] == "mean" for item in row["peers"].items()]
    figure = figure_class(figsize=(7, 0.35 * len(means) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, _, one) in enumerate(means):
        axes.plot([one["low"], one["high"]], [place, place], color=OKABE_ITO[0], linewidth=1.5)
        axes.plot(one["accuracy"], place, "o", color=OKABE_ITO[1])
    names = [f"{name}, {shape.split(', ')[1]}" for shape, name, _ in means]
    axes.set_yticks(range(len(means)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy, mean of {means[0][0].split(',')[0]}, and 95 % interval" if means else "accuracy")
    _save(figure, path)


def _figure_class() -> Any:
    if not can_plot():
        raise ZeroTuningError('plot needs matplotlib: pip install "zerotuning[plot]"')
    from matplotlib.figure import Figure

    return Figure


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    write_bytes_atomically(path, picture.getvalue())
