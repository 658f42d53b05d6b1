"""Label scores at several log γ: of short batches, copies for as many of them go through the model together as fill a pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.cuda_graphs import MOST_TOKENS, recorded_tokens
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix
from zerotuning.models.device_maps import input_device
from zerotuning.patching.patch import candidates

#: Tokens of a pass on a processor beyond which more candidates gain nothing. SmolLM2-135M, one core with AMX, bfloat16: a
#: candidate's 48 tokens take a third of their time in company, 96 half of it, 192 and more as long as alone (float32: 0.6,
#: 0.8, 0.9). So candidates share passes where examples are few or short.
CPU_TOKENS = 512
#: Candidates that share a pass, at most.
MOST_TOGETHER = 32

#: Index of a point, examples, their scores [n, C].
Scored = tuple[int, Batch, Tensor]


class Candidates:
    """Scores examples at given points, log γ float64 [layers * heads], without gradients.

    model         a patched model
    parameters    its leaves, from `patch.head_parameters`
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], setbacks: OutOfMemoryRetry) -> None:
        self.model = model
        self.parameters = parameters
        self.setbacks = setbacks
        self._device = input_device(model)
        # In one place for good: recorded passes read it there.
        self._table = torch.zeros(MOST_TOGETHER, len(parameters), len(parameters[0]), device=self._device)

    def set_point(self, point: np.ndarray) -> None:
        """Writes a point into the leaves."""
        values = torch.from_numpy(np.asarray(point)).reshape(len(self.parameters), -1)
        with torch.no_grad():
            for parameter, row in zip(self.parameters, values, strict=True):
                parameter.copy_(row)

    @torch.no_grad()
    def scores(
        self, scorer: LabelScorer, batches: Sequence[Batch], points: Sequence[np.ndarray], share_prefix: bool = False
    ) -> list[Scored]:
        """The scores of all batches at all points, in pieces; an example without finite scores at a point is left out
        there. share_prefix: what the prompts begin with is read once a point (`prefix_cache`), not once a prompt.

        Errors: ZeroTuningError for an example that is too large for the memory by itself.
        """
        if share_prefix:
            return [
                one for index, point in enumerate(points) for one in self._alone(scorer, batches, index, point, True)
            ]
        return [one for batch in batches for one in self._of_batch(scorer, batch, points)]

    def _of_batch(self, scorer: LabelScorer, batch: Batch, points: Sequence[np.ndarray]) -> list[Scored]:
        done: list[Scored] = []
        begin = 0
        while begin < len(points):
            count = self._together(batch, len(points) - begin)
            found: list[Tensor | None] | None = [None]
            if count > 1:
                found = self._side_by_side(scorer, batch, points[begin : begin + count])
            if found is None:  # memory ran out: fewer now
                continue
            for index, scores in enumerate(found, begin):
                if scores is None:
                    done += self._alone(scorer, [batch], index, points[index])
                else:
                    done.append((index, batch, scores))
            begin += count
        return done

    def _together(self, batch: Batch, waiting: int) -> int:
        """How many candidates go next: as many as fill a pass, or rather fewer so that all passes are about as full."""
        if self._device.type == "cpu":
            fitting = CPU_TOKENS // batch.input_ids.numel()
        else:
            fitting = MOST_TOKENS // recorded_tokens(batch.input_ids)
        most = max(1, min(MOST_TOGETHER, self.setbacks.together or MOST_TOGETHER, fitting))
        passes = -(-waiting // most)
        return -(-waiting // passes)

    def _side_by_side(
        self, scorer: LabelScorer, batch: Batch, points: Sequence[np.ndarray]
    ) -> list[Tensor | None] | None:
        """Scores [n, C] at each point, None at one where an example has no finite ones; None where memory ran out."""
        table = self._table[: len(points)]
        table.copy_(torch.from_numpy(np.stack(points)).reshape(table.shape))
        scores = None
        try:
            with candidates(self.model, table):
                scores = scorer.scores(batch.repeated(len(points)))
        except (RuntimeError, MemoryError) as error:
            if not self.setbacks.is_retryable(error, self.model):
                raise
        if scores is None:  # outside the except block, whose traceback holds the failed pass's tensors
            self.setbacks.ran_out_of_memory_for(len(points))
            return None
        return [_finite(part) for part in scores.unflatten(0, (len(points), len(batch)))]

    def _alone(
        self, scorer: LabelScorer, batches: Sequence[Batch], index: int, point: np.ndarray, share_prefix: bool = False
    ) -> list[Scored]:
        self.set_point(point)
        at_point = behind_prefix(scorer) if share_prefix else scorer
        return [
            (index, piece, scores)
            for batch in batches
            for piece, scores in self.setbacks.in_pieces(at_point, batch, lambda one: _finite(at_point.scores(one)))
        ]


def _finite(scores: Tensor) -> Tensor | None:
    """The scores [n, C], if every example has one at least and all of its are finite."""
    absent = scores == -torch.inf
    good = torch.isfinite(scores.masked_fill(absent, 0.0)).all() and not absent.all(dim=-1).any()
    return scores if bool(good) else None
