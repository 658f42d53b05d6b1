"""Data of the hub: columns to fields with data sets built here, local folders, and the errors without a network."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.evaluate import evaluate
from zerotuning.tasks.hub import hub_examples, is_hub_name, records_of, without_split
from zerotuning.tasks.task import Task

datasets = pytest.importorskip("datasets")


def rows_of(task_name: str, rows: list[dict[str, Any]], **features: Any) -> list[Any]:
    """Return the prompts of rows whose columns a built-in task maps to fields."""
    task = Task.load(task_name)
    assert task.hub is not None
    dataset = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    return [task.render(record) for record in records_of(task.hub, dataset, "here[test]")]


def test_a_class_label_is_its_number_and_minus_one_is_no_label() -> None:
    names = datasets.ClassLabel(names=["entailment", "not_entailment"])
    rows = [{"sentence1": f"it is {i}", "sentence2": "rain", "label": label} for i, label in enumerate((1, 0, -1))]
    prompts = rows_of("rte", rows, label=names)
    assert [prompt.label for prompt in prompts] == [1, 0, None]
    assert "\nPremise: it is 0\nHypothesis: rain\nAnswer:" in prompts[0].text


def test_choices_inside_a_column_and_answers_by_letter_or_digit() -> None:
    choices = {"text": ["iron", "wood", "salt"], "label": ["A", "B", "C"]}
    rows = [{"question": "What burns?", "choices": choices, "answerKey": key} for key in ("B", "3")]
    for task in ("arc_easy", "arc_challenge"):
        prompts = rows_of(task, rows)
        assert prompts[0].text == "Question: What burns?\nA. iron\nB. wood\nC. salt\nAnswer:"
        assert [prompt.label for prompt in prompts] == [1, 2]


def test_choices_of_several_columns() -> None:
    (prompt,) = rows_of("piqa", [{"goal": "to open a jar", "sol1": "twist", "sol2": "sing", "label": 0}])
    assert (prompt.text, prompt.label) == ("Question: to open a jar\nA. twist\nB. sing\nAnswer:", 0)


def test_letters_before_choices_are_removed() -> None:
    (prompt,) = rows_of("aqua", [{"question": "2 + 2?", "options": ["A)3", "B) 4 ", "C)5"], "correct": "B"}])
    assert (prompt.text, prompt.label) == ("Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:", 1)


def test_choices_within_one_text_are_split() -> None:
    options = "a ) 38 , b ) 27 , 675 , c ) data (d) inadequate , d ) x , e ) none of these"
    (prompt,) = rows_of("math_qa", [{"Problem": "How many?", "options": options, "correct": "e"}])
    assert prompt.text == (
        "Question: How many?\nA. 38\nB. 27 , 675\nC. data (d) inadequate\nD. x\nE. none of these\nAnswer:"
    )
    assert prompt.label == 4


def test_truth_values_are_answers() -> None:
    prompts = rows_of("boolq", [{"question": "is it?", "answer": answer, "passage": "p"} for answer in (True, False)])
    assert [prompt.label for prompt in prompts] == [1, 0]


def test_an_unknown_answer_and_a_missing_column_are_named() -> None:
    with pytest.raises(ZeroTuningError, match=r"^here\[test\]:0: answer 'Z' is none of A, B, C, D, E$"):
        rows_of("aqua", [{"question": "?", "options": ["A)3", "B)4"], "correct": "Z"}])
    with pytest.raises(ZeroTuningError, match=r"^data here\[test\] have no column 'text': there are words, label$"):
        rows_of("subj", [{"words": "x", "label": 0}])
    with pytest.raises(ZeroTuningError, match=r"^here\[test\]:0: choice '3' does not match"):
        rows_of("aqua", [{"question": "?", "options": ["3", "B)4"], "correct": "A"}])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder with a data set of two splits; the cache of `datasets` is beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "films"
    place.mkdir()
    for split, count in (("train", 8), ("test", 3)):
        rows = [{"text": f"{split} good {i}", "label": i % 2} for i in range(count)]
        datasets.Dataset.from_list(rows).to_json(place / f"{split}.jsonl")
    return place


def test_a_local_folder_is_read_through_the_same_function(folder: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    task = Task.load("subj")
    records = hub_examples(task, f"hub:{folder}", "test")
    assert [(record["sentence"], record["label"]) for record in records] == [
        (f"test good {i}", i % 2) for i in range(3)
    ]
    assert records[2].origin == f"{folder}[test]:2"
    assert (
        len(hub_examples(task, f"hub:{folder}", "validation")) == 8
    )  # subj's validation split is the data set's train split
    assert len(hub_examples(task, f"hub:{folder}:train", "test")) == 8
    own = Task("mine", "Review: {text}\nSentiment:", (" negative", " positive"))
    assert evaluate(tiny_model, tiny_tokenizer, own, f"hub:{folder}").examples == 3
    with pytest.raises(ZeroTuningError, match=r"cannot load data .*\[dev\]: Unknown split"):
        hub_examples(task, f"hub:{folder}:dev", "test")


def test_hub_names_are_split_into_repository_configuration_and_split() -> None:
    assert is_hub_name("hub")
    assert is_hub_name("hub:a/b")
    assert not is_hub_name("hub.jsonl")
    assert without_split("hub:a/b/c:test") == "hub:a/b/c"
    assert without_split("hub") == "hub"
    task = Task.load("subj")
    for name in ("hub:", "hub:a//b", "hub:a/b/c/d", "hub:a/b:"):
        with pytest.raises(ZeroTuningError, match=r"^data must be hub, hub:owner/name"):
            hub_examples(task, name, "test")
    with pytest.raises(ZeroTuningError, match=r"^task 'mine' names no data set of the hub"):
        hub_examples(Task("mine", "{text}", (" a", " b")), "hub", "test")


def test_a_missing_datasets_package_is_an_error_that_names_the_extra(monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    missing = lambda name, *more: None if name == "datasets" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    message = r'^data hub need the package datasets: pip install "zerotuning\[datasets\]", or name a JSON lines file$'
    with pytest.raises(ZeroTuningError, match=message):
        hub_examples(Task.load("subj"), "hub", "test")


def test_without_a_network_the_error_asks_for_a_file_without_retries(monkeypatch: Any, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("Session", (), {"head": unreachable}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    message = r"^cannot load data SetFit/subj\[test\]: .*; without a network, name a JSON lines file in its place$"
    with pytest.raises(ZeroTuningError, match=message):
        hub_examples(Task.load("subj"), "hub", "test")
    assert time.monotonic() - started < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
