"""The arguments of all commands: wrong ones are refused with one line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from command_line import calibrate, evaluate, refusal
from zerotuning.calibration.options import OBJECTIVES
from zerotuning.cli.main import main, make_parser


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tune"], "invalid choice: 'tune'"),
        (["evaluate"], "the following arguments are required: --model, --task"),
        (["calibrate", "--model", "model", "--task", "sst2"], "required: --output"),
        (evaluate("--limit", "0"), "argument --limit: must be a positive integer, got '0'"),
        (evaluate("--limit", "-3"), "argument --limit: must be a positive integer, got '-3'"),
        (evaluate("--limit", "2.5"), "argument --limit: must be a positive integer, got '2.5'"),
        (evaluate("--batch-size", "many"), "argument --batch-size: must be a positive integer, got 'many'"),
        (
            evaluate("--dtype", "int8"),
            "dtype must be one of float16, bfloat16, float32, float64, got 'int8'",
        ),
        (evaluate("--device", "abacus"), "device must be a torch device"),
        (evaluate("--lim", "3"), "unrecognized arguments: --lim 3"),
        (calibrate("--steps", "0"), "argument --steps: must be a positive integer, got '0'"),
        (calibrate("--seed", "-1"), "argument --seed: must be an integer of at least 0, got '-1'"),
        (calibrate("--examples", "21"), "examples must be at most 20, the number of records, got 21"),
        (calibrate("--examples", "2"), "examples must be at least 4, got 2"),
        (calibrate("--method", "adam"), "argument --method: invalid choice: 'adam'"),
        (calibrate("--objective", "accuracy"), "argument --objective: invalid choice: 'accuracy'"),
        (calibrate("--folds", "0"), "argument --folds: must be a positive integer, got '0'"),
        (calibrate("--seconds", "-1"), "argument --seconds: must be a positive number of seconds, got '-1'"),
        (
            calibrate("--l2-penalties", "1e-3,x"),
            "argument --l2-penalties: must be numbers of at least 0 with commas between, got 'x'",
        ),
        (calibrate("--prior", "half"), "argument --prior: must be unknown or estimate, or positive numbers"),
        (calibrate("--prior", "0.5,0.5"), "prior requires the objective information, got task-loss"),
        (calibrate("--layers", "3-1"), "argument --layers: must be layers such as 0-7,12, got '3-1'"),
        (calibrate("--layers", "0-2"), "layers: the model's layers are 0 to 1, got 2"),
        (calibrate("--heads", "3"), "argument --heads: must be layer:head pairs such as 3:0,12:8, got '3'"),
        (calibrate("--exclude-heads", "0:4"), "exclude_heads: the model's heads are 0 to 3, got 4"),
        (calibrate("--start", "nowhere"), "scales folder nowhere does not exist"),
        (calibrate("--task", "sst2"), "--data must be given once for each --task (2), got 1"),
        (calibrate("--method", "cma-es", "--folds", "3"), "folds are for the method gradient, got 3 with cma-es"),
        (["bench", "coffee"], "argument kind: invalid choice: 'coffee'"),
    ],
)
def test_wrong_arguments_get_one_line(place: Path, capsys: Any, command: list[str], message: str) -> None:
    assert message in refusal(capsys, command)


def test_choices_are_those_of_the_modules_behind_them() -> None:
    assert tuple(importlib.import_module("zerotuning.evaluation.objectives").OBJECTIVES) == OBJECTIVES


# Old names.


@pytest.mark.parametrize(
    ("command", "old", "new", "field"),
    [
        (["calibrate", "--model", "m", "--task", "t", "--output", "o"], "--seeds", "--num-searches", "num_searches"),
        (["calibrate", "--model", "m", "--task", "t", "--output", "o"], "--penalty", "--l2-penalties", "l2_penalties"),
        (
            ["calibrate", "--model", "m", "--task", "t", "--output", "o"],
            "--shot-draws",
            "--num-shot-candidates",
            "num_shot_candidates",
        ),
        (["bench", "search"], "--seeds", "--num-draws", "num_draws"),
        (["bench", "search"], "--shot-draws", "--num-shot-candidates", "num_shot_candidates"),
        (["study", "gamma", "--output", "o"], "--seeds", "--num-draws", "num_draws"),
    ],
)
def test_old_names_of_options_still_work_and_name_the_new_one(
    capsys: Any, command: list[str], old: str, new: str, field: str
) -> None:
    renamed = make_parser().parse_args([*command, old, "3"])
    assert capsys.readouterr().err == f"zerotuning: warning: {old} is now called {new}\n"
    assert getattr(renamed, field) == getattr(make_parser().parse_args([*command, new, "3"]), field)
    assert capsys.readouterr().err == ""
    main([command[0], "--help"])
    shown = capsys.readouterr().out
    assert new in shown
    assert f"{old} " not in shown
