"""`zerotuning study layers`: how γ in the heads of one layer, or of a third of the layers, changes loss and accuracy.

The paper (section 3) finds the same trend over γ in shallow, middle and deep layers, and a stronger effect in early
layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.plots.panels import gamma_axis, line_with_band
from zerotuning.plots.style import QUIET, add_legend, label_axes
from zerotuning.statistics import mean_and_half_width, mean_and_interval, rank_correlation, with_interval
from zerotuning.study.experiment import Cell, Experiment, Numbers, Row
from zerotuning.study.pictures import new_panels
from zerotuning.study.rows import by_task, select
from zerotuning.study.setting import Setting, figures_of

#: γ in all heads of one layer; γ in all heads of a third of the layers.
LAYER_GAMMAS = (0.3, 3.0)
THIRD_GAMMAS = (0.2, 0.5, 1.0, 2.0, 5.0)
SMALL_THIRD_GAMMAS = (0.5, 1.0, 2.0)
THIRDS = ("shallow", "middle", "deep")


def cells(setting: Setting) -> Iterator[Cell]:
    """For each task and seed, on test examples: the slopes, each third at each γ, each (small: each tenth) layer."""
    numbers = setting.numbers
    small = setting.size == "small"
    layers = range(0, setting.shape()[0], 10 if small else 1)
    for name in numbers.tasks:
        for seed in range(numbers.num_draws):
            draw = {"task": name, "seed": seed, "limit": numbers.limit}
            yield Cell({**draw, "measure": "slopes"}, partial(_slopes, setting, name, seed))
            for gamma in SMALL_THIRD_GAMMAS if small else THIRD_GAMMAS:
                for third in range(len(THIRDS)) if gamma != 1.0 else (None,):
                    part = "none" if third is None else THIRDS[third]
                    key = {**draw, "measure": "third", "third": part, "gamma": gamma}
                    yield Cell(key, partial(_third, setting, name, seed, third, gamma))
            for layer in layers:
                for gamma in LAYER_GAMMAS:
                    key = {**draw, "measure": "layer", "layer": layer, "gamma": gamma}
                    yield Cell(key, partial(_layer, setting, name, seed, layer, gamma))


def third_of(layer: int, layers: int) -> int:
    """The index of a layer's third (0, 1 or 2); thirds differ by at most one layer."""
    return layer * len(THIRDS) // layers


def _scorer(setting: Setting, name: str, seed: int) -> LabelScorer:
    return setting.scorer(setting.task(name), setting.tests(name, seed))


def _slopes(setting: Setting, name: str, seed: int) -> dict[str, Any]:
    slopes = setting.slopes(_scorer(setting, name, seed))
    return {"slopes": slopes.sum(axis=1).tolist(), "sizes": np.abs(slopes).sum(axis=1).tolist()}


def _third(setting: Setting, name: str, seed: int, third: int | None, gamma: float) -> dict[str, Any]:
    layers = setting.shape()[0]
    return _with_gamma_in_layers(
        setting, name, seed, [third_of(layer, layers) == third for layer in range(layers)], gamma
    )


def _layer(setting: Setting, name: str, seed: int, layer: int, gamma: float) -> dict[str, Any]:
    return _with_gamma_in_layers(setting, name, seed, [other == layer for other in range(setting.shape()[0])], gamma)


def _with_gamma_in_layers(
    setting: Setting, name: str, seed: int, chosen: Sequence[bool], gamma: float
) -> dict[str, Any]:
    """Figures with γ in all heads of the chosen layers."""
    scorer = _scorer(setting, name, seed)
    log_scale = np.where(chosen, math.log(gamma), 0.0)[:, None]
    return figures_of(setting.scores(scorer, log_scale), scorer.labels)


