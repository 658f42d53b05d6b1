"""Calibration: from a model, a task and some examples to head scales.

The search itself is C++ (csrc/search) and knows numbers only; this module evaluates what it asks for: the objective on
the fit part or on the held-out part of the examples and, for the gradient method, its gradient in every head's log γ by
one backward pass (design.md section 1).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from zerotuning import _search, objectives
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_json_atomically
from zerotuning.patch import head_parameters, is_patched, patch, patched_shape, unpatch
from zerotuning.scales import HeadScales
from zerotuning.scoring import Batch, LabelScorer
from zerotuning.tasks import Record, Task, as_records, read_examples
from zerotuning.version import __version__

METHODS = ("gradient", "paper", "cma-es")
STATE_FILE = "calibration_state.json"
REPORT_FILE = "report.json"
SCALES_FILE = "head_scales.safetensors"
HELD_OUT_SHARE = 0.2
#: Fit examples that one gradient step sees.
STEP_EXAMPLES = 64
DEFAULT_STEPS = {"gradient": 60, "paper": 0, "cma-es": 300}


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    scales    the head scales; all 1 when nothing beat γ = 1 on the held-out examples
    report    task, method, objective, numbers of examples and steps, seconds, `baseline` and `tuned` (loss and accuracy
              on the held-out part), `improved`, `history` (fit and held-out loss by step), versions
    """

    scales: HeadScales
    report: dict[str, Any]

    @property
    def improved(self) -> bool:
        """Whether the scales beat γ = 1 on the held-out examples."""
        return bool(self.report["improved"])


