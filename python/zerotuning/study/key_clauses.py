"""Which clause of its input a model itself calls the deciding one: AutoPASTA's first step (arXiv 2409.10790).

The paper lets the model generate the key sentences of a long context and maps them to the context's own by likeness. Our tasks'
inputs are mostly single sentences: here clauses take the sentences' place, and the words that are shared are the likeness.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zerotuning.evaluation.generation import generate_texts
from zerotuning.study.spans import token_span
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

#: What follows the prompt, cut behind its input.
QUESTION = '\nThe part of it that decides the answer, word for word: "'
NEW_TOKENS = 16
_BORDER = re.compile(r"[.,;:!?]+\s+|\s-+\s|\s(?=(?:but|and|yet|though|although|while|because)\s)")


def key_clauses(
    model: Any, tokenizer: Any, task: Task, records: Sequence[Record], batch_size: int
) -> list[tuple[int, int]]:
    """Of each example the tokens [first, end) of the clause that the model quotes, counted from the prompt's first token.

    All of the input where the quotation shares no word with it. The tokenizer pads on the left and knows its tokens' characters.
    """
    texts = [_input(task, record) for record in records]
    asked = [before + content + QUESTION for before, content in texts]
    quotations: list[str] = []
    for start in range(0, len(asked), batch_size):
        prompts = tokenizer(asked[start : start + batch_size])["input_ids"]
        quotations += generate_texts(model, tokenizer, prompts, NEW_TOKENS, do_sample=False)
    spans = []
    for record, (before, content), quotation in zip(records, texts, quotations, strict=True):
        begin, end = most_alike(content, quotation)
        prompt = task.render(record).own
        spans.append(token_span(tokenizer, prompt, len(before) + begin, len(before) + end))
    return spans


def most_alike(content: str, quotation: str) -> tuple[int, int]:
    """Characters [begin, end) of the clause of `content` with most words of the quotation; of equals the first."""
    quoted = _words(quotation.split('"')[0])
    found = clauses(content)
    shared = [len(quoted & _words(content[begin:end])) for begin, end in found]
    return found[shared.index(max(shared))] if max(shared, default=0) else (0, len(content))


def clauses(text: str) -> list[tuple[int, int]]:
    """Characters [begin, end) of the parts of a text between punctuation, or before a conjunction."""
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
