"""The command line: its round trip with a tiny model, and one line with exit code 2 for every bad input."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zerotuning
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zerotuning.calibration.options import OBJECTIVES
from zerotuning.cli.bench import BENCHMARKS
from zerotuning.cli.main import main
from zerotuning.patching.head_scales import HeadScales

TASK = """\
name: films
prompt: "Review: {text}\\nSentiment:"
labels: [" negative", " positive"]
"""
# One label for all: what helps one example then helps the others, so that a calibration finds something.
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": 1}
    for first in ("good", "bad", "a good story", "far too long")
    for second in ("told", "long", "well told", "far too well told", "a story")
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The current folder, with model/, task.yaml and data.jsonl; no hub can be reached from it."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    write_lines(tmp_path / "data.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZEROTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write_lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def calibrate(*more: str, output: str = "scales") -> list[str]:
    command = ["calibrate", "--model", "model", "--task", "task.yaml", "--data", "data.jsonl"]
    return [*command, "--steps", "4", "--dtype", "float32", "--output", output, *more]


def evaluate(*more: str) -> list[str]:
    command = ["evaluate", "--model", "model", "--task", "task.yaml", "--data", "data.jsonl"]
    return [*command, "--dtype", "float32", *more]


def instead(command: list[str], option: str, value: str) -> list[str]:
    """The command with another value of one of its options."""
    at = command.index(option) + 1
    return [*command[:at], value, *command[at + 1 :]]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: relative path -> bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refusal(capsys: Any, command: Sequence[str]) -> str:
    """The one line that a refused command prints; nothing on stdout, and the current folder as it was."""
    before = contents(Path.cwd())
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zerotuning: error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert contents(Path.cwd()) == before
    return err


def gamma_of(folder: str) -> torch.Tensor:
    return HeadScales.from_pretrained(Path(folder)).gamma


# The round trip.


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


def test_scales_of_one_change_no_figure(place: Path, capsys: Any) -> None:
    HeadScales.ones(2, 4).save_pretrained("ones")
    assert main(evaluate("--output", "untuned.json")) == main(evaluate("--output", "tuned.json", "--scales", "ones"))
    untuned, tuned = (json.loads((place / f"{name}.json").read_text("utf-8")) for name in ("untuned", "tuned"))
    assert tuned["accuracy"] == untuned["accuracy"]
    assert tuned["loss"] == pytest.approx(untuned["loss"], abs=1e-5)
    assert tuned["entropy"] == pytest.approx(untuned["entropy"], abs=1e-5)


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


def test_a_calibration_that_found_nothing_says_so(place: Path, capsys: Any, monkeypatch: Any) -> None:
    judge = importlib.import_module("zerotuning.calibration.acceptance").AcceptanceTest
    monkeypatch.setattr(judge, "approves", lambda self, point: False)
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


def test_the_command_takes_several_tasks_heads_and_a_start(place: Path, capsys: Any) -> None:
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


def test_evaluate_replaces_its_file(place: Path, capsys: Any) -> None:
    (place / "figures.json").write_text("old", encoding="utf-8")
    assert main(evaluate("--output", "figures.json", "--limit", "2")) == 0
    assert json.loads((place / "figures.json").read_text("utf-8"))["examples"] == 2


@pytest.mark.model
def test_the_embedded_model_is_called_demo(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "figures.json"
    command = ["evaluate", "--model", "demo", "--task", "sst2", "--limit", "16", "--output", str(output)]
    assert main(command) == 0
    figures = json.loads(output.read_text("utf-8"))
    assert (figures["task"], figures["examples"], figures["model"]) == ("sst2", 16, "demo")
    assert 0.5 <= figures["accuracy"] <= 1


# Interruption.


def interrupt_after(monkeypatch: Any, answers: int) -> Callable[[], None]:
    """Ctrl-C in the n-th round of the search; the function returned lets later ones pass."""
    search = importlib.import_module("zerotuning.calibration.gradient_search").GradientSearch
    advance = search.advance
    left = [answers]

    def interrupted(self: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(search, "advance", interrupted)
    return lambda: monkeypatch.setattr(search, "advance", advance)


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


# Bad input.


def test_a_finished_result_is_refused_without_overwrite(place: Path, capsys: Any) -> None:
    assert main(calibrate()) == 0
    assert "scales already holds a result (head_scales.safetensors)" in refusal(capsys, calibrate())
    assert "already holds a result" in refusal(capsys, ["demo", "--output", "scales"])
    old = gamma_of("scales")
    assert main(calibrate("--overwrite", "--seed", "1")) == 0
    assert not torch.equal(gamma_of("scales"), old)


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
        (calibrate("--examples", "21"), "examples must be at most 20, all there are, got 21"),
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
        (calibrate("--prior", "0.5,0.5"), "prior belongs to the objective information, got task-loss"),
        (calibrate("--layers", "3-1"), "argument --layers: must be layers such as 0-7,12, got '3-1'"),
        (calibrate("--layers", "0-2"), "layers: the model's layers are 0 to 1, got 2"),
        (calibrate("--heads", "3"), "argument --heads: must be layer:head pairs such as 3:0,12:8, got '3'"),
        (calibrate("--exclude-heads", "0:4"), "exclude_heads: the model's heads are 0 to 3, got 4"),
        (calibrate("--start", "nowhere"), "scales folder nowhere does not exist"),
        (calibrate("--task", "sst2"), "--data must come once for each --task (2), got 1"),
        (calibrate("--method", "cma-es", "--folds", "3"), "folds are for the method gradient, got 3 with cma-es"),
        (["bench", "coffee"], "argument kind: invalid choice: 'coffee'"),
    ],
)
def test_wrong_arguments_get_one_line(place: Path, capsys: Any, command: list[str], message: str) -> None:
    assert message in refusal(capsys, command)


@pytest.mark.parametrize("command", [evaluate(), calibrate(output="deep/scales")])
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TASK + "shots: 4\n", "task.yaml: unknown field 'shots'; known fields are name, prompt, labels"),
        (TASK.replace("{text}", "{text.__class__}"), "prompt: {text.__class__} must be a plain {field}"),
        (TASK.replace("{text}", "{text[0]}"), "prompt: {text[0]} must be a plain {field}"),
        (TASK.replace("{text}", "{0}"), "prompt: {0} must be a plain {field}"),
        (TASK.replace("{text}", "{text!r:>9}"), "must be a plain {field}, without conversion or format"),
        (TASK.replace('" positive"', '" negative"'), "labels must differ"),
        (TASK.replace("{text}", "{sentence}"), "data.jsonl:1: field 'sentence' is missing"),
        ("- a list\n", "task.yaml must be a mapping with name, prompt, labels"),
        ("name: [", "task.yaml:1: not YAML"),
        ("", "task.yaml must be a mapping"),
    ],
)
def test_a_bad_task_file_gets_one_line(place: Path, capsys: Any, command: list[str], task: str, message: str) -> None:
    (place / "task.yaml").write_text(task, encoding="utf-8")
    assert message in refusal(capsys, command)


@pytest.mark.parametrize("command", [evaluate(), calibrate(output="deep/scales")])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "data file data.jsonl holds no example"),
        (b"\n\n", "data file data.jsonl holds no example"),
        (b'{"text": "good", "label": 1}\n{"text": "bad"}\n' * 4, "data.jsonl:2: field 'label' is missing"),
        (b'{"text": "good", "label": 2}\n' * 8, "data.jsonl:1: field 'label' must be an integer from 0 to 1"),
        (
            b'{"text": "good", "label": "1"}\n' * 8,
            "data.jsonl:1: field 'label' must be an integer from 0 to 1",
        ),
        (b'{"text": "good", "label": 1', "data.jsonl:1: not JSON"),
        (b'\xff\xfe{"text"', "data.jsonl:1: not UTF-8"),
        (b'["good", 1]\n', "data.jsonl:1: a line must be a JSON object"),
    ],
)
def test_bad_data_get_one_line(place: Path, capsys: Any, command: list[str], data: bytes, message: str) -> None:
    (place / "data.jsonl").write_bytes(data)
    assert message in refusal(capsys, command)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--task", "trek", "unknown task 'trek', did you mean 'trec'?"),
        ("--task", "missing.yaml", "task file missing.yaml does not exist"),
        ("--task", ".", "unknown task '.'"),
        ("--data", "missing.jsonl", "data file missing.jsonl does not exist"),
        ("--data", "model", "cannot read data file model: Is a directory"),
        ("--model", "./missing", "model folder ./missing does not exist"),
        ("--model", "missing.gguf", "model file missing.gguf does not exist"),
        ("--model", "data.jsonl", "model data.jsonl must be a folder, a .gguf file or a hub name"),
        ("--model", "owner/missing", "cannot load model owner/missing"),
        ("--model", "cut.gguf", "cannot load model cut.gguf"),
        ("--model", "cut", "cannot load model cut"),
        ("--model", "", "model name must not be empty"),
    ],
)
@pytest.mark.parametrize("command", [evaluate("--output", "figures.json"), calibrate(output="deep/scales")])
def test_files_that_are_missing_or_truncated_get_one_line(
    place: Path, capsys: Any, command: list[str], option: str, value: str, message: str
) -> None:
    (place / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (place / "cut").mkdir()
    for file in (place / "model").iterdir():
        content = file.read_bytes()
        half = len(content) // 2 if file.suffix == ".safetensors" else len(content)
        (place / "cut" / file.name).write_bytes(content[:half])
    assert message in refusal(capsys, instead(command, option, value))


def test_a_task_of_ones_own_needs_data(place: Path, capsys: Any) -> None:
    command = ["evaluate", "--model", "model", "--task", "task.yaml"]
    assert "task 'films' has no examples of its own" in refusal(capsys, command)


@pytest.mark.parametrize("command", [evaluate(), calibrate(output="deep/scales")])
def test_labels_that_the_tokenizer_cannot_tell_apart_get_one_line(place: Path, capsys: Any, command: list[str]) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Review": 1, "film": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained("model")
    message = ": the tokenizer cannot tell labels ' negative' and ' positive' apart"
    assert message in refusal(capsys, command)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_no_positive_numbers_are_refused(place: Path, capsys: Any, value: float) -> None:
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
def test_a_place_without_scales_is_refused(place: Path, capsys: Any, command: list[str], folder: str) -> None:
    assert folder in refusal(capsys, [*command, folder])


def test_a_start_of_another_kind_of_model_is_refused(place: Path, capsys: Any) -> None:
    HeadScales(torch.ones(2, 4), {"model_type": "qwen2"}).save_pretrained("start")
    message = "start was made for a qwen2 model, this is a llama model"
    assert message in refusal(capsys, calibrate("--start", "start"))


def test_figures_beyond_what_integers_hold_are_not_shown(place: Path, capsys: Any) -> None:
    figures = {"accuracy": 0.5, "loss": 1.0}
    calibration = {"baseline": figures, "tuned": figures, "held_out_examples": 20}
    HeadScales(torch.ones(2, 4), {"calibration": calibration}).save_pretrained("scales")
    config = place / "scales/zerotuning_config.json"
    for examples, shown in (("20", True), ("1e999", False)):
        config.write_text(config.read_text("utf-8").replace('examples": 20', f'examples": {examples}'), "utf-8")
        assert main(["inspect", "scales"]) == 0
        assert ("held out" in capsys.readouterr().out) == shown


@pytest.mark.parametrize("command", [calibrate, lambda output: ["demo", "--output", output]])
@pytest.mark.parametrize("output", ["data.jsonl", "data.jsonl/deep", "/proc/scales", "/dev/null/scales"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    place: Path, capsys: Any, monkeypatch: Any, command: Callable[..., list[str]], output: str
) -> None:
    for name in ("load_model", "demo_model_path"):
        monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), name, None)
    assert f"output {output} " in refusal(capsys, command(output=output))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (evaluate("--output", "model"), "output model must be a file, got a folder"),
        (evaluate("--output", "pipe"), "output pipe must be a regular file, got a device or a pipe"),
        (evaluate("--output", ""), "output must name a file, got an empty name"),
        (calibrate(output=""), "output must name a folder, got an empty name"),
        (evaluate("--output", "missing/figures.json"), "output missing/figures.json cannot be written"),
        (["inspect", "ones", "--plot", "missing/map.png"], "output missing/map.png cannot be written"),
        (["inspect", "ones", "--plot", "map.jpg"], "output map.jpg must end in .png or .svg or .pdf"),
        (
            ["bench", "attention", "--output", "missing/bench.json"],
            "output missing/bench.json cannot be written",
        ),
    ],
)
def test_an_output_file_that_cannot_be_written_is_refused_first(
    place: Path, capsys: Any, command: list[str], message: str
) -> None:
    HeadScales.ones(2, 4).save_pretrained("ones")
    os.mkfifo("pipe")
    assert message in refusal(capsys, command)


def test_a_folder_that_another_process_writes_is_refused(place: Path, capsys: Any) -> None:
    (place / "scales").mkdir()
    descriptor = os.open("scales", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "output scales is being written by another calibration" in refusal(capsys, calibrate())
    os.close(descriptor)
    assert main(calibrate()) == 0


def test_figures_that_cannot_be_written_were_printed(place: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise zerotuning.ZeroTuningError("cannot write figures.json: No space left on device")

    monkeypatch.setattr(importlib.import_module("zerotuning.files"), "write_json_atomically", full)
    assert main(evaluate("--output", "figures.json")) == 2
    assert "films, 20 examples, model model" in capsys.readouterr().out


def test_a_lack_of_memory_gets_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), "load_model", exhausted)
    assert "not enough memory (CUDA out of memory. Tried to allocate 2 GiB)" in refusal(capsys, evaluate())


def test_a_mistake_in_the_program_keeps_its_traceback(place: Path, monkeypatch: Any) -> None:
    def mistaken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), "load_model", mistaken)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(evaluate())


# The demo, with a tiny model in place of the embedded one.


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


# The program and the package.


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_the_program_prints_its_version_and_help_without_loading_torch() -> None:
    version = run("-m", "zerotuning", "--version")
    assert (version.returncode, version.stdout) == (0, f"zerotuning {zerotuning.__version__}\n")
    code = "import sys; from zerotuning.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    shown = run("-c", code)
    assert shown.returncode == 0, shown.stderr
    for name in ("demo", "calibrate", "evaluate", "inspect", "bench"):
        assert f"    {name} " in shown.stdout or f"    {name}\n" in shown.stdout


def test_the_program_ends_with_code_2_and_one_line() -> None:
    result = run("-m", "zerotuning", "evaluate", "--model", "demo", "--task", "trek")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("zerotuning: error: unknown task 'trek', did you mean 'trec'? (known tasks: agnews, aqua,")


def test_a_terminal_without_greek_letters_gets_question_marks(place: Path, monkeypatch: Any) -> None:
    HeadScales.ones(2, 4).save_pretrained("ones")
    code = "import sys; from zerotuning.cli.main import main; sys.exit(main(['inspect', 'ones']))"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "? from 1 to 1" in result.stdout


def test_choices_are_those_of_the_modules_behind_them() -> None:
    assert tuple(importlib.import_module("zerotuning.evaluation.objectives").OBJECTIVES) == OBJECTIVES
    assert importlib.import_module("zerotuning.bench.runner").BENCHMARKS == BENCHMARKS
