"""Pictures of a benchmark: ratios between peers, accuracies of methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerotuning.plots.style import BLACK, BLUE, SERIES, new_figure, save_figure


def plot_ratios(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratios to the first peer: a panel for each "what" of the rows, with bars grouped by shape.

    Args:
        result: What `run_bench` returns.
        path: The picture, .png or .svg.
    """
    rows = [row for row in result["rows"] if any("ratio" in figures for figures in row["peers"].values())]
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    figure = new_figure(9, 3 * max(len(kinds), 1))
    for number, kind in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, number + 1)
        of_kind = [row for row in rows if row["what"] == kind]
        names = list(dict.fromkeys(name for row in of_kind for name in row["peers"]))
        width = 0.8 / len(names)
        for series, name in enumerate(names):
            heights = [row["peers"].get(name, {}).get("ratio", float("nan")) for row in of_kind]
            middles = [place + (series - (len(names) - 1) / 2) * width for place in range(len(of_kind))]
            label = None if number else name
            axes.bar(middles, heights, width, label=label, color=SERIES[series % len(SERIES)])
        axes.set_yscale("log")
        axes.axhline(1, color=BLACK, linewidth=0.8)
        shapes = [f"{row['shape']}, {row['dtype']}".replace(", ", "\n") for row in of_kind]
        axes.set_xticks(range(len(of_kind)), shapes, fontsize=7)
        axes.set_ylabel("time / untuned")
        axes.set_title(kind)
    figure.legend(loc="outside upper center", fontsize=8, ncols=6)
    save_figure(figure, path)


def plot_accuracies(result: Mapping[str, Any], path: Path) -> None:
    """Draw the mean accuracy over tasks of each method of `bench search`, with its 95 % interval.

    Args:
        result: What `run_bench` returns.
        path: The picture, .png or .svg.
    """
    means = [(row["shape"], *item) for row in result["rows"] if row["what"] == "mean" for item in row["peers"].items()]
    figure = new_figure(7, 0.35 * len(means) + 1.2)
    axes = figure.add_subplot()
    for place, (_, _, one) in enumerate(means):
        axes.plot([one["low"], one["high"]], [place, place], color=BLACK, linewidth=1.5)
        axes.plot(one["accuracy"], place, "o", color=BLUE)
    names = [f"{name}, {shape.split(', ')[1]}" for shape, name, _ in means]
    axes.set_yticks(range(len(means)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy, mean of {means[0][0].split(',')[0]}, and 95 % interval" if means else "accuracy")
    save_figure(figure, path)
