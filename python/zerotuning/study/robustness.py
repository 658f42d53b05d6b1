"""`zerotuning study robustness`: what scales tuned in one setting are worth in others (the paper's section on robustness).

Scales are tuned by gradient on the task's own prompt, without shots or distractors, on the model as loaded. Each part changes
one thing and measures the same test examples untuned (every γ 1) and with those scales. Parts `shots` and `examples` also tune anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerotuning.calibration.calibrate import calibrate
from zerotuning.evaluation.generation import chosen_label, max_answer_tokens
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import scores_behind_prefix, supports_prefix_cache
from zerotuning.patching.patch import head_parameters
from zerotuning.plots.panels import bars_with_intervals, line_with_band
from zerotuning.plots.style import SERIES, add_legend, label_axes
from zerotuning.statistics import bootstrap_interval, wilson_interval
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row, distinct
from zerotuning.study.heads import WORDINGS as HEADS_WORDINGS
from zerotuning.study.pictures import new_panels
from zerotuning.study.rounded_weights import ROUNDINGS, rounded_weights
from zerotuning.study.setting import Setting, figures_of
from zerotuning.tasks.examples import Record
from zerotuning.tasks.few_shot import draw_shots, without_shots
from zerotuning.tasks.task import Task

#: Parts, and what each changes.
PARTS = {
    "shots": "solved examples before the prompt",
    "context": "tokens of prompt and distractors",
    "quantisation": "weights",
    "decoding": "decoding",
    "wordings": "wording of the prompt",
    "examples": "examples to tune on",
}
_REVIEW_WORDINGS = (
    *HEADS_WORDINGS["sst2"],
    'A critic wrote: "{sentence}"\nThis verdict is (negative or positive):',
    "Decide whether the opinion is negative or positive.\nOpinion: {sentence}\nDecision:",
)
#: Four further wordings of a task's prompt; its own is wording 0.
WORDINGS = {
    "sst2": _REVIEW_WORDINGS,
    "mr": _REVIEW_WORDINGS,
    "trec": (
        *HEADS_WORDINGS["trec"],
        "Say which category fits the question: Expression, Entity, Description, Person, Location, or Number.\nText: {question}\nCategory:",
        'Someone asks: "{question}"\nThe answer will be an Expression, Entity, Description, Person, Location, or Number, namely',
    ),
}
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k 10": {"do_sample": True, "top_k": 10, "top_p": 1.0, "temperature": 1.0},
    "nucleus 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 1.0},
    "temperature 0.5": {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.5},
    "temperature 1": {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
}
#: Tasks whose texts (the longest field) stand before the prompt as distractors.
DISTRACTORS = ("boolq", "openbookqa", "commonsense_qa", "piqa")
#: In the key of a row: the scales tuned in the setting of all parts, or anew in the row's own.
SHORT, OWN = "base setting", "this setting"


@dataclass(frozen=True)
class Grid:
    """What each part goes through, and how scales are tuned; by size.

    context    tokens in all; 0: the prompt alone
    own_shots  numbers of shots at which scales are tuned anew
    """

    shots: tuple[int, ...]
    own_shots: tuple[int, ...]
    context: tuple[int, ...]
    roundings: tuple[str, ...]
    decodings: tuple[str, ...]
    wordings: int
    examples: tuple[int, ...]
    steps: int
    step_examples: int


GRIDS = {
    "small": Grid((0, 1), (), (0, 128), ("as loaded", "8-bit"), ("greedy", "top-k 10"), 2, (4,), 1, 4),
    "full": Grid(
        shots=(0, 1, 2, 4, 8, 16),
        own_shots=(1,),
        context=(0, 512, 2048, 8000),
        roundings=tuple(ROUNDINGS),
        decodings=tuple(DECODINGS),
        wordings=5,
        examples=(16, 64, 200),
        steps=12,
        step_examples=16,
    ),
}


# Scales.


class TunedScales:
    """log γ [L, H] by what it was tuned on: a cell each, whose row keeps them for a study that goes on later."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.grid = setting, GRIDS[setting.size]
        self._known: dict[tuple[str, int, int, int], np.ndarray] = {}
        self._asked: set[tuple[str, int, int, int]] = set()

    def cells(self, name: str, seed: int, examples: int, shots: int = 0) -> Iterator[Cell]:
        """The cell that tunes; none where it was asked for already."""
        place = (name, seed, examples, shots)
        if place not in self._asked:
            self._asked.add(place)
            key = {"part": "scales", "task": name, "seed": seed, "examples": examples, "shots": shots}
            key |= {"steps": self.grid.steps, "step_examples": self.grid.step_examples}
            yield Cell(key, partial(self._measure, *place), partial(self._keep, place))

    def of(self, name: str, seed: int, examples: int, shots: int = 0) -> np.ndarray:
        return self._known[name, seed, examples, shots]

    def _keep(self, place: tuple[str, int, int, int], row: Row) -> None:
        self._known[place] = np.array(row["log_scale"])

    def _measure(self, name: str, seed: int, examples: int, shots: int) -> dict[str, Any]:
        setting, grid = self.setting, self.grid
        model, tokenizer = setting.loaded()
        task = with_shots(setting.task(name), shots, seed)
        records = without_shots(task, setting.drawn(name, seed, examples))
        started = time.perf_counter()
        result = calibrate(
            model,
            tokenizer,
            task,
            records=records,
            steps=grid.steps,
            step_examples=grid.step_examples,
            folds=1,
            num_searches=1,
            seed=seed,
            batch_size=setting.batch_size,
        )
        report = result.report
        return {
            "log_scale": [[round(value, 6) for value in row] for row in result.scales.log_scale.tolist()],
            "improved": result.improved,
            "reason": report["reason"],
            "held_out": {"untuned": report["baseline"], "tuned": report["tuned"]},
            "tuning_seconds": round(time.perf_counter() - started, 3),
        }


