"""The old path of zerotuning.calibration.few_shot_choice, kept for one version."""

from __future__ import annotations

import warnings

from zerotuning.calibration.few_shot_choice import ShotChoice, choose_shots, shot_candidates

__all__ = ["ShotChoice", "choose_shots", "shot_candidates"]

warnings.warn(
    "zerotuning.shot_choice is now zerotuning.calibration.few_shot_choice; choose_shots is zerotuning.choose_shots",
    DeprecationWarning,
    stacklevel=2,
)
