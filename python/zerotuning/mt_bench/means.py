"""Figures of single answers averaged by turn and by category."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

Row = tuple[int, str, Mapping[str, float]]


def means(rows: Iterable[Row]) -> dict[str, Any]:
    """(turn, category, figures) of each answer -> {"mean": …, "turns": {"1": …}, "categories": {…}}: figures averaged, every
    answer counting alike; None for the mean of no rows."""
    found = list(rows)
    return {
        "mean": _mean(found),
        "turns": {
            str(turn): _mean([row for row in found if row[0] == turn]) for turn in sorted({row[0] for row in found})
        },
        "categories": {
            name: _mean([row for row in found if row[1] == name]) for name in dict.fromkeys(row[1] for row in found)
        },
    }


def _mean(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    figures = {name: fmean(row[2][name] for row in rows) for name in rows[0][2]}
    return {"answers": len(rows), **figures}


def table(found: Mapping[str, Any]) -> str:
    """The same as lines of text: all, turns, categories."""
    parts = {"all": found["mean"]}
    parts |= {f"turn {turn}": mean for turn, mean in found["turns"].items()}
    parts |= found["categories"]
    shown = [(name, mean) for name, mean in parts.items() if mean is not None]
    columns = [name for name in shown[0][1] if name != "answers"] if shown else []
    lines = [f"  {'':<12} {'answers':>7}" + "".join(f"  {name:>14}" for name in columns)]
    for name, mean in shown:
        lines.append(f"  {name:<12} {mean['answers']:>7}" + "".join(f"  {mean[column]:>14.4f}" for column in columns))
    return "\n".join(lines)
