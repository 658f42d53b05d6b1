"""`zerotuning bench search`: the accuracy that different methods reach with the same examples of the same tasks.

Each method may use labelled validation examples of a task (or only their texts), and all are judged on the same test
examples. Some of a method's labelled examples stand solved before each prompt (shots), except for `information`, which
has no labels, and for one row of the untuned model. The shots are the best of several draws and of no shots; methods
that use the same examples have the same shots (calibration/few_shot_choice.py). A row has the accuracy with its 95 %
interval, how many numbers were tuned, and the seconds of tuning.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerotuning.bench.methods import METHODS, WITHOUT_LABELS, MethodRun
from zerotuning.bench.rows import Row
from zerotuning.calibration.few_shot_choice import MIN_COMPARISON_EXAMPLES, choose_shots, shot_candidates
from zerotuning.calibration.folds import MIN_EXAMPLES, draw_examples
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation import objectives
from zerotuning.models.loading import load_model
from zerotuning.patching.patch import unpatch
from zerotuning.statistics import Z95, wilson_interval
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

TASKS = ("sst2", "mr", "sst5", "trec", "cb")
EXAMPLES = (16, 64, 200)
SHOTS = 4
SHOT_CANDIDATES = 4


@dataclass
class SearchBench:
    """The benchmark of methods on one model.

    Attributes:
        model: As `load_model` accepts it.
        tasks: Built-in names or YAML files with validation and test examples.
        examples: Numbers of labelled examples for `gradient`; the other methods use the largest number.
        limit: Test examples of a task.
        num_draws: Random draws of the labelled examples, with the seeds 0, 1, …
        methods: Names in METHODS; empty: all.
        batch_size: Prompts of one pass.
        shots: How many of a method's labelled examples stand solved before each prompt; the method tunes on the others.
        num_shot_candidates: Random sets of shots that are compared, beside no shots if there are several; fewer sets
            where there are few examples.
        device: As `load_model` accepts it.

    Raises:
        ZeroTuningError: A field has a wrong value.
    """

    model: str = "demo"
    tasks: Sequence[str] = TASKS
    examples: Sequence[int] = EXAMPLES
    limit: int = 400
    num_draws: int = 1
    methods: Sequence[str] = ()
    batch_size: int = 64
    shots: int = SHOTS
    num_shot_candidates: int = SHOT_CANDIDATES
    device: str | None = None
    _loaded: tuple[Any, Any] | None = field(default=None, repr=False)
    #: By task, number of examples and seed: the task with the chosen shots, and the seconds of the choice.
    _chosen: dict[tuple[str, int, int], tuple[Task, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.methods = tuple(self.methods) or tuple(METHODS)
        for name in self.methods:
            if name not in METHODS:
                raise ZeroTuningError(f"methods must be of {', '.join(METHODS)}, got {name!r}")
        if not self.examples or any(count < 4 for count in self.examples):
            raise ZeroTuningError(f"examples must be numbers of at least 4, got {list(self.examples)}")
        if self.num_draws < 1:
            raise ZeroTuningError(f"num_draws must be at least 1, got {self.num_draws}")
        if not 0 <= self.shots <= min(self.examples) - MIN_EXAMPLES:
            raise ZeroTuningError(
                f"shots must leave {MIN_EXAMPLES} of the {min(self.examples)} examples, got {self.shots}"
            )
        if self.num_shot_candidates < 1:
            raise ZeroTuningError(f"num_shot_candidates must be at least 1, got {self.num_shot_candidates}")

    def rows(self, done: Sequence[Row] = ()) -> Iterator[Row]:
        """Measure the rows, one for each task, method, number of examples and seed; then average over tasks.

        Args:
            done: Rows of an earlier run, which are not measured again.

        Yields:
            The rows in order, those of `done` among them.
        """
        by_key = {_key(row): row for row in done if row["what"] == "search"}
        measured = []
        for seed in range(self.num_draws):
            for name in self.tasks:
                for method, count, shots in self._plan(seed):
                    row = by_key.get((name, method, count, seed, shots, self._candidates_of(count, shots)))
                    if row is None:
                        row = self._row(name, method, count, seed, shots, by_key)
                        by_key[_key(row)] = row
                    measured.append(row)
                    yield row
        yield from mean_rows(measured)

    def _plan(self, seed: int) -> Iterator[tuple[str, int, int]]:
        """(method, number of examples, how many of them are shots)."""
        for method in self.methods:
            if method == "untuned":
                if seed == 0:
                    yield method, 0, 0
                if self.shots:
                    yield method, self.shots, self.shots
            elif method == "gradient":
                yield from ((method, count, self.shots) for count in sorted(self.examples))
            else:
                yield method, max(self.examples), 0 if method in WITHOUT_LABELS else self.shots

    def _candidates_of(self, count: int, shots: int) -> int:
        """Return how many sets of shots a row compares: they use at most a quarter of the examples and leave enough."""
        candidates = min(self.num_shot_candidates, count // (4 * shots)) if shots else 1
        return candidates if candidates > 1 and count - candidates * shots >= MIN_COMPARISON_EXAMPLES else 1

    def _row(self, name: str, method: str, count: int, seed: int, shots: int, by_key: dict[Any, Row]) -> Row:
        shape = f"{name}, {count} examples, seed {seed}" + (f", {shots} shots" if shots else "")
        row: Row = {"what": "search", "shape": shape, "dtype": "", "task": name, "method": method, "examples": count}
        candidates = self._candidates_of(count, shots)
        row |= {"seed": seed, "shots": shots, "num_shot_candidates": candidates, "peers": {}}
        model, tokenizer = self._model()
        row["dtype"] = str(model.dtype).removeprefix("torch.")
        gradient_row = by_key.get((name, "gradient", count, seed, shots, candidates))
        task, drawn, shot_choice_seconds = self._behind_shots(name, count, seed, shots)
        row["shot_seed"] = task.shot_seed
        run = MethodRun(
            model, tokenizer, task, drawn, shot_choice_seconds, count, seed, self.batch_size, self.limit, gradient_row
        )
        try:
            scores, numbers, seconds = METHODS[method](run)
        except ImportError as error:
            row["peers"][method] = {"skipped": f"needs the package {error.name}"}
            return row
        finally:
            unpatch(model)
        labels = run.test_scorer.labels
        correct = int((scores.argmax(dim=-1) == labels).sum())
        low, high = wilson_interval(correct, len(labels))
        row["peers"][method] = {
            "accuracy": correct / len(labels),
            "low": low,
            "high": high,
            "loss": float(objectives.task_loss(scores, labels)),
            "numbers": numbers,
            "s": seconds + shot_choice_seconds,
        }
        return row

    def _behind_shots(self, name: str, count: int, seed: int, shots: int) -> tuple[Task, list[Record], float]:
        """The task with its shots, the examples that a method may use, and the seconds of the choice of shots."""
        task = Task.load(name)
        # The untuned model with shots uses the shots drawn from the largest number of examples.
        drawing = CalibrationOptions(examples=count if count > shots else max(self.examples), seed=seed)
        drawn = draw_examples(task.examples("validation"), drawing)
        if not shots:
            return task, drawn, 0.0
        key = (name, count, seed)
        if key not in self._chosen:
            candidates = shot_candidates(task, drawn, shots, seed, self._candidates_of(count, shots))
            started = time.perf_counter()
            choice = choose_shots(*self._model(), candidates, drawn, batch_size=self.batch_size)
            self._chosen[key] = (choice.task, time.perf_counter() - started)
        chosen, seconds = self._chosen[key]
        return chosen, drawn, seconds

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = load_model(self.model, device=self.device)
        return self._loaded


def _key(row: Row) -> tuple[str, str, int, int, int, int]:
    # Older files name the field "shot_draws".
    candidates: int = row.get("num_shot_candidates") or row.get("shot_draws", 1)
    return row["task"], row["method"], row["examples"], row["seed"], row.get("shots", 0), candidates


def mean_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """Average over tasks the means over seeds, for each method and number of examples that all tasks have.

    Args:
        rows: Rows of SearchBench.

    Yields:
        One row for each method and number of examples, with "what" = "mean".
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for method, count in dict.fromkeys((row["method"], row["examples"]) for row in rows):
        of_method = [row["peers"][method] for row in rows if (row["method"], row["examples"]) == (method, count)]
        names = [row["task"] for row in rows if (row["method"], row["examples"]) == (method, count)]
        if any("accuracy" not in figures for figures in of_method) or set(names) != set(tasks):
            continue
        by_task = [[each for each, name in zip(of_method, names, strict=True) if name == task] for task in tasks]
        accuracies = [statistics.fmean(figures["accuracy"] for figures in part) for part in by_task]
        # Independent tasks: the variance of the mean is the mean variance over their number.
        variance = sum(((figures["high"] - figures["low"]) / 2 / Z95) ** 2 for part in by_task for figures in part[:1])
        half = Z95 * math.sqrt(variance) / len(tasks)
        mean = statistics.fmean(accuracies)
        averages = {"accuracy": mean, "low": mean - half, "high": mean + half}
        averages |= {"numbers": of_method[0]["numbers"], "s": statistics.fmean(each["s"] for each in of_method)}
        yield {
            "what": "mean",
            "shape": f"{len(tasks)} tasks, {count} examples",
            "dtype": "",
            "peers": {method: averages},
        }


def read_rows(path: Path) -> list[Row]:
    """The rows in an earlier run's JSON file; none if there is no such file.

    Raises:
        ZeroTuningError: The file holds something else.
    """
    if not path.exists():
        return []
    try:
        result = json.loads(path.read_text())
        if result["benchmark"] != "search":
            raise KeyError("benchmark")
        return list(result["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ZeroTuningError(
            f"{path} holds no figures of bench search; name another file or move this file away"
        ) from error
