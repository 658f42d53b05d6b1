"""A model whose layers lie on several devices, or wait on the CPU or disk, by transformers' device maps and accelerate's hooks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zerotuning.errors import ZeroTuningError

#: Maps that transformers works out.
NAMES = ("auto", "balanced", "balanced_low_0", "sequential")
#: A part's place where it waits to be read.
DISK = "disk"


def device_types(device_map: Any) -> set[str]:
    """The types of device that a map may use, such as cuda and cpu.

    Errors: ZeroTuningError for no map, a map to a GPU where torch sees none, and without the package accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ZeroTuningError('device_map needs the package accelerate: pip install "zerotuning[device-map]"')
    if isinstance(device_map, str) and device_map in NAMES:
        return {"cuda", "cpu"} if torch.cuda.is_available() else {"cpu"}
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    types = {_device_type(place) for place in places}
    if not types:
        raise ZeroTuningError("device_map must give every part of the model a device, got an empty one")
    if "cuda" in types and not torch.cuda.is_available():
        raise ZeroTuningError(f"device_map {device_map!r} asks for a GPU, but torch sees none")
    return types


def _device_type(place: Any) -> str:
    if place == DISK:
        return "cpu"
    try:
        if isinstance(place, bool) or not isinstance(place, (int, str, torch.device)):
            raise TypeError
        return "cuda" if isinstance(place, int) else torch.device(place).type
    except (RuntimeError, TypeError):
        raise ZeroTuningError(
            f"device_map must be one of {', '.join(NAMES)}, a device, or a mapping of the model's parts to devices or "
            f"{DISK!r}, got {place!r}"
        ) from None


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs: its input embedding's device, or where that computes if it is not there yet.

    Errors: ZeroTuningError for weights that are nowhere and that nothing brings, as transformers 5.6 leaves a model of
    which every part is to wait on the disk.
    """
    embedding = model.get_input_embeddings()
    if not embedding.weight.is_meta:
        return embedding.weight.device  # type: ignore[no-any-return]
    for hook in _hooks(embedding):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    raise ZeroTuningError("the model's weights are nowhere (device meta): give device_map a device for some part of it")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights wait on the CPU or disk, and come to the device for the time that they are used."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