def with_shots(task: Task, count: int, seed: int) -> Task:
    return task.with_shots(draw_shots(task, task.examples("validation"), count, seed))


# What is measured.


def cells(setting: Setting) -> Iterator[Cell]:
    """Part by part, for each task and seed: the scales that the part needs, then a cell a condition."""
    numbers, grid = setting.numbers, GRIDS[setting.size]
    scales = TunedScales(setting)
    for part in setting.parts or PARTS:
        for name in numbers.tasks:
            for seed in range(numbers.seeds):
                draw = Draw(setting, name, seed, scales)
                if part != "examples":
                    yield from scales.cells(name, seed, numbers.examples)
                for condition in _conditions(setting, part, name):
                    if part == "examples":
                        yield from scales.cells(name, seed, condition)
                    yield draw.cell(part, condition, OWN if part == "examples" else SHORT)
                for condition in grid.own_shots if part == "shots" else ():
                    yield from scales.cells(name, seed, numbers.examples, condition)
                    yield draw.cell(part, condition, OWN)


def _conditions(setting: Setting, part: str, name: str) -> Sequence[Any]:
    grid = GRIDS[setting.size]
    if part == "wordings":
        return range(min(grid.wordings, 1 + len(WORDINGS.get(name, ()))))
    if part == "context":
        context = getattr(setting.loaded()[0].config.get_text_config(), "max_position_embeddings", None)
        return [length for length in grid.context if context is None or length <= context]
    named: dict[str, Sequence[Any]] = {
        "shots": grid.shots,
        "quantisation": grid.roundings,
        "decoding": grid.decodings,
        "examples": grid.examples,
    }
    return named[part]


