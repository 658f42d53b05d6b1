"""Loading a model and its head scales by the names of folders or hub repositories."""

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
    """Load a model and its tokenizer, and apply head scales.

    Args:
        name: as in `load_model`.
        scales: HeadScales, their folder, or owner/repository on the hub; read before the model is loaded. None: the
            model is not patched.
        dtype: as in `load_model`.
        device: as in `load_model`.
        device_map: as in `load_model`.

    Returns:
        The model and its tokenizer.

    Raises:
        ZeroTuningError: the model or the scales cannot be read, or the scales do not fit the model; the message names
            both.
    """
    chosen = None if scales is None else read_scales(scales)
    model, tokenizer = load_model(name, dtype, device, device_map)
    if chosen is not None:
        apply_scales_to(model, chosen, os.fspath(name), scales)
    return model, tokenizer


def read_scales(scales: HeadScales | str | os.PathLike[str]) -> HeadScales:
    """Return head scales; given a name, read them from their folder or from the hub.

    Args:
        scales: HeadScales, their folder, or owner/repository on the hub.

    Raises:
        ZeroTuningError: no such folder, a folder of an unfinished calibration, or files that cannot be read.
    """
    if isinstance(scales, HeadScales):
        return scales
    folder = Path(scales)
    if folder.is_file():
        raise ZeroTuningError(f"scales {folder} must be a folder, got a file")
    if not folder.exists() and os.fspath(scales).count("/") != 1:  # owner/name may be on the hub
        raise ZeroTuningError(f"scales folder {folder} does not exist")
    if (folder / STATE_FILE).exists() and not (folder / SCALES_FILE).exists():
        raise ZeroTuningError(
            f"scales {folder}: the calibration there is unfinished; run its command again to resume the calibration"
        )
    return HeadScales.from_pretrained(scales)


def apply_scales_to(model: Any, chosen: HeadScales, model_name: str, scales: Any) -> None:
    """Apply scales to a model, with an error that also names the model and where the scales came from.

    Args:
        model: a transformers model, patched or not.
        chosen: the scales.
        model_name: for the error.
        scales: where the scales came from, for the error: HeadScales or a name.

    Raises:
        ZeroTuningError: the scales do not fit the model.
    """
    try:
        apply_scales(model, chosen)
    except ZeroTuningError as error:
        named = "scales" if isinstance(scales, HeadScales) else f"scales {os.fspath(scales)}"
        raise ZeroTuningError(f"{named} do not fit model {model_name}: {error}") from error
