"""MT-Bench's questions, and answers to them in FastChat's file format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record, check_text, read_examples

DATA = Path(__file__).parents[1] / "data" / "mt_bench"
TURNS = 2


@dataclass(frozen=True)
class Question:
    """A user's two turns; `category` is one of eight, such as writing or math."""

    question_id: int
    category: str
    turns: tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """A model's answers in both turns of a question; `record` is the answer's line in its file."""

    question: Question
    model_id: str
    turns: tuple[str, str]
    record: Mapping[str, Any]


def load_questions(limit: int | None = None) -> list[Question]:
    """The 80 questions in order, or the first `limit` of them."""
    records = read_examples(DATA / "question.jsonl")
    questions = [Question(record["question_id"], record["category"], tuple(record["turns"])) for record in records]
    return questions[:limit]


def read_answers(path: str | os.PathLike[str]) -> list[Answer]:
    """Read a file of answers in FastChat's format: question_id, model_id, choices[0].turns; further fields are kept.

    Raises:
        ZeroTuningError: The file is missing, or a line has another shape; the error names the line.
    """
    return parse_answers(read_examples(path))


def parse_answers(records: Iterable[Record]) -> list[Answer]:
    """Convert the lines of a file of answers; the errors are those of `read_answers`."""
    questions = {question.question_id: question for question in load_questions()}
    answers: dict[int, Answer] = {}
    for record in records:
        number = record.get("question_id")
        if isinstance(number, bool) or not isinstance(number, int) or number not in questions:
            raise ZeroTuningError(
                f"{record.origin}: question_id must be one of MT-Bench's, {min(questions)} to {max(questions)},"
                f" got {number!r}"
            )
        if number in answers:
            raise ZeroTuningError(f"{record.origin}: question {number} is answered twice")
        model_id = record.get("model_id")
        if not isinstance(model_id, str):
            raise ZeroTuningError(f"{record.origin}: model_id must be a string, got {model_id!r}")
        check_text(model_id, f"{record.origin}: model_id")
        answers[number] = Answer(questions[number], model_id, _turns(record), record)
    return list(answers.values())


def _turns(record: Record) -> tuple[str, str]:
    try:
        turns = record["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError) as error:
        raise ZeroTuningError(f"{record.origin}: choices[0].turns is missing, which FastChat's answers have") from error
    if not isinstance(turns, list) or len(turns) != TURNS or not all(isinstance(turn, str) for turn in turns):
        raise ZeroTuningError(f"{record.origin}: choices[0].turns must be two strings")
    for turn in turns:
        check_text(turn, f"{record.origin}: choices[0].turns")
    return turns[0], turns[1]