# Tables and figures of the rows.


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the slope by layer, the change of loss by layer at each γ, and the accuracy against γ of each third."""
    figure, panels = new_panels(columns=3)
    slopes = np.array([row["slopes"] for row in select(rows, measure="slopes")])
    _band(panels[0], 0, range(slopes.shape[1]), slopes.T, "mean of tasks and seeds")
    label_axes(panels[0], "slope of the loss at γ = 1", "layer", "dL / d log γ (nats)")
    layers = sorted({row["key"]["layer"] for row in select(rows, measure="layer")})
    for place, gamma in enumerate(LAYER_GAMMAS):
        changes = [_flatten(_loss_changes(rows, layer, gamma)) for layer in layers]
        _band(panels[1], place, layers, changes, f"γ = {gamma:g}")
    label_axes(panels[1], "all heads of one layer", "layer", "change of loss (nats)")
    gammas = sorted({row["key"]["gamma"] for row in select(rows, measure="third")})
    for place, third in enumerate(THIRDS):
        values = [_flatten(_third_changes(rows, third, gamma, "accuracy", 100.0)) for gamma in gammas]
        _band(panels[2], place, gammas, values, third)
    gamma_axis(panels[2], gammas)
    label_axes(panels[2], "all heads of a third of the layers", "γ", "change of accuracy (points)")
    for axes in panels:
        axes.axhline(0, color=QUIET, linewidth=0.8)
    for axes in panels[1:]:
        add_legend(axes)
    return {"": figure}


def _band(axes: Any, place: int, across: Sequence[float], values: Any, name: str) -> None:
    means, halves = zip(*(mean_and_half_width(list(sample)) for sample in values), strict=True)
    line_with_band(axes, place, list(across), means, halves, name)


def table(rows: Sequence[Row]) -> str:
    """A line for each third with its layers' effects and its trend over γ; then whether the paper's claims hold."""
    gammas = [gamma for gamma in sorted({row["key"]["gamma"] for row in select(rows, measure="third")}) if gamma != 1.0]
    head = "| third | mean size of a layer's slope, nats | mean size of one layer's change of loss, nats |"
    lines = [head + "".join(f" accuracy at γ = {gamma:g}, change in points |" for gamma in gammas)]
    lines.append("| --- | --- | --- |" + " --- |" * len(gammas))
    for place, third in enumerate(THIRDS):
        shown = [third, with_interval(_slope_sizes(rows, place), 4), with_interval(_effects(rows, place), 4)]
        shown += [with_interval(_third_changes(rows, third, gamma, "accuracy", 100.0), 1) for gamma in gammas]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n\n" + _conclusion(rows)


def _conclusion(rows: Sequence[Row]) -> str:
    early = [
        [_rank_correlation_with_place(row["slopes"]) for row in of_task]
        for of_task in by_task(select(rows, measure="slopes"))
    ]
    measured = [[_rank_correlation_with_place(sizes) for sizes in of_task] for of_task in _layer_sizes(rows)]
    same = [
        [float(np.mean(np.sign(row["slopes"]) == np.sign(sum(row["slopes"])))) for row in of_task]
        for of_task in by_task(select(rows, measure="slopes"))
    ]
    share = 100 * mean_and_interval(same)[0]
    sentences = [
        f"Rank correlation of a layer's place with the size of its effect: {with_interval(early, 2)} by slope, "
        f"{with_interval(measured, 2)} by measured loss (below 0: early layers are stronger).",
        f"Early layers stronger: {_agreement(early)} by slope, {_agreement(measured)} by measured loss.",
        f"One trend: {share:.0f} % of the layers have the sign of the whole model's slope "
        "(100 %: raising γ has one direction in all layers; 50 %: none).",
    ]
    return " ".join(sentences)


def _rank_correlation_with_place(effects: Sequence[float]) -> float:
    return rank_correlation(range(len(effects)), np.abs(effects).tolist())


def _agreement(correlations: Sequence[Sequence[float]]) -> str:
    _, low, high = mean_and_interval(correlations)
    if math.isnan(low):
        return "not judged (one draw)"
    return "agrees with the paper" if high < 0 else "disagrees with the paper" if low > 0 else "not decided"


def _flatten(groups: Sequence[Sequence[float]]) -> list[float]:
    return [value for group in groups for value in group]


def _untuned(rows: Sequence[Row], row: Row) -> Row:
    """The γ = 1 row of a row's task and seed."""
    return select(rows, measure="third", gamma=1.0, task=row["key"]["task"], seed=row["key"]["seed"])[0]


def _third_changes(rows: Sequence[Row], third: str, gamma: float, what: str, factor: float) -> list[list[float]]:
    wanted = [row for row in select(rows, measure="third", gamma=gamma) if row["key"]["third"] in (third, "none")]
    return [[factor * (row[what] - _untuned(rows, row)[what]) for row in of_task] for of_task in by_task(wanted)]


def _loss_changes(rows: Sequence[Row], layer: int, gamma: float) -> list[list[float]]:
    wanted = select(rows, measure="layer", layer=layer, gamma=gamma)
    return [[row["loss"] - _untuned(rows, row)["loss"] for row in of_task] for of_task in by_task(wanted)]


def _slope_sizes(rows: Sequence[Row], third: int) -> list[list[float]]:
    """Mean |slope| of the third's layers, one list for each task; no list for a third without layers."""
    means: list[list[float]] = []
    if not _layers_of_third(len(select(rows, measure="slopes")[0]["slopes"]), third):
        return means
    for of_task in by_task(select(rows, measure="slopes")):
        sizes = [np.abs(row["slopes"]) for row in of_task]
        means.append([float(of_row[_layers_of_third(len(of_row), third)].mean()) for of_row in sizes])
    return means


def _effects(rows: Sequence[Row], third: int) -> list[list[float]]:
    """Mean |change of loss| of the third's measured layers, one list for each task; no list without such layers."""
    layers = sorted({row["key"]["layer"] for row in select(rows, measure="layer")})
    total = len(select(rows, measure="slopes")[0]["slopes"])
    inside = [place for place, layer in enumerate(layers) if third_of(layer, total) == third]
    if not inside:
        return []
    return [[float(np.mean([sizes[place] for place in inside])) for sizes in of_task] for of_task in _layer_sizes(rows)]


def _layer_sizes(rows: Sequence[Row]) -> list[list[list[float]]]:
    """|change of loss| of each measured layer, averaged over its γ: lists by task, seed and layer."""
    layers = sorted({row["key"]["layer"] for row in select(rows, measure="layer")})
    by_layer = []
    for layer in layers:
        low, high = (_loss_changes(rows, layer, gamma) for gamma in LAYER_GAMMAS)
        by_layer.append(
            [[(abs(a) + abs(b)) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(low, high, strict=True)]
        )
    return [
        [[by_layer[place][task][seed] for place in range(len(layers))] for seed in range(len(by_layer[0][task]))]
        for task in range(len(by_layer[0]))
    ]


def _layers_of_third(layers: int, third: int) -> list[int]:
    return [layer for layer in range(layers) if third_of(layer, layers) == third]


STUDY = Experiment(
    name="layers",
    question="Which layers' heads move loss and accuracy most, and in one direction?",
    numbers={
        "small": Numbers(("sst2",), num_draws=1, examples=4, limit=4),
        "full": Numbers(("sst2", "mr", "trec"), num_draws=2, examples=4, limit=16),
    },
    cells=cells,
    figures=figures,
    table=table,
)
