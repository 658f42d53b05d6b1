"""`zerotuning study baselines`: head scales against other ways to use the same few examples of a frozen model.

Whatever a method has to choose (a temperature, heads, a span, a number of shots) it chooses by the loss on the same validation
examples, "change nothing" among the choices; all are judged on the same test examples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerotuning.calibration.calibrate import calibrate
from zerotuning.evaluation import objectives
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.label_bias import fit_label_bias
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import scores_behind_prefix, supports_prefix_cache
from zerotuning.plots.panels import bars_with_intervals
from zerotuning.plots.style import label_axes
from zerotuning.statistics import bootstrap_interval, wilson_interval
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row, distinct
from zerotuning.study.key_clauses import key_clauses
from zerotuning.study.pictures import new_panels
from zerotuning.study.setting import Setting, Spans, batch_spans, figures_of
from zerotuning.study.spans import find_spans, has_position
from zerotuning.study.steering import CalibratedSinks, Intervention, MarkedSpan, Temperature, steered
from zerotuning.tasks.examples import Record
from zerotuning.tasks.few_shot import draw_shots, without_shots

#: An intervention for a batch; PASTA's spans differ from example to example.
Maker = Callable[[Batch], Intervention]


@dataclass(frozen=True)
class Effort:
    """What each method tries; by size.

    temperatures   of the attention logits
    shots          solved examples before the prompt, taken from the validation examples
    head_shares    shares of the heads that ACT and PASTA steer, best-ranked first
    steps          gradient steps of ours
    step_examples  examples of one such step
    paper_layers   the paper's method profiles the heads of every n-th layer
    paper_heads    and at most so many of each: all heads of all layers take an hour on two cores
    """

    temperatures: tuple[float, ...]
    shots: tuple[int, ...]
    head_shares: tuple[float, ...]
    steps: int
    step_examples: int
    paper_layers: int
    paper_heads: int


EFFORTS = {
    "small": Effort((0.8,), (1,), (0.1,), steps=2, step_examples=4, paper_layers=30, paper_heads=2),
    "full": Effort(
        (0.6, 0.8, 0.9, 1.1, 1.25, 1.6),
        (1, 2, 4, 8),
        (0.02, 0.1, 0.3),
        steps=15,
        step_examples=16,
        paper_layers=7,
        paper_heads=1000,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Test scores [n, C], how many numbers or yes/no choices were tuned, seconds of tuning, what was chosen."""

    scores: Tensor
    numbers: int
    tuning_seconds: float
    chosen: Mapping[str, Any] = field(default_factory=dict)


class Draw:
    """The validation and test examples of a task and a seed, which all methods share."""

    def __init__(self, setting: Setting, name: str, seed: int) -> None:
        self.setting, self.name, self.seed = setting, name, seed
        self.task = setting.task(name)
        self.effort = EFFORTS[setting.size]

    @cached_property
    def validation(self) -> list[Record]:
        return self.setting.drawn(self.name, self.seed)

    @cached_property
    def tests(self) -> list[Record]:
        return self.setting.tests(self.name, self.seed)

    @cached_property
    def scorers(self) -> tuple[LabelScorer, LabelScorer]:
        """Of the validation and of the test examples."""
        return self.setting.scorer(self.task, self.validation), self.setting.scorer(self.task, self.tests)

    @cached_property
    def untuned(self) -> tuple[Tensor, Tensor]:
        """Scores at γ = 1."""
        validation, tests = self.scorers
        return self.setting.scores(validation), self.setting.scores(tests)

    def loss(self, scores: Tensor) -> float:
        """On the validation examples."""
        return float(objectives.task_loss(scores, self.scorers[0].labels))

    def steered_scores(self, scorer: LabelScorer, make: Maker, strength: Tensor | None = None) -> Tensor:
        """Scores [n, C] with an intervention in the heads that `strength` [L, H] names."""
        model, _ = self.setting.loaded()
        found = []
        with torch.no_grad():
            for batch in scorer.batches:
                with steered(model, make(batch), strength):
                    found.append(scorer.scores(batch).cpu())
        return scorer.gather(found)

    def head_slopes(self, make: Maker) -> np.ndarray:
        """Of each head the derivative of the mean validation loss in its share of the intervention at 0: float64 [L, H]."""
        model, _ = self.setting.loaded()
        scorer = self.scorers[0]
        total = np.zeros(self.setting.shape())
        for batch in scorer.batches:
            share = torch.zeros(self.setting.shape(), requires_grad=True)
            with steered(model, make(batch), share):
                scores = scorer.scores(batch)
            loss = objectives.task_loss(scores, batch.labels.to(scores.device)) * len(batch)
            total += torch.autograd.grad(loss, share)[0].double().numpy()
        return total / len(scorer)


