"""The page of plots: drawn from real reports of every kind, and left out without matplotlib."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import zerotuning as zt
from zerotuning.errors import ZeroTuningError
from zerotuning.plots.calibration_page import plot_report
from zerotuning.tasks.task import Task

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
RECORDS = [
    {"text": f"the film is {one} and {two}", "label": int(one == "good")}
    for one in ("good", "bad")
    for two in ("told", "long", "well told", "far too well told", "a story")
]


def texts_of(svg: Path) -> str:
    return svg.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["held-out accuracy by step", "entropy of the held-out predictions", "before (γ = 1)", "after"]),
        ({"num_searches": 2, "l2_penalties": [0.0, 0.1]}, ["loss by step"]),
        ({"method": "paper"}, ["profile: fall of the loss when a head is scaled up"]),
        ({"method": "cma-es", "steps": 24}, ["loss by step"]),
        ({"objective": "information"}, ["films · gradient · information · 10 examples"]),
    ],
)
def test_the_page_has_titles_axes_and_the_expected_texts(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    import matplotlib

    found = zt.calibrate(tiny_model, tiny_tokenizer, FILMS, records=RECORDS, **({"steps": 4} | options))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_report(found.scales, found.report, tmp_path / "page.svg")
    shown = texts_of(tmp_path / "page.svg")
    for text in [*expected, "γ of every head", "γ by layer", "step", "layer", "head", "gold", "predicted"]:
        assert text in shown, text
    assert plot_report(found.scales, found.report, tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_confusion_counts_every_held_out_example(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = zt.calibrate(tiny_model, tiny_tokenizer, FILMS, records=RECORDS, steps=4)
    (task,) = found.report["tasks"]
    for which, figures in (("baseline", found.report["baseline"]), ("tuned", found.report["tuned"])):
        table = task[f"{which}_confusion"]
        assert [sum(row) for row in table] == [5, 5]
        assert (table[0][0] + table[1][1]) / 10 == pytest.approx(figures["accuracy"])
        assert len(task[f"{which}_entropies"]) == 10
        assert sum(task[f"{which}_entropies"]) / 10 == pytest.approx(figures["entropy"], abs=1e-4)


def test_labels_of_any_letters_are_drawn_as_they_are_without_a_warning(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    import matplotlib

    odd = Task("films", "Review: {text}\nSentiment:", (" $x_{$", " 好"))
    found = zt.calibrate(tiny_model, tiny_tokenizer, odd, records=RECORDS, steps=1)
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_report(found.scales, found.report, tmp_path / "page.svg")
        plot_report(found.scales, found.report, tmp_path / "page.png")
    assert texts_of(tmp_path / "page.svg").count("$x_{$") == 4


def test_a_calibration_succeeds_even_if_its_page_cannot_be_drawn(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(importlib.import_module("zerotuning.calibration.calibrate"), "plot_report", broken)
    with pytest.raises(ValueError, match="no such font"):
        zt.calibrate(tiny_model, tiny_tokenizer, FILMS, records=RECORDS, steps=1, output=tmp_path)
    held = {path.name for path in tmp_path.iterdir()}
    assert {"head_scales.safetensors", "report.json"} <= held
    assert "calibration_state.json" not in held


def test_without_matplotlib_a_calibration_succeeds_without_a_picture(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    for module in ("calibration.calibrate", "plots.style"):
        monkeypatch.setattr(importlib.import_module(f"zerotuning.{module}"), "can_plot", lambda: False)
    found = zt.calibrate(tiny_model, tiny_tokenizer, FILMS, records=RECORDS, steps=2, output=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "head_scales.safetensors",
        "report.json",
        "zerotuning_config.json",
    ]
    with pytest.raises(ZeroTuningError, match="plots need matplotlib"):
        plot_report(found.scales, found.report, tmp_path / "page.png")
