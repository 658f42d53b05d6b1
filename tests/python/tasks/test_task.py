"""Task files: the task that a YAML file describes, and the one-line error for a bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import one_line_error
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.task import Task

AGNEWS = """\
name: agnews
prompt: "Classify the article into World, Sports, Business, or Technology.\\nArticle: {text}\\nCategory:"
labels: [" World", " Sports", " Business", " Technology"]
"""


def task_file(folder: Path, text: str) -> Path:
    path = folder / "task.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_yaml_file_gives_the_task_it_describes(tmp_path: Path) -> None:
    task = Task.load(task_file(tmp_path, AGNEWS))
    assert task.name == "agnews"
    assert task.labels == (" World", " Sports", " Business", " Technology")
    assert task.fields == ("text",)
    prompt = task.render({"text": "Shares {rose}.", "label": 2})
    assert prompt.text == (
        "Classify the article into World, Sports, Business, or Technology.\nArticle: Shares {rose}.\nCategory:"
    )
    assert prompt.labels == task.labels
    assert prompt.label == 2


@pytest.mark.parametrize(
    "template",
    [
        "{text.__class__}",
        "{text[0]}",
        "{text!r}",
        "{text:>10}",
        "{text:{width}}",
        "{0}",
        "{}",
        "{ text }",
        "{text-1}",
        "{text.__class__.__mro__[1].__subclasses__}",
    ],
)
def test_a_template_that_reaches_for_more_than_a_plain_field_is_refused(template: str, tmp_path: Path) -> None:
    text = yaml.safe_dump({"name": "t", "prompt": f"Say: {template} now", "labels": [" a", " b"]})
    message = one_line_error(Task.load, task_file(tmp_path, text))
    assert "must be a plain {field}" in message
    assert template in message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"shots": 4},
            "unknown field 'shots'; known fields are name, prompt, labels, continuation, "
            "description, source, chat, scoring, hub",
        ),
        ({"builtin": True}, "unknown field 'builtin'"),
        ({"name": None}, "name must be a string, got NoneType None"),
        ({"name": " "}, "name must not be empty"),
        ({"prompt": 3}, "prompt must be a string, got int 3"),
        ({"source": ["x"]}, "source must be a string"),
        ({"labels": "numbers"}, "labels must be a list of strings or \"letters\", got 'numbers'"),
        ({"labels": {"a": 1}}, "labels must be a list of strings"),
        ({"labels": None}, "labels must be a list of strings"),
        ({"labels": []}, "at least two"),
        ({"labels": [" only"]}, "at least two"),
        ({"labels": [" a", " b", " a"]}, "labels must differ, got ' a' at index 0 and 2"),
        ({"labels": [" a", " "]}, "labels must not be empty, got ' ' at index 1"),
        ({"labels": [True, False]}, "labels must be strings, got bool True at index 0: put the label in quotes"),
        ({"chat": "yes"}, "chat must be true or false, got str 'yes'"),
        ({"scoring": "best"}, "scoring must be one of sum, mean, first-token, generate, got 'best'"),
        ({"hub": "owner/name"}, "hub must be a mapping with name and columns, got 'owner/name'"),
        ({"hub": {"config": "x"}}, "hub: field 'name' is missing"),
        ({"hub": {"name": "a/b", "fields": {}}}, "hub: unknown field 'fields'"),
        ({"hub": {"name": "a/b", "columns": {"text": 3}}}, "hub: columns must map names to names"),
        ({"hub": {"name": "a/b", "splits": ["test"]}}, "hub: splits must map names to names"),
        ({"hub": {"name": "a/b", "choice": "("}}, "hub: choice must be a regular expression"),
        ({"hub": {"name": "a/b", "choice": "a"}}, "hub: choice must have one group in brackets"),
        ({"hub": {"name": "a/b", "answers": {"A": "0"}}}, "hub: answers must map answers to zero-based indices"),
        ({"labels": "letters"}, "needs {choices} in the prompt"),
    ],
)
def test_a_wrong_field_of_a_task_file_is_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    description = {"name": "t", "prompt": "{text}:", "labels": [" a", " b"]} | change
    path = task_file(tmp_path, yaml.safe_dump(description))
    message = one_line_error(Task.load, path)
    assert problem in message
    assert str(path) in message


@pytest.mark.parametrize("missing", ["name", "prompt", "labels"])
def test_a_missing_field_of_a_task_file_is_named(missing: str, tmp_path: Path) -> None:
    description = {"name": "t", "prompt": "{text}:", "labels": [" a", " b"]}
    del description[missing]
    path = task_file(tmp_path, yaml.safe_dump(description))
    assert f"field {missing!r} is missing" in one_line_error(Task.load, path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: t\nprompt: [\n", "not YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ('prompt: "\\q"\n', "not YAML"),
    ],
)
def test_a_task_file_that_is_no_mapping_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = task_file(tmp_path, text)
    message = one_line_error(Task.load, path)
    assert problem in message
    assert str(path) in message


def test_a_task_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert one_line_error(Task.load, missing) == f"task file {missing} does not exist"
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in one_line_error(Task.load, tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "not UTF-8" in one_line_error(Task.load, tmp_path / "latin.yaml")


def test_an_unknown_task_name_lists_the_known_ones_and_the_nearest() -> None:
    message = one_line_error(Task.load, "sst-2")
    assert "did you mean 'sst2'?" in message
    assert "openbookqa, piqa, rte, sst2, sst5, subj, trec" in message
    assert "did you mean" not in one_line_error(Task.load, "weather")


@pytest.mark.parametrize("key", ["name", "prompt", "continuation"])
def test_half_of_a_surrogate_pair_in_a_task_is_refused(key: str, tmp_path: Path) -> None:
    description = {"name": "t", "prompt": "{text}:", "continuation": " {text}"}
    description[key] += "\ud83d"
    (tmp_path / "t.yaml").write_text(json.dumps(description), encoding="utf-8")
    assert f"{key} holds '\\ud83d', half of a surrogate pair" in one_line_error(Task.load, tmp_path / "t.yaml")


def test_half_of_a_surrogate_pair_in_labels_fields_and_choices_is_refused() -> None:
    half = "half of a surrogate pair"
    assert half in one_line_error(Task, "t", "{text}:", (" a", " \udc00"))
    assert f"field 'text' holds '\\ud800', {half}" in one_line_error(
        Task("t", "{text}:", (" a", " b")).render, {"text": "a \ud800"}
    )
    letters = Task("t", "{choices}", "letters")
    assert f"field 'choices' holds '\\ud800', {half}" in one_line_error(letters.render, {"choices": ["a", "\ud800"]})


def test_a_task_of_the_users_own_has_no_builtin_examples_even_under_a_builtin_name(tmp_path: Path) -> None:
    task = Task.load(task_file(tmp_path, AGNEWS.replace("agnews", "sst2")))
    assert "no built-in examples" in one_line_error(task.examples)


def test_a_task_has_either_a_continuation_or_labels(tmp_path: Path) -> None:
    text = 'name: t\nprompt: "Q: {question}\\nA:"\ncontinuation: " {answer} ({year})"\n'
    task = Task.load(task_file(tmp_path, text))
    prompt = task.render({"question": "who?", "answer": "{me}", "year": 7}, require_label=True)
    assert (prompt.text, prompt.labels, prompt.label) == ("Q: who?\nA:", (" {me} (7)",), 0)
    assert "field 'answer' is missing" in one_line_error(task.render, {"question": "who?", "year": 7})
    assert "labels or a continuation, not both" in one_line_error(
        Task.load, task_file(tmp_path, text + 'labels: [" a", " b"]\n')
    )
    assert "continuation must hold at least one {field}" in one_line_error(
        Task.load, task_file(tmp_path, text.replace("{answer} ({year})", "yes"))
    )


def test_a_task_file_may_ask_for_a_chat_and_a_scoring(tmp_path: Path) -> None:
    task = Task.load(task_file(tmp_path, AGNEWS + "chat: true\nscoring: mean\n"))
    assert (task.chat, task.scoring) == (True, "mean")
    assert task.render({"text": "x", "label": 0}).labels == ("World", "Sports", "Business", "Technology")
    with pytest.raises(ZeroTuningError, match="scoring first-token needs labels"):
        Task("t", "{a}", continuation="{b}", scoring="first-token")


@pytest.mark.parametrize("name", ["subj", "rte", "agnews", "arc_easy", "logiqa", "math_qa"])
def test_a_builtin_task_without_a_sample_names_the_alternatives(name: str) -> None:
    task = Task.load(name)
    assert task.hub is not None
    message = one_line_error(task.examples)
    assert f"task '{name}' comes without examples: name a JSON lines file (--data FILE.jsonl)" in message
    assert f"{task.hub.name}: --data hub, with zerotuning[datasets]" in message


def test_tasks_can_be_keys_of_dictionaries() -> None:
    assert {Task.load("sst2"): 1}[Task.load("sst2")] == 1
