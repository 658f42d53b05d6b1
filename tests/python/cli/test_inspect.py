"""`zerotuning inspect`: its output, and the head scales that `inspect` and `evaluate` refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import evaluate, refusal
from zerotuning.cli.main import main
from zerotuning.patching.head_scales import HeadScales


def test_metadata_with_an_infinite_number_of_examples_are_not_shown(place: Path, capsys: Any) -> None:
    figures = {"accuracy": 0.5, "loss": 1.0}
    calibration = {"baseline": figures, "tuned": figures, "held_out_examples": 20}
    HeadScales(torch.ones(2, 4), {"calibration": calibration}).save_pretrained("scales")
    config = place / "scales/zerotuning_config.json"
    for examples, shown in (("20", True), ("1e999", False)):
        config.write_text(config.read_text("utf-8").replace('examples": 20', f'examples": {examples}'), "utf-8")
        assert main(["inspect", "scales"]) == 0
        assert ("held out" in capsys.readouterr().out) == shown


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_not_positive_numbers_are_refused(place: Path, capsys: Any, value: float) -> None:
    from safetensors.torch import save_file

    HeadScales.ones(2, 4).save_pretrained("broken")
    gamma = torch.ones(2, 4)
    gamma[1, 3] = value
    save_file({"gamma": gamma}, place / "broken/head_scales.safetensors")
    for command in (evaluate("--scales", "broken"), ["inspect", "broken"]):
        assert f"gamma must be positive and finite, got {value} at layer 1, head 3" in refusal(capsys, command)


@pytest.mark.parametrize("file", ["head_scales.safetensors", "zerotuning_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_scales_are_refused(place: Path, capsys: Any, file: str, damage: str) -> None:
    HeadScales.ones(2, 4).save_pretrained("broken")
    path = place / "broken" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    for command in (evaluate("--scales", "broken"), ["inspect", "broken", "--plot", "map.png"]):
        assert "broken" in refusal(capsys, command)


@pytest.mark.parametrize("command", [["inspect"], evaluate("--scales")])
@pytest.mark.parametrize("folder", ["missing", "deep/er/missing", "model", "data.jsonl"])
def test_a_folder_without_scales_is_refused(place: Path, capsys: Any, command: list[str], folder: str) -> None:
    assert folder in refusal(capsys, [*command, folder])
