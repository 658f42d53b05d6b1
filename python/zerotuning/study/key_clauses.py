"""The clause of an input that the model quotes as the deciding clause: AutoPASTA's first step (arXiv 2409.10790).

In the paper the model generates the key sentences of a long context, which are matched to the context's sentences by
similarity. The inputs of our tasks are mostly single sentences, so clauses replace sentences, and the similarity is the
number of shared words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zerotuning.evaluation.generation import generate_texts
from zerotuning.study.spans import token_span
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

#: Follows the part of the prompt up to the end of the input.
QUESTION = '\nThe part of it that decides the answer, word for word: "'
NEW_TOKENS = 16
_BORDER = re.compile(r"[.,;:!?]+\s+|\s-+\s|\s(?=(?:but|and|yet|though|although|while|because)\s)")


def key_clauses(
    model: Any, tokenizer: Any, task: Task, records: Sequence[Record], batch_size: int
) -> list[tuple[int, int]]:
    """Find the clause that the model quotes in each example's input.

    Args:
        model: Generates the quotations.
        tokenizer: A fast tokenizer, which gives the characters of its tokens.
        task: The examples' task.
        records: The examples.
        batch_size: Prompts of one batch of generation.

    Returns:
        The clauses' tokens [first, end), counted from the prompt's first token; the whole input where the quotation
        shares no word with it.
    """
    texts = [_input(task, record) for record in records]
    questions = [before + content + QUESTION for before, content in texts]
    quotations: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = tokenizer(questions[start : start + batch_size])["input_ids"]
        quotations += generate_texts(model, tokenizer, prompts, NEW_TOKENS, do_sample=False)
    spans = []
    for record, (before, content), quotation in zip(records, texts, quotations, strict=True):
        begin, end = most_alike(content, quotation)
        prompt = task.render(record).own
        spans.append(token_span(tokenizer, prompt, len(before) + begin, len(before) + end))
    return spans


def most_alike(content: str, quotation: str) -> tuple[int, int]:
    """Characters [begin, end) of the first clause of `content` that shares most words with the quotation."""
    quoted = _words(quotation.split('"')[0])
    parts = clauses(content)
    shared = [len(quoted & _words(content[begin:end])) for begin, end in parts]
    return parts[shared.index(max(shared))] if max(shared, default=0) else (0, len(content))


def clauses(text: str) -> list[tuple[int, int]]:
    """Characters [begin, end) of a text's parts between punctuation marks and before conjunctions."""
    begins = [0, *(match.end() for match in _BORDER.finditer(text))]
    ends = [*(match.start() for match in _BORDER.finditer(text)), len(text)]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if text[begin:end].strip()]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _input(task: Task, record: Record) -> tuple[str, str]:
    """(the prompt before its first field, the text from the first field to the last)."""
    pieces = task.pieces(record)
    fields = [place for place, (name, _) in enumerate(pieces) if name is not None]
    before = "".join(text for _, text in pieces[: fields[0]])
    return before, "".join(text for _, text in pieces[fields[0] : fields[-1] + 1])
