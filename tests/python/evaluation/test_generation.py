"""Generated texts against a greedy loop written out, and the labels that texts begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from zerotuning.calibration.calibrate import calibrate
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.evaluate import evaluate
from zerotuning.evaluation.generation import GREEDY, chosen_label, generate_texts, generated_accuracy
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"), scoring="generate")


@pytest.mark.parametrize(
    ("text", "labels", "index"),
    [
        (" positive, I think", (" negative", " positive"), 1),
        ("\n\nNEGATIVE", (" negative", " positive"), 0),
        ("It is positive", (" negative", " positive"), None),
        ("", (" negative", " positive"), None),
        ("good film", (" good", " good film", " bad"), 1),
        ("good films", (" good film", " good"), 0),
        ("goo", (" good film", " good"), None),
        ("B. because", (" A", " B"), 1),
    ],
)
def test_an_answer_is_the_longest_label_that_the_text_begins_with(
    text: str, labels: tuple[str, ...], index: int | None
) -> None:
    assert chosen_label(text, labels) == index


def test_a_text_without_a_label_is_wrong() -> None:
    records = [Record({"text": "x", "label": label}, "here") for label in (0, 1, 1, 0)]
    assert generated_accuracy(FILMS, ["negative", "Positive.", "none", "positive"], records) == 0.5


@torch.no_grad()
def greedy_text(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_prompts_of_different_lengths_are_continued_as_each_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    texts = ["good", "a bad story", "far too long, not well told, is it"]
    prompts = tiny_tokenizer(texts)["input_ids"]
    generated = generate_texts(tiny_model, tiny_tokenizer, prompts, 5, **GREEDY)
    assert generated == [greedy_text(tiny_model, tiny_tokenizer, text, 5) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_generated_greedily_after_each_prompt(
    tiny_model: Any, tiny_tokenizer: Any, batch_size: int
) -> None:
    task = Task("said", "Say {text}:", continuation=" {answer}", scoring="generate")
    records = []
    for index, text in enumerate(("good", "a bad story", "far too long, not well told", "films", "x", "the end")):
        written = greedy_text(tiny_model, tiny_tokenizer, f"Say {text}:", 4).strip()
        assert written
        records.append({"text": text, "answer": written[:2] if index % 3 else "something else"})
    found = evaluate(tiny_model, tiny_tokenizer, task, records, batch_size=batch_size)
    assert found.accuracy == pytest.approx(4 / 6)
    assert (found.loss, found.entropy, found.scoring) == (None, None, "generate")


def test_labels_that_differ_by_case_or_space_only_are_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    records = [{"text": "film", "label": 0}]
    for labels in ((" Good", " good"), (" good", "good"), (" bad", " straße", " STRASSE")):
        task = Task("films", FILMS.prompt, labels, scoring="generate")
        with pytest.raises(ZeroTuningError, match=r"^example 0: labels .* differ by case or surrounding space only: "):
            evaluate(tiny_model, tiny_tokenizer, task, records)
        assert evaluate(tiny_model, tiny_tokenizer, replace(task, scoring="sum"), records).examples == 1


def test_cma_es_tunes_generated_answers_and_gradients_refuse(tiny_model: Any, tiny_tokenizer: Any) -> None:
    records = [{"text": f"film {i}", "label": i % 2} for i in range(10)]
    found = calibrate(tiny_model, tiny_tokenizer, FILMS, records=records, method="cma-es", steps=24)
    assert found.report["objective"] == "metric"
    assert found.report["prompts"] == [{"task": "films", "shots": 0, "chat": False, "scoring": "generate"}]
    assert -1 <= found.report["baseline"]["loss"] <= 0
    for method in ("gradient", "paper"):
        with pytest.raises(ZeroTuningError, match=f"^scoring generate has no gradient: .* cma-es, got {method}$"):
            calibrate(tiny_model, tiny_tokenizer, FILMS, records=records, method=method)
    tasks = [FILMS, Task("other", "{text}:", (" a", " b"))]
    with pytest.raises(ZeroTuningError, match=r"^all tasks or none must have the scoring generate$"):
        calibrate(tiny_model, tiny_tokenizer, tasks, records=[records, records], method="cma-es")


def test_a_generated_answer_must_fit_the_context(tiny_model: Any, tiny_tokenizer: Any) -> None:
    word = "z"
    count = 256 - len(tiny_tokenizer("Review: \nSentiment:")["input_ids"])
    record = {"text": word * count, "label": 1}
    plain = Task("films", FILMS.prompt, FILMS.labels)
    assert evaluate(tiny_model, tiny_tokenizer, plain, [record]).examples == 1
    with pytest.raises(ZeroTuningError, match=r"^example 0: .* more than the model's context of 256$"):
        evaluate(tiny_model, tiny_tokenizer, FILMS, [record])
    assert evaluate(tiny_model, tiny_tokenizer, FILMS, [record], truncate=True).examples == 1
