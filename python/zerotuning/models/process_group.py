"""Data-parallel calibration: each rank evaluates a part of every batch, and sums are reduced over all ranks.

`torchrun … -m zerotuning calibrate` starts the processes and sets the variables that torch.distributed reads.
Tensor-parallel ranks (tensor_parallel.py) share one model instead: each evaluates every example, and all use rank 0's
numbers.
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

#: Timeout of the collectives. Ranks may take several minutes more or less than each other to load a large model.
TIMEOUT = timedelta(hours=1)


class Processes:
    """The ranks of torch.distributed's default process group; a single rank if there is no group."""

    def __init__(self, *, share_model: bool = False) -> None:
        """Read rank and world size from the default process group.

        Args:
            share_model: Whether the ranks hold shards of one model (tensor parallelism). Each rank then evaluates every
                example.
        """
        self.share_model = share_model
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.count = dist.get_world_size() if initialized else 1
        self._device = torch.device("cpu")
        if initialized and dist.get_backend() == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes files and prints: rank 0."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's contiguous shard of a sequence that every rank holds.

        The shards' sizes differ by at most one item; a shard may be empty. Ranks that share a model
        get the whole sequence.
        """
        if self.share_model:
            return items
        begin, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 arrays of one shape over the ranks, the same bits on every rank.

        Ranks that share a model hold equal values up to rounding: all these ranks get rank 0's array.
        """
        if self.count == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(self._device)
        if self.share_model:
            dist.broadcast(tensor, 0)
        else:
            dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def broadcast_from_main(self, text: str) -> str:
        """Return rank 0's text on every rank."""
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
        """Block until every rank has called this: what rank 0 wrote before its call is then visible."""
        if self.count > 1:
            # A barrier rather than a broadcast: after a broadcast, a thread of gloo may still hold the tensor, and a
            # process that exits at once aborts while this thread waits for the interpreter (seen with torch 2.10).
            dist.barrier(device_ids=[self._device.index] if self._device.type == "cuda" else None)


def is_distributed() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return world_size.isdecimal() and int(world_size) > 1


def join_process_group(device: str | None, *, tensor_parallel: bool = False) -> str | None:
    """Initialise the default process group and return the device that this rank should use.

    The ranks first exchange the identities of their GPUs, so that all choose the same backend: NCCL if each rank has a
    GPU of its own, else gloo.

    Raises:
        ZeroTuningError: Tensor-parallel ranks share a GPU, or only some ranks have a GPU.
    """
    chosen = _local_device(device, tensor_parallel)
    store, rank, count = next(iter(dist.rendezvous("env://")))
    store.set_timeout(TIMEOUT)
    gpus = _gather_texts(dist.PrefixStore("zerotuning", store), rank, count, _gpu_uuid(chosen))
    one_gpu_each = all(gpus) and len(set(gpus)) == count
    if tensor_parallel and any(gpus) and not one_gpu_each:
        raise ZeroTuningError(
            f"tensor_parallel needs a GPU for each of the {count} processes, got {len(set(gpus) - {''})} "
            '(or none, for the CPU: CUDA_VISIBLE_DEVICES="")'
        )
    if _gpu_uuid(chosen):
        torch.cuda.set_device(torch.device(chosen))  # type: ignore[arg-type]
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group(
        "nccl" if one_gpu_each else "gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT
    )
    return chosen


def _local_device(device: str | None, tensor_parallel: bool) -> str | None:
    """Return the requested device, or by default this rank's GPU (shared if there are fewer GPUs than local ranks)."""
    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    if device is None and not tensor_parallel:
        from zerotuning import ops

        if not ops.runs_on("cuda"):
            return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _gpu_uuid(device: str | None) -> str:
    """Return the UUID of a GPU, or "" for a device of another type."""
    try:
        chosen = torch.device(device or "cpu")
    except RuntimeError:  # load_model raises the error for this device
        return ""
    if chosen.type != "cuda" or not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        return ""
    return str(torch.cuda.get_device_properties(chosen).uuid)


def _gather_texts(store: dist.Store, rank: int, count: int, text: str) -> list[str]:
    """Return the text of every rank, in the order of the ranks."""
    store.set(str(rank), text)
    return [store.get(str(other)).decode("utf-8") for other in range(count)]


def leave_process_group() -> None:
    """Destroy the default process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
