"""The study of baselines on a tiny random model: its measurements, its choices, its resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zerotuning.evaluation import objectives
from zerotuning.study import Setting, run_study
from zerotuning.study.baseline_methods import METHODS, Draw, _strengths
from zerotuning.study.baselines import table
from zerotuning.study.key_clauses import clauses, most_alike
from zerotuning.study.steering import Temperature


@pytest.fixture
def setting(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Setting:
    tiny_model.config.max_position_embeddings = 2048
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return Setting(
        str(tmp_path / "model"), dtype="float32", size="small", tasks=("sst2",), examples=8, limit=6, num_draws=1
    )


def test_every_method_is_judged_on_the_same_examples_and_a_second_run_measures_nothing(
    setting: Setting, tmp_path: Path
) -> None:
    first = run_study("baselines", setting, tmp_path / "out")
    assert [row["key"]["method"] for row in first.rows] == list(METHODS)
    for row in first.rows:
        assert len(row["right"]) == 6
        assert row["accuracy"] == pytest.approx(sum(row["right"]) / 6)
        assert row["low"] <= row["accuracy"] <= row["high"]
    written = (tmp_path / "out" / "baselines.json").read_bytes()
    again = run_study("baselines", setting, tmp_path / "out")
    assert again.rows == first.rows
    assert (tmp_path / "out" / "baselines.json").read_bytes() == written
    assert json.loads(written)["study"] == "baselines"


def test_the_parts_argument_selects_the_methods(setting: Setting) -> None:
    setting.parts = ("untuned", "label-bias")
    rows = run_study("baselines", setting).rows
    assert [row["key"]["method"] for row in rows] == ["untuned", "label-bias"]


def test_a_chosen_temperature_is_never_worse_on_the_validation_examples(setting: Setting) -> None:
    complete = setting.with_defaults({"small": None})  # type: ignore[dict-item]
    draw = Draw(complete, "sst2", 0)
    outcome = METHODS["temperature"].run(draw)
    chosen = outcome.chosen["temperature"]
    labels = draw.scorers[0].labels
    before = float(objectives.task_loss(draw.untuned[0], labels))
    after = draw.loss(draw.steered_scores(draw.scorers[0], lambda batch: Temperature(chosen)))
    assert after <= before + 1e-5


def test_head_slopes_equal_finite_differences_of_the_loss(setting: Setting) -> None:
    complete = setting.with_defaults({"small": None})  # type: ignore[dict-item]
    draw = Draw(complete, "sst2", 0)
    found = draw.head_slopes(lambda batch: Temperature(3.0))
    step, share = 0.05, torch.zeros(draw.setting.shape())
    losses = []
    for sign in (1, -1):
        share[1, 2] = sign * step
        losses.append(draw.loss(draw.steered_scores(draw.scorers[0], lambda batch: Temperature(3.0), share)))
    assert found[1, 2] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05, abs=1e-5)


def test_only_heads_that_promise_a_gain_are_steered_the_best_first() -> None:
    slopes = np.array([[0.3, -0.1, -0.5], [0.0, -0.2, 0.4]])
    found = [strength.tolist() for strength in _strengths(slopes, (0.1, 0.34, 1.0))]
    assert found == [
        [[0, 0, 1], [0, 0, 0]],
        [[0, 0, 1], [0, 1, 0]],
        [[0, 1, 1], [0, 1, 0]],
    ]


def test_a_text_is_cut_at_punctuation_and_before_conjunctions() -> None:
    text = "slow at first , it grows on you but never ends. fine"
    assert [text[begin:end] for begin, end in clauses(text)] == [
        "slow at first ",
        "it grows on you",
        "but never ends",
        "fine",
    ]


@pytest.mark.parametrize(
    ("quotation", "expected"),
    [
        ('grows on YOU" and', "it grows on you"),
        ("nothing shared here", "slow at first, it grows on you"),
        ("", "slow at first, it grows on you"),
    ],
)
def test_the_clause_most_like_the_quotation_is_taken(quotation: str, expected: str) -> None:
    text = "slow at first, it grows on you"
    begin, end = most_alike(text, quotation)
    assert text[begin:end] == expected


def test_the_gain_is_paired_with_untuned_on_the_same_examples() -> None:
    def row(method: str, right: list[int]) -> dict[str, Any]:
        key = {"task": "sst2", "seed": 0, "method": method}
        return {"key": key, "right": right, "loss": 0.5, "numbers": 1, "tuning_seconds": 1.0, "chosen": {}}

    shown = table([row("untuned", [1, 0, 0, 1]), row("act", [1, 1, 0, 1])])
    assert "+25.0" in next(line for line in shown.splitlines() if line.startswith("| ACT"))
    assert "75.0 [" in shown
