"""Finding a model's attention layers: run two tokens and record the calls of the attention function."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zerotuning import ops
from zerotuning.errors import ZeroTuningError
from zerotuning.models.device_maps import input_device


class AttentionCall(NamedTuple):
    """One call of the attention function during the probe."""

    module: nn.Module
    heads: int  # query heads that this process computes
    device: torch.device  # where the layer computes; its weights may be elsewhere between calls


class AttentionLayer(NamedTuple):
    """An attention layer that the probe found."""

    name: str
    module: nn.Module
    heads: int
    device: torch.device


@dataclass
class Probe:
    """The calls that a model makes in a forward pass over two tokens."""

    module_names: dict[int, str]  # by id of the module
    thread: int = field(default_factory=threading.get_ident)
    calls: list[AttentionCall] = field(default_factory=list)
    layer_windows: set[int] = field(default_factory=set)  # sliding windows that layers pass to the attention function
    mask_windows: set[int] = field(default_factory=set)  # sliding windows that the mask function is called with

    def record_call(self, module: nn.Module, query: Tensor, sliding_window: int | None) -> None:
        """Record a call of the attention function."""
        self.calls.append(AttentionCall(module, query.shape[1], query.device))
        if sliding_window is not None:
            self.layer_windows.add(sliding_window)


_running: Probe | None = None
_lock = threading.Lock()


def running() -> Probe | None:
    """Return the probe whose forward pass this thread runs; None outside a probe, also while another thread probes."""
    probe = _running
    return probe if probe is not None and probe.thread == threading.get_ident() else None


def find_attention_layers(model: Any, partial: bool) -> list[AttentionLayer | None]:
    """Find the attention layers of a model whose attention implementation is switched already.

    Args:
        model: a transformers model.
        partial: accept a model in which some layers never call the attention function.

    Returns:
        The attention layer of each layer index; None where a layer was not found.

    Raises:
        ZeroTuningError: layers are missing, shared or windowed in an unsupported way, or two tokens cannot be run.
    """
    with _lock:
        probe = _run(model)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    indices: list[Any] = [getattr(call.module, "layer_idx", None) for call in probe.calls]
    if None in indices:
        indices = list(range(len(indices)))
    if len(set(indices)) < len(indices) or len({id(call.module) for call in probe.calls}) < len(indices):
        raise ZeroTuningError(
            f"{type(model).__name__} runs one attention layer several times, which zerotuning does not support"
        )
    missing = [index for index in range(num_layers) if index not in indices]
    if not probe.calls or (missing and not partial):
        raise ZeroTuningError(_describe_missing(model, missing, num_layers))
    unused_windows = probe.mask_windows - probe.layer_windows
    if unused_windows:
        raise ZeroTuningError(
            f"{type(model).__name__} masks a sliding window of {min(unused_windows)} keys, "
            "which no layer passes to its attention function"
        )
    layers: list[AttentionLayer | None] = [None] * num_layers
    for index, call in zip(indices, probe.calls, strict=True):
        check_device(call.device)
        layers[index] = AttentionLayer(probe.module_names[id(call.module)], *call)
    return layers


@torch.no_grad()
def _run(model: Any) -> Probe:
    """Run two tokens through the model in evaluation mode."""
    global _running
    device = input_device(model)
    check_device(device)
    training = [module for module in model.modules() if module.training]
    probe = _running = Probe({id(module): name for name, module in model.named_modules()})
    try:
        model.eval()
        model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
        return probe
    except ZeroTuningError:
        raise
    except Exception as error:
        raise ZeroTuningError(f"{type(model).__name__} could not run two tokens to find its layers: {error}") from error
    finally:
        for module in training:
            module.training = True
        _running = None


def check_device(device: torch.device) -> None:
    """Raise ZeroTuningError for a device without operators in this build."""
    if not ops.runs_on(device.type):
        raise ZeroTuningError(
            f"the model is on {device}, where this build of zerotuning has no operators; move it to the CPU"
        )


def _describe_missing(model: Any, missing: Sequence[int], total: int) -> str:
    blocks = next(
        (
            [f"{name}.{index} ({type(stack[index]).__name__})" for index in missing]
            for name, stack in model.named_modules()
            if isinstance(stack, nn.ModuleList) and len(stack) == total
        ),
        [f"layer {index}" for index in missing],
    )
    shown = ", ".join(blocks[:4]) + (f" and {len(blocks) - 4} more" if len(blocks) > 4 else "")
    advice = "" if len(missing) == total else "; partial=True tunes the others"
    return (
        f"{len(missing)} of {total} layers of {type(model).__name__} have no attention that zerotuning can reach: "
        f"{shown}{advice}"
    )
