"""Calibration: from a model, one or several tasks and some examples to head scales.

The optimisers are C++ (csrc/search) and know numbers only. measurement.py gives them the objective and, for the
gradient method, its gradient in every head's log γ by one backward pass (design.md section 1); folded_search.py and
single_search.py say which examples drive them and which judge them. Here these are put together, and kept on disk.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from zerotuning.calibration.acceptance import AcceptanceTest
from zerotuning.calibration.folds import draw_examples, make_splits
from zerotuning.calibration.gradient_search import GradientSearch
from zerotuning.calibration.holdout_search import HoldoutSearch
from zerotuning.calibration.objective import Measurement, Metric, TaskExamples
from zerotuning.calibration.options import METHODS, CalibrationOptions, options_from, shows_option_keywords
from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.calibration.parameterization import ScaleParameterization
from zerotuning.calibration.report import METADATA_FIELDS, held_out_figures, versions
from zerotuning.calibration.search_result import SearchResult
from zerotuning.calibration.state import CalibrationState, identity
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.label_scorer import GRADIENT_TOKENS, LabelScorer
from zerotuning.evaluation.objectives import estimated_prior
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
    """What `calibrate` found.

    scales    the head scales; all 1 when nothing beat γ = 1 on the held-out examples
    report    task, options, numbers of examples and steps, seconds, `baseline` and `tuned` (loss, accuracy, entropy on
              the held-out examples), `improved`, `chosen`, `reason` where nothing was found, `history` (losses by
              step), `tasks` (confusion and entropies), `by_seed` and `spread`, `setbacks`, versions
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

    Under torch.distributed all processes call it with the same arguments. They share the examples, or each reads all of
    them where they share a tensor-parallel model; every process returns the same result, once the main process has
    written it.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        task: A Task, a built-in name or the path of a YAML file; or a list of these, tuned together: the objective is
            the mean of theirs.
        records: Mappings, the path of a JSON lines file or a data set of the hub (tasks/hub.py); of a list of tasks, one
            such for each. Default: the built-in task's validation sample. Examples that are few-shot examples of their
            task are left out.
        start: Scales to begin with. Heads that are not tuned (`layers`, `heads`, `exclude_heads`) keep theirs.
        metric: With method `cma-es`: a function of the texts that the model writes after the prompts (greedily, at most
            `max_new_tokens`) and their records. It returns a number, the higher the better, and replaces the objective.
        output: A folder. During the search it holds the state from which the same call resumes; at the end it holds the
            scales (HeadScales.from_pretrained), report.json and, with matplotlib, report.png and head_map.png.
        overwrite: Replace a finished result in `output`, or restart an unfinished one.
        model_name: The model's name in the result's metadata. Default: the name in its configuration.
        progress: Draw a progress bar on stderr, if that is a terminal.
        options: The options, whole; default CalibrationOptions().
        keywords: Fields of CalibrationOptions, such as `method`, `objective`, `examples`, `steps` and `seed`; they
            replace those of `options`.

    Returns:
        The scales and a report.

    Raises:
        ZeroTuningError: Wrong input; an `output` that holds a result or the state of another calibration, or that
            another process is writing.
    """
    chosen = options_from(options, keywords)
    if start is not None and not isinstance(start, HeadScales):
        raise ZeroTuningError(f"start must be HeadScales, got {type(start).__name__}")
    named = _task_list(task)
    given = _records_of(named, task, records)
    examples = [draw_examples(without_shots(one, part), chosen) for one, part in zip(named, given, strict=True)]
    chosen = chosen.resolved(min(map(len, examples)))
    _check_together(named, chosen, metric)
    processes = Processes(share_model=is_tensor_parallel(model))
    with _output_folder(output, overwrite, processes) as folder, _patched(model):
        with head_parameters(model) as parameters:
            tasks = [
                _prepared(model, tokenizer, one, part, chosen, metric)
                for one, part in zip(named, examples, strict=True)
            ]
            parameterization = _parameterization(model, chosen, start)
            setbacks = OutOfMemoryRetry()
            measurement = Measurement(model, tokenizer, tasks, parameters, chosen, setbacks, processes, metric)
            tokens = [one.scorer.examples for one in tasks]
            what = identity(model, named, examples, tokens, chosen, start, _name_of(metric))
            state = CalibrationState(folder, what, processes)
            if overwrite:
                state.clear()
            run = _Run(measurement, parameterization, chosen, state)
            run.until_finished(progress and processes.is_main_process)
            log_scale, report = run.result()
        layers, heads = patched_shape(model)
        gamma = torch.from_numpy(np.exp(log_scale)).reshape(layers, heads)
        scales = HeadScales(gamma, metadata=_metadata(model, model_name, report))
        if folder is not None and processes.is_main_process:
            _write(folder, scales, report)
            try:
                _draw(folder, scales, report)
            finally:  # the result is there: what fails to be drawn must not make the search unfinished again
                state.clear()
        processes.wait_for_main()  # a result that is returned is written
    return Calibration(scales, report)


# What is asked for.


def _task_list(task: TaskLike | Sequence[TaskLike]) -> list[Task]:
    several = task if isinstance(task, (list, tuple)) else [task]
    if not several:
        raise ZeroTuningError("task must be at least one")
    return [one if isinstance(one, Task) else Task.load(one) for one in several]  # type: ignore[arg-type]


def _records_of(
    tasks: Sequence[Task], given: TaskLike | Sequence[TaskLike], records: Records | Sequence[Records] | None
) -> list[list[Record]]:
    if records is None:
        return [task.examples("validation", None) for task in tasks]
    if not isinstance(given, (list, tuple)):
        return [_read(tasks[0], records)]
    if not isinstance(records, (list, tuple)) or len(records) != len(tasks):
        got = len(records) if isinstance(records, (list, tuple)) else 1
        raise ZeroTuningError(f"records must be one for each of {len(tasks)} tasks, got {got}")
    return [_read(task, part) for task, part in zip(tasks, records, strict=True)]


def _read(task: Task, records: Any) -> list[Record]:
    return read_data(task, records, "validation") if isinstance(records, (str, Path)) else as_records(records)


def _check_together(tasks: Sequence[Task], options: CalibrationOptions, metric: Metric | None) -> None:
    if metric is not None and options.method != "cma-es":
        raise ZeroTuningError(f"metric has no gradient: it needs the method cma-es, got {options.method}")
    written = [task.scoring == "generate" for task in tasks]
    if any(written):
        if options.method != "cma-es":
            raise ZeroTuningError(f"scoring generate has no gradient: it needs the method cma-es, got {options.method}")
        if options.objective != "task-loss":
            raise ZeroTuningError(f"scoring generate takes the objective's place, got objective {options.objective}")
        if not all(written):
            raise ZeroTuningError("scoring generate must be that of all tasks or of none")
    for task in tasks:
        if task.continuation and options.objective != "task-loss":
            raise ZeroTuningError(
                f"objective {options.objective} needs labels to choose among, task {task.name!r} has none"
            )


def _prepared(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    records: list[Record],
    options: CalibrationOptions,
    metric: Metric | None,
) -> TaskExamples:
    need_labels = options.objective == "task-loss" and metric is None
    scorer = LabelScorer(
        model,
        tokenizer,
        task,
        records,
        batch_size=options.batch_size,
        batch_tokens=GRADIENT_TOKENS,
        require_labels=need_labels,
        truncate=options.truncate,
    )
    prior = None if isinstance(options.prior, str) else torch.tensor(options.prior)
    if prior is not None and len(prior) != scorer.num_labels:
        raise ZeroTuningError(
            f"prior must be one number for each of the {scorer.num_labels} labels of task {task.name!r}, got {len(prior)}"
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
    """Within it the model is patched; one that was not is put back."""
    was_patched = is_patched(model)
    patch(model)
    try:
        yield
    finally:
        if not was_patched:
            unpatch(model)


def _output_folder(output: str | Path | None, overwrite: bool, processes: Processes) -> Any:
    if output is None:
        return nullcontext(None)
    if not processes.is_main_process:
        return nullcontext(Path(output))
    return result_folder(output, overwrite=overwrite, resumable=True)


# The search.


class _Run:
    """A search under way: its state on disk after every round, the seconds it took over all its starts."""

    def __init__(
        self,
        measurement: Measurement,
        parameterization: ScaleParameterization,
        options: CalibrationOptions,
        state: CalibrationState,
    ) -> None:
        self.measurement, self.parameterization, self.options, self.state = (
            measurement,
            parameterization,
            options,
            state,
        )
        self.seconds = 0.0
        self.all_examples = [list(range(len(task.records))) for task in measurement.tasks]
        self.splits = make_splits([task.records for task in measurement.tasks], options)
        self.acceptance: AcceptanceTest | None = None
        if not measurement.reads_text:
            self._begin_acceptance()
        self.search = self._new_search()
        self._restore()

    def _begin_acceptance(self) -> None:
        if self.options.prior == "estimate":
            unjudged = self.measurement.scores(
                self.parameterization.log_scale(self.parameterization.untuned), self.all_examples
            )
            for task, scores in zip(self.measurement.tasks, unjudged, strict=True):
                task.prior = estimated_prior(scores)
        self.acceptance = AcceptanceTest(self.measurement, self.parameterization, self.all_examples, self.splits)
        if not np.isfinite(self.acceptance.baseline.loss):
            raise ZeroTuningError("the model's scores are not finite at γ = 1")

    def _new_search(self) -> GradientSearch | HoldoutSearch:
        if self.options.method != "gradient":
            return HoldoutSearch(self.measurement, self.parameterization, self.options, self.splits)
        assert self.acceptance is not None
        return GradientSearch(
            self.measurement, self.parameterization, self.options, self.splits, self.all_examples, self.acceptance
        )

    def _restore(self) -> None:
        saved = self.state.read()
        if saved is None:
            return
        try:
            self.search.restore(saved["search"])
            self.seconds = float(saved["seconds"])
            if not 0 <= self.seconds < math.inf:
                raise ValueError(f"seconds {self.seconds}")
            setbacks = self.measurement.setbacks
            noted = saved["setbacks"]
            setbacks.largest, setbacks.notes = noted["largest"], list(noted["notes"])
            setbacks.together, setbacks.checkpointed = noted.get("together"), bool(noted["checkpointed"])
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise self.state.damaged(error) from error

    def until_finished(self, progress: bool) -> None:
        hidden = not (progress and sys.stderr.isatty())
        if self.acceptance is not None and not self.acceptance.has_evidence:
            return
        with tqdm(
            total=self.search.steps_total, initial=self.search.steps_done, desc="calibrate", disable=hidden
        ) as bar:
            while not self.search.finished:
                if self._is_out_of_time():
                    self.search.stop()
                    continue
                started = time.perf_counter()
                self.search.advance()
                self.seconds += time.perf_counter() - started
                self._save()
                bar.n = self.search.steps_done
                bar.set_postfix_str(f"held-out loss {self.search.least_loss:.4f}", refresh=True)

    def _is_out_of_time(self) -> bool:
        if self.options.seconds is None:
            return False
        seconds = float(self.measurement.processes.broadcast_from_main(repr(self.seconds)))
        return seconds >= self.options.seconds * self.search.share_of_time

    def _save(self) -> None:
        setbacks = self.measurement.setbacks
        self.state.write(
            {
                "seconds": self.seconds,
                "setbacks": asdict(setbacks),
                "search": self.search.state(),
            }
        )

    # The result.

    def result(self) -> tuple[np.ndarray, dict[str, Any]]:
        """log γ [layers * heads] of what was found, and the report."""
        found = self.search.found()
        point = found.point
        reason = None
        if self.acceptance is not None and not self.acceptance.has_evidence:
            reason = "the untuned predictions say too little about the input for a search without labels"
        elif point is None:
            reason = "nothing beat γ = 1 on the held-out examples"
        elif self.acceptance is not None and not self.acceptance.accepts(self.parameterization.log_scale(point)):
            reason = "the scales chosen on the held-out examples were no better than γ = 1 on all"
        if reason is not None:
            point = None
            zero = self.parameterization.untuned
            found = replace(found, point=None, held_out_points=[(split, zero) for split in self.splits])
        log_scale = self.parameterization.log_scale(self.parameterization.untuned if point is None else point)
        return log_scale, self._report(found, reason)

    def _report(self, found: SearchResult, reason: str | None) -> dict[str, Any]:
        options, tasks = self.options, self.measurement.tasks
        report: dict[str, Any] = {
            "task": " + ".join(task.task.name for task in tasks),
            "method": options.method,
            "objective": "metric" if self.measurement.reads_text else options.objective,
            "prompts": [_prompt_settings(task.task) for task in tasks],
            "examples": sum(len(task.records) for task in tasks),
            "folds": len(self.splits) // options.search_count,
            "fit_examples": sum(len(places) for places in self.splits[0].fit),
            "steps": self.search.steps_done,
            "seed": options.seed,
            "num_searches": options.search_count,
            "seeds": options.search_count,  # the key's old name, for one version
            "free_heads": self.parameterization.free_heads,
            "numbers_searched": self.parameterization.count,
            "seconds": round(self.seconds, 3),
            "improved": reason is None,
            "reason": reason,
            "chosen": found.chosen,
            **self._held_out(found),
            "evidence": None if self.acceptance is None else self.acceptance.evidence,
            "setbacks": self.measurement.setbacks.notes,
            "options": options.to_json(),
            "history": self.search.history,
            "versions": versions(),
        }
        if isinstance(self.search, HoldoutSearch) and self.search.profile is not None:
            report["profile"] = self.search.profile
        return report

    def _held_out(self, found: SearchResult) -> dict[str, Any]:
        if self.acceptance is not None:
            return held_out_figures(self.measurement, self.parameterization, found, self.acceptance)
        assert isinstance(self.search, HoldoutSearch)
        optimizer = self.search.optimizers[0]
        return {
            "held_out_examples": sum(len(places) for places in self.splits[0].held_out),
            "baseline": {"loss": optimizer.baseline_loss(), "accuracy": None},
            "tuned": {"loss": self.search.least_loss, "accuracy": None},
        }


def _prompt_settings(task: Task) -> dict[str, Any]:
    shots = {"shots": len(task.shots)} | ({} if task.shot_seed is None else {"shot_seed": task.shot_seed})
    return {"task": task.name, **shots, "chat": task.chat, "scoring": task.scoring}


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


def _write(folder: Path, scales: HeadScales, report: Mapping[str, Any]) -> None:
    scales.save_pretrained(folder, overwrite=True)
    write_json_atomically(folder / REPORT_FILE, dict(report))


def _draw(folder: Path, scales: HeadScales, report: Mapping[str, Any]) -> None:
    if can_plot():
        plot_head_map(scales, folder / PICTURE_FILE)
        plot_report(scales, report, folder / REPORT_PAGE_FILE)
