"""Other wordings of the built-in tasks' prompts, with the same labels. A task's own prompt is wording 0."""

from __future__ import annotations

from collections.abc import Mapping

_REVIEW = (
    "Is the following film review positive or negative?\n{sentence}\nThe review is",
    "Review: {sentence}\nQuestion: What is the sentiment of this review, negative or positive?\nAnswer:",
    'A critic wrote: "{sentence}"\nThis verdict is (negative or positive):',
    "Decide whether the opinion is negative or positive.\nOpinion: {sentence}\nDecision:",
)
_QUESTION = (
    "What does the question ask for: Expression, Entity, Description, Person, Location, or Number?\n"
    "{question}\nIt asks for:",
    "Question: {question}\nKind of answer (Expression, Entity, Description, Person, Location, or Number):",
    "Say which category fits the question: Expression, Entity, Description, Person, Location, or Number.\n"
    "Text: {question}\nCategory:",
    'Someone asks: "{question}"\n'
    "The answer will be an Expression, Entity, Description, Person, Location, or Number, namely",
)
#: Templates of prompts, by task.
WORDINGS: Mapping[str, tuple[str, ...]] = {"sst2": _REVIEW, "mr": _REVIEW, "trec": _QUESTION}
