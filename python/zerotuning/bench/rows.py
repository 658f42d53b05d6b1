"""What a benchmark measures: rows of figures by peer, as text and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

#: what, shape, dtype, and by peer its figures {unit: value}.
Row = dict[str, Any]
UNTUNED = "untuned sdpa"
OURS = "zerotuning"


def as_line(row: Row) -> str:
    """Each peer's milliseconds and its ratio to the untuned attention."""
    cells = []
    for name, figures in row["peers"].items():
        values = [_shown(unit, value) for unit, value in figures.items()]
        cells.append(f"{name} {' '.join(values)}")
    return f"{row['what']:<19} {row['shape']:<22} {row['dtype']:<9} " + " | ".join(cells)


def _shown(unit: str, value: object) -> str:
    if not isinstance(value, float | int):
        return f"{unit}: {value}"
    return f"{value:.2f}x" if unit == "ratio" else f"{value:.3g} {unit}"


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each figure: what, shape, dtype, peer, unit, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("what", "shape", "dtype", "peer", "unit", "value"))
    for row in rows:
        for peer, figures in row["peers"].items():
            for unit, value in figures.items():
                writer.writerow((row["what"], row["shape"], row["dtype"], peer, unit, value))
    return text.getvalue()
