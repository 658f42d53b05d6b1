"""Processes that work together: their backend, and the examples that each gets."""

from __future__ import annotations

from pathlib import Path

from several_processes import torchrun
from zerotuning.models.process_group import Processes


def test_processes_that_share_a_model_each_get_every_example() -> None:
    together = Processes(share_model=True)
    together.rank, together.count = 1, 2
    assert list(together.shard([1, 2, 3])) == [1, 2, 3]


BACKEND = """
import os, sys
import torch.distributed as dist
from zerotuning.models import process_group
from zerotuning.errors import ZeroTuningError

process_group._gpu_uuid = lambda device: "a GPU" if os.environ["RANK"] == "0" else ""
process_group.torch.cuda.set_device = lambda device: None
try:
    process_group.join_process_group("cpu", tensor_parallel=len(sys.argv) > 1)
    print(f"joined over {dist.get_backend()}")
except ZeroTuningError as error:
    print(error)
process_group.leave_process_group()
"""


def test_processes_of_which_one_has_a_gpu_agree_on_gloo_or_refuse_to_share_a_model(tmp_path: Path) -> None:
    (tmp_path / "backend.py").write_text(BACKEND, encoding="utf-8")
    assert torchrun(tmp_path, "backend.py").stdout.count("joined over gloo") == 2
    refused = torchrun(tmp_path, "backend.py", "tensor-parallel").stdout
    assert refused.count("tensor_parallel needs a GPU for each of the 2 processes, got 1") == 2
