"""A killed calibration resumes and ends with the same bytes; several processes find the scales of one."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zerotuning as zt
from several_processes import torchrun
from torch import nn
from zerotuning.calibration.fingerprint import tokens_digest, weights_digest
from zerotuning.calibration.gradient_search import GradientSearch
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.tasks.examples import as_records
from zerotuning.tasks.task import Task
from zerotuning.tasks.tokenization import tokenize

TASK = """\
name: films
prompt: "Review: {text}\\nSentiment:"
labels: [" negative", " positive"]
"""
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": 1}
    for first in ("good", "bad", "a good story", "far too long")
    for second in ("told", "long", "well told", "far too well told", "a story")
]
FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
SAME_BYTES = ("head_scales.safetensors", "zerotuning_config.json")


@pytest.fixture
def place(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    write_records(tmp_path, RECORDS)
    return tmp_path


def write_records(place: Path, records: list[dict[str, Any]]) -> None:
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def command(output: str, *more: str) -> list[str]:
    return [
        *("calibrate", "--model", "model", "--task", "task.yaml", "--data", "data.jsonl", "--dtype", "float32"),
        *("--device", "cpu", "--output", output, *more),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(place: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "zerotuning", *arguments],
        cwd=place,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def test_killed_at_five_random_moments_it_ends_with_the_same_bytes(place: Path) -> None:
    options = ("--steps", "120", "--l2-penalties", "0.001,0.01", "--combine", "refit")
    finish(start(place, *command("whole", *options)))
    moments = random.Random(7)
    state = place / "killed/calibration_state.json"
    progress = []
    for _ in range(5):
        process = start(place, *command("killed", *options))
        before = state.read_bytes() if state.exists() else None
        # Kill the process at a random moment after its first new state; a search that has ended by then is not killed.
        while process.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not state.exists():
            break
        progress.append(json.loads(state.read_text("utf-8"))["state"]["seconds"])
    assert len(progress) >= 3, "the search is too short for this test"
    assert progress == sorted(progress)
    if state.exists():
        finish(start(place, *command("killed", *options)))
    for name in SAME_BYTES:
        assert (place / "killed" / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (place / "killed").iterdir()) == sorted(
        path.name for path in (place / "whole").iterdir()
    )


def test_temporary_files_of_a_killed_write_are_removed_with_the_state(tmp_path: Path) -> None:
    from zerotuning.calibration.state import CalibrationState
    from zerotuning.models.process_group import Processes

    state = CalibrationState(tmp_path, {"seed": 0}, Processes())
    state.write({"search": 1})
    saved = state.read()
    assert saved is not None
    assert saved.value("search") == 1
    (tmp_path / ".calibration_state.json.0f.part").write_text("half", encoding="utf-8")
    (tmp_path / "notes.part").write_text("the user's", encoding="utf-8")
    state.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.part"]
    assert state.read() is None


class Interruption(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every search is interrupted before its fourth round."""
    advance, left = GradientSearch.advance, [3]

    def advance_or_stop(self: GradientSearch) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interruption
        advance(self)

    monkeypatch.setattr(GradientSearch, "advance", advance_or_stop)


def calibrate_films(model: Any, tokenizer: Any, output: Path, task: Task = FILMS) -> None:
    zt.calibrate(model, tokenizer, task, records=RECORDS, steps=9, output=output)


def test_a_damaged_state_is_refused(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, interrupted: None) -> None:
    def run() -> None:
        calibrate_films(tiny_model, tiny_tokenizer, tmp_path / "out")

    with pytest.raises(Interruption):
        run()
    state = tmp_path / "out/calibration_state.json"
    content = json.loads(state.read_text("utf-8"))
    saved = content["state"]
    damaged = {
        "": "Expecting value",
        "[1]": r"the state must be a JSON object, got a list of 1",
        "{}": "calibration is missing",
    }
    changed: list[tuple[dict[str, Any], str]] = [
        ({"seconds": -1.0}, "state.seconds must be a finite number of at least 0, got -1.0"),
        ({"seconds": math.inf}, "state.seconds must be a finite number of at least 0, got inf"),
        ({"search": []}, "state.search must be a JSON object, got a list of 0"),
        ({"search": {}}, "state.search.round is missing"),
        (
            {"search": {**saved["search"], "round": math.inf}},
            "state.search.round must be an integer from 0 to 10, got inf",
        ),
        ({"memory": []}, "state.memory must be a JSON object, got a list of 0"),
    ]
    for changes, reason in changed:
        damaged[json.dumps({**content, "state": {**saved, **changes}})] = reason
    for text, reason in damaged.items():
        state.write_text(text, encoding="utf-8")
        with pytest.raises(
            ZeroTuningError, match=rf"calibration_state\.json cannot be read: {reason}.*; overwrite to start anew$"
        ):
            run()


