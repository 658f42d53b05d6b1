"""`zerotuning bench`: choose the rows of a benchmark, print them and write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from zerotuning import ops
from zerotuning.bench.names import BENCHMARKS
from zerotuning.bench.pictures import plot_accuracies, plot_ratios
from zerotuning.bench.rows import Row, as_csv, as_line
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_json_atomically, write_text_atomically
from zerotuning.machine import machine


def run_bench(
    kind: str,
    output: Path | None = None,
    device: str | None = None,
    plot: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a benchmark, print its rows and write them.

    Args:
        kind: One of BENCHMARKS.
        output: A .json file, or a .csv file with a line for each figure.
        device: "cpu" or "cuda". Default: "cuda" if the operators run on a GPU of this machine.
        plot: A picture of the ratios (of `search`: the accuracies), .png or .svg.
        options: Of `search`: the fields of SearchBench. Its rows are written one by one, and rows that a .json `output`
            holds already are not measured again.

    Returns:
        {"benchmark": kind, "machine": …, "rows": […]}, as in the .json file.

    Raises:
        ZeroTuningError: An argument is wrong, or the operators run on no GPU of this machine.
    """
    if kind not in BENCHMARKS:
        raise ZeroTuningError(f"kind must be one of {', '.join(BENCHMARKS)}, got {kind!r}")
    on_cuda = torch.cuda.is_available() and ops.runs_on("cuda")
    device = device or ("cuda" if on_cuda else "cpu")
    if device == "cuda" and not on_cuda:
        raise ZeroTuningError("device cuda: this build of zerotuning has no operators for a GPU of this machine")
    if output is not None and output.suffix.lower() not in (".json", ".csv"):
        raise ZeroTuningError(f"output must end in .json or .csv, got {output}")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise ZeroTuningError(f"plot must end in .png or .svg, got {plot}")
    machine_facts, measure = _measurements(kind, device, output, options)
    print(", ".join(f"{name} {value}" for name, value in machine_facts.items()), flush=True)
    rows: list[Row] = []
    for row in measure():
        rows.append(row)
        print(as_line(row), flush=True)
        if kind == "search" and output is not None:
            _write(output, {"benchmark": kind, "machine": machine_facts, "rows": rows})
    result = {"benchmark": kind, "machine": machine_facts, "rows": rows}
    if output is not None:
        _write(output, result)
    if plot is not None:
        (plot_accuracies if kind == "search" else plot_ratios)(result, plot)
    return result


def _measurements(
    kind: str, device: str, output: Path | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[], Iterable[Row]]]:
    """The machine that the figures depend on, and the function that measures the rows."""
    facts = machine()
    if device == "cuda":
        from zerotuning.bench.attention_cuda import card

        facts |= card()
    if kind == "search":
        from zerotuning.bench.search import SearchBench, read_rows

        search = SearchBench(device=device, **options)
        done = read_rows(output) if output is not None and output.suffix.lower() == ".json" else []
        return facts, lambda: search.rows(done)
    if kind == "sensitivity":
        from zerotuning.bench.sensitivity import sensitivity_rows

        return facts, lambda: sensitivity_rows(device=device)
    return facts, _rows_by_device(kind, device)


def _rows_by_device(kind: str, device: str) -> Callable[[], Iterable[Row]]:
    if device == "cuda":
        from zerotuning.bench import attention_cuda, model_cuda

        on_gpu: dict[str, Callable[[], Iterable[Row]]] = {
            "attention": attention_cuda.attention_rows,
            "decode": attention_cuda.decode_rows,
            "calibration": model_cuda.calibration_rows,
        }
        return on_gpu[kind]
    from zerotuning.bench import attention_cpu, model_cpu

    on_cpu: dict[str, Callable[[], Iterable[Row]]] = {
        "attention": attention_cpu.attention_rows,
        "decode": attention_cpu.decode_rows,
        "calibration": model_cpu.calibration_rows,
    }
    return on_cpu[kind]


def _write(output: Path, result: Mapping[str, Any]) -> None:
    if output.suffix.lower() == ".csv":
        write_text_atomically(output, as_csv(result["rows"]))
    else:
        write_json_atomically(output, result)