@dataclass(frozen=True)
class Options:
    """The choices that make a calibration reproducible; a resumed run must have the same."""

    method: str
    objective: str
    examples: int | None
    steps: int | None
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ZeroTuningError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.objective not in objectives.OBJECTIVES:
            known = ", ".join(objectives.OBJECTIVES)
            raise ZeroTuningError(f"objective must be one of {known}, got {self.objective!r}")
        for name, least in (("examples", 4), ("steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ZeroTuningError(f"{name} must be at least {least}, got {value}")


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    task: Task | str | os.PathLike[str],
    *,
    records: Iterable[Mapping[str, Any]] | str | os.PathLike[str] | None = None,
    method: str = "gradient",
    objective: str = "task-loss",
    examples: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    model_name: str | None = None,
    progress: bool = False,
) -> Calibration:
    """Search head scales for a task. The model is left as it was: apply the result with `apply_scales`.

    Args:
        model, tokenizer: a transformers causal language model and its tokenizer.
        task: a Task, a built-in name or the path of a YAML file.
        records: mappings, or the path of a JSON lines file; by default a built-in task's validation sample.
        method: `gradient`, `paper` (arXiv 2505.11739) or `cma-es`.
        objective: `task-loss` (nats, needs labels), `entropy` (the paper's label-free one) or `information`. The paper's
            method with `task-loss` minimises 1 - accuracy, as the paper does.
        examples: use only so many of the records, drawn by `seed`; a fifth of them is held out.
        steps: gradient steps (default 60) or CMA-ES evaluations (default 300); the paper's method takes none.
        seed: of the draw, the split, the order of batches and CMA-ES.
        batch_size: prompts that go through the model together.
        output: a folder. While the search runs it holds its state, and the same call resumes; at the end it holds the
            scales (HeadScales.from_pretrained) and report.json.
        overwrite: replace a finished result in `output`, or start an unfinished one anew.
        model_name: what the result's metadata call the model; by default its config's name.
        progress: draw a bar on stderr, if that is a terminal.

    Raises:
        ZeroTuningError: bad input; an `output` that holds a result or the state of another calibration.
    """
    options = Options(method, objective, examples, steps, seed, batch_size)
    task = task if isinstance(task, Task) else Task.load(task)
    folder = _Folder(None if output is None else Path(output), overwrite)
    fit, held_out = split_examples(_records(task, records), options)
    was_patched = is_patched(model)
    patch(model)
    try:
        layers, heads = patched_shape(model)
        search = new_search(layers * heads, options)
        run = _Run(search, options, folder, _fingerprint(model, task, fit, held_out, options))
        require_labels = objective in objectives.SUPERVISED_OBJECTIVES
        with head_parameters(model) as parameters:
            parts = {
                name: _Part(model, tokenizer, task, part, options, parameters, require_labels)
                for name, part in (("fit", fit), ("held_out", held_out))
            }
            run.until_finished(parts, progress)
            point = search.best()
            report = run.report(parts["held_out"], point, task, len(fit))
    finally:
        if not was_patched:
            unpatch(model)
    gamma = torch.from_numpy(np.exp(point)).reshape(layers, heads)
    scales = HeadScales(gamma, metadata=_metadata(model, model_name, report))
    folder.finish(scales, report)
    return Calibration(scales, report)


def _records(task: Task, records: Iterable[Mapping[str, Any]] | str | os.PathLike[str] | None) -> list[Record]:
    if records is None:
        return task.examples("validation", None)
    if isinstance(records, (str, os.PathLike)):
        return read_examples(records)
    return as_records(records)


def split_examples(records: list[Record], options: Options) -> tuple[list[Record], list[Record]]:
    """Draws `options.examples` of the records and holds a fifth of them out, the labels' shares kept in both parts."""
    if options.examples is not None and len(records) < options.examples:
        raise ZeroTuningError(f"examples must be at most {len(records)}, all there are, got {options.examples}")
    if len(records) < 4:
        raise ZeroTuningError(f"calibration needs at least 4 examples, got {len(records)}")
    order = np.random.default_rng(options.seed).permutation(len(records))[: options.examples]
    # Stable sort by label: every k-th example of the sorted list has the labels in their shares.
    by_label = sorted(order, key=lambda i: str(records[i].get("label")))
    stride = round(1 / HELD_OUT_SHARE)
    held_out = set(by_label[stride // 2 :: stride])
    return (
        [records[i] for i in order if i not in held_out],
        [records[i] for i in order if i in held_out],
    )


def new_search(dimension: int, options: Options) -> _search.Optimizer:
    """The C++ search of `dimension` log scales that the options ask for."""
    steps = options.steps or DEFAULT_STEPS[options.method]
    try:
        if options.method == "paper":
            return _search.PaperOptimizer(dimension)
        if options.method == "cma-es":
            return _search.CmaEsOptimizer(dimension, seed=options.seed, evaluations=steps)
        return _search.GradientOptimizer(dimension, steps=steps, **GRADIENT_SETTINGS)
    except ValueError as error:  # too few evaluations for a generation of CMA-ES, say
        raise ZeroTuningError(f"method {options.method} with steps = {steps}: {error}") from error


#: One setting for all tasks.
GRADIENT_SETTINGS: dict[str, Any] = {
    "learning_rate": 0.1,
    "penalty": 1e-3,
    "evaluate_every": 3,
    "patience": 0,
}


class _Part:
    """One part of the examples: the objective there, at any point, with or without its gradient."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: Task,
        records: Sequence[Record],
        options: Options,
        parameters: Sequence[Tensor],
        require_labels: bool,
    ) -> None:
        self.scorer = LabelScorer(
            model, tokenizer, task, records, batch_size=options.batch_size, require_labels=require_labels
        )
        self.options = options
        self.parameters = parameters

    def set_point(self, point: np.ndarray) -> None:
        """Writes log γ, [layers * heads], into the model."""
        values = torch.from_numpy(np.asarray(point)).reshape(len(self.parameters), -1)
        with torch.no_grad():
            for parameter, row in zip(self.parameters, values, strict=True):
                parameter.copy_(row)

    @torch.no_grad()
    def loss(self, point: np.ndarray) -> float:
        """The objective on the whole part; for the paper's method with labels 1 - accuracy."""
        scores, labels = self._all_scores(point)
        if self.options.method == "paper" and self.options.objective == "task-loss":
            return 1.0 - objectives.accuracy(scores, labels)
        return float(self._objective(scores, labels))

    @torch.no_grad()
    def accuracy(self, point: np.ndarray) -> float | None:
        """Fraction of right answers, None without labels."""
        scores, labels = self._all_scores(point)
        return None if int(labels.min()) < 0 else objectives.accuracy(scores, labels)

    def loss_and_gradient(self, point: np.ndarray, step: int) -> tuple[float, np.ndarray]:
        """The objective on the batches of this step and its gradient in log γ, [layers * heads]."""
        self.set_point(point)
        batches = self._batches_of_step(step)
        labels = torch.cat([batch.labels for batch in batches])
        total = sum(len(batch) for batch in batches)
        if self.options.objective == "information":
            return self._gradient_through_scores(batches, labels)
        loss, gradient = 0.0, np.zeros(sum(p.numel() for p in self.parameters))
        for batch in batches:
            share = len(batch) / total
            value = self._objective(self.scorer.scores(batch), batch.labels) * share
            loss += float(value.detach())
            gradient += self._gradient(value)
        return loss, gradient

    def _gradient_through_scores(self, batches: Sequence[Batch], labels: Tensor) -> tuple[float, np.ndarray]:
        """For an objective that is no mean over examples: its gradient in all scores first, then batch by batch."""
        with torch.no_grad():
            parts = [self.scorer.scores(batch) for batch in batches]
        scores = torch.cat(parts).requires_grad_()
        value = self._objective(scores, labels)
        (weights,) = torch.autograd.grad(value, scores)
        gradient = np.zeros(sum(p.numel() for p in self.parameters))
        for batch, weight in zip(batches, weights.split([len(part) for part in parts]), strict=True):
            gradient += self._gradient((self.scorer.scores(batch).nan_to_num(neginf=0.0) * weight).sum())
        return float(value.detach()), gradient

    def _gradient(self, value: Tensor) -> np.ndarray:
        gradients = torch.autograd.grad(value, list(self.parameters), allow_unused=True)
        rows = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(gradients, self.parameters, strict=True)
        ]
        return torch.cat([row.detach().double().cpu().flatten() for row in rows]).numpy()

    def _objective(self, scores: Tensor, labels: Tensor) -> Tensor:
        return objectives.OBJECTIVES[self.options.objective](scores, labels.to(scores.device))

    def _all_scores(self, point: np.ndarray) -> tuple[Tensor, Tensor]:
        self.set_point(point)
        scores = self.scorer.gather([self.scorer.scores(batch).cpu() for batch in self.scorer.batches])
        return scores, self.scorer.labels

    def _batches_of_step(self, step: int) -> list[Batch]:
        """About STEP_EXAMPLES examples; each epoch goes through all batches in an order of its own."""
        batches = self.scorer.batches
        per_step = max(1, min(len(batches), round(STEP_EXAMPLES * len(batches) / max(1, len(self.scorer)))))
        chosen = range(step * per_step, (step + 1) * per_step)
        orders = {
            epoch: np.random.default_rng((self.options.seed, epoch)).permutation(len(batches))
            for epoch in {index // len(batches) for index in chosen}
        }
        return [batches[orders[index // len(batches)][index % len(batches)]] for index in chosen]


@dataclass
class _Run:
    """A search under way: its state on disk after every answer, its history for the report."""

    search: _search.Optimizer
    options: Options
    folder: _Folder
    fingerprint: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        state = self.folder.read_state(self.fingerprint)
        if state is not None:
            try:
                self.search.restore(state["search"])
            except ValueError as error:
                raise ZeroTuningError(f"{self.folder.path / STATE_FILE}: {error}") from error  # type: ignore[operator]
            self.history, self.seconds = state["history"], state["seconds"]

    def until_finished(self, parts: Mapping[str, _Part], progress: bool) -> None:
        hidden = not (progress and sys.stderr.isatty())
        total = self.search.steps_total()
        with tqdm(total=total, initial=self.search.steps_done(), desc="calibrate", disable=hidden) as bar:
            while not self.search.finished():
                started = time.perf_counter()
                self._answer(parts)
                self.seconds += time.perf_counter() - started
                self.folder.write_state(
                    self.fingerprint,
                    {"search": self.search.state(), "history": self.history, "seconds": self.seconds},
                )
                bar.n = self.search.steps_done()
                bar.set_postfix_str(f"held-out loss {self.search.best_loss():.4f}", refresh=True)

    def _answer(self, parts: Mapping[str, _Part]) -> None:
        step = self.search.steps_done()
        outcomes: list[tuple[float, np.ndarray | None]] = []
        entry: dict[str, Any] = {"step": step}
        for wanted in self.search.ask():
            if wanted.gradient:
                outcomes.append(parts[wanted.part].loss_and_gradient(wanted.point, step))
            else:
                outcomes.append((parts[wanted.part].loss(wanted.point), None))
            entry[f"{wanted.part}_loss"] = outcomes[-1][0]
        try:
            self.search.tell(outcomes)
        except ValueError as error:
            raise ZeroTuningError(f"the model's loss cannot be used: {error}") from error
        self.history.append(entry)

    def report(self, held_out: _Part, point: np.ndarray, task: Task, fit_examples: int) -> dict[str, Any]:
        zero = np.zeros_like(point)
        report: dict[str, Any] = {
            "task": task.name,
            "method": self.options.method,
            "objective": self.options.objective,
            "examples": fit_examples + len(held_out.scorer),
            "fit_examples": fit_examples,
            "held_out_examples": len(held_out.scorer),
            "steps": self.search.steps_done(),
            "seed": self.options.seed,
            "seconds": round(self.seconds, 3),
            "baseline": {"loss": self.search.baseline_loss(), "accuracy": held_out.accuracy(zero)},
            "tuned": {"loss": self.search.best_loss(), "accuracy": held_out.accuracy(point)},
            "improved": bool(np.any(point != 0)),
            "history": self.history,
            "versions": {
                "zerotuning": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        if isinstance(self.search, _search.PaperOptimizer):
            profile = [None if np.isnan(effect) else float(effect) for effect in self.search.profile()]
            report["profile"] = {
                "effect": profile,
                "direction": self.search.direction(),
                "group": self.search.group(),
            }
        return report


@dataclass(frozen=True)
class _Folder:
    """The output folder: what is refused, resumed, written and cleared there. No folder: nothing is kept."""

    path: Path | None
    overwrite: bool

    def __post_init__(self) -> None:
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ZeroTuningError(f"output {self.path} is a file, not a folder")
        state = self.path / STATE_FILE
        if not self.overwrite and (self.path / SCALES_FILE).exists() and not state.exists():
            raise ZeroTuningError(f"{self.path} already holds a result; choose another folder or overwrite it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZeroTuningError(f"cannot create {self.path}: {error.strerror or error}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ZeroTuningError(f"{self.path} cannot be written")
        if self.overwrite:
            state.unlink(missing_ok=True)

    def read_state(self, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state of the same calibration, interrupted earlier."""
        if self.path is None or not (self.path / STATE_FILE).exists():
            return None
        try:
            content = json.loads((self.path / STATE_FILE).read_text("utf-8"))
            saved, state = content["calibration"], content["state"]
            known = {"search": str, "history": list, "seconds": float}
            if any(not isinstance(state[name], kind) for name, kind in known.items()):
                raise ValueError("a field has a wrong type")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZeroTuningError(
                f"{self.path / STATE_FILE} cannot be read ({error}); overwrite to start anew"
            ) from error
        for name, value in fingerprint.items():
            if saved.get(name) != value:
                raise ZeroTuningError(
                    f"{self.path} holds an unfinished calibration with another {name}: {saved.get(name)!r}, "
                    f"not {value!r}; run that one again, choose another folder or overwrite it"
                )
        return dict(state)

    def write_state(self, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        if self.path is not None:
            write_json_atomically(self.path / STATE_FILE, {"calibration": dict(fingerprint), "state": dict(state)})

    def finish(self, scales: HeadScales, report: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        scales.save_pretrained(self.path, overwrite=True)
        write_json_atomically(self.path / REPORT_FILE, dict(report))
        (self.path / STATE_FILE).unlink(missing_ok=True)


def _fingerprint(
    model: Any, task: Task, fit: Sequence[Record], held_out: Sequence[Record], options: Options
) -> dict[str, Any]:
    """What must be equal for a saved state to be continued."""
    examples = json.dumps([list(fit), list(held_out)], sort_keys=True, default=str)
    return {
        "version": __version__,
        "model_type": getattr(model.config, "model_type", ""),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "task": task.name,
        "prompt": task.prompt,
        "labels": task.labels if isinstance(task.labels, str) else list(task.labels),
        "method": options.method,
        "objective": options.objective,
        "examples": options.examples,
        "steps": options.steps,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "data": hashlib.sha256(examples.encode()).hexdigest(),
    }


def _metadata(model: Any, model_name: str | None, report: Mapping[str, Any]) -> dict[str, Any]:
    apart = ("history", "profile", "versions", "task", "method", "objective")
    return {
        "model_type": getattr(model.config, "model_type", ""),
        "model_name": model_name or getattr(model.config, "name_or_path", ""),
        "task": report["task"],
        "method": report["method"],
        "objective": report["objective"],
        "versions": report["versions"],
        "calibration": {name: value for name, value in report.items() if name not in apart},
    }
