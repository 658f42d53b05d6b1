"""The methods that `zerotuning study baselines` compares: prompts, label bias, attention steering, head scales.

Each method chooses its settings (a temperature, heads, a span, a number of shots) by the loss on the same validation
examples. "Change nothing" is among the choices.
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
from zerotuning.study.key_clauses import key_clauses
from zerotuning.study.setting import Setting, Spans, batch_spans
from zerotuning.study.spans import find_spans, has_position
from zerotuning.study.steering import CalibratedSinks, Intervention, MarkedSpan, Temperature, steered
from zerotuning.tasks.examples import Record
from zerotuning.tasks.few_shot import draw_shots, without_shots

#: Makes the intervention for a batch: PASTA's spans differ from example to example.
InterventionMaker = Callable[[Batch], Intervention]


@dataclass(frozen=True)
class Effort:
    """What each method tries, by size of the study.

    Attributes:
        temperatures: Of the attention logits.
        shots: Numbers of solved examples before the prompt, taken from the validation examples.
        head_shares: Shares of the heads that ACT and PASTA steer, best-ranked heads first.
        steps: Gradient steps of our search.
        step_examples: Examples of one such step.
        paper_layers: Step between the layers whose heads the paper's method profiles. All heads of all layers take an
            hour on two cores.
        paper_heads: The largest number of heads that the paper's method profiles in one of these layers.
    """

    temperatures: tuple[float, ...]
    shots: tuple[int, ...]
    head_shares: tuple[float, ...]
    steps: int
    step_examples: int
    paper_layers: int
    paper_heads: int


EFFORTS = {
    "small": Effort(
        temperatures=(0.8,), shots=(1,), head_shares=(0.1,), steps=2, step_examples=4, paper_layers=30, paper_heads=2
    ),
    "full": Effort(
        temperatures=(0.6, 0.8, 0.9, 1.1, 1.25, 1.6),
        shots=(1, 2, 4, 8),
        head_shares=(0.02, 0.1, 0.3),
        steps=15,
        step_examples=16,
        paper_layers=7,
        paper_heads=1000,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The result of a method.

    Attributes:
        scores: Of the test examples' labels: [n, C].
        numbers: How many numbers or yes/no choices the method tuned.
        tuning_seconds: Time of tuning.
        chosen: The chosen settings, by name.
    """

    scores: Tensor
    numbers: int
    tuning_seconds: float
    chosen: Mapping[str, Any] = field(default_factory=dict)


class Draw:
    """The validation and test examples of a task, drawn by a seed, which all methods share."""

    def __init__(self, setting: Setting, name: str, seed: int) -> None:
        self.setting, self.name, self.seed = setting, name, seed
        self.task = setting.task(name)
        self.effort = EFFORTS[setting.size]

    @cached_property
    def validation(self) -> list[Record]:
        """The examples on which methods choose their settings."""
        return self.setting.drawn(self.name, self.seed)

    @cached_property
    def tests(self) -> list[Record]:
        """The examples on which all methods are measured."""
        return self.setting.tests(self.name, self.seed)

    @cached_property
    def scorers(self) -> tuple[LabelScorer, LabelScorer]:
        """The scorers of the validation and of the test examples."""
        return self.setting.scorer(self.task, self.validation), self.setting.scorer(self.task, self.tests)

    @cached_property
    def untuned(self) -> tuple[Tensor, Tensor]:
        """Scores of the validation and of the test examples at γ = 1."""
        validation, tests = self.scorers
        return self.setting.scores(validation), self.setting.scores(tests)

    def loss(self, scores: Tensor) -> float:
        """The task loss of scores of the validation examples."""
        return float(objectives.task_loss(scores, self.scorers[0].labels))

    def steered_scores(self, scorer: LabelScorer, make: InterventionMaker, strength: Tensor | None = None) -> Tensor:
        """Scores [n, C] with an intervention in the heads whose `strength` [L, H] is not 0; None: in all heads."""
        model, _ = self.setting.loaded()
        by_batch = []
        with torch.no_grad():
            for batch in scorer.batches:
                with steered(model, make(batch), strength):
                    by_batch.append(scorer.scores(batch).cpu())
        return scorer.gather(by_batch)

    def head_slopes(self, make: InterventionMaker) -> np.ndarray:
        """Differentiate the mean validation loss in each head's strength of the intervention, at 0: float64 [L, H]."""
        model, _ = self.setting.loaded()
        scorer = self.scorers[0]
        total = np.zeros(self.setting.shape())
        for batch in scorer.batches:
            strength = torch.zeros(self.setting.shape(), requires_grad=True)
            with steered(model, make(batch), strength):
                scores = scorer.scores(batch)
            loss = objectives.task_loss(scores, batch.labels.to(scores.device)) * len(batch)
            total += torch.autograd.grad(loss, strength)[0].double().numpy()
        return total / len(scorer)


def _untuned(draw: Draw) -> Outcome:
    return Outcome(draw.untuned[1], 0, 0.0)


