"""The demo: the embedded model, calibrated on 64 SST-2 examples, measured on 400 others before and after."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerotuning.files import write_json_atomically
from zerotuning.output import PICTURE_FILE, REPORT_FILE, STATE_FILE, result_folder

if TYPE_CHECKING:
    from zerotuning.evaluation.evaluate import Evaluation

MODEL = "demo"
TASK = "sst2"
CALIBRATION_EXAMPLES = 64
TEST_EXAMPLES = 400
# Fewer steps, folds and examples a step than the default, which for so few examples gain little: processors without
# bfloat16 instructions take seven times as long as those with.
STEPS = 20
STEP_EXAMPLES = 16
FOLDS = 1


def run_demo(output: str | os.PathLike[str], *, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Run the demo, print its table, write scales, picture and report.json to `output`; return the report.

    The report: `untuned` and `tuned` (examples, accuracy in [0, 1], loss and entropy in nats, seconds),
    `seconds` of it all less the model's download, task, model, the calibration's own report and the versions.
    Errors: ZeroTuningError for an output that holds a result (without overwrite) or cannot be written, and
    for a model that cannot be fetched. Nothing is written before everything is measured.
    """
    with result_folder(output, overwrite=overwrite) as folder:
        return _run(folder, progress)


def _run(folder: Path, progress: bool) -> dict[str, Any]:
    import torch
    import transformers

    from zerotuning.calibration.calibrate import calibrate
    from zerotuning.evaluation.evaluate import evaluate
    from zerotuning.models.demo_model import demo_model_path
    from zerotuning.models.loading import load_model
    from zerotuning.patching.patch import apply_scales
    from zerotuning.plots.head_map import plot_head_map
    from zerotuning.plots.style import can_plot
    from zerotuning.tasks.examples import builtin_examples
    from zerotuning.tasks.task import Task
    from zerotuning.version import __version__

    file = demo_model_path()
    started = time.perf_counter()
    task = Task.load(TASK)
    fit, test = (
        builtin_examples(TASK, "validation", CALIBRATION_EXAMPLES),
        builtin_examples(TASK, "test", TEST_EXAMPLES),
    )
    _say(f"Loading {file.name}")
    model, tokenizer = load_model(MODEL)
    _say(f"Untuned: {len(test)} test examples of {TASK}")
    untuned = evaluate(model, tokenizer, task, test, progress=progress)
    _say(f"Calibrating on {len(fit)} other examples")
    calibration = calibrate(
        model,
        tokenizer,
        task,
        records=fit,
        steps=STEPS,
        step_examples=STEP_EXAMPLES,
        folds=FOLDS,
        model_name=file.name,
        progress=progress,
    )
    apply_scales(model, calibration.scales)
    _say(f"Tuned: the same {len(test)} test examples")
    tuned = evaluate(model, tokenizer, task, test, progress=progress)

    report = {
        "task": TASK,
        "model": file.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "untuned": _figures(untuned),
        "tuned": _figures(tuned),
        "seconds": round(time.perf_counter() - started, 3),
        "calibration": calibration.report,
        "versions": {
            "zerotuning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    calibration.scales.save_pretrained(folder, overwrite=True)
    written = ["scales"]
    if can_plot():
        plot_head_map(calibration.scales, folder / PICTURE_FILE)
        written.append(PICTURE_FILE)
    write_json_atomically(folder / REPORT_FILE, report)
    (folder / STATE_FILE).unlink(missing_ok=True)
    print(_table(untuned, tuned))
    if not calibration.improved:
        print("\nNothing better than γ = 1 was found on the held-out examples: every γ stays 1.")
    print(f"\n{calibration.scales.gamma.numel()} scales, no weight touched, {report['seconds']:.0f} s in all")
    print(f"In {folder}: {', '.join([*written, REPORT_FILE])}")
    return report


def _say(text: str) -> None:
    print(f"{text} …", flush=True)


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in evaluation.to_json().items() if name != "task"}


def _table(untuned: Evaluation, tuned: Evaluation) -> str:
    lines = [f"\n{TASK}, {untuned.examples} test examples", "", "           accuracy    loss  entropy"]
    for name, figures in (("untuned", untuned), ("tuned", tuned)):
        lines.append(f"  {name:<8} {100 * figures.accuracy:6.1f} %  {figures.loss:6.3f}   {figures.entropy:6.3f}")
    return "\n".join(lines)
