"""A model with head scales applied, from the names that users give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from zerotuning.errors import ZeroTuningError
from zerotuning.models.loading import load_model
from zerotuning.output import SCALES_FILE, STATE_FILE
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import apply_scales


def load_scaled_model(
    name: str | os.PathLike[str],
    scales: HeadScales | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
) -> tuple[Any, Any]:
    """`load_model`, then `apply_scales`; without scales the model stays as transformers has it.

    scales   HeadScales, the folder of such, or owner/name on the hub; read before the model is loaded
    Errors: ZeroTuningError as of both, and for scales of another shape, which names scales and model.
    """
    chosen = None if scales is None else read_scales(scales)
    model, tokenizer = load_model(name, dtype, device, device_map)
    if chosen is not None:
        apply_scales_to(model, chosen, os.fspath(name), scales)
    return model, tokenizer


def read_scales(scales: HeadScales | str | os.PathLike[str]) -> HeadScales:
    """Head scales as they are, or from where they were saved."""
    if isinstance(scales, HeadScales):
        return scales
    folder = Path(scales)
    if folder.is_file():
        raise ZeroTuningError(f"scales {folder} must be a folder, got a file")
    if not folder.exists() and os.fspath(scales).count("/") != 1:  # owner/name may be on the hub
        raise ZeroTuningError(f"scales folder {folder} does not exist")
    if (folder / STATE_FILE).exists() and not (folder / SCALES_FILE).exists():
        raise ZeroTuningError(
            f"scales {folder}: the calibration there is unfinished; its command, run again, resumes it"
        )
    return HeadScales.from_pretrained(scales)


def apply_scales_to(model: Any, chosen: HeadScales, model_name: str, scales: Any) -> None:
    """`apply_scales`, whose error also names the model and where the scales came from."""
    try:
        apply_scales(model, chosen)
    except ZeroTuningError as error:
        named = "scales" if isinstance(scales, HeadScales) else f"scales {os.fspath(scales)}"
        raise ZeroTuningError(f"{named} do not fit model {model_name}: {error}") from error