def test_the_state_on_disk_is_plain_json(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, interrupted: None
) -> None:
    with pytest.raises(Interruption):
        calibrate_films(tiny_model, tiny_tokenizer, tmp_path)
    text = (tmp_path / "calibration_state.json").read_text("utf-8")
    search = json.loads(text, parse_constant=pytest.fail)["state"]["search"]
    assert search["round"] == 3
    for stepper in search["searches"][0]["steppers"]:
        assert stepper["steps_done"] == 3
        assert len(stepper["point"]) == 8
        assert all(isinstance(value, float) for value in stepper["point"])


def test_other_weights_of_the_same_shape_do_not_resume(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, interrupted: None
) -> None:
    with pytest.raises(Interruption):
        calibrate_films(tiny_model, tiny_tokenizer, tmp_path)
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ZeroTuningError, match="holds an unfinished calibration with another weights: "):
        calibrate_films(tiny_model, tiny_tokenizer, tmp_path)


def test_a_tokenizer_that_gives_other_tokens_does_not_resume(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, interrupted: None
) -> None:
    chat = replace(FILMS, chat=True)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }} Answer: "
    with pytest.raises(Interruption):
        calibrate_films(tiny_model, tokenizer, tmp_path, chat)
    tokenizer.chat_template = "{{ messages[0]['content'] }} Say: "
    with pytest.raises(ZeroTuningError, match="holds an unfinished calibration with another tokens: "):
        calibrate_films(tiny_model, tokenizer, tmp_path, chat)


def test_digests_differ_for_other_weights_and_tokens_and_repeat_for_equal_ones(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tiny_model.save_pretrained(tmp_path)
    again = type(tiny_model).from_pretrained(tmp_path)
    assert weights_digest(again) == weights_digest(tiny_model)
    with torch.no_grad():
        again.lm_head.weight.neg_()
    assert weights_digest(again) != weights_digest(tiny_model)
    many = nn.Linear(1, 1)
    many.weight = nn.Parameter(torch.zeros(1).expand(2**25 + 3))  # indices that float32 cannot represent
    last = torch.arange(2**25 + 3) == 2**25 + 2
    before = weights_digest(many)
    many.weight = nn.Parameter(last.to(torch.float32))
    assert weights_digest(many) != before
    tokens = [tokenize(tiny_tokenizer, FILMS, as_records(RECORDS))]
    assert tokens_digest(tokens) == tokens_digest([list(tokens[0])])
    assert tokens_digest(tokens) != tokens_digest([tokens[0][1:]])


@pytest.mark.parametrize(
    ("objective", "method", "more"),
    [
        ("task-loss", "gradient", ()),
        ("task-loss", "gradient", ("--shots", "3", "--num-shot-candidates", "3")),
        ("information", "gradient", ()),
        ("task-loss", "cma-es", ()),
        ("entropy", "paper", ()),
    ],
)
def test_two_processes_find_the_scales_of_one(place: Path, objective: str, method: str, more: tuple[str, ...]) -> None:
    if more:  # enough examples to compare draws of shots
        write_records(place, [{**record, "text": f"{record['text']} {i}"} for i in range(3) for record in RECORDS])
    options = ("--steps", "30" if method == "cma-es" else "12", "--objective", objective, "--method", method, *more)
    finish(start(place, *command("one", *options)))
    together = torchrun(place, "-m", "zerotuning", *command("two", *options))
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("In two: ") == 1
    assert together.stdout.count("  chosen\n") == bool(more)
    one, two = (HeadScales.from_pretrained(place / name).gamma for name in ("one", "two"))
    if objective == "task-loss" and method == "gradient":
        assert bool((one != 1).any())
    assert torch.allclose(one, two, atol=1e-4, rtol=0)
    reports = [json.loads((place / name / "report.json").read_text("utf-8")) for name in ("one", "two")]
    losses = [[entry["fit_loss"] for entry in report["history"] if "fit_loss" in entry] for report in reports]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


SLOW_WRITER = """
import importlib, time
from pathlib import Path
import zerotuning as zt
from zerotuning.models import process_group

calibrate = importlib.import_module("zerotuning.calibration.calibrate")

def slowly(*arguments, write=calibrate._write_result):
    time.sleep(3)
    write(*arguments)

calibrate._write_result = slowly
process_group.join_process_group("cpu")
model, tokenizer = zt.load_model("model", device="cpu")
zt.calibrate(model, tokenizer, "task.yaml", records="data.jsonl", steps=1, output="out")
print(f"written: {Path('out/report.json').exists()}")
process_group.leave_process_group()
"""


def test_calibrate_returns_in_each_process_only_after_the_main_process_has_written(place: Path) -> None:
    (place / "slow_writer.py").write_text(SLOW_WRITER, encoding="utf-8")
    together = torchrun(place, "slow_writer.py")
    assert together.stdout.count("written: True") == 2, together.stderr


def test_bad_input_ends_all_processes(place: Path) -> None:
    together = torchrun(place, "-m", "zerotuning", *command("two", "--layers", "9"))
    assert together.returncode != 0
    assert "layers: the model's layers are 0 to 1, got 9" in together.stderr
    # torchrun may kill the first process, which raises the same error, before this process removes its folder.
    assert not any((place / "two").glob("*"))
