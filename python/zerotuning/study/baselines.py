"""`zerotuning study baselines`: head scales against other ways to use the same few examples of a frozen model.

All methods (baseline_methods.py) choose by the same validation examples and are judged by the same test examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from zerotuning.plots.panels import bars_with_intervals
from zerotuning.plots.style import label_axes
from zerotuning.statistics import wilson_interval
from zerotuning.study.baseline_methods import METHODS, Draw
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row
from zerotuning.study.pictures import new_panels
from zerotuning.study.rows import accuracy_with_interval, paired_gain, select, tasks_of
from zerotuning.study.setting import Setting, figures_of


def cells(setting: Setting) -> Iterator[Cell]:
    """One cell for each task, seed and method (of `Setting.parts`)."""
    numbers = setting.numbers
    for name in numbers.tasks:
        for seed in range(numbers.num_draws):
            draw = Draw(setting, name, seed)
            for method in setting.parts or METHODS:
                key = {"task": name, "seed": seed, "method": method}
                key |= {"examples": numbers.examples, "limit": numbers.limit, "size": setting.size}
                yield Cell(key, partial(_measure, draw, method))


def _measure(draw: Draw, method: str) -> dict[str, Any]:
    outcome = METHODS[method].run(draw)
    labels = draw.scorers[1].labels
    right = (outcome.scores.argmax(dim=-1) == labels).int().tolist()
    low, high = wilson_interval(sum(right), len(right))
    return {
        **figures_of(outcome.scores, labels),
        "low": low,
        "high": high,
        "right": right,
        "numbers": outcome.numbers,
        "tuning_seconds": round(outcome.tuning_seconds, 3),
        "chosen": dict(outcome.chosen),
    }


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw a panel for each task: accuracy of each method with its 95 % interval."""
    tasks = tasks_of(rows)
    figure, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        present = [method for method in METHODS if select(rows, task=task, method=method)]
        accuracies = [_accuracy(select(rows, task=task, method=method)) for method in present]
        means, lows, highs = zip(*accuracies, strict=True)
        bars_with_intervals(axes, [METHODS[method].title for method in present], means, lows, highs)
        label_axes(axes, task, "accuracy (%)", "")
    return {"": figure}


def table(rows: Sequence[Row]) -> str:
    """A table for each task, a line for each method: accuracy and gain over untuned with intervals, loss, effort."""
    parts = []
    for task in tasks_of(rows):
        lines = [f"**{task}**", ""]
        lines.append("| method | accuracy, % | gain, points | loss, nats | numbers tuned | s of tuning | chosen |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        lines += [_line(rows, task, method) for method in METHODS if select(rows, task=task, method=method)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(rows: Sequence[Row], task: str, method: str) -> str:
    of_method = select(rows, task=task, method=method)
    mean, low, high = _accuracy(of_method)
    shown = [
        METHODS[method].title,
        f"{mean:.1f} [{low:.1f}, {high:.1f}]",
        _gain(of_method, select(rows, task=task, method="untuned")),
    ]
    shown += [f"{np.mean([row['loss'] for row in of_method]):.3f}", str(of_method[0]["numbers"])]
    shown += [f"{np.mean([row['tuning_seconds'] for row in of_method]):.0f}", "; ".join(map(_choice, of_method))]
    return f"| {' | '.join(shown)} |"


def _choice(row: Row) -> str:
    """Describe the settings that a row's method chose, in a few words."""
    chosen = row["chosen"]
    if "bias" in chosen:
        return ""
    if "improved" in chosen:
        return "" if chosen["improved"] else f"γ = 1: {chosen['reason']}"
    return ", ".join(f"{name} {value:g}" if not isinstance(value, str) else value for name, value in chosen.items())


def _accuracy(rows: Sequence[Row]) -> tuple[float, float, float]:
    return accuracy_with_interval([correct for row in rows for correct in row["right"]])


def _gain(of_method: Sequence[Row], untuned: Sequence[Row]) -> str:
    """Points over untuned on the same examples with their interval; nothing for untuned itself."""
    before = {row["key"]["seed"]: row["right"] for row in untuned}
    pairs = [
        pair
        for row in of_method
        if row["key"]["seed"] in before
        for pair in zip(before[row["key"]["seed"]], row["right"], strict=True)
    ]
    if not pairs or of_method[0]["key"]["method"] == "untuned":
        return ""
    mean, low, high = paired_gain(pairs)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


STUDY = Experiment(
    name="baselines",
    question="What do other ways to use the same examples of a frozen model give, beside head scales?",
    numbers={
        "small": Numbers(("sst2",), num_draws=1, examples=4, limit=4),
        "full": Numbers(("sst2", "trec"), num_draws=1, examples=32, limit=100),
    },
    cells=cells,
    figures=figures,
    table=table,
    parts=tuple(METHODS),
)
