"""Examples: JSON lines files, the package's samples, and the one-line error for a bad file or field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import one_line_error
from zerotuning.tasks.examples import Record, builtin_examples, builtin_task_names, read_examples
from zerotuning.tasks.task import Task


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


def test_a_record_is_a_dictionary_with_the_line_of_its_origin() -> None:
    record = Record({"text": "a"}, "data.jsonl:4")
    assert record == {"text": "a"}
    assert record.origin == "data.jsonl:4"
