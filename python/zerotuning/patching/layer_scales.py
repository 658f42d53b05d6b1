"""The scales of one attention layer: a child module of the layer, read by the attention function in every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zerotuning.errors import ZeroTuningError
from zerotuning.models.tensor_parallel import HeadShard

#: Name of the child module of each attention layer.
CHILD = "zerotuning"


class LayerScales(nn.Module):
    """log γ of one layer's heads, of one or several named settings; float32 in a model of any dtype.

    Under tensor parallelism each rank computes some of the heads. The module holds the scales of all heads, and
    `current` returns those of this rank's heads.

    Args:
        layer_name: the layer's name in the model, for error messages.
        heads: number of query heads of the whole layer.
        device: where the layer computes.
        shard: the heads that this rank computes; None: all.

    Attributes:
        log_scale: float32 [settings, heads].
        sample_settings: int64 [B], the setting of each sample; None: all samples use the first setting.
        parameter: [heads] or [C, heads], used in place of the settings during a search.
        span: int64 [B, 2], the keys that are scaled in place of the initial token.
        enabled: whether the scales apply; if False every γ is 1.
    """

    log_scale: Tensor
    sample_settings: Tensor | None

    def __init__(self, layer_name: str, heads: int, device: torch.device, shard: HeadShard | None = None) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.heads = heads
        self.shard = shard
        self.enabled = True
        # Not persistent: a patched model's state_dict has the same keys as before.
        self.register_buffer("log_scale", torch.zeros(1, heads, device=device), persistent=False)
        self.register_buffer("sample_settings", None, persistent=False)
        self.parameter: Tensor | None = None
        self.span: Tensor | None = None
        self._first_setting_cache: tuple[Tensor, Tensor] | None = (
            None  # log_scale, and row 0 of it for this rank's heads
        )

    def _apply(self, fn: Any, recurse: bool = True) -> LayerScales:
        exact = self.log_scale
        super()._apply(fn, recurse)
        if self.log_scale.dtype != torch.float32:  # model.half(), model.to(torch.bfloat16)
            self.log_scale = exact.to(self.log_scale.device)
        return self

    def current(self, batch: int) -> Tensor:
        """Return log γ of this rank's heads for a batch.

        Args:
            batch: number of samples of the batch, beams of a beam search included.

        Returns:
            [heads], or [batch, heads] inside `select_scales` or `candidates`.

        Raises:
            ZeroTuningError: the batch is no multiple of the number of samples that were named.
        """
        if not self.enabled:
            return self._of_this_rank(torch.zeros_like(self.log_scale[0]))
        if self.parameter is not None:
            log_scale = self.parameter
            if log_scale.dim() == 2:
                log_scale = repeat_for_batch(log_scale, batch, "candidates names the scales")
            return self._of_this_rank(log_scale)
        # Faster than self.sample_settings, which nn.Module looks up in __getattr__.
        settings = self._buffers["sample_settings"]
        if settings is None:
            return self._first_setting()
        return self._of_this_rank(self.log_scale[repeat_for_batch(settings, batch, "select_scales names the scales")])

    def _of_this_rank(self, log_scale: Tensor) -> Tensor:
        return log_scale if self.shard is None else self.shard.select(log_scale)

    def _first_setting(self) -> Tensor:
        settings: Any = self._buffers["log_scale"]
        if torch.compiler.is_compiling():
            return self._of_this_rank(settings[0])
        cached = self._first_setting_cache
        if cached is None or cached[0] is not settings:
            with torch.inference_mode(False):  # training may use the view as well
                cached = self._first_setting_cache = settings, self._of_this_rank(settings[0])
        return cached[1]


def repeat_for_batch(of_samples: Tensor, batch: int, subject: str) -> Tensor:
    """Repeat each sample's row for the beams of a beam search.

    Args:
        of_samples: [samples, …].
        batch: number of rows to return.
        subject: how the error message begins.

    Returns:
        [batch, …].

    Raises:
        ZeroTuningError: the batch is no multiple of the samples.
    """
    samples = of_samples.shape[0]
    if batch % samples:
        raise ZeroTuningError(f"{subject} of {samples} samples, the batch has {batch}")
    return of_samples if batch == samples else of_samples.repeat_interleave(batch // samples, dim=0)