class Draw:
    """The test examples of a task and a seed, and what they give under each part's conditions."""

    def __init__(self, setting: Setting, name: str, seed: int, scales: TunedScales) -> None:
        self.setting, self.name, self.seed, self.scales = setting, name, seed, scales
        self.task = setting.task(name)

    @cached_property
    def tests(self) -> list[Record]:
        return self.setting.tests(self.name, self.seed)

    def cell(self, part: str, condition: Any, tuned_on: str) -> Cell:
        numbers = self.setting.numbers
        key = {"part": part, "task": self.name, "seed": self.seed, "condition": condition, "tuned_on": tuned_on}
        key |= {"limit": numbers.limit, "steps": self.scales.grid.steps}
        if part != "examples":
            key["examples"] = numbers.examples
        return Cell(key, partial(self._measure, part, condition, tuned_on))

    def log_scale(self, part: str, condition: Any, tuned_on: str) -> np.ndarray:
        examples = condition if part == "examples" else self.setting.numbers.examples
        shots = condition if part == "shots" and tuned_on == OWN else 0
        return self.scales.of(self.name, self.seed, examples, shots)

    def _measure(self, part: str, condition: Any, tuned_on: str) -> dict[str, Any]:
        log_scale = self.log_scale(part, condition, tuned_on)
        measure = self._generated if part == "decoding" else self._scored
        return {"untuned": measure(part, condition, 0.0), "tuned": measure(part, condition, log_scale)}

    def _scored(self, part: str, condition: Any, log_scale: Any) -> dict[str, Any]:
        """Figures of label scores, and which examples are right."""
        model, _ = self.setting.loaded()
        scorer = self.setting.scorer(self._task_of(part, condition), self.tests)
        rounding = rounded_weights(model, condition) if part == "quantisation" else nullcontext()
        with rounding:
            if part in ("shots", "context") and supports_prefix_cache(scorer):
                with at_scales(self.setting, log_scale):
                    scores = scores_behind_prefix(scorer)
            else:
                scores = self.setting.scores(scorer, log_scale)
        right: Tensor = scores.argmax(dim=-1) == scorer.labels
        tokens = float(np.mean([len(example.prompt) for example in scorer.examples]))
        return {**figures_of(scores, scorer.labels), "right": right.int().tolist(), "tokens": tokens}

    def _task_of(self, part: str, condition: Any) -> Task:
        if part == "shots":
            return with_shots(self.task, condition, self.seed)
        if part == "context":
            return self._behind_distractors(condition) if condition else self.task
        if part == "wordings" and condition:
            return replace(self.task, prompt=WORDINGS[self.name][condition - 1])
        return self.task

    def _behind_distractors(self, length: int) -> Task:
        """The task with texts of other tasks before its prompt, `length` tokens with the longest test example."""
        _, tokenizer = self.setting.loaded()
        longest = max(example.longest for example in self.setting.scorer(self.task, self.tests).examples)
        text = distractors(tokenizer, max(length - longest - 4, 0), self.name, self.seed)
        return replace(self.task, prompt=text.replace("{", "{{").replace("}", "}}") + "\n\n" + self.task.prompt)

    @torch.no_grad()
    def _generated(self, part: str, condition: str, log_scale: Any) -> dict[str, Any]:
        """Which examples' generated answers begin with the right label, and how many begin with any."""
        model, tokenizer = self.setting.loaded()
        scorer = self.setting.scorer(self.task, self.tests)
        chosen: dict[int, int | None] = {}
        with at_scales(self.setting, log_scale), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for batch in scorer.batches:
                places = batch.indices.tolist()
                texts = _written(model, tokenizer, scorer, places, DECODINGS[condition])
                for place, text in zip(places, texts, strict=True):
                    chosen[place] = chosen_label(text, self.task.render(self.tests[place]).labels)
        right = [int(chosen[place] == label) for place, label in enumerate(scorer.labels.tolist())]
        answered = sum(label is not None for label in chosen.values())
        return {"accuracy": sum(right) / len(right), "answered": answered / len(right), "right": right}


def _written(
    model: Any, tokenizer: Any, scorer: LabelScorer, places: Sequence[int], decoding: dict[str, Any]
) -> list[str]:
    prompts = scorer.prompt_batch(places)
    ids = model.generate(
        input_ids=prompts.input_ids.to(model.device),
        attention_mask=prompts.attention_mask.to(model.device),
        max_new_tokens=max_answer_tokens(scorer),
        num_beams=1,
        repetition_penalty=1.0,  # whatever the model's own generation settings say
        pad_token_id=tokenizer.pad_token_id or 0,
        **decoding,
    )
    return list(tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True))


@contextmanager
def at_scales(setting: Setting, log_scale: Any) -> Iterator[None]:
    """Within it log γ of all heads is `log_scale`, one number or [L, H]."""
    values = torch.as_tensor(log_scale, dtype=torch.float32).expand(setting.shape())
    with head_parameters(setting.loaded()[0]) as parameters:
        with torch.no_grad():
            for parameter, row in zip(parameters, values, strict=True):
                parameter.copy_(row)
        yield


def distractors(tokenizer: Any, tokens: int, but: str, seed: int) -> str:
    """Texts of other tasks' validation examples, drawn by the seed, cut at so many tokens."""
    generator = np.random.default_rng((seed, 3))
    texts = [
        max((value for value in record.values() if isinstance(value, str)), key=len)
        for name in DISTRACTORS
        if name != but
        for record in Task.load(name).examples("validation")
    ]
    drawn: list[str] = []
    size = 0
    for place in generator.permutation(len(texts)).tolist():
        if size > tokens:
            break
        drawn.append(texts[place])
        size += len(tokenizer(texts[place], add_special_tokens=False)["input_ids"])
    text = "\n\n".join(drawn)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[tokens - 1][1]] if 0 < tokens <= len(offsets) else text[: 0 if tokens == 0 else None]


# What is made of the rows.


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """A figure a part, a panel a task: accuracy with its 95 % band where conditions are numbers, else the gains."""
    made = {}
    for part in PARTS:
        chosen = [row for row in rows if row["key"]["part"] == part]
        if chosen:
            draw = _curves if part in ("shots", "context", "examples") else _gains
            made[part] = draw(part, chosen)
    return made


