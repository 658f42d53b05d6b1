"""Few-shot prompts: their text, written out by hand, and the draw of the shots."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from zerotuning.calibration.calibrate import calibrate
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import as_records
from zerotuning.tasks.few_shot import draw_shots, without_shots
from zerotuning.tasks.task import Task

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
RECORDS = [{"text": f"film {i}", "label": i % 2} for i in range(12)]


def test_shots_are_prompts_with_their_answers_and_a_blank_line_after_each() -> None:
    task = FILMS.with_shots([{"text": "a {joy}", "label": 1}, {"text": "a bore", "label": 0}])
    prompt = task.render({"text": "fine", "label": 1})
    assert prompt.text == (
        "Review: a {joy}\nSentiment: positive\n\nReview: a bore\nSentiment: negative\n\nReview: fine\nSentiment:"
    )
    assert prompt.own == "Review: fine\nSentiment:"
    assert (prompt.labels, prompt.label) == ((" negative", " positive"), 1)
    assert task.with_shots([]).render({"text": "fine"}).text == "Review: fine\nSentiment:"


def test_shots_of_choices_and_of_continuations_show_the_right_answer() -> None:
    quiz = Task("quiz", "{question}\n{choices}\nAnswer:", "letters")
    shown = quiz.with_shots([{"question": "2 + 2?", "choices": ["3", "4"], "label": 1}])
    assert shown.render({"question": "1 + 1?", "choices": ["2", "3", "4"]}).text == (
        "2 + 2?\nA. 3\nB. 4\nAnswer: B\n\n1 + 1?\nA. 2\nB. 3\nC. 4\nAnswer:"
    )
    asked = Task("asked", "Q: {question}\nA:", continuation=" {answer}")
    shown = asked.with_shots([{"question": "who?", "answer": "me, {you}"}])
    assert shown.render({"question": "when?", "answer": "now"}).text == "Q: who?\nA: me, {you}\n\nQ: when?\nA:"


def test_a_shot_without_its_label_is_an_error_that_names_it() -> None:
    with pytest.raises(ZeroTuningError, match=r"^example 1: field 'label' is missing$"):
        FILMS.with_shots([RECORDS[0], {"text": "unlabelled"}])


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_gives_every_label_its_share_and_smaller_draws_begin_larger_ones(seed: int) -> None:
    task = Task.load("trec")
    records = task.examples("validation")
    drawn = draw_shots(task, records, 16, seed)
    counts = Counter(record["label"] for record in drawn)
    assert sorted(counts.values()) == [2, 2, 3, 3, 3, 3]
    assert len({record.origin for record in drawn}) == 16
    for count in (0, 1, 6, 15):
        assert draw_shots(task, records, count, seed) == drawn[:count]
    assert {record["label"] for record in drawn[:6]} == set(range(6))
    assert draw_shots(task, records, 16, seed + 1) != drawn


def test_other_labels_fill_the_places_of_labels_that_run_out_of_records() -> None:
    records = [{"text": f"film {i}", "label": int(i == 3)} for i in range(6)]
    drawn = draw_shots(FILMS, records, 6)
    assert sorted(record["text"] for record in drawn) == [f"film {i}" for i in range(6)]
    assert 1 in [record["label"] for record in drawn[:2]]


def test_choices_and_continuations_are_drawn_without_regard_to_labels() -> None:
    quiz = Task("quiz", "{question}\n{choices}\nAnswer:", "letters")
    records = [{"question": str(i), "choices": ["a", "b", "c"], "label": i % 3} for i in range(9)]
    drawn = draw_shots(quiz, records, 4, 3)
    assert drawn == draw_shots(quiz, records, 4, 3)
    assert len({record["question"] for record in drawn}) == 4
    asked = Task("asked", "Q: {question}\nA:", continuation=" {answer}")
    assert len(draw_shots(asked, [{"question": str(i), "answer": "x"} for i in range(3)], 3)) == 3


@pytest.mark.parametrize(
    ("count", "seed", "problem"),
    [
        (17, 0, "shots must be an integer from 0 to 16, got 17"),
        (-1, 0, "shots must be an integer from 0 to 16, got -1"),
        (True, 0, "shots must be an integer from 0 to 16, got True"),
        (13, 0, "shots must be at most 12, the number of examples to draw from, got 13"),
        (1, -1, "shot seed must be an integer of at least 0, got -1"),
    ],
)
def test_an_impossible_draw_is_refused(count: Any, seed: int, problem: str) -> None:
    with pytest.raises(ZeroTuningError, match=f"^{problem}$"):
        draw_shots(FILMS, RECORDS, count, seed)


def test_calibration_excludes_the_shots_and_their_duplicates(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    shots = [RECORDS[0], RECORDS[5]]
    task = FILMS.with_shots(shots)
    records = [*RECORDS, dict(RECORDS[5])]
    kept = without_shots(task, as_records(records))
    assert [record["text"] for record in kept] == [f"film {i}" for i in range(12) if i not in (0, 5)]
    found = calibrate(tiny_model, tiny_tokenizer, task, records=records, steps=2)
    assert found.report["examples"] == 10
    with pytest.raises(ZeroTuningError, match="calibration needs at least 4 examples, got 3"):
        calibrate(tiny_model, tiny_tokenizer, task, records=records[:4], steps=2)
