"""`zerotuning study positions`: what scaling the initial token gains against other tokens (the paper's section 3).

At each position two settings are chosen on validation examples and judged on test examples: the best of a few γ for all
heads, and a γ for each head by one step along the negative gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from zerotuning.plots.panels import bars_with_intervals
from zerotuning.plots.style import label_axes
from zerotuning.statistics import mean_and_interval, with_interval
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row
from zerotuning.study.pictures import new_panels
from zerotuning.study.rows import distinct, figures_by_task, select
from zerotuning.study.setting import Setting, best_gamma, figures_of
from zerotuning.study.spans import POSITIONS, find_spans, has_position

GAMMAS = (0.3, 3.0)
SMALL_GAMMAS = (2.0,)
#: Root mean square of log γ after the step, equal at all positions, and the largest |log γ| of a head.
STEP, MOST = 0.3, 1.0


def cells(setting: Setting) -> Iterator[Cell]:
    """One cell for each task, seed and position that the task's prompts have."""
    numbers = setting.numbers
    for name in numbers.tasks:
        task = setting.task(name)
        for seed in range(numbers.num_draws):
            draw = _Draw(setting, name, seed)
            for position in POSITIONS:
                if has_position(task, position):
                    key = {
                        "task": name,
                        "seed": seed,
                        "position": position,
                        "examples": numbers.examples,
                        "limit": numbers.limit,
                        **({} if draw.gammas == GAMMAS else {"gammas": list(draw.gammas)}),
                    }
                    yield Cell(key, partial(_measure, draw, position))


