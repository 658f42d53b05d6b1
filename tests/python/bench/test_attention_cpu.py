"""The rows of the CPU benchmark of attention."""

from __future__ import annotations

from zerotuning.bench import attention_cpu
from zerotuning.bench.rows import OURS


def test_attention_rows_cover_both_passes_and_memory_grows_linearly() -> None:
    rows = list(attention_cpu.attention_rows([(2, 1, 16)], [32], seconds=0.0, flex=False))
    passes = {(row["what"], row["dtype"]) for row in rows}
    assert {("forward", "bfloat16"), ("forward + backward", "float32")} <= passes
    per_token = [row["peers"][OURS]["KiB per token"] for row in rows if row["what"] == "memory"]
    assert max(per_token) < 1.2 * min(per_token)