def cells(setting: Setting) -> Iterator[Cell]:
    """One for each task, seed and method (of `Setting.parts`)."""
    numbers = setting.numbers
    for name in numbers.tasks:
        for seed in range(numbers.seeds):
            draw = Draw(setting, name, seed)
            for method in setting.parts or METHODS:
                key = {"task": name, "seed": seed, "method": method}
                key |= {"examples": numbers.examples, "limit": numbers.limit, "size": setting.size}
                yield Cell(key, partial(_measure, draw, method))


def _measure(draw: Draw, method: str) -> dict[str, Any]:
    outcome = METHODS[method].run(draw)
    labels = draw.scorers[1].labels
    right = (outcome.scores.argmax(dim=-1) == labels).int().tolist()
    low, high = wilson_interval(sum(right), len(right))
    return {
        **figures_of(outcome.scores, labels),
        "low": low,
        "high": high,
        "right": right,
        "numbers": outcome.numbers,
        "tuning_seconds": round(outcome.tuning_seconds, 3),
        "chosen": dict(outcome.chosen),
    }


# The methods.


def _untuned(draw: Draw) -> Outcome:
    return Outcome(draw.untuned[1], 0, 0.0)


def _few_shot(draw: Draw) -> Outcome:
    """Solved examples before the prompt; how many is judged on those validation examples that are none of the most."""
    started = time.perf_counter()
    most = draw.task.with_shots(draw_shots(draw.task, draw.validation, max(draw.effort.shots), draw.seed))
    judges = without_shots(most, draw.validation)
    losses = {}
    for count in (0, *draw.effort.shots):
        shots = draw_shots(draw.task, draw.validation, count, draw.seed)
        scorer = draw.setting.scorer(draw.task.with_shots(shots), judges)
        losses[count] = float(objectives.task_loss(_scores_with_shots(draw, scorer), scorer.labels))
    best = min(losses, key=lambda count: losses[count])
    seconds = time.perf_counter() - started
    task = draw.task.with_shots(draw_shots(draw.task, draw.validation, best, draw.seed))
    scorer = draw.setting.scorer(task, draw.tests)
    return Outcome(_scores_with_shots(draw, scorer), 1, seconds, {"shots": best})


def _scores_with_shots(draw: Draw, scorer: LabelScorer) -> Tensor:
    """At γ = 1; the shots read once."""
    if scorer.task.shots and supports_prefix_cache(scorer):
        return scores_behind_prefix(scorer)
    return draw.setting.scores(scorer)


def _label_bias(draw: Draw) -> Outcome:
    """A number added to each label's log-probability."""
    started = time.perf_counter()
    validation, tests = draw.untuned
    bias = fit_label_bias(validation, draw.scorers[0].labels)
    return Outcome(tests + bias, len(bias) - 1, time.perf_counter() - started, {"bias": bias.tolist()})


def _temperature(draw: Draw) -> Outcome:
    """One temperature for the attention logits of all heads."""
    started = time.perf_counter()
    losses = {1.0: draw.loss(draw.untuned[0])}
    for temperature in draw.effort.temperatures:
        make = _same(Temperature(temperature))
        losses[temperature] = draw.loss(draw.steered_scores(draw.scorers[0], make))
    best = min(losses, key=lambda temperature: losses[temperature])
    seconds = time.perf_counter() - started
    scores = draw.steered_scores(draw.scorers[1], _same(Temperature(best)))
    return Outcome(scores, 1, seconds, {"temperature": best})


def _act(draw: Draw) -> Outcome:
    """ACT with the paper's alpha and beta, in heads of the layers that its code allows: not the first two, not the last."""
    layers, _ = draw.setting.shape()
    make = _same(CalibratedSinks())
    return _in_best_heads(draw, {"": (make, make)}, set(range(2, layers - 1)))


def _pasta(draw: Draw) -> Outcome:
    """PASTA with the instruction or the content marked."""
    variants = {}
    for position in ("instruction", "content"):
        if has_position(draw.task, position):
            validation, tests = (_spans(draw, position, scorer) for scorer in draw.scorers)
            variants[position] = (partial(_marked, validation, None), partial(_marked, tests, None))
    return _in_best_heads(draw, variants)


