"""Label scores at several candidate log γ: one forward pass holds copies of a short batch for several candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.cuda_graphs import MAX_RECORDED_TOKENS, recorded_tokens
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix
from zerotuning.models.device_maps import input_device
from zerotuning.patching.patch import candidates

#: Number of tokens in a pass on the CPU beyond which candidates gain nothing from a shared pass. Time of a candidate in
#: a shared pass, relative to a pass of its own (SmolLM2-135M, one core with AMX, bfloat16): 1/3 with 48 tokens, 1/2
#: with 96, 1 with 192 and more (float32: 0.6, 0.8, 0.9).
CPU_TOKENS = 512
#: Number of candidates in one pass at most.
MAX_CANDIDATES_PER_PASS = 32

#: Index of a point, examples, their scores [n, C].
Scored = tuple[int, Batch, Tensor]


class CandidateScorer:
    """Scores examples at given points, log γ float64 [layers * heads], without gradients.

    Args:
        model: A patched model.
        parameters: Its log γ as leaves of autograd, from `patching.patch.head_parameters`.
        memory: Retries smaller passes where memory runs out.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], memory: OutOfMemoryRetry) -> None:
        self.model = model
        self.parameters = parameters
        self.memory = memory
        self._device = input_device(model)
        # Never reallocated: recorded CUDA graphs read this address.
        self._table = torch.zeros(MAX_CANDIDATES_PER_PASS, len(parameters), len(parameters[0]), device=self._device)

    def set_point(self, point: np.ndarray) -> None:
        """Write a point into the model's parameters."""
        values = torch.from_numpy(np.asarray(point)).reshape(len(self.parameters), -1)
        with torch.no_grad():
            for parameter, row in zip(self.parameters, values, strict=True):
                parameter.copy_(row)

    @torch.no_grad()
    def scores(
        self, scorer: LabelScorer, batches: Sequence[Batch], points: Sequence[np.ndarray], share_prefix: bool = False
    ) -> list[Scored]:
        """Score every batch at every point.

        Args:
            scorer: The scorer of the batches' task.
            batches: The examples.
            points: log γ, float64 [layers * heads] each.
            share_prefix: Whether the tokens that all prompts begin with are read once a point (evaluation/prefix_cache)
                instead of once a prompt.

        Returns:
            Scores in pieces. An example without finite scores at a point is left out there.

        Raises:
            ZeroTuningError: A single example that does not fit in memory.
        """
        if share_prefix:
            return [
                scored
                for index, point in enumerate(points)
                for scored in self._score_at_point(scorer, batches, index, point, True)
            ]
        return [scored for batch in batches for scored in self._score_batch(scorer, batch, points)]

    def _score_batch(self, scorer: LabelScorer, batch: Batch, points: Sequence[np.ndarray]) -> list[Scored]:
        scored: list[Scored] = []
        begin = 0
        while begin < len(points):
            count = self._candidates_in_pass(batch, len(points) - begin)
            results: list[Tensor | None] | None = [None]
            if count > 1:
                results = self._score_in_one_pass(scorer, batch, points[begin : begin + count])
            if results is None:  # memory ran out: the next pass has fewer candidates
                continue
            for index, scores in enumerate(results, begin):
                if scores is None:
                    scored += self._score_at_point(scorer, [batch], index, points[index])
                else:
                    scored.append((index, batch, scores))
            begin += count
        return scored

    def _candidates_in_pass(self, batch: Batch, remaining: int) -> int:
        """The number of candidates in the next pass: at most as many as fill the pass, with all passes equally full."""
        if self._device.type == "cpu":
            fitting = CPU_TOKENS // batch.input_ids.numel()
        else:
            fitting = MAX_RECORDED_TOKENS // recorded_tokens(batch.input_ids)
        most = max(1, min(MAX_CANDIDATES_PER_PASS, self.memory.max_candidates or MAX_CANDIDATES_PER_PASS, fitting))
        passes = -(-remaining // most)
        return -(-remaining // passes)

    def _score_in_one_pass(
        self, scorer: LabelScorer, batch: Batch, points: Sequence[np.ndarray]
    ) -> list[Tensor | None] | None:
        """Scores [n, C] at each point, or None at a point where an example has no finite score.

        The result is None, not a list, where memory ran out.
        """
        table = self._table[: len(points)]
        table.copy_(torch.from_numpy(np.stack(points)).reshape(table.shape))
        scores = None
        try:
            with candidates(self.model, table):
                scores = scorer.scores(batch.repeated(len(points)))
        except (RuntimeError, MemoryError) as error:
            if not self.memory.is_retryable(error, self.model):
                raise
        if scores is None:  # outside the except block, whose traceback holds the failed pass's tensors
            self.memory.halve_candidates(len(points))
            return None
        return [_finite(part) for part in scores.unflatten(0, (len(points), len(batch)))]

    def _score_at_point(
        self, scorer: LabelScorer, batches: Sequence[Batch], index: int, point: np.ndarray, share_prefix: bool = False
    ) -> list[Scored]:
        self.set_point(point)
        at_point = behind_prefix(scorer) if share_prefix else scorer
        return [
            (index, piece, scores)
            for batch in batches
            for piece, scores in self.memory.in_pieces(at_point, batch, lambda part: _finite(at_point.scores(part)))
        ]


def _finite(scores: Tensor) -> Tensor | None:
    """The scores [n, C], or None where an example lacks a finite score. -inf marks an absent label."""
    absent = scores == -torch.inf
    good = torch.isfinite(scores.masked_fill(absent, 0.0)).all() and not absent.all(dim=-1).any()
    return scores if bool(good) else None
