"""A simulated lack of memory: passes of many sequences fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def memory_for(model: Any, sequences: int) -> Iterator[None]:
    """Make passes of more than `sequences` sequences raise an out-of-memory error."""

    def refuse(_: Any, args: Any, options: dict[str, Any]) -> None:
        if len(options["input_ids"]) > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