def _auto_pasta(draw: Draw) -> Outcome:
    """AutoPASTA: within the content the clause that the model quotes as the deciding one is marked."""
    started = time.perf_counter()
    model, tokenizer = draw.setting.loaded()
    makers = []
    for records, scorer in zip((draw.validation, draw.tests), draw.scorers, strict=True):
        clauses = key_clauses(model, tokenizer, draw.task, records, draw.setting.batch_size)
        makers.append(partial(_marked, clauses, _spans(draw, "content", scorer)))
    asking = time.perf_counter() - started
    outcome = _in_best_heads(draw, {"quoted clause": (makers[0], makers[1])})
    return Outcome(outcome.scores, outcome.numbers, asking + outcome.tuning_seconds, outcome.chosen)


def _spans(draw: Draw, position: str, scorer: LabelScorer) -> Spans:
    records = draw.validation if scorer is draw.scorers[0] else draw.tests
    lengths = [len(example.prompt) for example in scorer.examples]
    return find_spans(position, draw.task, records, draw.setting.loaded()[1], lengths, (draw.seed,))


def _marked(spans: Spans, within: Spans | None, batch: Batch) -> Intervention:
    return MarkedSpan(batch_spans(batch, spans), within=None if within is None else batch_spans(batch, within))


def _same(intervention: Intervention) -> Maker:
    return lambda batch: intervention


def _in_best_heads(draw: Draw, variants: Mapping[str, tuple[Maker, Maker]], layers: set[int] | None = None) -> Outcome:
    """Each variant in the best-ranked heads, so many as lose least on the validation examples.

    ACT and PASTA rank heads by the accuracy of the model with that head alone steered, a pass over the examples for each. Here
    one gradient ranks all: the derivative of the loss in each head's share of the intervention. Only heads whose derivative
    promises a gain are steered.
    """
    started = time.perf_counter()
    best: tuple[float, str, Tensor | None] = (draw.loss(draw.untuned[0]), "", None)
    for name, (make, _) in variants.items():
        slopes = draw.head_slopes(make)
        if layers is not None:
            slopes[[layer not in layers for layer in range(len(slopes))]] = 0.0
        for strength in _strengths(slopes, draw.effort.head_shares):
            loss = draw.loss(draw.steered_scores(draw.scorers[0], make, strength))
            if loss < best[0]:
                best = loss, name, strength
    seconds = time.perf_counter() - started
    _, name, found = best
    numbers = draw.setting.shape()[1] * (len(layers) if layers is not None else draw.setting.shape()[0])
    if found is None:
        return Outcome(draw.untuned[1], numbers, seconds, {"heads": 0})
    chosen = {"heads": int(found.sum()), **({"marked": name} if name else {})}
    return Outcome(draw.steered_scores(draw.scorers[1], variants[name][1], found), numbers, seconds, chosen)


def _strengths(slopes: np.ndarray, shares: Sequence[float]) -> Iterator[Tensor]:
    """For each share of all heads: 1 in so many heads of the least slope below 0, else 0; each set once."""
    order = np.argsort(slopes, axis=None, kind="stable")
    helpful = int((slopes < 0).sum())
    for count in sorted({min(helpful, max(1, round(share * slopes.size))) for share in shares} - {0}):
        strength = torch.zeros(slopes.size)
        strength[torch.from_numpy(order[:count].copy())] = 1.0
        yield strength.view(slopes.shape)


def _paper(draw: Draw) -> Outcome:
    """The paper's method among some heads: `Effort.paper_layers`."""
    layers, heads = draw.setting.shape()
    chosen = range(0, layers, draw.effort.paper_layers)
    some = [(layer, head) for layer in chosen for head in range(min(heads, draw.effort.paper_heads))]
    return _calibrated(draw, method="paper", heads=some)


def _gradient(draw: Draw) -> Outcome:
    effort = draw.effort
    return _calibrated(draw, steps=effort.steps, step_examples=effort.step_examples, folds=1, num_searches=1)


def _information(draw: Draw) -> Outcome:
    effort = draw.effort
    return _calibrated(draw, objective="information", steps=effort.steps, step_examples=effort.step_examples)


