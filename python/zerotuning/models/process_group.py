"""Several processes that calibrate together: each takes a share of every batch, sums go to all of them.

`torchrun … -m zerotuning calibrate` starts them and sets what torch.distributed reads from the environment. Processes that
share one model (tensor_parallel.py) all read every example instead, and go by the first one's numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from zerotuning.errors import ZeroTuningError

T = TypeVar("T")

#: How long a process waits for the others. Reading a large model takes minutes, and not equally many in each.
PATIENCE = timedelta(hours=1)


class Processes:
    """This process among those of torch.distributed's default group; alone where there is no group.

    share_model     whether they hold one model together, so that each has to read every example
    """

    def __init__(self, *, share_model: bool = False) -> None:
        self.share_model = share_model
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._device = torch.device("cpu")
        if together and dist.get_backend() == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a sequence that all hold: contiguous, as equal as can be, maybe empty. All of it where
        they share a model."""
        if self.share_model:
            return items
        begin, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Float64 arrays of one shape -> their sum, the same bits in every process. Where processes share a model, and
        all found the same to rounding: what the first one found."""
        if self.count == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self._device)
        if self.share_model:
            dist.broadcast(tensor, 0)
        else:
            dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def broadcast_from_main(self, text: str) -> str:
        """The first process's text, in all of them."""
        if self.count == 1:
            return text
        content = torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8, device=self._device)
        length = torch.tensor([len(content)], device=self._device)
        dist.broadcast(length, 0)
        if not int(length):
            return ""
        if not self.is_main_process:
            content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        dist.broadcast(content, 0)
        return bytes(content.cpu().tolist()).decode("utf-8")

    def wait_for_main(self) -> None:
        """Returns once the first process, and all others, are here too: what they did before is done."""
        if self.count > 1:
            # No broadcast: after one, a thread of gloo's may still hold its tensor, and a process that leaves at once aborts
            # in that thread's wait for the interpreter (seen with torch 2.10).
            dist.barrier(device_ids=[self._device.index] if self._device.type == "cuda" else None)


def is_one_of_several() -> bool:
    """Whether torchrun, or the like, started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1").isdecimal() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str | None, *, tensor_parallel: bool = False) -> str | None:
    """Joins the other processes and returns the device to use: NCCL where each of them has a GPU of its own, else gloo.

    They tell each other their GPUs first, so that all choose alike. Errors: ZeroTuningError for processes that are to share
    a model and a GPU at once, or of which some have one and some none.
    """
    chosen = _own_device(device, tensor_parallel)
    store, rank, count = next(iter(dist.rendezvous("env://")))
    store.set_timeout(PATIENCE)
    gpus = _told_by_all(dist.PrefixStore("zerotuning", store), rank, count, _name_of_gpu(chosen))
    have_own = all(gpus) and len(set(gpus)) == count
    if tensor_parallel and any(gpus) and not have_own:
        raise ZeroTuningError(
            f"tensor_parallel needs a GPU for each of the {count} processes, got {len(set(gpus) - {''})} "
            '(or none, for the CPU: CUDA_VISIBLE_DEVICES="")'
        )
    if _name_of_gpu(chosen):
        torch.cuda.set_device(torch.device(chosen))  # type: ignore[arg-type]
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group("nccl" if have_own else "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    return chosen


def _own_device(device: str | None, tensor_parallel: bool) -> str | None:
    """The device asked for; without one this process's own GPU, or one that it shares where they are too few."""
    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    if device is None and not tensor_parallel:
        from zerotuning import ops

        if not ops.runs_on("cuda"):
            return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _name_of_gpu(device: str | None) -> str:
    """What tells a GPU from all others; nothing for another device."""
    try:
        chosen = torch.device(device or "cpu")
    except RuntimeError:  # load_model says what is wrong with it
        return ""
    if chosen.type != "cuda" or not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        return ""
    return str(torch.cuda.get_device_properties(chosen).uuid)


def _told_by_all(store: dist.Store, rank: int, count: int, text: str) -> list[str]:
    """Every process's text, in the order of their ranks."""
    store.set(str(rank), text)
    return [store.get(str(one)).decode("utf-8") for one in range(count)]


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
