"""`zerotuning evaluate`: its figures, its file, and scales that do not fit the model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zerotuning
from command_line import evaluate, refusal
from zerotuning.cli.main import main
from zerotuning.patching.head_scales import HeadScales


def test_scales_of_one_change_no_figure(place: Path, capsys: Any) -> None:
    HeadScales.ones(2, 4).save_pretrained("ones")
    assert main(evaluate("--output", "untuned.json")) == main(evaluate("--output", "tuned.json", "--scales", "ones"))
    untuned, tuned = (json.loads((place / f"{name}.json").read_text("utf-8")) for name in ("untuned", "tuned"))
    assert tuned["accuracy"] == untuned["accuracy"]
    assert tuned["loss"] == pytest.approx(untuned["loss"], abs=1e-5)
    assert tuned["entropy"] == pytest.approx(untuned["entropy"], abs=1e-5)


def test_evaluate_replaces_its_file(place: Path, capsys: Any) -> None:
    (place / "figures.json").write_text("old", encoding="utf-8")
    assert main(evaluate("--output", "figures.json", "--limit", "2")) == 0
    assert json.loads((place / "figures.json").read_text("utf-8"))["examples"] == 2


@pytest.mark.model
def test_the_demo_model_is_called_demo(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "figures.json"
    command = ["evaluate", "--model", "demo", "--task", "sst2", "--limit", "16", "--output", str(output)]
    assert main(command) == 0
    figures = json.loads(output.read_text("utf-8"))
    assert (figures["task"], figures["examples"], figures["model"]) == ("sst2", 16, "demo")
    assert 0.5 <= figures["accuracy"] <= 1


def test_figures_are_printed_even_if_their_file_cannot_be_written(place: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise zerotuning.ZeroTuningError("cannot write figures.json: No space left on device")

    monkeypatch.setattr(importlib.import_module("zerotuning.files"), "write_json_atomically", full)
    assert main(evaluate("--output", "figures.json")) == 2
    assert "films, 20 examples, model model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (HeadScales.ones(3, 4), "scales are for 3 layers x 4 heads, the model has 2 x 4"),
        (HeadScales.ones(2, 9), "scales are for 2 layers x 9 heads, the model has 2 x 4"),
        (
            HeadScales(torch.ones(2, 4), {"model_type": "qwen2"}),
            "made for a qwen2 model, this is a llama model",
        ),
    ],
)
def test_scales_of_another_model_are_refused_by_name(
    place: Path, capsys: Any, scales: HeadScales, message: str
) -> None:
    scales.save_pretrained("foreign")
    error = refusal(capsys, evaluate("--scales", "foreign", "--output", "figures.json"))
    assert "scales foreign do not fit model model" in error
    assert message in error
