"""Searches of head scales: x = log gamma, float64, minimised through ask() and tell().

Written in C++ (csrc/search); the GIL is released while they compute. Wrong arguments and states are
ValueError.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

class Evaluation:
    """One loss that an optimizer asks for."""

    @property
    def point(self) -> npt.NDArray[np.float64]:
        """x = log gamma: numpy float64 [dimension], a copy."""
    @property
    def part(self) -> Literal["fit", "held_out"]:
        """Which examples the loss is wanted on."""
    @property
    def gradient(self) -> bool:
        """Whether the gradient is wanted as well."""

class Optimizer:
    """A search for x = log gamma [dimension] with the least loss. One object serves one thread at a time."""

    def ask(self) -> list[Evaluation]:
        """The evaluations wanted now: the same until tell() is called, none when finished."""
    def tell(self, outcomes: Sequence[tuple[float, npt.ArrayLike | None]]) -> None:
        """Answers the last ask(), in its order, with (loss, gradient) pairs.

        gradient: [dimension], None where it was not asked for. Raises ValueError, and changes nothing, for
        another number of pairs, numbers that are not finite, a gradient of another length.
        """
    def finished(self) -> bool:
        """Whether nothing is left to evaluate."""
    def best(self) -> npt.NDArray[np.float64]:
        """The point with the lowest held-out loss so far, 0 if none beats 0: [dimension]."""
    def best_loss(self) -> float:
        """Held-out loss of best(); NaN before it is known."""
    def baseline_loss(self) -> float:
        """Held-out loss of x = 0; NaN before it is known."""
    def progress(self) -> str:
        """Where the search stands, e.g. 'step 12/30'."""
    def steps_done(self) -> int: ...
    def steps_total(self) -> int:
        """The most steps there can be; the search may finish earlier."""
    def state(self) -> str:
        """All that the search knows, as text; restored, it continues bit for bit."""
    def restore(self, state: str) -> None:
        """Takes over the state() of an optimizer of the same method, dimension and options.

        Raises ValueError, and changes nothing, if it is of another, truncated or changed.
        """
    @property
    def method(self) -> str: ...
    @property
    def dimension(self) -> int: ...

class GradientOptimizer(Optimizer):
    """Adam on the fit loss + penalty/2 |x|^2, with |x| <= max_abs_log_scale and early stopping."""

    def __init__(
        self,
        dimension: int,
        *,
        steps: int = 30,
        learning_rate: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        penalty: float = 1e-4,
        max_abs_log_scale: float = 4.0,
        schedule: str = "cosine",
        evaluate_every: int = 1,
        patience: int = 8,
        held_out: bool = True,
        average: float = 0.0,
        start: npt.ArrayLike | None = None,
    ) -> None: ...
    def stopped_early(self) -> bool:
        """Whether `patience` evaluations without improvement ended the search."""

class PaperOptimizer(Optimizer):
    """The ZeroTuning paper's search (arXiv 2505.11739): profile, dominant group, one shared gamma."""

    def __init__(
        self,
        dimension: int,
        *,
        profile_gamma: float = 1.5,
        two_sided: bool = False,
        sweep: Sequence[float] = [0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.8, 1.25, 1.5, 2.0, 2.75, 4.0],
        top_fraction: float = 1.0,
        chunk: int = 16,
        held_out: bool = True,
    ) -> None: ...
    def profile(self) -> npt.NDArray[np.float64]:
        """Fall of the loss when a head is scaled up: [dimension], NaN where it is not measured."""
    def direction(self) -> Literal["none", "up", "down"]:
        """The group that is tuned; 'none' before the profile is complete or without effects."""
    def group(self) -> list[int]:
        """The heads that are tuned: ascending indices into x."""
    def sweep_losses(self) -> npt.NDArray[np.float64]:
        """Fit loss of each gamma of `sweep`, NaN where it is not measured."""

class CmaEsOptimizer(Optimizer):
    """CMA-ES (arXiv 1604.00772) for losses without a gradient; only their order counts."""

    def __init__(
        self,
        dimension: int,
        *,
        sigma: float = 0.3,
        population: int = 0,
        seed: int = 0,
        evaluations: int = 1000,
        diagonal: bool | None = None,
        max_abs_log_scale: float = 4.0,
        tolfun: float = 1e-10,
        tolx: float = 1e-6,
        held_out: bool = True,
        start: npt.ArrayLike | None = None,
    ) -> None: ...
    def stop_reason(self) -> Literal["", "evaluations", "tolfun", "tolx", "condition"]:
        """Why the search ended; empty while it goes on."""
    @property
    def population(self) -> int: ...
    @property
    def diagonal(self) -> bool: ...
    def sigma(self) -> float:
        """The step size now."""
    def mean(self) -> npt.NDArray[np.float64]:
        """The point in the middle of the distribution now: [dimension]."""
