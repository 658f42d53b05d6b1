"""The result of a search of head scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zerotuning.calibration.folds import Split


@dataclass(frozen=True)
class SearchResult:
    """The point that a search chose.

    Attributes:
        point: x [P], the numbers of a ScaleParameterization; None where nothing beat γ = 1.
        held_out_points: For each split, the x at which its held-out examples are scored: x = 0 where nothing beat
            γ = 1.
        chosen: How `point` was found, for the report: step, penalty and kind of point.
    """

    point: np.ndarray | None
    held_out_points: list[tuple[Split, np.ndarray]]
    chosen: dict[str, Any]
