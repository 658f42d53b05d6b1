"""Tasks: what a YAML file and a JSON lines file may say, and the one-line error for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record, builtin_examples, builtin_task_names, read_examples
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


def one_line_error(action: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ZeroTuningError) as caught:
        action(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_braces_are_written_double_and_values_are_not_read_as_templates() -> None:
    task = Task("t", "{{set}} {a}{b}{a}", (" x", " y"))
    assert task.fields == ("a", "b")
    assert task.render({"a": "{b}", "b": 7}).text == "{set} {b}7{b}"


def test_letters_make_a_list_of_the_examples_own_choices() -> None:
    task = Task("quiz", "{question}\n{choices}\nAnswer:", "letters")
    prompt = task.render({"question": "2 + 2?", "choices": ["3", "4", "5"], "label": 1})
    assert prompt.text == "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:"
    assert prompt.labels == (" A", " B", " C")
    assert task.render({"question": "?", "choices": ["a", "b"]}).labels == (" A", " B")


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
    ("prompt", "problem"),
    [
        ("{text", "prompt: "),
        ("text}", "prompt: "),
        ("no field", "at least one {field}"),
        ("{{text}}", "at least one {field}"),
        ("{text} {label}", "{label} would show the model the answer"),
    ],
)
def test_a_template_that_makes_no_sense_is_refused(prompt: str, problem: str) -> None:
    assert problem in one_line_error(Task, "t", prompt, (" a", " b"))


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
        ({"labels": [True, False]}, "labels must be strings, got bool True at index 0: put it in quotes"),
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


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"label": 0}, "field 'text' is missing"),
        ({"text": None, "label": 0}, "field 'text' must be a string or a number, got NoneType None"),
        ({"text": ["a"], "label": 0}, "field 'text' must be a string or a number"),
        ({"text": "a", "label": 2}, "field 'label' must be an integer from 0 to 1, got int 2"),
        ({"text": "a", "label": -1}, "field 'label' must be an integer from 0 to 1"),
        ({"text": "a", "label": True}, "got bool True"),
        ({"text": "a", "label": "0"}, "got str '0'"),
        ({"text": "a", "label": 1.0}, "got float 1.0"),
        ({"text": "a"}, "field 'label' is missing"),
    ],
)
def test_a_wrong_field_of_an_example_is_named_with_its_line(line: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine", "label": 1}\n\n' + json.dumps(line) + "\n", encoding="utf-8")
    task = Task("t", "{text}:", (" a", " b"))
    first, second = read_examples(path)
    assert task.render(first, require_label=True).label == 1
    message = one_line_error(task.render, second, require_label=True)
    assert message.startswith(f"{path}:3: ")
    assert problem in message


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


def test_a_label_may_be_missing_where_none_is_required() -> None:
    assert Task("t", "{text}:", (" a", " b")).render({"text": "x"}).label is None


@pytest.mark.parametrize("choices", [None, "ab", ["a"], ["a", 2], ["a"] * 27])
def test_choices_that_are_no_list_of_two_or_more_strings_are_refused(choices: Any) -> None:
    task = Task("t", "{choices}", "letters")
    assert "field 'choices'" in one_line_error(task.render, {"choices": choices, "label": 0})


def test_a_choice_label_beyond_the_examples_own_choices_is_refused() -> None:
    task = Task("t", "{choices}", "letters")
    assert "from 0 to 1, got int 2" in one_line_error(task.render, {"choices": ["a", "b"], "label": 2})


def test_json_lines_are_read_in_utf8_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    # A byte order mark, Windows line ends, a blank line, a line separator inside a string, no final newline.
    path.write_bytes('\ufeff{"text": "naïve"}\r\n  \r\n{"text": "a\u2028b"}'.encode())
    assert read_examples(path) == [{"text": "naïve"}, {"text": "a\u2028b"}]
    assert [record.origin for record in read_examples(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no example"),
        (b"\n \n", "holds no example"),
        (b'{"text": "a"}\n{"text": \n', ":2: not JSON"),
        (b'{"text": "a"}\n["a"]\n', ":2: a line must be a JSON object, got list"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ":2: not UTF-8"),
        (b"[" * 100_000 + b"\n", ":1: not JSON"),
    ],
)
def test_a_bad_data_file_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    message = one_line_error(read_examples, path)
    assert problem in message
    assert str(path) in message


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    assert "none.jsonl does not exist" in one_line_error(read_examples, tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["sst2", "sst5", "mr", "trec", "cb"])
def test_a_builtin_task_ships_examples_of_every_label_that_share_no_text(name: str) -> None:
    task = Task.load(name)
    texts: dict[str, set[str]] = {}
    for split, least in (("validation", 200), ("test", 56 if name == "cb" else 500)):
        records = task.examples(split)
        prompts = [task.render(record, require_label=True) for record in records]
        assert len(prompts) >= least
        assert {prompt.label for prompt in prompts} == set(range(len(task.labels)))
        assert {prompt.label for prompt in prompts[:200]} == set(range(len(task.labels)))
        texts[split] = {" ".join(prompt.text.lower().split()) for prompt in prompts}
    assert not texts["validation"] & texts["test"]


def test_builtin_tasks_are_listed_and_limited() -> None:
    assert builtin_task_names() == [
        *("agnews", "aqua", "arc_challenge", "arc_easy", "boolq", "cb", "commonsense_qa", "logiqa", "math_qa"),
        *("mmlu", "mr", "openbookqa", "piqa", "rte", "sst2", "sst5", "subj", "trec"),
    ]
    assert builtin_examples("sst2", "validation", 3) == builtin_examples("sst2", "validation")[:3]
    assert len(builtin_examples("cb", "test", 10_000)) == 56
    assert "split must be one of validation, test" in one_line_error(builtin_examples, "sst2", "train")
    assert "no built-in task 'x'" in one_line_error(builtin_examples, "x")
    for limit in (0, -1, True, 1.5):
        assert "limit must be a positive integer" in one_line_error(builtin_examples, "sst2", "test", limit)


def test_a_task_of_the_users_own_has_no_builtin_examples_even_under_a_builtin_name(tmp_path: Path) -> None:
    task = Task.load(task_file(tmp_path, AGNEWS.replace("agnews", "sst2")))
    assert "no built-in examples" in one_line_error(task.examples)


def test_a_record_is_a_dictionary_that_knows_its_line() -> None:
    record = Record({"text": "a"}, "data.jsonl:4")
    assert record == {"text": "a"}
    assert record.origin == "data.jsonl:4"


def test_a_continuation_takes_the_place_of_labels(tmp_path: Path) -> None:
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
def test_a_builtin_task_without_a_sample_says_what_would_do(name: str) -> None:
    task = Task.load(name)
    assert task.hub is not None
    message = one_line_error(task.examples)
    assert f"task '{name}' comes without examples: name a JSON lines file (--data FILE.jsonl)" in message
    assert f"{task.hub.name}: --data hub, with zerotuning[datasets]" in message


def test_tasks_can_be_keys_of_dictionaries() -> None:
    assert {Task.load("sst2"): 1}[Task.load("sst2")] == 1