def _calibrated(draw: Draw, **options: Any) -> Outcome:
    started = time.perf_counter()
    model, tokenizer = draw.setting.loaded()
    options |= {"seed": draw.seed, "batch_size": draw.setting.batch_size}
    result = calibrate(model, tokenizer, draw.task, records=draw.validation, **options)
    seconds = time.perf_counter() - started
    chosen = {"improved": result.improved, "reason": result.report["reason"]}
    scores = draw.setting.scores(draw.scorers[1], result.scales.log_scale)
    return Outcome(scores, int(result.report["numbers_searched"]), seconds, chosen)


@dataclass(frozen=True)
class Method:
    title: str
    run: Callable[[Draw], Outcome]


METHODS = {
    "untuned": Method("untuned", _untuned),
    "few-shot": Method("few-shot prompts", _few_shot),
    "label-bias": Method("label bias", _label_bias),
    "temperature": Method("attention temperature", _temperature),
    "act": Method("ACT", _act),
    "pasta": Method("PASTA", _pasta),
    "autopasta": Method("AutoPASTA", _auto_pasta),
    "paper": Method("the paper's method, some heads", _paper),
    "gradient": Method("ours, with labels", _gradient),
    "information": Method("ours, without labels", _information),
}


# What is made of the rows.


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """A panel a task: accuracy of each method with its 95 % interval."""
    tasks = distinct(row["key"]["task"] for row in rows)
    figure, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        chosen = [method for method in METHODS if _of(rows, task, method)]
        found = [_accuracy(_of(rows, task, method)) for method in chosen]
        means, lows, highs = zip(*found, strict=True)
        bars_with_intervals(axes, [METHODS[method].title for method in chosen], means, lows, highs)
        label_axes(axes, task, "accuracy (%)", "")
    return {"": figure}


def table(rows: Sequence[Row]) -> str:
    """A table a task, a line a method: accuracy with its 95 % interval, gain over untuned with its own, loss, effort."""
    parts = []
    for task in distinct(row["key"]["task"] for row in rows):
        lines = [f"**{task}**", ""]
        lines.append("| method | accuracy, % | gain, points | loss, nats | numbers tuned | s of tuning | chosen |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        lines += [_line(rows, task, method) for method in METHODS if _of(rows, task, method)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(rows: Sequence[Row], task: str, method: str) -> str:
    own = _of(rows, task, method)
    mean, low, high = _accuracy(own)
    shown = [METHODS[method].title, f"{mean:.1f} [{low:.1f}, {high:.1f}]", _gain(own, _of(rows, task, "untuned"))]
    shown += [f"{np.mean([row['loss'] for row in own]):.3f}", str(own[0]["numbers"])]
    shown += [f"{np.mean([row['tuning_seconds'] for row in own]):.0f}", "; ".join(map(_choice, own))]
    return f"| {' | '.join(shown)} |"


def _choice(row: Row) -> str:
    """What a row's method chose, in few words."""
    chosen = row["chosen"]
    if "bias" in chosen:
        return ""
    if "improved" in chosen:
        return "" if chosen["improved"] else f"γ = 1: {chosen['reason']}"
    return ", ".join(f"{name} {value:g}" if not isinstance(value, str) else value for name, value in chosen.items())


def _of(rows: Sequence[Row], task: str, method: str) -> list[Row]:
    return [row for row in rows if row["key"]["task"] == task and row["key"]["method"] == method]


def _accuracy(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Per cent, with the 95 % interval of all seeds' test examples taken together."""
    right = [one for row in rows for one in row["right"]]
    low, high = wilson_interval(sum(right), len(right))
    return 100 * sum(right) / len(right), 100 * low, 100 * high


def _gain(own: Sequence[Row], untuned: Sequence[Row]) -> str:
    """Points over untuned on the same examples, with a bootstrap's 95 % interval over them."""
    before = {row["key"]["seed"]: row["right"] for row in untuned}
    paired = [
        100.0 * (after - first)
        for row in own
        if row["key"]["seed"] in before
        for after, first in zip(row["right"], before[row["key"]["seed"]], strict=True)
    ]
    if not paired or own[0]["key"]["method"] == "untuned":
        return ""
    low, high = bootstrap_interval(paired)
    return f"{np.mean(paired):+.1f} [{low:+.1f}, {high:+.1f}]"


STUDY = Experiment(
    name="baselines",
    question="What do other ways to use the same examples of a frozen model give, beside head scales?",
    numbers={
        "small": Numbers(("sst2",), seeds=1, examples=4, limit=4),
        "full": Numbers(("sst2", "trec"), seeds=1, examples=32, limit=100),
    },
    cells=cells,
    figures=figures,
    table=table,
    parts=tuple(METHODS),
)
