"""`calibrate`: from a model, one or several tasks and some examples to head scales.

This module checks the input, prepares model and tasks, and writes the result; run.py contains the search. The C++
optimisers (csrc/search) work on plain vectors: objective.py computes the objective at their points and, for the
gradient method, the gradient in every head's log γ from one backward pass (docs/how-it-works.md, "The idea").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import nn

from zerotuning.calibration.folds import draw_examples
from zerotuning.calibration.objective import CalibrationObjective, Metric, TaskExamples
from zerotuning.calibration.options import METHODS, CalibrationOptions, options_from, shows_option_keywords
from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.report import METADATA_FIELDS
from zerotuning.calibration.run import CalibrationRun
from zerotuning.calibration.state import CalibrationState, identity
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.label_scorer import GRADIENT_TOKENS, LabelScorer
from zerotuning.files import write_json_atomically
from zerotuning.models.process_group import Processes
from zerotuning.models.tensor_parallel import is_tensor_parallel
from zerotuning.output import PICTURE_FILE, REPORT_FILE, REPORT_PAGE_FILE, result_folder
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import check_model_type, head_parameters, is_patched, patch, patched_shape, unpatch
from zerotuning.plots.calibration_page import plot_report
from zerotuning.plots.head_map import plot_head_map
from zerotuning.plots.style import can_plot
from zerotuning.tasks.examples import Record, as_records
from zerotuning.tasks.few_shot import without_shots
from zerotuning.tasks.hub import read_data
from zerotuning.tasks.task import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zerotuning.calibration.options import CalibrationKeywords

__all__ = ["METHODS", "Calibration", "calibrate"]

TaskLike = Union[Task, str, "Path"]
Records = Union[Iterable[Mapping[str, Any]], str, "Path"]


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        scales: The head scales; all 1 where nothing beat γ = 1 on the held-out examples.
        report: What report.json holds: the task, options, numbers of examples and steps, seconds; `baseline` and
            `tuned`, loss, accuracy and entropy on the held-out examples before and after; `improved`, `chosen`, and
            `reason` where nothing was found; `history`, the losses by step; `tasks`, confusion and entropies; `by_seed`
            and `spread`; `warnings`; versions.
    """

    scales: HeadScales
    report: dict[str, Any]

    @property
    def improved(self) -> bool:
        """Whether the scales beat γ = 1 on the held-out examples."""
        return bool(self.report["improved"])


@shows_option_keywords
def calibrate(
    model: nn.Module,
    tokenizer: Any,
    task: TaskLike | Sequence[TaskLike],
    *,
    records: Records | Sequence[Records] | None = None,
    start: HeadScales | None = None,
    metric: Metric | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    model_name: str | None = None,
    progress: bool = False,
    options: CalibrationOptions | None = None,
    **keywords: Unpack[CalibrationKeywords],
) -> Calibration:
    """Search head scales for one or several tasks. The model is left as it was: `apply_scales` applies the result.

    Under torch.distributed all processes call `calibrate` with the same arguments. They divide the examples among them;
    the ranks of a tensor-parallel model each read all examples. Every process returns the same result, after the main
    process has written the files.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        task: A Task, a built-in name or the path of a YAML file; or a list of these, tuned together: the objective is
            the mean of the tasks' objectives.
        records: Mappings, the path of a JSON lines file or a data set of the hub (tasks/hub.py); for a list of tasks, a
            list of these. Default: the built-in task's validation sample. Few-shot examples of the task are left out.
        start: Scales to begin with. Heads that are not tuned (`layers`, `heads`, `exclude_heads`) keep these scales.
        metric: With method `cma-es`: a function of the texts that the model writes after the prompts (greedily, at most
            `max_new_tokens`) and their records. Its result, the higher the better, replaces the objective.
        output: A folder. During the search the folder holds the state from which the same call resumes; at the end, the
            scales (HeadScales.from_pretrained), report.json and, with matplotlib, report.png and head_map.png.
        overwrite: Replace a finished result in `output`, or restart an unfinished one.
        model_name: The model's name in the result's metadata. Default: the name in its configuration.
        progress: Draw a progress bar if stderr is a terminal.
        options: The options, whole; default CalibrationOptions().
        keywords: Fields of CalibrationOptions, such as `method`, `objective`, `examples`, `steps` and `seed`, that
            replace the fields of `options`.

    Returns:
        The scales and a report.

    Raises:
        ZeroTuningError: Wrong input; an `output` that holds a result or the state of another calibration, or that
            another process is writing.
    """
    chosen = options_from(options, keywords)
    if start is not None and not isinstance(start, HeadScales):
        raise ZeroTuningError(f"start must be HeadScales, got {type(start).__name__}")
    tasks = _task_list(task)
    drawn = [
        draw_examples(without_shots(each, part), chosen)
        for each, part in zip(tasks, _records_of(tasks, task, records), strict=True)
    ]
    chosen = chosen.resolved(min(map(len, drawn)))
    _check_combination(tasks, chosen, metric)
    processes = Processes(share_model=is_tensor_parallel(model))
    with _output_folder(output, overwrite, processes) as folder, _patched(model):
        with head_parameters(model) as parameters:
            examples = [
                _task_examples(model, tokenizer, each, part, chosen, metric)
                for each, part in zip(tasks, drawn, strict=True)
            ]
            objective = CalibrationObjective(
                model, tokenizer, examples, parameters, chosen, OutOfMemoryRetry(), processes, metric
            )
            tokens = [part.scorer.examples for part in examples]
            identity_of_run = identity(model, tasks, drawn, tokens, chosen, start, _name_of(metric))
            state = CalibrationState(folder, identity_of_run, processes)
            if overwrite:
                state.clear()
            run = CalibrationRun(objective, _parameterization(model, chosen, start), chosen, state)
            run.until_finished(progress and processes.is_main_process)
            log_scale, report = run.result()
        gamma = torch.from_numpy(np.exp(log_scale)).reshape(patched_shape(model))
        scales = HeadScales(gamma, metadata=_metadata(model, model_name, report))
        if folder is not None and processes.is_main_process:
            _write_result(folder, scales, report, state)
        processes.wait_for_main()  # every process returns after the result has been written
    return Calibration(scales, report)