def _few_shot(draw: Draw) -> Outcome:
    """Put solved examples before the prompt, as many as give the least loss on examples that are never shots."""
    started = time.perf_counter()
    with_most = draw.task.with_shots(draw_shots(draw.task, draw.validation, max(draw.effort.shots), draw.seed))
    compared = without_shots(with_most, draw.validation)
    losses = {}
    for count in (0, *draw.effort.shots):
        shots = draw_shots(draw.task, draw.validation, count, draw.seed)
        scorer = draw.setting.scorer(draw.task.with_shots(shots), compared)
        losses[count] = float(objectives.task_loss(_scores_with_shots(draw, scorer), scorer.labels))
    best = min(losses, key=lambda count: losses[count])
    seconds = time.perf_counter() - started
    task = draw.task.with_shots(draw_shots(draw.task, draw.validation, best, draw.seed))
    scorer = draw.setting.scorer(task, draw.tests)
    return Outcome(_scores_with_shots(draw, scorer), 1, seconds, {"shots": best})


def _scores_with_shots(draw: Draw, scorer: LabelScorer) -> Tensor:
    """Score at γ = 1, with the shots in a prefix cache where possible."""
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
        make = _for_every_batch(Temperature(temperature))
        losses[temperature] = draw.loss(draw.steered_scores(draw.scorers[0], make))
    best = min(losses, key=lambda temperature: losses[temperature])
    seconds = time.perf_counter() - started
    scores = draw.steered_scores(draw.scorers[1], _for_every_batch(Temperature(best)))
    return Outcome(scores, 1, seconds, {"temperature": best})


def _act(draw: Draw) -> Outcome:
    """ACT with the paper's alpha and beta, in heads of the layers that ACT's code allows: all but 0, 1 and the last."""
    layers, _ = draw.setting.shape()
    make = _for_every_batch(CalibratedSinks())
    return _steer_best_heads(draw, {"": (make, make)}, set(range(2, layers - 1)))


def _pasta(draw: Draw) -> Outcome:
    """PASTA with the instruction or the content marked."""
    variants = {}
    for position in ("instruction", "content"):
        if has_position(draw.task, position):
            validation, tests = (_spans(draw, position, scorer) for scorer in draw.scorers)
            variants[position] = (partial(_marked, validation, None), partial(_marked, tests, None))
    return _steer_best_heads(draw, variants)


def _auto_pasta(draw: Draw) -> Outcome:
    """AutoPASTA: the marked span is the clause of the content that the model quotes as deciding the answer."""
    started = time.perf_counter()
    model, tokenizer = draw.setting.loaded()
    makers = []
    for records, scorer in zip((draw.validation, draw.tests), draw.scorers, strict=True):
        clauses = key_clauses(model, tokenizer, draw.task, records, draw.setting.batch_size)
        makers.append(partial(_marked, clauses, _spans(draw, "content", scorer)))
    quoting_seconds = time.perf_counter() - started
    outcome = _steer_best_heads(draw, {"quoted clause": (makers[0], makers[1])})
    return Outcome(outcome.scores, outcome.numbers, quoting_seconds + outcome.tuning_seconds, outcome.chosen)


def _spans(draw: Draw, position: str, scorer: LabelScorer) -> Spans:
    records = draw.validation if scorer is draw.scorers[0] else draw.tests
    lengths = [len(example.prompt) for example in scorer.examples]
    return find_spans(position, draw.task, records, draw.setting.loaded()[1], lengths, (draw.seed,))


def _marked(spans: Spans, within: Spans | None, batch: Batch) -> Intervention:
    return MarkedSpan(batch_spans(batch, spans), within=None if within is None else batch_spans(batch, within))


def _for_every_batch(intervention: Intervention) -> InterventionMaker:
    return lambda batch: intervention


def _steer_best_heads(
    draw: Draw, variants: Mapping[str, tuple[InterventionMaker, InterventionMaker]], layers: set[int] | None = None
) -> Outcome:
    """Steer the best-ranked heads: the variant and the number of heads with the least loss on the validation examples.

    ACT and PASTA rank heads by the accuracy of the model with one head steered, which takes a pass over the examples
    for each head. Here one gradient ranks all heads: the derivative of the loss in each head's strength of the
    intervention. Only heads with a negative derivative are steered.

    Args:
        draw: The examples.
        variants: By name, the intervention on validation and on test examples.
        layers: Layers whose heads may be steered; None: all.
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
    _, name, steered_heads = best
    numbers = draw.setting.shape()[1] * (len(layers) if layers is not None else draw.setting.shape()[0])
    if steered_heads is None:
        return Outcome(draw.untuned[1], numbers, seconds, {"heads": 0})
    chosen = {"heads": int(steered_heads.sum()), **({"marked": name} if name else {})}
    return Outcome(draw.steered_scores(draw.scorers[1], variants[name][1], steered_heads), numbers, seconds, chosen)


def _strengths(slopes: np.ndarray, shares: Sequence[float]) -> Iterator[Tensor]:
    """Yield a strength for each share of all heads: 1 in that many heads of most negative slope, else 0; none twice."""
    order = np.argsort(slopes, axis=None, kind="stable")
    helpful = int((slopes < 0).sum())
    for count in sorted({min(helpful, max(1, round(share * slopes.size))) for share in shares} - {0}):
        strength = torch.zeros(slopes.size)
        strength[torch.from_numpy(order[:count].copy())] = 1.0
        yield strength.view(slopes.shape)


def _paper(draw: Draw) -> Outcome:
    """The paper's method among the heads that `Effort.paper_layers` and `paper_heads` leave."""
    layers, heads = draw.setting.shape()
    profiled_layers = range(0, layers, draw.effort.paper_layers)
    profiled = [(layer, head) for layer in profiled_layers for head in range(min(heads, draw.effort.paper_heads))]
    return _calibrated(draw, method="paper", heads=profiled)


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
    """A method's name in tables and pictures, and its function."""

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
