"""The tokens of a prompt's parts: single tokens, the instruction, the labels that it names, the content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

#: The parts that `find_spans` finds. Only the first one includes the initial token: the others begin after it.
POSITIONS = ("initial", "token 1", "token 4", "middle", "last", "random", "instruction", "labels", "content")


def has_position(task: Task, position: str) -> bool:
    """Whether the task's prompts have that part: some have no instruction, or an instruction without the labels."""
    if position == "instruction":
        return bool(_instruction(task))
    if position == "labels":
        return _named_labels(task) is not None
    return position in POSITIONS


def find_spans(
    position: str, task: Task, records: Sequence[Record], tokenizer: Any, lengths: Sequence[int], seed: Sequence[int]
) -> list[tuple[int, int]]:
    """Find a part's tokens in each prompt.

    Args:
        position: One of `POSITIONS`. initial: token 0. token 1, token 4 (the last one, if the prompt is shorter).
            middle: token n // 2 of n. last: token n - 1. random: one of tokens 1 … n - 1, drawn for each example.
            instruction: the template's lines before the line of the first field. labels: from the first to the last
            label that the instruction names. content: from the first field to the last field.
        task: The prompts' task.
        records: The examples.
        tokenizer: A fast tokenizer, which gives the characters of its tokens.
        lengths: Tokens of each prompt.
        seed: Of the random tokens.

    Returns:
        Tokens [first, end) of each prompt, counted from the prompt's first token.

    Raises:
        ZeroTuningError: The task has no such part, or the tokenizer gives no offsets.
    """
    if not has_position(task, position):
        raise ZeroTuningError(f"task {task.name!r} has no position {position!r}")
    if position in ("instruction", "labels", "content"):
        return [_part(position, task, record, tokenizer) for record in records]
    generator = np.random.default_rng(tuple(seed))
    places = [_single(position, length, generator) for length in lengths]
    return [(place, place + 1) for place in places]


def _single(position: str, length: int, generator: np.random.Generator) -> int:
    if position == "random":
        return int(generator.integers(1, length)) if length > 1 else 0
    places = {"initial": 0, "token 1": 1, "token 4": 4, "middle": length // 2, "last": length - 1}
    return min(places[position], length - 1)


def _part(position: str, task: Task, record: Record, tokenizer: Any) -> tuple[int, int]:
    pieces = task.pieces(record)
    begin, end = _characters(position, task, pieces)
    first, last = token_span(tokenizer, "".join(text for _, text in pieces), begin, end)
    return max(first, 1), max(last, 1)


def _characters(position: str, task: Task, pieces: Sequence[tuple[str | None, str]]) -> tuple[int, int]:
    if position == "instruction":
        return 0, len(_instruction(task))
    if position == "labels":
        named = _named_labels(task)
        assert named is not None  # find_spans has checked
        return named
    ends = np.cumsum([len(text) for _, text in pieces])
    fields = [place for place, (name, _) in enumerate(pieces) if name is not None]
    return int(ends[fields[0]]) - len(pieces[fields[0]][1]), int(ends[fields[-1]])


def _instruction(task: Task) -> str:
    """The template's text before the line of the first field; in a template of one line the text before the field."""
    before = task.template_before_fields()
    return before[: before.rindex("\n")] if "\n" in before else before


def _named_labels(task: Task) -> tuple[int, int] | None:
    """Characters from the first to the last label in the instruction; None unless it names all labels."""
    if isinstance(task.labels, str) or not task.labels:
        return None
    instruction = _instruction(task)
    searches = [re.search(rf"\b{re.escape(label.strip())}\b", instruction, re.IGNORECASE) for label in task.labels]
    matches = [match for match in searches if match is not None]
    if len(matches) < len(searches):
        return None
    return min(match.start() for match in matches), max(match.end() for match in matches)


def token_span(tokenizer: Any, text: str, begin: int, end: int) -> tuple[int, int]:
    """The tokens [first, last) of `text` that overlap its characters [begin, end); (0, 0) if none does.

    Raises:
        ZeroTuningError: The tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ZeroTuningError(
            f"spans need a fast tokenizer, which gives the characters of its tokens, got {type(tokenizer).__name__}"
        )
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [place for place, (start, stop) in enumerate(offsets) if start < stop and start < end and stop > begin]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
