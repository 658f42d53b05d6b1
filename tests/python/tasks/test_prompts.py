"""Prompts: templates filled with fields, letters for choices, and the templates that are refused."""

from __future__ import annotations

import pytest
from refusals import one_line_error
from zerotuning.tasks.task import Task


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
    ("prompt", "problem"),
    [
        ("{text", "prompt: "),
        ("text}", "prompt: "),
        ("no field", "at least one {field}"),
        ("{{text}}", "at least one {field}"),
        ("{text} {label}", "{label} would show the model the answer"),
    ],
)
def test_a_malformed_template_is_refused(prompt: str, problem: str) -> None:
    assert problem in one_line_error(Task, "t", prompt, (" a", " b"))
