"""The methods that `zerotuning bench search` compares, and their inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zerotuning.bench.adapters import ADAPTER_RATES, AdapterRun, fitted_adapter, ia3_config, lora_config
from zerotuning.bench.rows import Row
from zerotuning.calibration.calibrate import calibrate
from zerotuning.evaluation.evaluate import label_scores
from zerotuning.evaluation.label_bias import fit_label_bias
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.patching.patch import apply_scales
from zerotuning.tasks.examples import Record
from zerotuning.tasks.few_shot import without_shots
from zerotuning.tasks.task import Task

#: Test scores float32 [n, C], numbers tuned, seconds of tuning.
Outcome = tuple[Tensor, int, float]
#: Methods that use the examples' texts but not their labels.
WITHOUT_LABELS = ("information",)


@dataclass
class MethodRun:
    """The inputs of one method.

    Attributes:
        model: Unpatched.
        tokenizer: The model's tokenizer.
        task: The task with its shots.
        drawn: The examples that the method may use, shots included.
        shot_choice_seconds: The time in which the shots were chosen.
        count: How many examples; 0 for a method that uses none.
        seed: Of the draw of examples.
        batch_size: Prompts of one pass.
        limit: How many test examples.
        gradient_row: The row of the method `gradient` on the same examples, if there is one.
        records: The examples that are no shots, in the order in which `calibrate` draws them with this count and seed.
        tests: The test examples.
        test_scorer: The scorer of the test examples.
    """

    model: Any
    tokenizer: Any
    task: Task
    drawn: list[Record]
    shot_choice_seconds: float
    count: int
    seed: int
    batch_size: int
    limit: int
    gradient_row: Row | None

    def __post_init__(self) -> None:
        self.records = without_shots(self.task, self.drawn)
        self.tests = self.task.examples("test", self.limit)
        self.test_scorer = self.scorer(self.tests)

    def scorer(self, records: list[Record], model: Any = None, batch_size: int | None = None) -> LabelScorer:
        """A scorer of these records, by default on the run's model and with the run's batch size."""
        return LabelScorer(
            model or self.model, self.tokenizer, self.task, records, batch_size=batch_size or self.batch_size
        )

    def calibrated(self, **options: Any) -> Outcome:
        """The outcome of `calibrate` with these options on the run's examples."""
        # Without shots `calibrate` draws the examples itself, as for `zerotuning calibrate`.
        draw: dict[str, Any] = {"records": self.records}
        if not self.task.shots:
            draw = {"records": self.task.examples("validation"), "examples": self.count}
        started = time.perf_counter()
        result = calibrate(
            self.model,
            self.tokenizer,
            self.task,
            **draw,
            seed=self.seed,
            batch_size=self.batch_size,
            **options,
        )
        seconds = time.perf_counter() - started
        apply_scales(self.model, result.scales)
        return label_scores(self.test_scorer), int(result.report["numbers_searched"]), seconds


def _untuned(run: MethodRun) -> Outcome:
    return label_scores(run.test_scorer), 0, 0.0


def _label_bias(run: MethodRun) -> Outcome:
    """A number added to each label's log-probability, fitted to the examples; the model is not changed."""
    started = time.perf_counter()
    scorer = run.scorer(run.records)
    bias = fit_label_bias(label_scores(scorer), scorer.labels)
    seconds = time.perf_counter() - started
    return label_scores(run.test_scorer) + bias, len(bias) - 1, seconds


def _shared(run: MethodRun) -> Outcome:
    return run.calibrated(tie="all", num_searches=1)


def _gradient(run: MethodRun) -> Outcome:
    return run.calibrated()


def _information(run: MethodRun) -> Outcome:
    return run.calibrated(objective="information")


def _paper(run: MethodRun) -> Outcome:
    return run.calibrated(method="paper")


def _paper_in_time(run: MethodRun) -> Outcome:
    """The paper's method stopped after the seconds that `gradient` took on the same examples."""
    seconds = (
        run.gradient_row["peers"]["gradient"]["s"] - run.shot_choice_seconds
        if run.gradient_row
        else run.calibrated()[2]
    )
    return run.calibrated(method="paper", seconds=seconds)


def _lora(run: MethodRun) -> Outcome:
    return _adapter(run, lora_config(), ADAPTER_RATES["lora"])


def _ia3(run: MethodRun) -> Outcome:
    return _adapter(run, ia3_config(), ADAPTER_RATES["ia3"])


def _adapter(run: MethodRun, config: Any, rates: Sequence[float]) -> Outcome:
    started = time.perf_counter()
    fit = AdapterRun(run.model, run.task.name, run.records, run.seed, run.scorer)
    with fitted_adapter(fit, config, rates) as (model, numbers):
        seconds = time.perf_counter() - started
        return label_scores(run.scorer(run.tests, model)), numbers, seconds


METHODS: dict[str, Callable[[MethodRun], Outcome]] = {
    "untuned": _untuned,
    "label-bias": _label_bias,
    "shared": _shared,
    "gradient": _gradient,
    "information": _information,
    "paper": _paper,
    "paper-in-time": _paper_in_time,
    "ia3": _ia3,
    "lora": _lora,
}
