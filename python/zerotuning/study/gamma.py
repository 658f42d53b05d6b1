"""`zerotuning study gamma`: accuracy, loss and output entropy with one γ for all heads.

The label-free mode of the paper (section 4) chooses the γ with the least entropy. The study shows the accuracy
of that γ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from zerotuning.plots.panels import gamma_axis, line_with_band
from zerotuning.plots.style import QUIET, add_legend, label_axes
from zerotuning.statistics import mean_and_half_width
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row
from zerotuning.study.pictures import new_panels
from zerotuning.study.rows import select, tasks_of
from zerotuning.study.setting import Setting, figures_of

GAMMAS = (0.1, 0.3, 0.6, 1.0, 1.7, 3.0, 10.0)
SMALL_GAMMAS = (0.5, 1.0, 2.0)


def cells(setting: Setting) -> Iterator[Cell]:
    """One cell for each task, seed and γ, on test examples drawn by the seed."""
    numbers = setting.numbers
    for name in numbers.tasks:
        for seed in range(numbers.num_draws):
            for gamma in SMALL_GAMMAS if setting.size == "small" else GAMMAS:
                key = {"task": name, "seed": seed, "limit": numbers.limit, "gamma": gamma}
                yield Cell(key, partial(_measure, setting, name, seed, gamma))


def _measure(setting: Setting, name: str, seed: int, gamma: float) -> dict[str, Any]:
    scorer = setting.scorer(setting.task(name), setting.tests(name, seed))
    return figures_of(setting.scores(scorer, math.log(gamma)), scorer.labels)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw accuracy, loss and entropy against γ: three panels with a curve for each task."""
    figure, panels = new_panels(columns=3)
    gammas = sorted({row["key"]["gamma"] for row in rows})
    for axes, (what, unit, factor) in zip(panels, _FIGURES, strict=True):
        for series, task in enumerate(tasks_of(rows)):
            intervals = [
                mean_and_half_width([factor * v for v in _values(rows, task, gamma, what)]) for gamma in gammas
            ]
            means, halves = zip(*intervals, strict=True)
            line_with_band(axes, series, gammas, means, halves, task)
        gamma_axis(axes, gammas)
        axes.axvline(1, color=QUIET, linewidth=0.8)
        label_axes(axes, what, "γ of all heads", unit)
    add_legend(panels[0])
    return {"": figure}


_FIGURES = (("accuracy", "accuracy (%)", 100.0), ("loss", "loss (nats)", 1.0), ("entropy", "entropy (nats)", 1.0))


def table(rows: Sequence[Row]) -> str:
    """A line for each task: accuracy at γ = 1, and the γ of best accuracy, least loss and least entropy with theirs."""
    lines = ["| task | γ = 1 | best γ, accuracy | γ of least loss, accuracy | γ of least entropy, accuracy |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for task in tasks_of(rows):
        by_gamma = {
            gamma: {what: mean_and_half_width(_values(rows, task, gamma, what))[0] for what, _, _ in _FIGURES}
            for gamma in sorted({row["key"]["gamma"] for row in rows})
        }
        chosen = (
            max(by_gamma, key=lambda gamma: by_gamma[gamma]["accuracy"]),
            min(by_gamma, key=lambda gamma: by_gamma[gamma]["loss"]),
            min(by_gamma, key=lambda gamma: by_gamma[gamma]["entropy"]),
        )
        shown = " | ".join(f"{gamma:g}: {100 * by_gamma[gamma]['accuracy']:.1f} %" for gamma in chosen)
        lines.append(f"| {task} | {100 * by_gamma[1.0]['accuracy']:.1f} % | {shown} |")
    return "\n".join(lines)


def _values(rows: Sequence[Row], task: str, gamma: float, what: str) -> list[float]:
    return [row[what] for row in select(rows, task=task, gamma=gamma)]


STUDY = Experiment(
    name="gamma",
    question="How do accuracy, loss and output entropy follow one γ shared by all heads?",
    numbers={
        "small": Numbers(("sst2",), num_draws=1, examples=8, limit=16),
        "full": Numbers(("sst2", "mr", "trec"), num_draws=3, examples=8, limit=32),
    },
    cells=cells,
    figures=figures,
    table=table,
)
