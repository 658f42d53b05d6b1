"""The rows of a benchmark: figures of peers that were measured side by side, as text and as CSV.

A row has the keys "what", "shape" and "dtype", and "peers": for each peer its figures by unit. Ratios are
relative to the first peer of a row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
#: Names of peers: torch's attention with every γ = 1, and ours.
UNTUNED = "untuned sdpa"
OURS = "zerotuning"
#: Name of a peer that also computes every head's gradient.
GRADIENT = "forward + gradient of every head"


def as_line(row: Row) -> str:
    """A row as one line of text: each peer with its figures."""
    cells = []
    for name, figures in row["peers"].items():
        values = [_figure_text(unit, value) for unit, value in figures.items()]
        cells.append(f"{name} {' '.join(values)}")
    return f"{row['what']:<19} {row['shape']:<22} {row['dtype']:<9} " + " | ".join(cells)


def _figure_text(unit: str, value: object) -> str:
    if not isinstance(value, float | int):
        return f"{unit}: {value}"
    return f"{value:.2f}x" if unit == "ratio" else f"{value:.3g} {unit}"


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, with a line for each figure: what, shape, dtype, peer, unit, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("what", "shape", "dtype", "peer", "unit", "value"))
    for row in rows:
        for peer, figures in row["peers"].items():
            for unit, value in figures.items():
                writer.writerow((row["what"], row["shape"], row["dtype"], peer, unit, value))
    return text.getvalue()
