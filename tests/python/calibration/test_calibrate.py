"""Calibration of a tiny random model: its results, the heads that change, tasks, metrics, refused options."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zerotuning as zt
from film_reviews import FILMS, FIRST, RECORDS, SECOND, calibrate, loss_of
from zerotuning.calibration.folds import make_folds
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import as_records
from zerotuning.tasks.task import Task

# Results.


@pytest.mark.parametrize("combine", ["average", "refit"])
def test_a_calibration_with_folds_lowers_the_loss(tiny: Any, combine: str) -> None:
    found = calibrate(tiny, combine=combine)
    assert found.improved
    assert found.report["chosen"]["combine"] == combine
    assert found.report["held_out_examples"] == 20
    before, after = loss_of(tiny, zt.HeadScales.ones(2, 4)), loss_of(tiny, found.scales)
    assert found.report["baseline"]["loss"] == pytest.approx(before, abs=1e-4)
    assert after < before


def test_the_held_out_loss_is_of_scales_that_never_saw_the_example(tiny: Any) -> None:
    """The reference is each fold's search written out: Adam as in csrc/search, and the held-out examples' loss."""
    found = calibrate(tiny, steps=1, learning_rate=0.2, epsilon=1e-8, l2_penalties=[0.0])
    total = 0.0
    zt.patch(tiny[0])
    for fold in make_folds(as_records(RECORDS), 2, seed=0):
        fit, held_out = ([RECORDS[i] for i in order_of(20)[part]] for part in (fold.fit, fold.held_out))
        # The cosine schedule begins at 1, so that Adam's first step is learning_rate against the gradient's sign.
        gamma = torch.from_numpy(np.exp(-0.2 * np.sign(numeric_gradient(tiny, fit))))
        zt.apply_scales(tiny[0], zt.HeadScales(gamma.reshape(2, 4)))
        total += zt.evaluate(*tiny, FILMS, held_out).loss * len(held_out)
    zt.unpatch(tiny[0])
    assert found.report["tuned"]["loss"] == pytest.approx(total / 20, abs=2e-4)


def order_of(count: int) -> Any:
    """The order in which seed 0 draws examples, as an array of positions."""
    return np.random.default_rng(0).permutation(count)


def numeric_gradient(tiny: Any, records: Any, width: float = 0.05) -> np.ndarray:
    slopes = []
    for head in range(8):
        sides = []
        for side in (width, -width):
            log_scale = torch.zeros(8)
            log_scale[head] = side
            zt.apply_scales(tiny[0], zt.HeadScales(log_scale.exp().reshape(2, 4)))
            sides.append(zt.evaluate(*tiny, FILMS, records).loss)
        slopes.append((sides[0] - sides[1]) / (2 * width))
    return np.array(slopes)


def test_the_held_out_loss_chooses_the_penalty(tiny: Any) -> None:
    found = calibrate(tiny, l2_penalties=[100.0, 0.0])
    assert found.report["chosen"]["penalty"] == 0.0
    least = {
        penalty: min(e["held_out_loss"] for e in found.report["history"] if e["penalty"] == penalty)
        for penalty in (0.0, 100.0)
    }
    assert found.report["tuned"]["loss"] == pytest.approx(least[0.0], abs=1e-5)
    assert least[0.0] < least[100.0]


def test_contradictory_labels_leave_every_scale_at_one(tiny: Any) -> None:
    """Each text has both labels: what helps one half hurts the other. Only flatter predictions lower the loss."""
    texts = [record["text"] for record in RECORDS[:10]]
    records = [{"text": text, "label": label} for label in (0, 1) for text in texts]
    found = calibrate(tiny, records=records, steps=3)
    if not found.improved:
        assert bool((found.scales.gamma == 1).all())
        assert found.report["reason"]
    else:
        assert loss_of(tiny, found.scales, records) < loss_of(tiny, zt.HeadScales.ones(2, 4), records)
        assert found.report["tuned"]["accuracy"] >= found.report["baseline"]["accuracy"]


def test_seeds_are_averaged_and_their_spread_reported(tiny: Any) -> None:
    found = calibrate(tiny, num_searches=3)
    assert [one["seed"] for one in found.report["by_seed"]] == [0, 1, 2]
    losses = [one["loss"] for one in found.report["by_seed"]]
    assert found.report["spread"]["loss"] == pytest.approx(float(np.std(losses, ddof=1)))
    assert len(set(losses)) > 1


def test_patience_ends_a_search_early(tiny: Any) -> None:
    # The step is so long that every later point is worse.
    found = calibrate(tiny, steps=40, learning_rate=4.0, patience=1)
    assert found.report["steps"] < 40


def test_a_time_limit_ends_a_search_early_with_a_result(tiny: Any) -> None:
    found = calibrate(tiny, steps=100000, seconds=1.0)
    assert found.improved
    assert 1 < found.report["steps"] < 100000
    assert 1.0 <= found.report["seconds"] < 20


# Without labels.


def test_without_labels_predictions_that_ignore_the_input_leave_every_scale_at_one(tiny: Any) -> None:
    for layer in tiny[0].model.layers:  # attention adds nothing: the last token, the same in every prompt, decides
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    records = [{"text": record["text"]} for record in RECORDS]
    found = calibrate(tiny, records=records, objective="information")
    assert not found.improved
    assert found.report["evidence"] < 1e-6
    assert "too little" in found.report["reason"]
    assert found.report["steps"] == 0


def test_without_the_guard_the_information_falls(tiny: Any) -> None:
    texts = [f"{one} and {two}, {three}" for one in FIRST for two in SECOND for three in (*FIRST, *SECOND)]
    found = calibrate(tiny, records=[{"text": text} for text in texts], objective="information", guard=False, steps=8)
    assert found.improved
    assert found.report["tuned"]["loss"] < found.report["baseline"]["loss"]


@pytest.mark.parametrize("prior", ["estimate", (0.2, 0.8)])
def test_the_information_objective_accepts_a_class_prior(tiny: Any, prior: Any) -> None:
    records = [{"text": record["text"]} for record in RECORDS]
    plain = calibrate(tiny, records=records, objective="information", guard=False)
    found = calibrate(tiny, records=records, objective="information", guard=False, prior=prior)
    assert found.report["baseline"]["loss"] != plain.report["baseline"]["loss"]


def test_a_prior_for_letters_has_a_number_for_each_choice(tiny: Any) -> None:
    task = Task("asked", "{text}\n{choices}\nAnswer:", "letters")
    records = [{**record, "choices": ["good", "bad", "long"]} for record in RECORDS]
    options = {"objective": "information", "guard": False, "steps": 1}
    report = calibrate(tiny, task, records=records, prior=(0.2, 0.5, 0.3), **options).report
    assert report["options"]["prior"] == [0.2, 0.5, 0.3]
    with pytest.raises(
        ZeroTuningError, match="prior must be one number for each of the 3 labels of task 'asked', got 7"
    ):
        calibrate(tiny, task, records=records, prior=(0.1,) * 6 + (0.4,), **options)


# Which heads.


def test_only_the_heads_that_options_name_change(tiny: Any) -> None:
    gamma = calibrate(tiny, layers=[1], exclude_heads=[(1, 2)]).scales.gamma
    assert bool((gamma[0] == 1).all())
    assert gamma[1, 2] == 1
    assert bool((gamma[1, [0, 1, 3]] != 1).all())
    gamma = calibrate(tiny, heads=[(1, 3)]).scales.gamma
    assert gamma[1, 3] != 1
    assert int((gamma != 1).sum()) == 1


def test_tied_heads_share_their_scale(tiny: Any) -> None:
    by_layer = calibrate(tiny, tie="layer").scales.gamma
    assert all(len(set(row.tolist())) == 1 for row in by_layer)
    assert by_layer[0, 0] != by_layer[1, 0]
    assert len(set(calibrate(tiny, tie="all").scales.gamma.flatten().tolist())) == 1


@pytest.mark.parametrize("method", ["gradient", "cma-es"])
def test_heads_that_are_not_free_keep_the_scales_of_the_start(tiny: Any, method: str) -> None:
    start = zt.HeadScales(torch.linspace(0.5, 2.0, 8).reshape(2, 4))
    steps = 4 if method == "gradient" else 24
    folds = 2 if method == "gradient" else None
    found = calibrate(tiny, start=start, layers=[1], method=method, steps=steps, folds=folds)
    assert found.scales.gamma[0].tolist() == pytest.approx(start.gamma[0].tolist())


def test_a_start_is_the_first_point_of_the_search(tiny: Any) -> None:
    better = calibrate(tiny, steps=8)
    again = calibrate(tiny, start=better.scales, steps=1, learning_rate=1e-6)
    assert again.scales.gamma.flatten().tolist() == pytest.approx(better.scales.gamma.flatten().tolist(), abs=1e-4)


# Several tasks, text of any length, metrics.


def test_tasks_tuned_together_are_each_evaluated(tiny: Any) -> None:
    short = Task("short", "{text}:", (" bad", " good"))
    found = calibrate(tiny, [FILMS, short], records=[RECORDS, RECORDS[:12]])
    assert found.report["task"] == "films + short"
    assert [one["task"] for one in found.report["tasks"]] == ["films", "short"]
    ones = zt.HeadScales.ones(2, 4)
    mean = (loss_of(tiny, ones) + loss_of(tiny, ones, RECORDS[:12], short)) / 2
    assert found.report["baseline"]["loss"] == pytest.approx(mean, abs=1e-4)


def test_a_gold_continuation_of_any_length_is_learned(tiny: Any) -> None:
    task = Task("stories", "Tell: {text}\n", continuation=" {answer}")
    records = [
        {"text": r["text"], "answer": "a good story, well told" + " too" * (i % 3)} for i, r in enumerate(RECORDS)
    ]
    found = calibrate(tiny, task, records=records, steps=8)
    assert found.improved
    assert found.report["baseline"]["accuracy"] is None
    before, after = (loss_of(tiny, one, records, task) for one in (zt.HeadScales.ones(2, 4), found.scales))
    assert found.report["baseline"]["loss"] == pytest.approx(before, abs=1e-4)
    assert after < before


def test_cma_es_accepts_any_metric_of_generated_text(tiny: Any) -> None:
    seen = []

    def spaces(texts: list[str], records: list[Any]) -> float:
        seen.append(len(texts))
        assert [record["label"] for record in records] == [1] * len(texts)
        return sum(text.count("e") - text.count("o") for text in texts) / len(texts)

    found = calibrate(tiny, method="cma-es", metric=spaces, steps=30, folds=None, max_new_tokens=6)
    assert set(seen) == {16, 4}
    assert found.report["objective"] == "metric"
    if found.improved:
        assert found.report["tuned"]["loss"] < found.report["baseline"]["loss"]
    else:
        assert bool((found.scales.gamma == 1).all())


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), 1, True])
def test_a_metric_may_return_a_number_of_any_library(tiny: Any, number: Any) -> None:
    found = calibrate(tiny, method="cma-es", metric=lambda *_: number, steps=10, folds=None, max_new_tokens=1)
    assert found.report["baseline"]["loss"] == -float(number)


@pytest.mark.parametrize("number", ["0.5", None, math.nan, torch.zeros(2), np.zeros(2), 10**400])
def test_a_metric_that_returns_no_finite_number_is_refused(tiny: Any, number: Any) -> None:
    with pytest.raises(ZeroTuningError, match="metric must return a finite number, got "):
        calibrate(tiny, method="cma-es", metric=lambda *_: number, steps=10, folds=None, max_new_tokens=1)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 0}, "folds must be at least 1, got 0"),
        ({"num_searches": 0}, "num_searches must be at least 1, got 0"),
        ({"l2_penalties": [-1.0]}, "l2_penalties must be numbers of at least 0"),
        ({"prior": (0.5, 0.5)}, "prior requires the objective information, got task-loss"),
        ({"prior": (0.9, 0.9), "objective": "information"}, "prior must be positive numbers, one for each label"),
        ({"prior": (0.2, 0.2, 0.6), "objective": "information"}, "prior must be one number for each of the 2 labels"),
        (
            {"prior": 0.5, "objective": "information"},
            "prior must be positive numbers, one for each label, with sum 1, got 0.5",
        ),
        ({"layers": 1}, "layers must be a sequence of integers, got 1"),
        ({"layers": "01"}, "layers must be a sequence of integers, got '01'"),
        ({"layers": [0.0]}, "layers must be a sequence of integers, got [0.0]"),
        ({"heads": [1]}, "heads must be (layer, head) pairs, got 1"),
        ({"heads": [(0, True)]}, "heads must be (layer, head) pairs, got (0, True)"),
        ({"exclude_heads": None}, "exclude_heads must be (layer, head) pairs, got None"),
        ({"truncate": "no"}, "truncate must be True or False, got 'no'"),
        ({"guard": "no"}, "guard must be True or False, got 'no'"),
        ({"records": 5}, "examples must be mappings, or the name of a file, got int 5"),
        ({"records": ["good"]}, "example 0 must be a mapping of its fields, got str 'good'"),
        ({"start": "dir"}, "start must be HeadScales, got str"),
        (
            {"start": zt.HeadScales(torch.ones(2, 4), {"model_type": "qwen2"})},
            "start was made for a qwen2 model, this is a llama model",
        ),
        ({"method": "cma-es"}, "folds are for the method gradient, got 2 with cma-es"),
        ({"layers": [2]}, "layers: the model's layers are 0 to 1, got 2"),
        ({"heads": [(0, 4)]}, "heads: the model's heads are 0 to 3, got 4"),
        ({"layers": [0], "heads": [(1, 1)]}, "leave no head to tune"),
        ({"start": zt.HeadScales.ones(3, 4)}, "start must be 2 layers x 4 heads, the model's shape, got [3, 4]"),
        ({"metric": len}, "metric has no gradient: method must be cma-es, got gradient"),
        ({"stepps": 3}, "calibrate has no option 'stepps': there are method,"),
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"task": [FILMS, FILMS]}, "records must be a list with one item for each of the 2 tasks, got 20"),
        ({"method": "paper", "folds": None, "start": zt.HeadScales([[2.0] * 4] * 2)}, "the paper's method begins at"),
    ],
)
def test_impossible_options_are_refused_by_name(tiny: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ZeroTuningError) as error:
        calibrate(tiny, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_runs_write_the_same_scales_and_metadata(tiny: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        calibrate(tiny, output=tmp_path / name)
    for name in ("head_scales.safetensors", "zerotuning_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "seconds" not in json.loads((tmp_path / "one/zerotuning_config.json").read_text("utf-8"))["calibration"]
