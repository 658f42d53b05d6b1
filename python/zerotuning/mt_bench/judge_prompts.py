"""The judge's prompts: grading of single answers, from templates in FastChat's format."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from zerotuning.errors import ZeroTuningError
from zerotuning.mt_bench.questions import DATA, Answer, read_answers
from zerotuning.tasks.examples import Record, read_examples

#: Names of templates by whether there is a reference answer, and by turn. The package's own templates have the prefix
#: "zerotuning-": their wording is not FastChat's, and scores by them must not be taken for scores by FastChat's.
NAMES = {
    (False, 1): "single-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 1): "single-math-v1",
    (True, 2): "single-math-v1-multi-turn",
}
OWN_PREFIX = "zerotuning-"
#: The categories whose answers FastChat judges beside a reference answer.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

_FIELD = re.compile(r"\{(question|answer|question_1|question_2|answer_1|answer_2|ref_answer_1|ref_answer_2)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """The prompt of one judgment: its template's name, the system's message and the user's message."""

    name: str
    system: str
    user: str


class JudgePrompts:
    """The templates of a file, and the reference answers of another file.

    Args:
        path: FastChat's judge_prompts.jsonl or a file in that format; None: the package's own file.
        references: Answers in FastChat's format, such as its reference_answer/gpt-4.jsonl; None: no answer is judged
            beside a reference.

    Raises:
        ZeroTuningError: A file is missing or has another shape.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, references: str | os.PathLike[str] | None = None
    ) -> None:
        records = read_examples(DATA / "judge_prompts.jsonl" if path is None else path)
        named = {str(record.get("name")).removeprefix(OWN_PREFIX): _checked(record) for record in records}
        absent = [name for name in NAMES.values() if name not in named]
        if absent:
            raise ZeroTuningError(f"judge prompts {path}: no prompt is named {absent[0]}")
        self.prompts: Mapping[str, Record] = named
        self.references: dict[int, Answer] = {}
        if references is not None:
            self.references = {answer.question.question_id: answer for answer in read_answers(references)}

    def prompt(self, answer: Answer, turn: int) -> JudgePrompt:
        """The judge's prompt for one turn, 1 or 2."""
        reference = self.reference(answer)
        chosen = self.prompts[NAMES[reference is not None, turn]]
        fields = {"question": answer.question.turns[0], "answer": answer.turns[0]}
        for index in range(2):
            fields[f"question_{index + 1}"] = answer.question.turns[index]
            fields[f"answer_{index + 1}"] = answer.turns[index]
            if reference is not None:
                fields[f"ref_answer_{index + 1}"] = reference.turns[index]
        user = _FIELD.sub(lambda match: fields.get(match[1], match[0]), chosen["prompt_template"])
        return JudgePrompt(chosen["name"], chosen["system_prompt"], user)

    def reference(self, answer: Answer) -> Answer | None:
        """The reference answer that the judge sees beside this answer, if there is one."""
        if answer.question.category not in REFERENCE_CATEGORIES:
            return None
        return self.references.get(answer.question.question_id)


def _checked(record: Record) -> Record:
    for name in ("name", "system_prompt", "prompt_template"):
        if not isinstance(record.get(name), str):
            raise ZeroTuningError(f"{record.origin}: {name} must be a string, as in FastChat's judge prompts")
    return record
