"""One page of plots of a calibration: the search by step, the scales, and the predictions before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zerotuning.plots.head_map import ScalesOfHeads
from zerotuning.plots.panels import map_of_heads
from zerotuning.plots.style import (
    BLUE,
    GREY,
    INK,
    QUIET,
    SKY_BLUE,
    SMALL_SIZE,
    VERMILION,
    add_legend,
    check_picture_path,
    label_axes,
    new_figure,
    save_figure,
)

_FIT, _HELD_OUT, _BEFORE, _AFTER = SKY_BLUE, BLUE, GREY, VERMILION
#: Up to this number of labels, their names stand beside the confusions; more names would not be readable.
_NAMED_LABELS = 12


def plot_report(scales: ScalesOfHeads, report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the page of a Calibration. With several tasks, confusions and entropies are those of the first task.

    Args:
        scales: The calibration's scales.
        report: The calibration's report.
        path: The picture: .png (110 dpi), .svg or .pdf; written whole or not at all.

    Returns:
        The path.

    Raises:
        ZeroTuningError: matplotlib is missing, the suffix is another one, or the file cannot be written.
    """
    figure = new_figure(13.5, 10.5)
    grid = figure.add_gridspec(3, 6)
    _draw_loss(figure.add_subplot(grid[0, :3]), report)
    if report.get("profile"):
        _draw_profile(figure.add_subplot(grid[0, 3:]), report["profile"])
    else:
        _draw_accuracy(figure.add_subplot(grid[0, 3:]), report)
    _draw_heads(figure.add_subplot(grid[1, :3]), scales)
    _draw_layers(figure.add_subplot(grid[1, 3:]), scales)
    task = (report.get("tasks") or [{}])[0]
    _draw_entropy(figure.add_subplot(grid[2, :2]), task)
    _draw_confusion(figure.add_subplot(grid[2, 2:4]), task, "baseline", "before (γ = 1)")
    _draw_confusion(figure.add_subplot(grid[2, 4:]), task, "tuned", "after")
    figure.suptitle(_title(report), fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left", parse_math=False)
    return save_figure(figure, check_picture_path(path), dpi=110)


def _title(report: Mapping[str, Any]) -> str:
    outcome = "" if report["improved"] else " · nothing better than γ = 1 found"
    return f"{report['task']} · {report['method']} · {report['objective']} · {report['examples']} examples{outcome}"


def _draw_loss(axes: Any, report: Mapping[str, Any]) -> None:
    for name, key, colour, style in (
        ("fit examples", "fit_loss", _FIT, "--"),
        ("held-out examples", "held_out_loss", _HELD_OUT, "-"),
    ):
        for index, points in enumerate(_curves(report["history"], key)):
            axes.plot(*points, style, color=colour, linewidth=1.6, label=name if index == 0 else None)
    baseline = report["baseline"]["loss"]
    axes.axhline(baseline, color=_BEFORE, linewidth=1, linestyle=":", label="held out, γ = 1")
    _mark_chosen(axes, report)
    label_axes(axes, "loss by step", "step", f"{report['objective']} (nats)")
    add_legend(axes)


def _draw_accuracy(axes: Any, report: Mapping[str, Any]) -> None:
    for points in _curves(report["history"], "held_out_accuracy"):
        axes.plot(points[0], 100 * np.array(points[1]), "-", color=_HELD_OUT, linewidth=1.6)
    label_axes(axes, "held-out accuracy by step", "step", "accuracy (%)")
    baseline = report["baseline"].get("accuracy")
    if baseline is None:
        _write_note(axes, "no labels")
        return
    axes.axhline(100 * baseline, color=_BEFORE, linewidth=1, linestyle=":", label="γ = 1")
    _mark_chosen(axes, report)
    add_legend(axes)


def _curves(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[list[float], list[float]]]:
    """(steps, values) for each penalty."""
    penalties = dict.fromkeys(entry.get("penalty") for entry in history)
    curves = []
    for penalty in penalties:
        chosen = [e for e in history if e.get("penalty") == penalty and e.get(key) is not None]
        if chosen:
            curves.append(([e["step"] for e in chosen], [e[key] for e in chosen]))
    return curves


def _mark_chosen(axes: Any, report: Mapping[str, Any]) -> None:
    if report["method"] == "gradient" and report["improved"]:
        axes.axvline(report["chosen"]["step"], color=_AFTER, linewidth=1, linestyle="-.", label="chosen")


def _draw_profile(axes: Any, profile: Mapping[str, Any]) -> None:
    effects = np.array([np.nan if effect is None else effect for effect in profile["effect"]])
    chosen = np.isin(np.arange(len(effects)), profile["group"])
    for name, which, colour in (("tuned group", chosen, _AFTER), ("other heads", ~chosen, _BEFORE)):
        axes.vlines(np.flatnonzero(which), 0, effects[which], color=colour, linewidth=1, label=name)
    axes.axhline(0, color=INK, linewidth=0.6)
    label_axes(axes, "profile: fall of the loss when a head is scaled up", "head (layer by layer)", "effect")
    add_legend(axes)


def _draw_heads(axes: Any, scales: ScalesOfHeads) -> None:
    map_of_heads(axes, np.log2(scales.gamma.double().numpy()), "γ of every head", "log₂ γ", least_end=0.1)


def _draw_layers(axes: Any, scales: ScalesOfHeads) -> None:
    log2_gamma = np.log2(scales.gamma.double().numpy())
    layers = np.arange(log2_gamma.shape[0])
    spread = np.repeat(layers, log2_gamma.shape[1])
    axes.plot(spread, log2_gamma.reshape(-1), ".", color=_HELD_OUT, alpha=0.5, markersize=4, label="head")
    axes.plot(layers, log2_gamma.mean(axis=1), "-", color=_AFTER, linewidth=1.8, label="mean of the layer")
    axes.axhline(0, color=_BEFORE, linewidth=1, linestyle=":", label="γ = 1")
    label_axes(axes, "γ by layer", "layer", "log₂ γ")
    add_legend(axes, loc="upper left", ncols=3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))


def _draw_entropy(axes: Any, task: Mapping[str, Any]) -> None:
    label_axes(axes, "entropy of the held-out predictions", "entropy (nats)", "examples")
    if "tuned_entropies" not in task:
        _write_note(axes, "no labels to choose among")
        return
    before, after = task["baseline_entropies"], task["tuned_entropies"]
    bins = np.linspace(0, max([*before, *after, 0.1]), 21)
    axes.hist(before, bins, color=_BEFORE, alpha=0.55, label="before")
    axes.hist(after, bins, histtype="step", color=_AFTER, linewidth=1.8, label="after")
    add_legend(axes)


def _draw_confusion(axes: Any, task: Mapping[str, Any], which: str, title: str) -> None:
    label_axes(axes, f"{task.get('task', '')}, {title}".lstrip(", "), "predicted", "gold")
    table = task.get(f"{which}_confusion")
    if table is None:
        _write_note(axes, "no labels")
        return
    counts = np.array(table)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    named = len(counts) <= _NAMED_LABELS
    places, names = (range(len(counts)), task["labels"]) if named else ([], [])
    axes.set_xticks(places, names, rotation=35, ha="right", parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    for row, column in np.ndindex(*counts.shape) if named else ():
        dark = shares[row, column] > 0.5
        axes.text(
            column,
            row,
            counts[row, column],
            ha="center",
            va="center",
            fontsize=SMALL_SIZE,
            color="white" if dark else INK,
        )


def _write_note(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