def _curves(part: str, rows: Sequence[Row]) -> Any:
    tasks = distinct(row["key"]["task"] for row in rows)
    figure, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row["key"]["task"] == task]
        curves = [("untuned", "untuned", own)]
        for tuned_on in distinct(row["key"]["tuned_on"] for row in own):
            curves.append(("tuned", f"tuned in {tuned_on}", [row for row in own if row["key"]["tuned_on"] == tuned_on]))
        conditions = sorted({row["key"]["condition"] for row in own})
        for place, (which, title, part_rows) in enumerate(curves):
            across = [spot for spot, condition in enumerate(conditions) if _at(part_rows, condition)]
            found = [_accuracy(_at(part_rows, conditions[spot]), which) for spot in across]
            means, lows, highs = zip(*found, strict=True)
            line_with_band(axes, place, across, means, [0.0] * len(means), title)
            axes.fill_between(across, lows, highs, color=SERIES[place], alpha=0.15, linewidth=0)
        axes.set_xticks(range(len(conditions)), [f"{condition:,}" for condition in conditions])
        label_axes(axes, task, PARTS[part], "accuracy (%)")
    add_legend(panels[0])
    return figure


def _gains(part: str, rows: Sequence[Row]) -> Any:
    tasks = distinct(row["key"]["task"] for row in rows)
    figure, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row["key"]["task"] == task]
        conditions = distinct(row["key"]["condition"] for row in own)
        found = [_gain(_at(own, condition)) for condition in conditions]
        means, lows, highs = zip(*found, strict=True)
        bars_with_intervals(axes, [str(condition) for condition in conditions], means, lows, highs)
        label_axes(axes, task, "gain in accuracy by tuning (points)", PARTS[part])
    return figure


def table(rows: Sequence[Row]) -> str:
    """A table a part, a line a task and condition: accuracy untuned and tuned, the paired gain with its 95 % interval."""
    blocks = []
    for part, what in PARTS.items():
        own = [row for row in rows if row["key"]["part"] == part]
        if not own:
            continue
        lines = [f"**{part}**", "", f"| task | {what} | tuned in | untuned, % | tuned, % | gain, points | loss, nats |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for task, condition, tuned_on in distinct(
            (row["key"]["task"], row["key"]["condition"], row["key"]["tuned_on"]) for row in own
        ):
            chosen = [
                row for row in _at(own, condition) if (row["key"]["task"], row["key"]["tuned_on"]) == (task, tuned_on)
            ]
            lines.append(_line(chosen, task, condition, tuned_on))
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *_refused(rows)])


def _line(rows: Sequence[Row], task: str, condition: Any, tuned_on: str) -> str:
    before, after = _accuracy(rows, "untuned")[0], _accuracy(rows, "tuned")[0]
    mean, low, high = _gain(rows)
    loss = ""
    if "loss" in rows[0]["untuned"]:
        losses = [np.mean([row[which]["loss"] for row in rows]) for which in ("untuned", "tuned")]
        loss = f"{losses[0]:.3f} → {losses[1]:.3f}"
    gain = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"| {task} | {condition} | {tuned_on} | {before:.1f} | {after:.1f} | {gain} | {loss} |"


def _refused(rows: Sequence[Row]) -> list[str]:
    """A sentence for each search that found nothing: its rows have tuned = untuned."""
    return [
        f"Scales of {key['task']}, seed {key['seed']}, {key['examples']} examples, {key['shots']} shots stayed at γ = 1: {row['reason']}."
        for row in rows
        if (key := row["key"])["part"] == "scales" and not row["improved"]
    ]


def _at(rows: Sequence[Row], condition: Any) -> list[Row]:
    return [row for row in rows if row["key"]["condition"] == condition]


def _accuracy(rows: Sequence[Row], which: str) -> tuple[float, float, float]:
    """Per cent, with the 95 % interval of all seeds' test examples taken together."""
    right = [one for row in rows for one in row[which]["right"]]
    low, high = wilson_interval(sum(right), len(right))
    return 100 * sum(right) / len(right), 100 * low, 100 * high


def _gain(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Points by tuning on the same examples, with a bootstrap's 95 % interval over them."""
    paired = [
        100.0 * (after - before)
        for row in rows
        for before, after in zip(row["untuned"]["right"], row["tuned"]["right"], strict=True)
    ]
    return (float(np.mean(paired)), *bootstrap_interval(paired))


STUDY = Experiment(
    name="robustness",
    question="What are scales tuned in one setting worth with shots, long contexts, coarser weights, other decoding and wordings?",
    numbers={
        "small": Numbers(("sst2",), seeds=1, examples=4, limit=3),
        "full": Numbers(("sst2", "trec"), seeds=3, examples=64, limit=64),
    },
    cells=cells,
    figures=figures,
    table=table,
    parts=tuple(PARTS),
)
