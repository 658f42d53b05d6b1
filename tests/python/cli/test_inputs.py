"""Tasks, data and models that cannot be read: each is refused with one line, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import TASK, calibrate, evaluate, instead, refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


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


def test_a_task_file_needs_data(place: Path, capsys: Any) -> None:
    command = ["evaluate", "--model", "model", "--task", "task.yaml"]
    assert "task 'films' has no examples of its own" in refusal(capsys, command)


@pytest.mark.parametrize("command", [evaluate(), calibrate(output="deep/scales")])
def test_labels_that_the_tokenizer_cannot_tell_apart_get_one_line(place: Path, capsys: Any, command: list[str]) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Review": 1, "film": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained("model")
    message = ": the tokenizer cannot tell labels ' negative' and ' positive' apart"
    assert message in refusal(capsys, command)
