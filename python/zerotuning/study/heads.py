"""`zerotuning study heads`: which heads gain by a larger γ, which by a smaller γ, how stable the sign is, and the gain.

The paper (section 3) calls a head up-effective if raising its γ helps, and down-effective if lowering it helps. Here
the sign of the loss's slope in the head's log γ decides: a negative slope is up. The paper's second finding is that
heads differ, so that a γ for a group of heads beats one γ for all heads.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from zerotuning.plots.panels import bars_with_intervals, map_of_heads
from zerotuning.plots.style import label_axes
from zerotuning.statistics import mean_and_half_width, mean_and_interval, rank_correlation, with_interval
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row
from zerotuning.study.pictures import new_panels
from zerotuning.study.rows import figures_by_task, select, tasks_of
from zerotuning.study.setting import Setting, best_gamma, figures_of
from zerotuning.study.wordings import WORDINGS
from zerotuning.tasks.task import Task

#: How many of the other wordings of a prompt are measured.
OTHER_WORDINGS = 2
GAMMAS = (0.2, 0.5, 2.0, 5.0)
SMALL_GAMMAS = (2.0,)
GROUPS = ("all", "up", "down", "up and down")
#: |log γ| of the two evaluations of a head that is measured without a gradient, and how many heads are measured so.
CHECK_STEP = 0.5
CHECKED, SMALL_CHECKED = 12, 2


def cells(setting: Setting) -> Iterator[Cell]:
    """For each task: slopes of each seed, and of seed 0 in each other wording; checks of some heads; the groups."""
    numbers = setting.numbers
    small = setting.size == "small"
    for name in numbers.tasks:
        wordings = [setting.task(name), *other_wordings(setting.task(name))]
        slopes_by_seed: dict[int, np.ndarray] = {}
        for seed in range(numbers.num_draws):
            for place, task in enumerate(wordings if seed == 0 else wordings[:1]):
                key = {"measure": "slopes", "task": name, "seed": seed, "wording": place, "examples": numbers.examples}
                yield Cell(key, partial(_measure_slopes, setting, task, name, seed))
        for layer, head in checked_heads(setting.shape(), SMALL_CHECKED if small else CHECKED):
            key = {"measure": "check", "task": name, "layer": layer, "head": head, "examples": numbers.examples}
            yield Cell(key, partial(_check, setting, name, layer, head))
        for seed in range(numbers.num_draws):
            for group in GROUPS:
                key = {
                    "measure": "group",
                    "task": name,
                    "seed": seed,
                    "group": group,
                    "examples": numbers.examples,
                    "limit": numbers.limit,
                    **({"gammas": list(SMALL_GAMMAS)} if small else {}),
                }
                yield Cell(key, partial(_group, setting, name, seed, group, slopes_by_seed))


def other_wordings(task: Task) -> list[Task]:
    """The task with each of the first OTHER_WORDINGS prompts of `WORDINGS`; none for a task without an entry there."""
    return [dataclasses.replace(task, prompt=prompt) for prompt in WORDINGS.get(task.name, ())[:OTHER_WORDINGS]]


def checked_heads(shape: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """`count` heads as (layer, head), evenly spread; all heads if there are fewer."""
    layers, heads = shape
    places = np.unique(np.linspace(0, layers * heads - 1, min(count, layers * heads)).round().astype(int))
    return [(int(place) // heads, int(place) % heads) for place in places]


def _measure_slopes(setting: Setting, task: Task, name: str, seed: int) -> dict[str, Any]:
    return {"slopes": setting.slopes(setting.scorer(task, setting.drawn(name, seed))).tolist()}


def _check(setting: Setting, name: str, layer: int, head: int) -> dict[str, Any]:
    """The slope of one head from the losses at γ = exp(±CHECK_STEP)."""
    scorer = setting.scorer(setting.task(name), setting.drawn(name, 0))
    losses = []
    for step in (-CHECK_STEP, CHECK_STEP):
        log_scale = np.zeros(setting.shape())
        log_scale[layer, head] = step
        losses.append(figures_of(setting.scores(scorer, log_scale), scorer.labels)["loss"])
    return {"low": losses[0], "high": losses[1], "slope": (losses[1] - losses[0]) / (2 * CHECK_STEP)}


def group_directions(slopes: np.ndarray, group: str) -> np.ndarray:
    """Factors of log γ, [L, H]: 1 for heads in the group, 0 for others; -1 for down heads of "up and down"."""
    if group == "all":
        return np.ones_like(slopes)
    up, down = (slopes < 0).astype(float), (slopes > 0).astype(float)
    return {"up": up, "down": down, "up and down": up - down}[group]


def _group(setting: Setting, name: str, seed: int, group: str, slopes_by_seed: dict[int, np.ndarray]) -> dict[str, Any]:
    """Figures of a group's shared γ, chosen on validation examples (`best_gamma`) and judged on test examples."""
    task = setting.task(name)
    validation, test = (
        setting.scorer(task, records) for records in (setting.drawn(name, seed), setting.tests(name, seed))
    )
    if seed not in slopes_by_seed:
        slopes_by_seed[seed] = setting.slopes(validation)
    directions = group_directions(slopes_by_seed[seed], group)

    def at(scorer: Any, gamma: float) -> dict[str, float]:
        return figures_of(setting.scores(scorer, math.log(gamma) * directions), scorer.labels)

    gammas = SMALL_GAMMAS if setting.size == "small" else GAMMAS
    curve = {gamma: at(validation, gamma) for gamma in (1.0, *gammas)}
    chosen = best_gamma(curve)
    before = at(test, 1.0)
    after = before if chosen == 1.0 else at(test, chosen)
    return {
        "validation": [{"gamma": gamma, **figures} for gamma, figures in sorted(curve.items())],
        "gamma": chosen,
        "heads": int((directions != 0).sum()),
        "untuned": before,
        "tuned": after,
        "accuracy_gain": after["accuracy"] - before["accuracy"],
        "loss_gain": before["loss"] - after["loss"],
    }


