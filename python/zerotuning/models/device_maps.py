"""Device maps: models whose layers are spread over devices or offloaded to CPU or disk (accelerate's hooks)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zerotuning.errors import ZeroTuningError

#: Maps that transformers computes from the sizes of the layers and the free memory.
NAMES = ("auto", "balanced", "balanced_low_0", "sequential")
#: The entry of a map that offloads a part of the model to the disk.
DISK = "disk"


def device_types(device_map: Any) -> set[str]:
    """Return the types of device, such as "cuda" and "cpu", that a map may use.

    Raises:
        ZeroTuningError: `device_map` is no map, names a GPU on a machine without one, or accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ZeroTuningError('device_map needs the package accelerate: pip install "zerotuning[device-map]"')
    if isinstance(device_map, str) and device_map in NAMES:
        return {"cuda", "cpu"} if torch.cuda.is_available() else {"cpu"}
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    types = {_device_type(device) for device in devices}
    if not types:
        raise ZeroTuningError("device_map must give every part of the model a device, got an empty mapping")
    if "cuda" in types and not torch.cuda.is_available():
        raise ZeroTuningError(f"device_map {device_map!r} names a GPU, but torch finds none")
    return types


def _device_type(device: Any) -> str:
    if device == DISK:
        return "cpu"
    try:
        if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
            raise TypeError
        return "cuda" if isinstance(device, int) else torch.device(device).type
    except (RuntimeError, TypeError):
        raise ZeroTuningError(
            f"device_map must be one of {', '.join(NAMES)}, a device, or a mapping of the model's parts to devices or "
            f"{DISK!r}, got {device!r}"
        ) from None


def input_device(model: Any) -> torch.device:
    """Return the device that a model's inputs must be on.

    This is the device of the input embedding, or the device to which accelerate loads an offloaded embedding.

    Raises:
        ZeroTuningError: The embedding is on the device meta and no hook loads it. transformers 5.6 leaves a model in
            this state if its map offloads every part to the disk.
    """
    embedding = model.get_input_embeddings()
    if not embedding.weight.is_meta:
        return embedding.weight.device  # type: ignore[no-any-return]
    for hook in _hooks(embedding):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    raise ZeroTuningError(
        "the model's weights are on no device (meta): device_map must place some part of the model on a device"
    )


def is_offloaded(model: nn.Module) -> bool:
    """Return whether some weights are offloaded to CPU or disk and copied to the device for each use."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
