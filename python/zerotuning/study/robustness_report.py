"""Pictures and tables of `zerotuning study robustness`: accuracy untuned and tuned and paired gain, by condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zerotuning.plots.panels import bars_with_intervals, line_with_band
from zerotuning.plots.style import SERIES, add_legend, label_axes
from zerotuning.study.experiment import Row
from zerotuning.study.pictures import new_panels
from zerotuning.study.robustness_conditions import PARTS
from zerotuning.study.rows import accuracy_with_interval, distinct, paired_gain, select, tasks_of


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a figure for each part, with a panel for each task.

    Where conditions are numbers, curves of accuracy with 95 % bands; else bars of the gains by tuning.
    """
    drawn = {}
    for part in PARTS:
        of_part = select(rows, part=part)
        if of_part:
            draw = _draw_curves if part in ("shots", "context", "examples") else _draw_gains
            drawn[part] = draw(part, of_part)
    return drawn


def _draw_curves(part: str, rows: Sequence[Row]) -> Any:
    tasks = tasks_of(rows)
    figure, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        of_task = select(rows, task=task)
        curves = [("untuned", "untuned", of_task)]
        for tuned_on in distinct(row["key"]["tuned_on"] for row in of_task):
            curves.append(("tuned", f"tuned in {tuned_on}", select(of_task, tuned_on=tuned_on)))
        conditions = sorted({row["key"]["condition"] for row in of_task})
        for series, (which, title, of_curve) in enumerate(curves):
            across = [place for place, condition in enumerate(conditions) if select(of_curve, condition=condition)]
            accuracies = [_accuracy(select(of_curve, condition=conditions[place]), which) for place in across]
            means, lows, highs = zip(*accuracies, strict=True)
            line_with_band(axes, series, across, means, [0.0] * len(means), title)
            axes.fill_between(across, lows, highs, color=SERIES[series], alpha=0.15, linewidth=0)
        axes.set_xticks(range(len(conditions)), [f"{condition:,}" for condition in conditions])
        label_axes(axes, task, PARTS[part], "accuracy (%)")
    add_legend(panels[0])
    return figure


def _draw_gains(part: str, rows: Sequence[Row]) -> Any:
    tasks = tasks_of(rows)
    figure, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        of_task = select(rows, task=task)
        conditions = distinct(row["key"]["condition"] for row in of_task)
        gains = [_gain(select(of_task, condition=condition)) for condition in conditions]
        means, lows, highs = zip(*gains, strict=True)
        bars_with_intervals(axes, [str(condition) for condition in conditions], means, lows, highs)
        label_axes(axes, task, "gain in accuracy by tuning (points)", PARTS[part])
    return figure


def table(rows: Sequence[Row]) -> str:
    """A table for each part, with a line for each task and condition.

    A line has the accuracy untuned and tuned, and the paired gain with its 95 % interval.
    """
    blocks = []
    for part, varied in PARTS.items():
        of_part = select(rows, part=part)
        if not of_part:
            continue
        lines = [
            f"**{part}**",
            "",
            f"| task | {varied} | tuned in | untuned, % | tuned, % | gain, points | loss, nats |",
        ]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for task, condition, tuned_on in distinct(
            (row["key"]["task"], row["key"]["condition"], row["key"]["tuned_on"]) for row in of_part
        ):
            of_line = select(of_part, task=task, condition=condition, tuned_on=tuned_on)
            lines.append(_table_line(of_line, task, condition, tuned_on))
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *_searches_without_result(rows)])


def _table_line(rows: Sequence[Row], task: str, condition: Any, tuned_on: str) -> str:
    before, after = _accuracy(rows, "untuned")[0], _accuracy(rows, "tuned")[0]
    mean, low, high = _gain(rows)
    loss = ""
    if "loss" in rows[0]["untuned"]:
        losses = [np.mean([row[which]["loss"] for row in rows]) for which in ("untuned", "tuned")]
        loss = f"{losses[0]:.3f} → {losses[1]:.3f}"
    gain = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"| {task} | {condition} | {tuned_on} | {before:.1f} | {after:.1f} | {gain} | {loss} |"


def _searches_without_result(rows: Sequence[Row]) -> list[str]:
    """A sentence for each search that ended at γ = 1: in the rows with its scales tuned equals untuned."""
    return [
        f"Scales of {key['task']}, seed {key['seed']}, {key['examples']} examples, {key['shots']} shots "
        f"stayed at γ = 1: {row['reason']}."
        for row in select(rows, part="scales")
        if (key := row["key"]) and not row["improved"]
    ]


def _accuracy(rows: Sequence[Row], which: str) -> tuple[float, float, float]:
    return accuracy_with_interval([correct for row in rows for correct in row[which]["right"]])


def _gain(rows: Sequence[Row]) -> tuple[float, float, float]:
    return paired_gain(_pairs(rows))


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    for row in rows:
        yield from zip(row["untuned"]["right"], row["tuned"]["right"], strict=True)
