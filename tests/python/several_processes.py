"""Starting processes that work together, as users do: by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(place: Path, *arguments: str | Path, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """Run two processes of a script, or of a module after -m."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **hidden},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
