"""A description of the machine, stored beside measured figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Return processor, cores, threads and versions: what a measured figure depends on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        amx = any("amx_bf16" in line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        amx = False
    return {
        "processor": name,
        "bf16 matrix unit": amx,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
