"""Prompts: templates filled with an example's fields, behind solved examples (shots), as text or as a chat."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import LETTERS_OF_CHOICES, choices_of, field_text

#: How a label is scored: by the sum or the mean of its tokens' log-probabilities, by its first token's
#: log-probability, or by whether the generated text begins with the label.
SCORINGS = ("sum", "mean", "first-token", "generate")
#: The largest number of solved examples before a prompt.
MAX_SHOTS = 16
#: The text between a solved example and the next example.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Shot:
    """A solved example.

    Attributes:
        prompt: The prompt of the example.
        answer: The gold label or continuation, as the task writes it.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """The texts of an example for a model.

    Attributes:
        own: The example's own prompt.
        labels: The texts that may follow the prompt; a single text for a task with a continuation.
        label: The index of the gold label, None where the example has none.
        shots: Solved examples before the prompt.
        chat: Whether the prompt is a chat: `own` is the user's last turn, shots are earlier turns.
    """

    own: str
    labels: tuple[str, ...]
    label: int | None
    shots: tuple[Shot, ...] = ()
    chat: bool = False

    @property
    def text(self) -> str:
        """All text before the label; for a chat the user's last turn, without the tokenizer's chat template."""
        if self.chat:
            return self.own
        return "".join(shot.prompt + shot.answer + SEPARATOR for shot in self.shots) + self.own

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of a chat, in the form that chat templates read."""
        turns = []
        for shot in self.shots:
            turns.append({"role": "user", "content": shot.prompt})
            turns.append({"role": "assistant", "content": shot.answer.strip()})
        return [*turns, {"role": "user", "content": self.own}]


@dataclass(frozen=True)
class Template:
    """A text with `{field}`s, which the fields of an example fill; `{{` and `}}` stand for braces.

    str.format, whose fields can reach into objects, is not used on a template.

    Attributes:
        key: The template's name in a task file, for error messages.
        text: The template.
        pieces: (literal text, name of the field after it or None), in order.

    Raises:
        ZeroTuningError: The text contains no field, or a field that is not a plain `{field}`.
    """

    key: str
    text: str
    pieces: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ZeroTuningError(f"{self.key}: {error}; write {{{{ and }}}} for braces that are text") from error
        for _, name, format_spec, conversion in parsed:
            if name is not None:
                _check_field(self.key, name, format_spec, conversion)
        pieces = tuple((literal, name) for literal, name, _, _ in parsed)
        if all(name is None for _, name in pieces):
            raise ZeroTuningError(f"{self.key} must hold at least one {{field}}, or every example would read the same")
        object.__setattr__(self, "pieces", pieces)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def filled_pieces(
        self, record: Mapping[str, Any], origin: str, values: Mapping[str, str] | None = None
    ) -> list[tuple[str | None, str]]:
        """The template filled, in pieces.

        Args:
            record: The example.
            origin: The name of the example in error messages.
            values: Texts of fields, in place of the record's own.

        Returns:
            (None, literal text) and (name of a field, its text), in order.
        """
        values = values or {}
        filled: list[tuple[str | None, str]] = []
        for literal, name in self.pieces:
            if literal:
                filled.append((None, literal))
            if name is not None:
                filled.append((name, values[name] if name in values else field_text(record, name, origin)))
        return filled

    def filled(self, record: Mapping[str, Any], origin: str) -> str:
        """The template filled with an example's fields; `origin` names the example in error messages."""
        return "".join(text for _, text in self.filled_pieces(record, origin))


def _check_field(key: str, name: str, format_spec: str | None, conversion: str | None) -> None:
    written = "{" + name + (f"!{conversion}" if conversion else "") + (f":{format_spec}" if format_spec else "") + "}"
    if conversion or format_spec:
        raise ZeroTuningError(f"{key}: {written} must be a plain {{field}}, without conversion or format")
    if not name.isidentifier():
        raise ZeroTuningError(
            f"{key}: {written} must be a plain {{field}}: a name of letters, digits and underscores,"
            " without attributes, indices or positions"
        )
    if name == "label" and key == "prompt":
        raise ZeroTuningError("prompt: {label} would show the model the answer")


def lettered_choices(record: Mapping[str, Any], origin: str) -> str:
    """The choices of an example as lines "A. ...", "B. ..."; `origin` names the example in error messages."""
    choices = choices_of(record, origin)
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS_OF_CHOICES, choices, strict=False))


def letter_labels(record: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """The labels " A", " B", ... of an example's choices; `origin` names the example in errors."""
    return tuple(f" {letter}" for letter in LETTERS_OF_CHOICES[: len(choices_of(record, origin))])
