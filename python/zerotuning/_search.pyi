"""Searches of head scales: the loss is minimised over x = log gamma, float64.

They are written in C++ (csrc/search), which releases the GIL where a call computes for long. One object serves one
thread at a time. Wrong arguments and states are ValueError, and leave the object as it was.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

class GradientStepper:
    """Adam on loss + l2_penalty/2 |x|^2, clamped to |x| <= max_abs_log_scale, and a moving average of its points.

    The stepper sees gradients alone: its caller decides which of the points is accepted, and when to stop.

    Args:
        dimension: Number of components of x.
        steps: Number of steps, over which the learning rate falls with schedule 'cosine'.
        learning_rate: The first step moves each component by about this much.
        beta1: Decay of the mean gradient.
        beta2: Decay of the mean squared gradient.
        epsilon: Components whose gradients are smaller move by less than learning_rate.
        l2_penalty: Strength of the pull toward x = 0.
        max_abs_log_scale: Bound of every |x|.
        schedule: 'cosine' or 'constant'.
        average_decay: Decay of the moving average, in [0, 1).
        start: The first point [dimension]; None: 0.
    """

    def __init__(
        self,
        dimension: int,
        *,
        steps: int = 30,
        learning_rate: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        l2_penalty: float = 1e-4,
        max_abs_log_scale: float = 4.0,
        schedule: str = "cosine",
        average_decay: float = 0.0,
        start: npt.ArrayLike | None = None,
    ) -> None: ...
    def point(self) -> npt.NDArray[np.float64]:
        """Return x, where the next gradient is to be taken: [dimension], a copy."""
    def averaged_point(self) -> npt.NDArray[np.float64]:
        """Return the moving average of the points after the steps so far, `point()` before the first: [dimension]."""
    def step(self, gradient: npt.ArrayLike) -> None:
        """Take a step.

        Args:
            gradient: Of the loss (without the penalty) at `point()`, [dimension].

        Raises:
            ValueError: Numbers that are not finite, another count of them, a step beyond the last.
        """
    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
    def finished(self) -> bool:
        """Return whether all steps are done."""
    def state(self) -> dict[str, Any]:
        """Return the whole state, which JSON can hold: a restored stepper continues bit for bit."""
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a stepper of the same dimension and options.

        Raises:
            ValueError: A field is missing, unknown, or of another value than this stepper allows.
        """
    @property
    def steps_done(self) -> int: ...
    @property
    def steps_total(self) -> int: ...
    @property
    def dimension(self) -> int: ...

class Optimizer:
    """A search for x = log gamma [dimension] with the least loss, which needs no gradient."""

    def ask(self) -> list[npt.NDArray[np.float64]]:
        """Return the points to evaluate now: the same until `tell` is called, none when finished."""
    def tell(self, losses: Sequence[float | None]) -> None:
        """Give the losses of the points of the last `ask`, in its order.

        Args:
            losses: None, NaN and infinities stand for failed evaluations, worse than every finite loss.

        Raises:
            ValueError: Another number of losses; the search is as it was.
        """
    def finished(self) -> bool:
        """Return whether nothing is left to evaluate."""
    def finalists(self) -> list[npt.NDArray[np.float64]]:
        """Return the points that the search proposes so far, to be compared on held-out examples."""
    def progress(self) -> str:
        """Return how far the search is, such as 'sweep 3/12'."""
    def state(self) -> dict[str, Any]:
        """Return the whole state, which JSON can hold: a restored search continues bit for bit."""
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a search of the same method, dimension and options.

        Raises:
            ValueError: A field is missing, unknown, or of another value than this search allows.
        """
    @property
    def steps_done(self) -> int:
        """Number of losses received."""
    @property
    def steps_total(self) -> int:
        """The largest possible number of losses; the search may finish earlier."""
    @property
    def method(self) -> str: ...
    @property
    def dimension(self) -> int: ...

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
    ) -> None: ...
    def profile(self) -> npt.NDArray[np.float64]:
        """Return the fall of the loss when a head is scaled up: [dimension].

        NaN where it is not measured yet, infinite where an evaluation failed.
        """
    def direction(self) -> Literal["none", "up", "down"]:
        """Return the group that is tuned; 'none' before the profile is complete or without effects."""
    def group(self) -> list[int]:
        """Return the heads that are tuned: ascending indices into x."""
    def sweep_losses(self) -> npt.NDArray[np.float64]:
        """Return the loss of each gamma of `sweep`, NaN where it is not measured yet."""

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
        start: npt.ArrayLike | None = None,
    ) -> None: ...
    def stop_reason(self) -> Literal["", "evaluations", "tolfun", "tolx", "condition"]:
        """Return why the search ended; empty while it goes on."""
    def sigma(self) -> float:
        """Return the step size now."""
    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean of the distribution now: [dimension]."""
    @property
    def population(self) -> int: ...
    @property
    def diagonal(self) -> bool: ...