class _Draw:
    """A task's examples of one seed; figures that do not depend on the position are measured once, on first use."""

    def __init__(self, setting: Setting, name: str, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self.task = setting.task(name)
        self._name = name
        self.gammas = SMALL_GAMMAS if setting.size == "small" else GAMMAS

    @cached_property
    def records(self) -> tuple[list[Any], list[Any]]:
        return self.setting.drawn(self._name, self.seed), self.setting.tests(self._name, self.seed)

    @cached_property
    def scorers(self) -> tuple[Any, Any]:
        validation, test = self.records
        return self.setting.scorer(self.task, validation), self.setting.scorer(self.task, test)

    @cached_property
    def untuned(self) -> tuple[dict[str, float], dict[str, float]]:
        """Figures of validation and test examples at γ = 1, which do not depend on the position."""
        validation, test = (figures_of(self.setting.scores(scorer), scorer.labels) for scorer in self.scorers)
        return validation, test

    def spans(self, position: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        tokenizer = self.setting.loaded()[1]
        validation, test = (
            find_spans(
                position,
                self.task,
                records,
                tokenizer,
                [len(example.prompt) for example in scorer.examples],
                (self.seed, part),
            )
            for part, (records, scorer) in enumerate(zip(self.records, self.scorers, strict=True))
        )
        return validation, test


def _measure(draw: _Draw, position: str) -> dict[str, Any]:
    setting = draw.setting
    (validation, test), (validation_spans, test_spans) = draw.scorers, draw.spans(position)
    before = draw.untuned[1]

    def on_test(log_scale: Any) -> dict[str, float]:
        return figures_of(setting.scores(test, log_scale, test_spans), test.labels)

    curve = {1.0: draw.untuned[0]}
    for gamma in draw.gammas:
        curve[gamma] = figures_of(setting.scores(validation, math.log(gamma), validation_spans), validation.labels)
    chosen = best_gamma(curve)
    shared = before if chosen == 1.0 else on_test(math.log(chosen))
    slopes = setting.slopes(validation, validation_spans)
    by_head = on_test(step_down(slopes))
    return {
        "validation": [{"gamma": gamma, **of_gamma} for gamma, of_gamma in sorted(curve.items())],
        "gamma": chosen,
        "untuned": before,
        "shared": shared,
        "by_head": by_head,
        "slope_norm": float(np.linalg.norm(slopes)),
        "accuracy_gain": shared["accuracy"] - before["accuracy"],
        "loss_gain": before["loss"] - shared["loss"],
        "by_head_accuracy_gain": by_head["accuracy"] - before["accuracy"],
        "by_head_loss_gain": before["loss"] - by_head["loss"],
    }


def step_down(slopes: np.ndarray) -> np.ndarray:
    """One step along the negative slopes: log γ [L, H], float64, scaled to root mean square STEP and cut at MOST.

    Zero slopes give zeros.
    """
    size = float(np.sqrt(np.mean(slopes**2)))
    return np.clip(-STEP * slopes / size, -MOST, MOST) if size else np.zeros_like(slopes)


# Tables and figures of the rows.

#: Figure of a row, title of its panel, name of its axis, factor to the axis's unit.
_FIGURES = (
    ("accuracy_gain", "one γ for all heads", "gain in accuracy (points)", 100.0),
    ("loss_gain", "one γ for all heads", "gain in loss (nats)", 1.0),
    ("by_head_accuracy_gain", "a γ a head, one gradient step", "gain in accuracy (points)", 100.0),
    ("by_head_loss_gain", "a γ a head, one gradient step", "gain in loss (nats)", 1.0),
)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw gains in accuracy and loss, with one γ and a γ for each head: four panels with a bar for each position."""
    figure, panels = new_panels(columns=2, rows=2)
    positions = _positions(rows)
    for place, (axes, (what, title, unit, factor)) in enumerate(zip(panels, _FIGURES, strict=True)):
        intervals = [mean_and_interval(_gains(rows, position, what, factor)) for position in positions]
        means, lows, highs = zip(*intervals, strict=True)
        bars_with_intervals(axes, positions, means, lows, highs, place // 2)
        label_axes(axes, title, unit, "scaled tokens")
    return {"": figure}


def table(rows: Sequence[Row]) -> str:
    """Two tables, for one γ and for a γ for each head, with a line for each position.

    A line has the position's mean gains and the initial token's lead over the position.
    """
    parts = []
    for title, prefix in (
        ("One γ for all heads", ""),
        ("A γ for each head, one gradient step", "by_head_"),
    ):
        lines = [f"**{title}** (mean and 95 % interval over tasks and seeds)", ""]
        lines.append("| scaled tokens | tasks x seeds | gain in accuracy, points | gain in loss, nats |" + _LEADS)
        lines.append("| --- | --- | --- | --- | --- | --- |" + (" --- |" if prefix else ""))
        if prefix:
            lines[-2] += " norm of the slopes, nats |"
        lines += [_line(rows, position, prefix) for position in _positions(rows)]
        parts.append("\n".join(lines) + "\n\n" + _conclusion(rows, prefix))
    return "\n\n".join(parts)


_LEADS = " initial token minus this, accuracy | initial token minus this, loss |"


def _line(rows: Sequence[Row], position: str, prefix: str) -> str:
    accuracy, loss = f"{prefix}accuracy_gain", f"{prefix}loss_gain"
    count = len(select(rows, position=position))
    shown = [position, str(count)]
    shown.append(with_interval(_gains(rows, position, accuracy, 100.0), 1))
    shown.append(with_interval(_gains(rows, position, loss), 3))
    for what, factor, digits in ((accuracy, 100.0, 1), (loss, 1.0, 3)):
        shown.append("" if position == "initial" else with_interval(_leads(rows, position, what, factor), digits))
    if prefix:
        shown.append(f"{np.mean([row['slope_norm'] for row in select(rows, position=position)]):.2f}")
    return f"| {' | '.join(shown)} |"


def _conclusion(rows: Sequence[Row], prefix: str) -> str:
    """State in words where the interval of the initial token's lead in accuracy, and in loss, excludes zero."""
    if all(len(values) == 1 for values in _gains(rows, "initial", "loss_gain")):
        return "One draw of the examples a task: no interval, no finding."
    sentences = []
    for what, unit in (("accuracy_gain", "accuracy"), ("loss_gain", "loss")):
        ahead: list[str] = []
        behind: list[str] = []
        undecided: list[str] = []
        for position in _positions(rows):
            leads = _leads(rows, position, f"{prefix}{what}")
            if position == "initial" or not leads:
                continue
            _, low, high = mean_and_interval(leads)
            (ahead if low > 0 else behind if high < 0 else undecided).append(position)
        named = (("ahead of", ahead), ("behind", behind), ("not told apart from", undecided))
        clauses = [f"{how} {', '.join(positions)}" for how, positions in named if positions]
        if clauses:
            sentences.append(f"By {unit} the initial token is {'; '.join(clauses)}.")
    return " ".join(sentences)


def _positions(rows: Sequence[Row]) -> list[str]:
    return distinct(row["key"]["position"] for row in rows)


def _gains(rows: Sequence[Row], position: str, name: str, factor: float = 1.0) -> list[list[float]]:
    """A figure of a position's rows, one list for each task."""
    return figures_by_task(select(rows, position=position), name, factor)


def _leads(rows: Sequence[Row], position: str, what: str, factor: float = 1.0) -> list[list[float]]:
    """Initial token minus position on the same examples, one list a task."""
    initial = {_task_and_seed(row): row[what] for row in select(rows, position="initial")}
    paired = [
        {**row, "lead": initial[_task_and_seed(row)] - row[what]}
        for row in select(rows, position=position)
        if _task_and_seed(row) in initial
    ]
    return figures_by_task(paired, "lead", factor)


def _task_and_seed(row: Row) -> tuple[str, int]:
    return row["key"]["task"], row["key"]["seed"]


STUDY = Experiment(
    name="positions",
    question="What does tuning the initial token gain against tuning other tokens?",
    numbers={
        "small": Numbers(("sst2",), num_draws=1, examples=4, limit=4),
        "full": Numbers(("sst2", "mr", "trec", "sst5"), num_draws=3, examples=12, limit=16),
    },
    cells=cells,
    figures=figures,
    table=table,
)
