"""`zerotuning calibrate`: its result and its output, its options, interruption and resumption."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import RECORDS, TASK, calibrate, evaluate, gamma_of, instead, interrupt_after, refusal, write_lines
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.cli.calibrate import options_of
from zerotuning.cli.main import main, make_parser
from zerotuning.patching.head_scales import HeadScales


def test_calibrate_then_inspect_then_evaluate(place: Path, capsys: Any) -> None:
    assert main(calibrate()) == 0
    out = capsys.readouterr().out
    assert "films: gradient, 4 steps" in out
    assert "20 held-out examples      γ = 1     tuned" in out
    assert sorted(path.name for path in (place / "scales").iterdir()) == [
        "head_map.png",
        "head_scales.safetensors",
        "report.json",
        "report.png",
        "zerotuning_config.json",
    ]
    report = json.loads((place / "scales/report.json").read_text("utf-8"))
    assert (report["task"], report["method"], report["examples"]) == ("films", "gradient", 20)
    assert report["improved"]
    assert report["tuned"]["loss"] < report["baseline"]["loss"]

    assert main(["inspect", "scales", "--plot", "map.svg"]) == 0
    out = capsys.readouterr().out
    assert "model       llama · model" in out
    assert "shape       2 layers × 4 heads" in out
    assert "held out    20 examples: accuracy" in out
    assert "strongest heads" in out
    assert (place / "map.svg").read_bytes().startswith(b"<?xml")

    assert main(evaluate("--output", "untuned.json")) == 0
    assert main(evaluate("--output", "tuned.json", "--scales", "scales", "--limit", "12")) == 0
    out = capsys.readouterr().out
    assert "films, 20 examples, model model, scales none (γ = 1)" in out
    assert "films, 12 examples, model model, scales scales" in out
    untuned, tuned = (json.loads((place / f"{name}.json").read_text("utf-8")) for name in ("untuned", "tuned"))
    assert {"task", "examples", "accuracy", "loss", "entropy", "seconds"} <= set(tuned)
    assert (untuned["examples"], tuned["examples"]) == (20, 12)
    assert tuned["loss"] != untuned["loss"]


@pytest.mark.parametrize("method", ["paper", "cma-es"])
def test_the_other_methods_run_through_the_same_command(place: Path, capsys: Any, method: str) -> None:
    steps = ["--steps", "24"] if method == "cma-es" else []
    assert main(calibrate("--method", method, *steps)) == 0
    assert json.loads((place / "scales/report.json").read_text("utf-8"))["method"] == method


def test_objectives_without_labels_take_data_without_labels(place: Path, capsys: Any) -> None:
    write_lines(place / "texts.jsonl", [{"text": record["text"]} for record in RECORDS])
    command = instead(calibrate("--objective", "information"), "--data", "texts.jsonl")
    assert main(command) == 0
    assert "accuracy                       –         –" in capsys.readouterr().out
    assert main(["inspect", "scales"]) == 0
    assert "20 examples: loss" in capsys.readouterr().out


def test_a_calibration_that_found_no_better_scales_prints_this(place: Path, capsys: Any, monkeypatch: Any) -> None:
    judge = importlib.import_module("zerotuning.calibration.acceptance").AcceptanceTest
    monkeypatch.setattr(judge, "accepts", lambda self, point: False)
    assert main(calibrate()) == 0
    out = capsys.readouterr().out
    assert "Nothing better than γ = 1 was found on the held-out examples: every γ stays 1." in out
    assert torch.equal(gamma_of("scales"), torch.ones(2, 4))
    HeadScales(torch.full((2, 4), 1.5)).save_pretrained("start")
    assert main(calibrate("--start", "start", "--layers", "1", "--overwrite")) == 0
    out = capsys.readouterr().out
    assert "examples: the tuned heads stay at 1, the others as --start has them." in out
    assert "20 held-out examples    untuned     tuned" in out
    assert gamma_of("scales").tolist() == [[1.5] * 4, [1.0] * 4]


def test_the_command_accepts_several_tasks_heads_and_a_start(place: Path, capsys: Any) -> None:
    HeadScales(torch.full((2, 4), 1.5)).save_pretrained("start")
    write_lines(place / "few.jsonl", RECORDS[:8])
    (place / "short.yaml").write_text(TASK.replace("films", "short").replace("Review: ", ""), encoding="utf-8")
    more = [
        "--task",
        "short.yaml",
        "--data",
        "few.jsonl",
        "--layers",
        "1",
        "--exclude-heads",
        "1:0",
        "--start",
        "start",
    ]
    assert main(calibrate(*more, "--num-searches", "2", "--folds", "2", "--l2-penalties", "0,0.01")) == 0
    assert "films + short: gradient, 4 steps" in capsys.readouterr().out
    report = json.loads((place / "scales/report.json").read_text("utf-8"))
    assert (report["free_heads"], report["num_searches"], report["folds"]) == (3, 2, 2)
    gamma = gamma_of("scales")
    assert gamma[0].tolist() == [1.5] * 4
    assert gamma[1, 0] == 1.5


def test_a_start_of_another_kind_of_model_is_refused(place: Path, capsys: Any) -> None:
    HeadScales(torch.ones(2, 4), {"model_type": "qwen2"}).save_pretrained("start")
    message = "start was made for a qwen2 model, this is a llama model"
    assert message in refusal(capsys, calibrate("--start", "start"))


# Interruption.


def test_an_interrupted_calibration_resumes_to_the_same_scales(place: Path, capsys: Any, monkeypatch: Any) -> None:
    assert main(calibrate(output="uninterrupted")) == 0
    go_on = interrupt_after(monkeypatch, 4)
    capsys.readouterr()
    assert main(calibrate()) == 130
    assert capsys.readouterr().err.strip() == "zerotuning: interrupted; the same command resumes"
    assert [path.name for path in (place / "scales").iterdir()] == ["calibration_state.json"]
    go_on()

    assert "calibration there is unfinished" in refusal(capsys, ["inspect", "scales"])
    assert "another steps: 4, not 5" in refusal(capsys, calibrate("--steps", "5"))
    assert main(calibrate()) == 0
    assert torch.equal(gamma_of("scales"), gamma_of("uninterrupted"))
    history, whole = (
        json.loads((place / folder / "report.json").read_text("utf-8"))["history"]
        for folder in ("scales", "uninterrupted")
    )
    assert history == whole
    assert not (place / "scales/calibration_state.json").exists()


def test_an_overwriting_calibration_keeps_the_old_result_until_the_new_is_there(
    place: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert main(calibrate()) == 0
    old = gamma_of("scales")
    go_on = interrupt_after(monkeypatch, 3)
    assert main(calibrate("--overwrite", "--seed", "1")) == 130
    assert "the same command without --overwrite resumes" in capsys.readouterr().err
    assert torch.equal(gamma_of("scales"), old)
    go_on()
    assert main(calibrate("--seed", "1")) == 0
    assert not torch.equal(gamma_of("scales"), old)


def test_an_interruption_before_anything_is_saved_leaves_no_folder(place: Path, capsys: Any, monkeypatch: Any) -> None:
    interrupt_after(monkeypatch, 1)
    assert main(calibrate()) == 130
    assert capsys.readouterr().err.strip() == "zerotuning: interrupted"
    assert not (place / "scales").exists()


# The output folder.


def test_a_finished_result_is_refused_without_overwrite(place: Path, capsys: Any) -> None:
    assert main(calibrate()) == 0
    assert "scales already holds a result (head_scales.safetensors)" in refusal(capsys, calibrate())
    assert "already holds a result" in refusal(capsys, ["demo", "--output", "scales"])
    old = gamma_of("scales")
    assert main(calibrate("--overwrite", "--seed", "1")) == 0
    assert not torch.equal(gamma_of("scales"), old)


def test_a_folder_that_another_process_writes_is_refused(place: Path, capsys: Any) -> None:
    (place / "scales").mkdir()
    descriptor = os.open("scales", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "output scales is being written by another calibration" in refusal(capsys, calibrate())
    os.close(descriptor)
    assert main(calibrate()) == 0


# The options.


def test_the_command_lines_defaults_are_those_of_the_options() -> None:
    arguments = make_parser().parse_args(["calibrate", "--model", "m", "--task", "t", "--output", "o"])
    assert options_of(arguments) == CalibrationOptions()
    without_flag = {field.name for field in fields(CalibrationOptions) if not hasattr(arguments, field.name)}
    assert without_flag == {
        "average",
        "epsilon",
        "guard",
        "learning_rate",
        "max_new_tokens",
        "patience",
        "step_examples",
    }


def test_every_option_of_the_search_has_the_name_of_its_field() -> None:
    flags = [f"--{field.name.replace('_', '-')}" for field in fields(CalibrationOptions)]
    given = ["--num-searches", "2", "--l2-penalties", "0,0.5", "--exclude-heads", "1:2", "--tie", "all", "--folds", "3"]
    assert set(given[::2]) <= set(flags)
    required = ["calibrate", "--model", "m", "--task", "t", "--output", "o"]
    options = options_of(make_parser().parse_args([*required, *given]))
    assert options == CalibrationOptions(
        num_searches=2, l2_penalties=(0, 0.5), exclude_heads=((1, 2),), tie="all", folds=3
    )