# Tables and figures of the rows.


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Compare two maps of slopes [L, H]: (Spearman's correlation, share of equal signs in [0, 1])."""
    correlation = rank_correlation(first.ravel().tolist(), second.ravel().tolist())
    return correlation, float((np.sign(first) == np.sign(second)).mean())


def pairs(rows: Sequence[Row], across: str) -> list[tuple[float, float]]:
    """`agreement` of all pairs of maps that differ only in `across`: "seed", "task" or "wording"."""
    maps = [(row["key"], np.array(row["slopes"])) for row in select(rows, measure="slopes")]
    names = ("task", "seed", "wording")
    return [
        agreement(first, second)
        for (one, first), (other, second) in itertools.combinations(maps, 2)
        if [name for name in names if one[name] != other[name]] == [across]
    ]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the map of mean slopes of each task, and the stability and gains of the groups."""
    tasks = tasks_of(rows)
    maps, panels = new_panels(columns=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        map_of_heads(axes, _mean_map(rows, task), f"{task}: blue heads gain by a larger γ", "dL / d log γ (nats)")
    return {"map": maps, "": _stability_and_groups(rows)}


def _stability_and_groups(rows: Sequence[Row]) -> Any:
    figure, panels = new_panels(columns=2)
    comparisons = [(f"other {across}", pairs(rows, across)) for across in ("seed", "wording", "task")]
    shown = [
        (name, mean_and_half_width([value for value, _ in of_pairs])) for name, of_pairs in comparisons if of_pairs
    ]
    if shown:
        _bars(panels[0], shown, 0)
    label_axes(panels[0], "stability of the heads' slopes", "rank correlation", "slopes of")
    gains = [(group, mean_and_interval(_gains(rows, group, "accuracy_gain", 100.0))) for group in GROUPS]
    means, lows, highs = zip(*(interval for _, interval in gains), strict=True)
    bars_with_intervals(panels[1], [group for group, _ in gains], means, lows, highs, 1)
    label_axes(panels[1], "one γ shared by a group", "gain in accuracy (points)", "heads")
    return figure


def _bars(axes: Any, shown: Sequence[tuple[str, tuple[float, float]]], place: int) -> None:
    names, intervals = zip(*shown, strict=True)
    means, halves = (np.array(values) for values in zip(*intervals, strict=True))
    bars_with_intervals(axes, names, means, means - halves, means + halves, place)


def table(rows: Sequence[Row]) -> str:
    """Three tables: shares of up and down heads with a check of their slopes, slopes' stability, groups' gains."""
    return "\n\n".join((_shares(rows), _stability(rows), _groups(rows)))


def _shares(rows: Sequence[Row]) -> str:
    lines = [
        "| task | up heads | down heads | up in all seeds | down in all seeds | measured slopes: signs, correlation |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for task in tasks_of(rows):
        maps = _maps(rows, task)
        mean = maps.mean(axis=0)
        shares = [mean < 0, mean > 0, (maps < 0).all(axis=0), (maps > 0).all(axis=0)]
        shown = " | ".join(f"{100 * share.mean():.0f} %" for share in shares)
        lines.append(f"| {task} | {shown} | {_checked(rows, task)} |")
    return "\n".join(lines)


def _checked(rows: Sequence[Row], task: str) -> str:
    """Compare the slopes of seed 0 with slopes from two evaluations."""
    checks = select(rows, measure="check", task=task)
    slopes = _maps(rows, task)[0]
    by_gradient = np.array([slopes[row["key"]["layer"]][row["key"]["head"]] for row in checks])
    correlation, _ = agreement(by_gradient, np.array([row["slope"] for row in checks]))
    same = sum(np.sign(slope) == np.sign(row["slope"]) for slope, row in zip(by_gradient, checks, strict=True))
    return f"{same} of {len(checks)}, {correlation:.2f}"


def _stability(rows: Sequence[Row]) -> str:
    lines = [
        "| slopes of two | pairs | rank correlation, mean | least | same sign, mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for across in ("seed", "wording", "task"):
        compared = pairs(rows, across)
        if compared:
            correlations, signs = (np.array(values) for values in zip(*compared, strict=True))
            shown = f"{correlations.mean():.2f} | {correlations.min():.2f} | {100 * signs.mean():.0f} %"
            lines.append(f"| {across}s | {len(compared)} | {shown} |")
    return "\n".join(lines) if len(lines) > 2 else "One map of slopes only: no stability."


def _groups(rows: Sequence[Row]) -> str:
    lines = [
        "| one γ for | gain in accuracy, points | gain in loss, nats "
        "| minus one γ for all, accuracy | minus one γ for all, loss |"
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for group in GROUPS:
        shown = [group if group != "up and down" else "up heads γ, down heads 1/γ"]
        shown += [with_interval(_gains(rows, group, what, factor), digits) for what, factor, digits in _GAINS]
        for what, factor, digits in _GAINS:
            shown.append("" if group == "all" else with_interval(_leads(rows, group, what, factor), digits))
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n\n" + _conclusion(rows)


_GAINS = (("accuracy_gain", 100.0, 1), ("loss_gain", 1.0, 3))


def _conclusion(rows: Sequence[Row]) -> str:
    words = []
    for what, unit in (("accuracy_gain", "accuracy"), ("loss_gain", "loss")):
        for group in GROUPS[1:]:
            _, low, high = mean_and_interval(_leads(rows, group, what))
            if math.isnan(low):
                return "One draw of the examples a task: no interval, no finding."
            how = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
            words.append(f"by {unit} a γ for {group} is {how} one for all heads")
    return f"The paper's claim that a group's γ beats a uniform one, here: {'; '.join(words)}."


def _maps(rows: Sequence[Row], task: str) -> np.ndarray:
    """Slopes of the task's own wording: [seeds, L, H]."""
    return np.array([row["slopes"] for row in select(rows, measure="slopes", task=task, wording=0)])


def _mean_map(rows: Sequence[Row], task: str) -> np.ndarray:
    mean: np.ndarray = _maps(rows, task).mean(axis=0)
    return mean


def _gains(rows: Sequence[Row], group: str, name: str, factor: float = 1.0) -> list[list[float]]:
    """A group's gains, one list for each task."""
    return figures_by_task(select(rows, group=group), name, factor)


def _leads(rows: Sequence[Row], group: str, what: str, factor: float = 1.0) -> list[list[float]]:
    """The group's gain minus that of all heads on the same examples, one list a task."""
    both = zip(_gains(rows, group, what, factor), _gains(rows, "all", what, factor), strict=True)
    return [[one - other for one, other in zip(*pair, strict=True)] for pair in both]


STUDY = Experiment(
    name="heads",
    question=(
        "Which heads gain by a larger γ and which by a smaller, how stable is the sign, and how large is the gain?"
    ),
    numbers={
        "small": Numbers(("sst2",), num_draws=1, examples=4, limit=4),
        "full": Numbers(("sst2", "mr", "trec"), num_draws=3, examples=24, limit=40),
    },
    cells=cells,
    figures=figures,
    table=table,
)
