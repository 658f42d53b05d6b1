"""The placement of a command's model: the device, the processes that torchrun started, loading."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zerotuning.errors import ZeroTuningError


@contextmanager
def joined_processes(arguments: argparse.Namespace, *, share_examples: bool) -> Iterator[str | None]:
    """Within the context, join the process group of the processes that torchrun started.

    Args:
        arguments: device, device_map and tensor_parallel of the command line.
        share_examples: Whether the processes share the command's examples, each with the whole model.

    Yields:
        The device for the model, or None where --device-map, --tensor-parallel or `load_model` decides.
    """
    from zerotuning.models import process_group

    several = process_group.is_distributed()
    if several and arguments.device_map is not None:
        raise ZeroTuningError("--device-map spreads the model of one process, torchrun started several")
    try:
        if arguments.tensor_parallel:
            from zerotuning.models.tensor_parallel import join_processes

            join_processes()
            yield None
        else:
            yield process_group.join_process_group(arguments.device) if several and share_examples else arguments.device
    finally:
        process_group.leave_process_group()


def load_placed_model(arguments: argparse.Namespace, device: str | None) -> tuple[Any, Any]:
    """Return the model and tokenizer of --model, on `device` or placed as the command line asks."""
    from zerotuning.models.loading import load_model

    return load_model(arguments.model, arguments.dtype, device, arguments.device_map, arguments.tensor_parallel)
