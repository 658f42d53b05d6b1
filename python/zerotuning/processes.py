"""Several processes that calibrate together: each takes a share of every batch, sums go to all of them.

`torchrun … -m zerotuning calibrate` starts them and sets what torch.distributed reads from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """This process among those of torch.distributed's default group; alone where there is no group."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._device = torch.device("cpu")
        if together and dist.get_backend() == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a sequence that all hold: contiguous, as equal as can be, maybe empty."""
        begin, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Float64 arrays of one shape -> their sum, the same bits in every process."""
        if self.count == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self._device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def from_first(self, text: str) -> str:
        """The first process's text, in all of them."""
        if self.count == 1:
            return text
        content = torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8, device=self._device)
        length = torch.tensor([len(content)], device=self._device)
        dist.broadcast(length, 0)
        if not self.is_first:
            content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        dist.broadcast(content, 0)
        return bytes(content.cpu().tolist()).decode("utf-8")


def is_one_of_several() -> bool:
    """Whether torchrun, or the like, started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1").isdecimal() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str | None) -> str | None:
    """Joins the other processes: NCCL where each has a GPU of its own, else gloo. Returns the device to use."""
    if device is None and torch.cuda.device_count() > int(os.environ.get("LOCAL_RANK", "0")):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    on_gpu = device is not None and torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.device(device))  # type: ignore[arg-type]
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10))
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
