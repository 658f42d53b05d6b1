"""The demo: SmolLM2-135M-Instruct is calibrated on 64 SST-2 examples and measured on 400 others before and after."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerotuning.files import write_json_atomically
from zerotuning.output import PICTURE_FILE, REPORT_FILE, STATE_FILE, result_folder
from zerotuning.version import __version__

if TYPE_CHECKING:
    from zerotuning.calibration.calibrate import Calibration
    from zerotuning.evaluation.evaluate import Evaluation

MODEL = "demo"
TASK = "sst2"
CALIBRATION_EXAMPLES = 64
TEST_EXAMPLES = 400
# Fewer steps, folds and examples in a step than the defaults. The defaults would gain little with so few examples, and
# processors without bfloat16 instructions are seven times slower than others.
STEPS = 20
STEP_EXAMPLES = 16
FOLDS = 1


def run_demo(output: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Run the demo, print its table and write the scales, their picture and report.json.

    All files are written after the last measurement.

    Args:
        output: The folder of the result.
        overwrite: Replace a result in `output`.
        progress: Draw progress bars if stderr is a terminal.

    Returns:
        The report: `untuned` and `tuned` (examples, accuracy in [0, 1], loss and entropy in nats, seconds); `seconds`
        in all, without the model's download; the task, the model, the calibration's own report and versions.

    Raises:
        ZeroTuningError: `output` holds a result or cannot be written, or the model cannot be fetched.
    """
    with result_folder(output, overwrite=overwrite) as folder:
        figures = _measure(progress)
        return _write_and_print(figures, folder)


@dataclass(frozen=True)
class _DemoFigures:
    model_name: str
    dtype: str
    untuned: Evaluation
    tuned: Evaluation
    calibration: Calibration
    seconds: float


def _measure(progress: bool) -> _DemoFigures:
    from zerotuning.calibration.calibrate import calibrate
    from zerotuning.evaluation.evaluate import evaluate
    from zerotuning.models.demo_model import demo_model_path
    from zerotuning.models.loading import load_model
    from zerotuning.patching.patch import apply_scales
    from zerotuning.tasks.examples import builtin_examples
    from zerotuning.tasks.task import Task

    file = demo_model_path()
    started = time.perf_counter()
    task = Task.load(TASK)
    calibration_examples = builtin_examples(TASK, "validation", CALIBRATION_EXAMPLES)
    test_examples = builtin_examples(TASK, "test", TEST_EXAMPLES)
    _print_step(f"Loading {file.name}")
    model, tokenizer = load_model(MODEL)
    _print_step(f"Untuned: {len(test_examples)} test examples of {TASK}")
    untuned = evaluate(model, tokenizer, task, test_examples, progress=progress)
    _print_step(f"Calibrating on {len(calibration_examples)} other examples")
    calibration = calibrate(
        model,
        tokenizer,
        task,
        records=calibration_examples,
        steps=STEPS,
        step_examples=STEP_EXAMPLES,
        folds=FOLDS,
        model_name=file.name,
        progress=progress,
    )
    apply_scales(model, calibration.scales)
    _print_step(f"Tuned: the same {len(test_examples)} test examples")
    tuned = evaluate(model, tokenizer, task, test_examples, progress=progress)
    dtype = str(model.dtype).removeprefix("torch.")
    return _DemoFigures(file.name, dtype, untuned, tuned, calibration, round(time.perf_counter() - started, 3))


def _write_and_print(figures: _DemoFigures, folder: Path) -> dict[str, Any]:
    from zerotuning.plots.head_map import plot_head_map
    from zerotuning.plots.style import can_plot

    report = _report(figures)
    scales = figures.calibration.scales
    scales.save_pretrained(folder, overwrite=True)
    written = ["scales"]
    if can_plot():
        plot_head_map(scales, folder / PICTURE_FILE)
        written.append(PICTURE_FILE)
    write_json_atomically(folder / REPORT_FILE, report)
    (folder / STATE_FILE).unlink(missing_ok=True)
    print(_table(figures.untuned, figures.tuned))
    if not figures.calibration.improved:
        print("\nNothing better than γ = 1 was found on the held-out examples: every γ stays 1.")
    print(f"\n{scales.gamma.numel()} scales, no weight changed, {figures.seconds:.0f} s in all")
    print(f"In {folder}: {', '.join([*written, REPORT_FILE])}")
    return report


def _report(figures: _DemoFigures) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "task": TASK,
        "model": figures.model_name,
        "dtype": figures.dtype,
        "untuned": _to_json(figures.untuned),
        "tuned": _to_json(figures.tuned),
        "seconds": figures.seconds,
        "calibration": figures.calibration.report,
        "versions": {
            "zerotuning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _print_step(text: str) -> None:
    print(f"{text} …", flush=True)


def _to_json(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in evaluation.to_json().items() if name != "task"}


def _table(untuned: Evaluation, tuned: Evaluation) -> str:
    lines = [f"\n{TASK}, {untuned.examples} test examples", "", "           accuracy    loss  entropy"]
    for name, figures in (("untuned", untuned), ("tuned", tuned)):
        lines.append(f"  {name:<8} {100 * figures.accuracy:6.1f} %  {figures.loss:6.3f}   {figures.entropy:6.3f}")
    return "\n".join(lines)