# Input.


def _task_list(task: TaskLike | Sequence[TaskLike]) -> list[Task]:
    given = task if isinstance(task, (list, tuple)) else [task]
    if not given:
        raise ZeroTuningError("task must be one task or several, got an empty list")
    return [one if isinstance(one, Task) else Task.load(one) for one in given]  # type: ignore[arg-type]


def _records_of(
    tasks: Sequence[Task], given: TaskLike | Sequence[TaskLike], records: Records | Sequence[Records] | None
) -> list[list[Record]]:
    if records is None:
        return [task.examples("validation", None) for task in tasks]
    if not isinstance(given, (list, tuple)):
        return [_read_records(tasks[0], records)]
    if not isinstance(records, (list, tuple)) or len(records) != len(tasks):
        got = len(records) if isinstance(records, (list, tuple)) else 1
        raise ZeroTuningError(f"records must be a list with one item for each of the {len(tasks)} tasks, got {got}")
    return [_read_records(task, part) for task, part in zip(tasks, records, strict=True)]


def _read_records(task: Task, records: Any) -> list[Record]:
    return read_data(task, records, "validation") if isinstance(records, (str, Path)) else as_records(records)


def _check_combination(tasks: Sequence[Task], options: CalibrationOptions, metric: Metric | None) -> None:
    if metric is not None and options.method != "cma-es":
        raise ZeroTuningError(f"metric has no gradient: method must be cma-es, got {options.method}")
    generated = [task.scoring == "generate" for task in tasks]
    if any(generated):
        if options.method != "cma-es":
            raise ZeroTuningError(f"scoring generate has no gradient: method must be cma-es, got {options.method}")
        if options.objective != "task-loss":
            raise ZeroTuningError(
                f"scoring generate replaces the objective, so objective must be task-loss, got {options.objective}"
            )
        if not all(generated):
            raise ZeroTuningError("all tasks or none must have the scoring generate")
    for task in tasks:
        if task.continuation and options.objective != "task-loss":
            raise ZeroTuningError(
                f"objective {options.objective} needs labels to choose among, task {task.name!r} has none"
            )


def _task_examples(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    records: list[Record],
    options: CalibrationOptions,
    metric: Metric | None,
) -> TaskExamples:
    scorer = LabelScorer(
        model,
        tokenizer,
        task,
        records,
        batch_size=options.batch_size,
        batch_tokens=GRADIENT_TOKENS,
        require_labels=options.objective == "task-loss" and metric is None,
        truncate=options.truncate,
    )
    prior = None if isinstance(options.prior, str) else torch.tensor(options.prior)
    if prior is not None and len(prior) != scorer.num_labels:
        raise ZeroTuningError(
            f"prior must be one number for each of the {scorer.num_labels} labels of task {task.name!r}, "
            f"got {len(prior)}"
        )
    return TaskExamples(task, records, scorer, prior)


def _parameterization(model: nn.Module, options: CalibrationOptions, start: HeadScales | None) -> ScaleParameterization:
    layers, heads = patched_shape(model)
    if start is not None:
        check_model_type(model, start, "start was")
    return ScaleParameterization(
        layers,
        heads,
        only_layers=options.layers,
        only_heads=options.heads,
        exclude_heads=options.exclude_heads,
        tie=options.tie,
        start=None if start is None else start.gamma.double().log().numpy(),
    )


def _name_of(metric: Metric | None) -> str:
    return "" if metric is None else f"{getattr(metric, '__module__', '')}.{getattr(metric, '__qualname__', 'metric')}"


@contextmanager
def _patched(model: nn.Module) -> Iterator[None]:
    """Patch the model; unpatch it at the end unless it was patched before."""
    was_patched = is_patched(model)
    patch(model)
    try:
        yield
    finally:
        if not was_patched:
            unpatch(model)


def _output_folder(
    output: str | Path | None, overwrite: bool, processes: Processes
) -> AbstractContextManager[Path | None]:
    if output is None:
        return nullcontext(None)
    if not processes.is_main_process:
        return nullcontext(Path(output))
    return result_folder(output, overwrite=overwrite, resumable=True)


# The result's files.


def _metadata(model: Any, model_name: str | None, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": getattr(model.config, "model_type", ""),
        "model_name": model_name or getattr(model.config, "name_or_path", ""),
        "task": report["task"],
        "method": report["method"],
        "objective": report["objective"],
        "versions": report["versions"],
        "calibration": {name: report[name] for name in METADATA_FIELDS},
    }


def _write_result(folder: Path, scales: HeadScales, report: Mapping[str, Any], state: CalibrationState) -> None:
    scales.save_pretrained(folder, overwrite=True)
    write_json_atomically(folder / REPORT_FILE, dict(report))
    try:
        if can_plot():
            plot_head_map(scales, folder / PICTURE_FILE)
            plot_report(scales, report, folder / REPORT_PAGE_FILE)
    finally:  # a picture that cannot be drawn does not make the finished search unfinished
        state.clear()
