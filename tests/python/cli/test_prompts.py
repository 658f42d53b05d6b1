"""Options of prompts: few-shot examples, chat templates, scoring, truncation; wrong options are refused in one line."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from zerotuning.cli.main import main
from zerotuning.evaluation.evaluate import evaluate as evaluate_in_python
from zerotuning.models.loading import load_model
from zerotuning.tasks.examples import read_examples
from zerotuning.tasks.few_shot import draw_shots
from zerotuning.tasks.task import Task

TASK = 'name: films\nprompt: "Review: {text}\\nSentiment:"\nlabels: [" negative", " positive"]\n'
FIRST = ("good", "bad", "a good story", "far too long")
SECOND = ("told", "long", "well told", "far too well told", "a story")
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": (i + k) % 2}
    for i, first in enumerate(FIRST)
    for k, second in enumerate(SECOND)
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The current folder, with model/, task.yaml, validation.jsonl and test.jsonl; no hub can be reached from it."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    for name, records in (("validation", RECORDS[:14]), ("test", RECORDS[14:])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def evaluate(*more: str, data: str = "test.jsonl") -> list[str]:
    return ["evaluate", "--model", "model", "--task", "task.yaml", "--data", data, "--dtype", "float32", *more]


def calibrate(*more: str) -> list[str]:
    command = ["calibrate", "--model", "model", "--task", "task.yaml", "--data", "validation.jsonl"]
    return [*command, "--dtype", "float32", "--steps", "2", "--folds", "1", "--output", "scales", *more]


def figures(*more: str) -> dict[str, Any]:
    assert main(evaluate("--output", "figures.json", *more)) == 0
    return json.loads(Path("figures.json").read_text("utf-8"))


def refusal(capsys: Any, command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zerotuning: error: ")
    assert len(err.splitlines()) == 1, err
    assert not Path("scales").exists()
    return err


def test_shots_of_the_command_are_those_of_draw_shots(place: Path, capsys: Any) -> None:
    found = figures("--shots", "3", "--shot-seed", "5", "--shot-data", "validation.jsonl")
    assert (found["shots"], found["chat"], found["scoring"]) == (3, False, "sum")
    task = Task.load("task.yaml")
    task = task.with_shots(draw_shots(task, read_examples("validation.jsonl"), 3, 5))
    model, tokenizer = load_model("model", "float32", "cpu")
    expected = evaluate_in_python(model, tokenizer, task, "test.jsonl")
    assert found["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert found["loss"] != pytest.approx(figures()["loss"], abs=1e-3)
    other = figures("--shots", "3", "--shot-seed", "6", "--shot-data", "validation.jsonl")
    assert other["loss"] != pytest.approx(found["loss"], abs=1e-4)


def test_shots_are_never_among_the_examples(place: Path, capsys: Any) -> None:
    found = figures("--shots", "8", "--shot-data", "validation.jsonl", "--limit", "3")
    assert (found["examples"], found["shots"]) == (3, 8)
    # --data and --shot-data name the same file: its three other examples can be drawn.
    assert figures("--shots", "3", "--shot-data", "test.jsonl", "--limit", "3")["examples"] == 3
    message = refusal(capsys, evaluate("--shots", "4", "--shot-data", "test.jsonl", "--limit", "3"))
    assert "shots must be at most 3, the number of examples to draw from, got 4" in message
    assert main(calibrate("--shots", "4")) == 0
    report = json.loads((place / "scales/report.json").read_text("utf-8"))
    assert report["examples"] == 10
    assert report["prompts"] == [{"task": "films", "shots": 4, "shot_seed": 0, "chat": False, "scoring": "sum"}]
    config = json.loads((place / "scales/zerotuning_config.json").read_text("utf-8"))
    assert config["calibration"]["prompts"] == report["prompts"]


@pytest.fixture
def trials(monkeypatch: Any) -> None:
    """Short searches that need few steps and few examples."""
    choice = importlib.import_module("zerotuning.calibration.few_shot_choice")
    monkeypatch.setattr(choice, "MIN_COMPARISON_EXAMPLES", 4)
    monkeypatch.setitem(choice.TRIAL_OPTIONS, "steps", 2)


def test_the_best_of_several_candidates_is_chosen_and_its_seed_printed(place: Path, capsys: Any, trials: None) -> None:
    assert main(calibrate("--shots", "3", "--shot-seed", "4", "--num-shot-candidates", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "films: held-out loss of a short search with each set of few-shot examples"
    names = ["--shot-seed 4", "--shot-seed 5", "no shots"]
    losses = [float(line[len(name) + 2 :].split()[0]) for name, line in zip(names, lines[1:4], strict=True)]
    assert [line.endswith("  chosen") for line in lines[1:4]] == [loss == min(losses) for loss in losses]
    assert any(line.startswith("In scales: ") and line.endswith("shot_trials.json") for line in lines)
    report = json.loads((place / "scales/report.json").read_text("utf-8"))
    best = losses.index(min(losses))
    expected = {"shots": 0} if best == 2 else {"shots": 3, "shot_seed": 4 + best}
    assert report["prompts"] == [{"task": "films", **expected, "chat": False, "scoring": "sum"}]
    assert report["examples"] == 14 - expected["shots"]


def test_candidates_that_cannot_be_compared_are_refused(place: Path, capsys: Any, monkeypatch: Any) -> None:
    assert "--num-shot-candidates 2 compares sets of few-shot examples: --shots must be at least 1" in refusal(
        capsys, calibrate("--num-shot-candidates", "2")
    )
    message = refusal(capsys, calibrate("--shots", "11", "--num-shot-candidates", "2"))
    assert "shots 11 leave 3 of 14 examples of task 'films', calibration needs at least 4" in message
    generated = ("--scoring", "generate", "--method", "cma-es")
    message = refusal(capsys, calibrate("--shots", "2", "--num-shot-candidates", "2", *generated))
    assert "few-shot examples are compared by the loss of labels, which scoring generate does not have" in message
    monkeypatch.setattr("zerotuning.models.loading.load_model", None)  # refused before a model is loaded
    message = refusal(capsys, calibrate("--shots", "2", "--num-shot-candidates", "2"))
    assert "task 'films' needs at least 32 examples outside every set, got " in message


def test_a_builtin_tasks_shots_come_from_its_validation_sample(place: Path, capsys: Any, tiny_model: Any) -> None:
    tiny_model.config.max_position_embeddings = 4096
    tiny_model.save_pretrained("model")
    command = ["evaluate", "--model", "model", "--task", "arc_challenge", "--limit", "2", "--output", "figures.json"]
    assert main([*command, "--shots", "2"]) == 0
    assert json.loads(Path("figures.json").read_text("utf-8"))["shots"] == 2


@pytest.mark.parametrize("scoring", ["mean", "first-token", "generate"])
def test_a_scoring_and_a_chat_are_chosen_on_the_command_line(
    place: Path, capsys: Any, scoring: str, tiny_tokenizer: Any
) -> None:
    tokenizer = importlib.import_module("copy").deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    tokenizer.save_pretrained("model")
    (place / "task.yaml").write_text(TASK + "chat: true\nscoring: sum\n", encoding="utf-8")
    found = figures("--scoring", scoring)
    assert (found["scoring"], found["chat"]) == (scoring, True)
    assert (found["loss"] is None) == (scoring == "generate")
    assert figures("--no-chat")["chat"] is False


def test_truncate_shortens_prompts_that_are_too_long(place: Path, capsys: Any) -> None:
    long = {"text": "good " * 400, "label": 1}
    (place / "long.jsonl").write_text((json.dumps(long) + "\n") * 5, encoding="utf-8")
    message = refusal(capsys, evaluate(data="long.jsonl"))
    assert "long.jsonl:1: prompt and label have" in message
    assert "more than the model's context of 256" in message
    assert main(evaluate("--truncate", data="long.jsonl")) == 0
    command = [*calibrate("--truncate"), "--data", "long.jsonl", "--task", "task.yaml"]
    assert main(command) == 0


def interrupt(monkeypatch: Any, command: list[str], rounds_before: int = 1) -> None:
    """Run the command and interrupt it after `rounds_before` steps of its searches."""
    search = importlib.import_module("zerotuning.calibration.gradient_search").GradientSearch
    advance = search.advance
    rounds: list[int] = []

    def interrupted(self: Any) -> None:
        rounds.append(1)
        if len(rounds) == rounds_before + 1:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as patched:
        patched.setattr(search, "advance", interrupted)
        assert main(command) == 130


def test_a_resumed_calibration_chooses_the_same_candidate(
    place: Path, capsys: Any, monkeypatch: Any, trials: None
) -> None:
    command = calibrate("--shots", "2", "--num-shot-candidates", "3", "--steps", "3")
    assert main([*command, "--output", "whole"]) == 0
    interrupt(monkeypatch, command)  # in the first short search
    interrupt(monkeypatch, command, rounds_before=7)  # in the second after it
    interrupt(monkeypatch, command, rounds_before=7)  # in the calibration itself
    assert (place / "scales/calibration_state.json").exists()
    assert main(command) == 0
    for name in ("head_scales.safetensors", "zerotuning_config.json", "shot_trials.json"):
        assert (place / "scales" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert main([*command, "--overwrite"]) == 0


def test_a_resumed_calibration_notices_other_prompts(place: Path, capsys: Any, monkeypatch: Any) -> None:
    shot_data = ["--shot-data", "test.jsonl"]
    interrupt(monkeypatch, calibrate("--shots", "2", *shot_data))
    for more, message in (
        (["--shots", "3", *shot_data], "another shots: ['2 of SHA-256 "),
        (["--shots", "2", "--shot-seed", "1", *shot_data], "another shots: ['2 of SHA-256 "),
        (["--shots", "2", "--scoring", "mean", *shot_data], "another scoring: ['sum'], not ['mean']"),
        (["--shots", "2", "--truncate", *shot_data], "another truncate: False, not True"),
    ):
        capsys.readouterr()
        assert main(calibrate(*more)) == 2
        assert message in capsys.readouterr().err
    assert main(calibrate("--shots", "2", *shot_data)) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (evaluate("--shots", "17"), "argument --shots: must be an integer from 0 to 16, got '17'"),
        (evaluate("--shots", "-1"), "argument --shots: must be an integer from 0 to 16, got '-1'"),
        (evaluate("--shots", "two"), "argument --shots: must be an integer from 0 to 16, got 'two'"),
        (evaluate("--shot-seed", "x"), "argument --shot-seed: must be an integer of at least 0, got 'x'"),
        (evaluate("--shots", "2"), "shots of task 'films' need examples to draw from: name a file with --shot-data"),
        (
            evaluate("--shots", "15", "--shot-data", "validation.jsonl"),
            "shots must be at most 14, the number of examples to draw from, got 15",
        ),
        (evaluate("--shots", "1", "--shot-data", "none.jsonl"), "data file none.jsonl does not exist"),
        (calibrate("--shots", "11"), "shots 11 leave 3 of 14 examples of task 'films', calibration needs at least 4"),
        (calibrate("--shots", "15"), "shots must be at most 14, the number of examples to draw from, got 15"),
        (
            calibrate("--shots", "1", "--shot-data", "a.jsonl", "--shot-data", "b.jsonl"),
            "--shot-data must be given once for each --task (1), got 2",
        ),
        (evaluate("--chat"), "chat needs a tokenizer with a chat template, model has none"),
        (evaluate("--scoring", "best"), "argument --scoring: invalid choice: 'best'"),
        (calibrate("--scoring", "generate"), "scoring generate has no gradient: method must be cma-es"),
        (evaluate(data="hub"), "task 'films' names no data set of the hub: give hub:owner/name or a file"),
        (
            ["evaluate", "--model", "model", "--task", "subj"],
            "task 'subj' comes without examples: name a JSON lines file (--data FILE.jsonl), "
            "or its data set SetFit/subj",
        ),
        (["evaluate", "--model", "model", "--task", "subh"], "unknown task 'subh', did you mean 'subj'?"),
    ],
)
def test_wrong_prompts_get_one_line(place: Path, capsys: Any, command: list[str], message: str) -> None:
    assert message in refusal(capsys, command)


def test_a_data_set_that_cannot_be_loaded_gets_one_line(place: Path, capsys: Any) -> None:
    pytest.importorskip("datasets")
    assert "cannot load data owner/name[test]: " in refusal(capsys, evaluate(data="hub:owner/name"))


def test_labels_with_the_same_first_token_get_one_line(place: Path, capsys: Any) -> None:
    (place / "task.yaml").write_text(TASK.replace('" negative"', '" positive film"'), encoding="utf-8")
    message = refusal(capsys, evaluate("--scoring", "first-token"))
    assert "labels ' positive film' and ' positive' begin with the same token" in message


def test_a_missing_datasets_package_gets_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "datasets" else find(name, *more)
    )
    message = refusal(capsys, evaluate(data="hub:owner/name"))
    assert 'need the package datasets: pip install "zerotuning[datasets]", or name a JSON lines file' in message
