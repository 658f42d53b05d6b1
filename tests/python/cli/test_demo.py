"""`zerotuning demo`, with a tiny model in place of the demo model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import gamma_of, interrupt_after, refusal
from zerotuning.cli.main import main


@pytest.fixture
def tiny_demo(place: Path, monkeypatch: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.config.max_position_embeddings = 2048
    load = lambda *arguments: (tiny_model, tiny_tokenizer)  # noqa: E731
    monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), "load_model", load)
    module = importlib.import_module("zerotuning.models.demo_model")
    monkeypatch.setattr(module, "demo_model_path", lambda: Path("tiny.gguf"))


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_writes_its_report_scales_and_picture(place: Path, capsys: Any) -> None:
    assert main(["demo", "--output", "result"]) == 0
    out = capsys.readouterr().out
    report = json.loads((place / "result/report.json").read_text("utf-8"))
    assert report["calibration"]["examples"] == 64
    for name in ("untuned", "tuned"):
        figures = report[name]
        assert figures["examples"] == 400
        assert 0 <= figures["accuracy"] <= 1
        assert f"{name:<8} {100 * figures['accuracy']:6.1f} %" in out
    assert report["seconds"] > report["untuned"]["seconds"]
    assert (place / "result/head_map.png").is_file()
    assert gamma_of("result").shape == (2, 4)

    assert "already holds a result" in refusal(capsys, ["demo", "--output", "result"])
    assert main(["demo", "--output", "result", "--overwrite"]) == 0


@pytest.mark.usefixtures("tiny_demo")
def test_a_demo_that_fails_writes_nothing(place: Path, capsys: Any, monkeypatch: Any) -> None:
    interrupt_after(monkeypatch, 2)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.strip() == "zerotuning: interrupted"
    assert not (place / "zerotuning-demo").exists()
