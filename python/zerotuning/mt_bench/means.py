"""Figures of single answers averaged by turn and by category."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

#: Turn, category, figures.
Row = tuple[int, str, Mapping[str, float]]


def means(rows: Iterable[Row]) -> dict[str, Any]:
    """Average figures over all answers, by turn and by category, with equal weights.

    Args:
        rows: (turn, category, figures) of each answer.

    Returns:
        {"mean": …, "turns": {"1": …}, "categories": {…}}; the mean of no rows is None.
    """
    answers = list(rows)
    return {
        "mean": _mean(answers),
        "turns": {
            str(turn): _mean([row for row in answers if row[0] == turn]) for turn in sorted({row[0] for row in answers})
        },
        "categories": {
            name: _mean([row for row in answers if row[1] == name]) for name in dict.fromkeys(row[1] for row in answers)
        },
    }


def _mean(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    figures = {name: fmean(row[2][name] for row in rows) for name in rows[0][2]}
    return {"answers": len(rows), **figures}


def table(averages: Mapping[str, Any]) -> str:
    """Format the result of `means` as lines of text: all answers, turns, categories."""
    parts = {"all": averages["mean"]}
    parts |= {f"turn {turn}": mean for turn, mean in averages["turns"].items()}
    parts |= averages["categories"]
    shown = [(name, mean) for name, mean in parts.items() if mean is not None]
    columns = [name for name in shown[0][1] if name != "answers"] if shown else []
    lines = [f"  {'':<12} {'answers':>7}" + "".join(f"  {name:>14}" for name in columns)]
    for name, mean in shown:
        lines.append(f"  {name:<12} {mean['answers']:>7}" + "".join(f"  {mean[column]:>14.4f}" for column in columns))
    return "\n".join(lines)
