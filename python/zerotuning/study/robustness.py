"""`zerotuning study robustness`: what scales tuned in one setting gain in others (the paper's section on robustness).

Scales are tuned by gradient on the task's own prompt, without shots or distractors, on the model as loaded. Each part
varies one thing and measures the same test examples untuned (every γ is 1) and with those scales. The parts `shots` and
`examples` also tune anew in the varied setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerotuning.evaluation.generation import chosen_label, generate_answers, max_answer_tokens
from zerotuning.evaluation.prefix_cache import scores_behind_prefix, supports_prefix_cache
from zerotuning.study.experiment import Cell, Experiment, Numbers
from zerotuning.study.robustness_conditions import DECODINGS, GRIDS, PARTS, conditions, distractors
from zerotuning.study.robustness_report import figures, table
from zerotuning.study.rounded_weights import rounded_weights
from zerotuning.study.setting import Setting, figures_of
from zerotuning.study.tuned_scales import TunedScales, with_shots
from zerotuning.study.wordings import WORDINGS
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

#: Values of "tuned_on" in a row's key: scales tuned in the setting that all parts share, or in the row's own.
BASE_SETTING, OWN_SETTING = "base setting", "this setting"


def cells(setting: Setting) -> Iterator[Cell]:
    """For each part, task and seed: the scales that the part needs, then a cell for each condition."""
    numbers, grid = setting.numbers, GRIDS[setting.size]
    scales = TunedScales(setting, grid.steps, grid.step_examples)
    for part in setting.parts or PARTS:
        for name in numbers.tasks:
            for seed in range(numbers.num_draws):
                draw = Draw(setting, name, seed, scales)
                if part != "examples":
                    yield from scales.cells(name, seed, numbers.examples)
                for condition in conditions(setting, part, name):
                    if part == "examples":
                        yield from scales.cells(name, seed, condition)
                    yield draw.cell(part, condition, OWN_SETTING if part == "examples" else BASE_SETTING)
                for shots in grid.own_shots if part == "shots" else ():
                    yield from scales.cells(name, seed, numbers.examples, shots)
                    yield draw.cell(part, shots, OWN_SETTING)


class Draw:
    """The test examples of a task and a seed, measured under the conditions of each part.

    Args:
        setting: The study's model and examples.
        name: The task.
        seed: Draws the test examples.
        scales: The tuned scales.
    """

    def __init__(self, setting: Setting, name: str, seed: int, scales: TunedScales) -> None:
        self.setting, self.name, self.seed, self.scales = setting, name, seed, scales
        self.task = setting.task(name)

    @cached_property
    def tests(self) -> list[Record]:
        """The test examples."""
        return self.setting.tests(self.name, self.seed)

    def cell(self, part: str, condition: Any, tuned_on: str) -> Cell:
        """The cell of one condition with scales that were tuned on BASE_SETTING or OWN_SETTING."""
        numbers = self.setting.numbers
        key = {"part": part, "task": self.name, "seed": self.seed, "condition": condition, "tuned_on": tuned_on}
        key |= {"limit": numbers.limit, "steps": self.scales.steps}
        if part != "examples":
            key["examples"] = numbers.examples
        return Cell(key, partial(self._measure, part, condition, tuned_on))

    def log_scale(self, part: str, condition: Any, tuned_on: str) -> np.ndarray:
        """The scales of a cell: [layers, heads]."""
        examples = condition if part == "examples" else self.setting.numbers.examples
        shots = condition if part == "shots" and tuned_on == OWN_SETTING else 0
        return self.scales.log_scale(self.name, self.seed, examples, shots)

    def _measure(self, part: str, condition: Any, tuned_on: str) -> dict[str, Any]:
        log_scale = self.log_scale(part, condition, tuned_on)
        measure = self._generated if part == "decoding" else self._scored
        return {"untuned": measure(part, condition, 0.0), "tuned": measure(part, condition, log_scale)}

    def _scored(self, part: str, condition: Any, log_scale: Any) -> dict[str, Any]:
        """Figures of label scores, and which examples are right."""
        model, _ = self.setting.loaded()
        scorer = self.setting.scorer(self._varied_task(part, condition), self.tests)
        rounding = rounded_weights(model, condition) if part == "quantisation" else nullcontext()
        with rounding:
            if part in ("shots", "context") and supports_prefix_cache(scorer):
                with self.setting.scaled(log_scale):
                    scores = scores_behind_prefix(scorer)
            else:
                scores = self.setting.scores(scorer, log_scale)
        right: Tensor = scores.argmax(dim=-1) == scorer.labels
        tokens = float(np.mean([len(example.prompt) for example in scorer.examples]))
        return {**figures_of(scores, scorer.labels), "right": right.int().tolist(), "tokens": tokens}

    def _varied_task(self, part: str, condition: Any) -> Task:
        if part == "shots":
            return with_shots(self.task, condition, self.seed)
        if part == "context":
            return self._behind_distractors(condition) if condition else self.task
        if part == "wordings" and condition:
            return replace(self.task, prompt=WORDINGS[self.name][condition - 1])
        return self.task

    def _behind_distractors(self, length: int) -> Task:
        """The task with distractors before its prompt, such that the longest test example has `length` tokens."""
        _, tokenizer = self.setting.loaded()
        longest = max(example.longest for example in self.setting.scorer(self.task, self.tests).examples)
        text = distractors(tokenizer, max(length - longest - 4, 0), self.name, self.seed)
        return replace(self.task, prompt=text.replace("{", "{{").replace("}", "}}") + "\n\n" + self.task.prompt)

    @torch.no_grad()
    def _generated(self, part: str, condition: str, log_scale: Any) -> dict[str, Any]:
        """Which examples' generated answers begin with the right label, and how many begin with any label."""
        _, tokenizer = self.setting.loaded()
        scorer = self.setting.scorer(self.task, self.tests)
        most = max_answer_tokens(scorer)
        predicted: dict[int, int | None] = {}
        with self.setting.scaled(log_scale), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for batch in scorer.batches:
                texts = generate_answers(scorer, tokenizer, batch, most, **DECODINGS[condition])
                for place, text in zip(batch.indices.tolist(), texts, strict=True):
                    predicted[place] = chosen_label(text, self.task.render(self.tests[place]).labels)
        right = [int(predicted[place] == label) for place, label in enumerate(scorer.labels.tolist())]
        answered = sum(label is not None for label in predicted.values())
        return {"accuracy": sum(right) / len(right), "answered": answered / len(right), "right": right}


STUDY = Experiment(
    name="robustness",
    question=(
        "What are scales tuned in one setting worth with shots, long contexts, coarser weights, "
        "other decoding and wordings?"
    ),
    numbers={
        "small": Numbers(("sst2",), num_draws=1, examples=4, limit=3),
        "full": Numbers(("sst2", "trec"), num_draws=3, examples=64, limit=64),
    },
    cells=cells,
    figures=figures,
    table=table,
    parts=tuple(PARTS),
)
