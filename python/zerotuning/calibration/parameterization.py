"""Which heads a search may change: the linear map from the searched numbers x to the log γ of all heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zerotuning.errors import ZeroTuningError

#: Bound of |log γ| of every free head, the same as the default of the optimisers in csrc/search.
MAX_ABS_LOG_SCALE = 4.0


class ScaleParameterization:
    """log γ = fixed + M x, with x [P] the searched numbers and M [layers * heads, P] of zeros and ones.

    The log γ of a free head is one entry of x. An entry belongs to one head, to all free heads of a layer, or to all
    free heads. The other heads stay at `start`, which defaults to γ = 1. x = 0 is γ = 1 in all free heads.

    Args:
        layers: Number of the model's layers.
        heads: Number of heads in each layer.
        only_layers: Heads of these layers are free; None: of all.
        only_heads: These (layer, head) pairs are free; None: all.
        exclude_heads: (layer, head) pairs that are not free.
        tie: Which free heads share a number: `none`, those of a `layer`, or `all`.
        start: log γ [layers, heads] to begin with; None: 0.

    Attributes:
        start: x [P] to begin with, within ±MAX_ABS_LOG_SCALE; for tied heads, the mean of their log γ.

    Raises:
        ZeroTuningError: A layer or head that the model lacks, no free head at all, a start of another shape.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        *,
        only_layers: Sequence[int] | None = None,
        only_heads: Sequence[tuple[int, int]] | None = None,
        exclude_heads: Sequence[tuple[int, int]] = (),
        tie: str = "none",
        start: np.ndarray | None = None,
    ) -> None:
        self.shape = (layers, heads)
        free = np.ones(self.shape, dtype=bool)
        if only_layers is not None:
            chosen = np.zeros(self.shape, dtype=bool)
            for layer in only_layers:
                self._check_index("layers", layer, 0)
                chosen[layer] = True
            free &= chosen
        if only_heads is not None:
            free &= self._mask("heads", only_heads)
        free &= ~self._mask("exclude_heads", exclude_heads)
        if not free.any():
            raise ZeroTuningError("layers, heads and exclude_heads leave no head to tune")
        self._group = self._groups(free, tie)
        self._free = free.reshape(-1)
        self._members = np.bincount(self._group[self._free])
        start = np.zeros(self.shape) if start is None else np.asarray(start, dtype=np.float64)
        if start.shape != self.shape:
            raise ZeroTuningError(
                f"start must be {layers} layers x {heads} heads, the model's shape, got {list(start.shape)}"
            )
        self._fixed = np.where(self._free, 0.0, start.reshape(-1))
        mean = self.point_gradient(start.reshape(-1)) / self._members
        self.start = np.clip(mean, -MAX_ABS_LOG_SCALE, MAX_ABS_LOG_SCALE)

    @property
    def count(self) -> int:
        """P, the number of searched numbers."""
        return len(self._members)

    @property
    def free_heads(self) -> int:
        """The number of free heads."""
        return int(self._free.sum())

    @property
    def untuned(self) -> np.ndarray:
        """x = 0 [P], which is γ = 1 in all free heads."""
        return np.zeros(self.count)

    def log_scale(self, point: np.ndarray) -> np.ndarray:
        """Map x [P] to log γ, float64 [layers * heads]."""
        log_scale = self._fixed.copy()
        log_scale[self._free] = np.asarray(point)[self._group[self._free]]
        return log_scale

    def point_gradient(self, gradient: np.ndarray) -> np.ndarray:
        """Map dL/d log γ [layers * heads] to dL/dx = Mᵀ dL/d log γ, float64 [P]."""
        return np.bincount(self._group[self._free], weights=gradient[self._free], minlength=self.count)

    def _groups(self, free: np.ndarray, tie: str) -> np.ndarray:
        """Return each head's index into x, [layers * heads]; meaningless where a head is not free."""
        layers, heads = self.shape
        if tie == "all":
            return np.zeros(layers * heads, dtype=np.int64)
        if tie == "layer":
            return np.repeat(np.cumsum(free.any(axis=1)) - 1, heads)
        return np.cumsum(free.reshape(-1)) - 1

    def _mask(self, name: str, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        mask = np.zeros(self.shape, dtype=bool)
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ZeroTuningError(f"{name} must be (layer, head) pairs, got {pair!r}")
            self._check_index(name, *pair)
            mask[tuple(pair)] = True
        return mask

    def _check_index(self, name: str, layer: int, head: int) -> None:
        layers, heads = self.shape
        for kind, value, count in (("layer", layer, layers), ("head", head, heads)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < count:
                raise ZeroTuningError(f"{name}: the model's {kind}s are 0 to {count - 1}, got {value!r}")
