r"""Tasks: a prompt template and labels, read from YAML files.

    name: agnews
    prompt: "Classify the article into World, Sports, Business, or Technology.\nArticle: {text}\nCategory:"
    labels: [" World", " Sports", " Business", " Technology"]

A built-in task is such a file in the package's data. `{field}` names a field of an example; `{{` and `}}` stand for
braces. An example is one line of a JSON lines file with the fields of the prompt and `label`, a zero-based index into
`labels`. With `labels: letters` each example has its own `choices`: `{choices}` becomes "A. ...\nB. ..." and the labels
are " A", " B", and so on.

With `continuation: " {answer}"` in place of labels the right answer is any text with fields of the example.
`chat: true` makes each prompt a user's turn in the tokenizer's chat template; `scoring` is one of SCORINGS; `hub`
names the data set on the Hugging Face hub (hub.py).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from zerotuning.errors import ZeroTuningError, shown
from zerotuning.tasks.examples import (
    DATA,
    Record,
    as_records,
    builtin_examples,
    builtin_task_names,
    check_text,
    has_builtin_examples,
    label_of,
    read_bytes,
)
from zerotuning.tasks.hub import HubSource
from zerotuning.tasks.prompts import SCORINGS, Prompt, Shot, Template, letter_labels, lettered_choices

LETTERS = "letters"

_KEYS = ("name", "prompt", "labels", "continuation", "description", "source", "chat", "scoring", "hub")
_REQUIRED_KEYS = ("name", "prompt")


@dataclass(frozen=True)
class Task:
    """A prompt template and its labels.

    Attributes:
        name: The task's name.
        prompt: The template of the prompt.
        labels: The labels' texts, or "letters" where each example has its own choices; empty with a continuation.
        description: One line about the task.
        source: The origin of the task's data.
        builtin: Whether the package includes the task.
        continuation: The template of the text that should follow the prompt; empty with labels.
        shots: Solved examples before every prompt (`with_shots`).
        chat: Whether the prompt is a user's turn in the tokenizer's chat template. Labels then lose leading spaces.
        scoring: How labels are scored, one of SCORINGS. A continuation has no scoring `first-token`.
        hub: The task's data set on the Hugging Face hub.
        shot_seed: The seed that drew the shots.

    Raises:
        ZeroTuningError: A template contains anything but plain fields; labels are empty or repeated; there are labels
            and a continuation, or neither; the scoring is unknown; UTF-8 cannot represent a text.
    """

    name: str
    prompt: str
    labels: tuple[str, ...] | str = ()
    description: str = ""
    source: str = ""
    builtin: bool = False
    continuation: str = ""
    shots: tuple[Shot, ...] = ()
    chat: bool = False
    scoring: str = "sum"
    hub: HubSource | None = field(default=None, compare=False)
    shot_seed: int | None = field(default=None, compare=False)
    _prompt: Template = field(init=False, repr=False, compare=False)
    _continuation: Template | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("name", "prompt", "continuation", "description", "source"):
            if not isinstance(getattr(self, key), str):
                raise ZeroTuningError(f"{key} must be a string, got {shown(getattr(self, key))}")
            check_text(getattr(self, key), key)
        if not isinstance(self.chat, bool):
            raise ZeroTuningError(f"chat must be true or false, got {shown(self.chat)}")
        if self.scoring not in SCORINGS:
            raise ZeroTuningError(f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}")
        if self.continuation and self.scoring == "first-token":
            raise ZeroTuningError("scoring first-token needs labels to choose among, a continuation has none")
        if not self.name.strip():
            raise ZeroTuningError("name must not be empty")
        object.__setattr__(self, "_prompt", Template("prompt", self.prompt))
        object.__setattr__(self, "_continuation", None)
        if self.continuation:
            if self.labels:
                raise ZeroTuningError("a task has labels or a continuation, not both")
            object.__setattr__(self, "_continuation", Template("continuation", self.continuation))
        elif isinstance(self.labels, str):
            if self.labels != LETTERS:
                raise ZeroTuningError(f'labels must be a list of strings or "{LETTERS}", got {self.labels!r}')
            if "choices" not in self.fields:
                raise ZeroTuningError(f"labels: {LETTERS} needs {{choices}} in the prompt, got fields {self.fields}")
        else:
            object.__setattr__(self, "labels", _checked_labels(self.labels))

    @staticmethod
    def load(name_or_path: str | os.PathLike[str]) -> Task:
        """The built-in task of a name, or the task that a .yaml (.yml) file describes.

        Raises:
            ZeroTuningError: There is no such task or file, or the file is bad.
        """
        text = os.fspath(name_or_path)
        if text.lower().endswith((".yaml", ".yml")):
            return _read_task(Path(text), builtin=False)
        names = builtin_task_names()
        if text in names:
            return _read_task(DATA / "tasks" / f"{text}.yaml", builtin=True)
        nearest = difflib.get_close_matches(text.lower(), names, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ZeroTuningError(
            f"unknown task {text!r}{hint} (known tasks: {', '.join(names)}, or the path of a .yaml file)"
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that the prompt uses, each once, in order."""
        return self._prompt.fields

    def template_before_fields(self) -> str:
        """The text before the prompt's first field, which is the same for all examples."""
        return self._prompt.pieces[0][0]

    def with_shots(self, records: Iterable[Mapping[str, Any]], seed: int | None = None) -> Task:
        """The same task with these solved examples before every prompt, in place of earlier ones.

        A solved example is its prompt, its gold label or continuation, and a blank line.

        Args:
            records: The examples; `few_shot.draw_shots` draws them.
            seed: The seed of the draw, for reports.

        Raises:
            ZeroTuningError: A record lacks a field or its label.
        """
        shots = []
        for record in as_records(records):
            prompt = self.render(record, require_label=True)
            assert prompt.label is not None
            shots.append(Shot(prompt.own, prompt.labels[prompt.label]))
        return replace(self, shots=tuple(shots), shot_seed=seed)

    def render(self, record: Mapping[str, Any], *, require_label: bool = False, origin: str | None = None) -> Prompt:
        """The prompt of one example.

        Args:
            record: The example.
            require_label: Whether a missing `label` is an error; otherwise `Prompt.label` is None for such an example.
            origin: The name of the example in error messages; by default the file and line of the example.

        Raises:
            ZeroTuningError: A field is missing or wrong. The error names the example and the field.
        """
        origin = str(origin or getattr(record, "origin", "example"))
        if self._continuation is not None:
            continuation = self._continuation.filled(record, origin)
            if not continuation.strip():
                raise ZeroTuningError(f"{origin}: the continuation is empty")
            text = self._prompt.filled(record, origin)
            return Prompt(text, self._answers((continuation,)), 0, self.shots, self.chat)
        labels = letter_labels(record, origin) if isinstance(self.labels, str) else self.labels
        text = "".join(piece for _, piece in self.pieces(record, origin=origin))
        label = label_of(record, len(labels), require_label, origin)
        return Prompt(text, self._answers(labels), label, self.shots, self.chat)

    def pieces(self, record: Mapping[str, Any], *, origin: str | None = None) -> list[tuple[str | None, str]]:
        """The prompt of one example in pieces: (None, text of the template) or (field name, its text).

        The joined texts are `render(record).own`. Arguments and errors are those of `render`.
        """
        origin = str(origin or getattr(record, "origin", "example"))
        values = {"choices": lettered_choices(record, origin)} if self.labels == LETTERS else {}
        return self._prompt.filled_pieces(record, origin, values)

    def _answers(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """The answers; in a chat without the space that would separate an answer from its prompt."""
        return tuple(text.lstrip() for text in texts) if self.chat else texts

    @property
    def has_examples(self) -> bool:
        """Whether the package includes examples of the task."""
        return self.builtin and has_builtin_examples(self.name)

    def examples(self, split: str = "test", limit: int | None = None) -> list[Record]:
        """The first examples of a built-in task's sample.

        Args:
            split: "validation" or "test".
            limit: Number of examples; by default all.

        Raises:
            ZeroTuningError: The package includes no examples of the task; the error names the alternatives.
        """
        if not self.builtin:
            raise ZeroTuningError(f"task {self.name!r} has no built-in examples: name a JSON lines file")
        if not self.has_examples:
            hub = f", or its data set {self.hub.name}: --data hub, with zerotuning[datasets]" if self.hub else ""
            raise ZeroTuningError(
                f"task {self.name!r} comes without examples: name a JSON lines file (--data FILE.jsonl){hub}"
            )
        return builtin_examples(self.name, split, limit)


def _checked_labels(labels: Any) -> tuple[str, ...]:
    if not isinstance(labels, (list, tuple)):
        raise ZeroTuningError(f'labels must be a list of strings or "{LETTERS}", got {shown(labels)}')
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ZeroTuningError(
                f"labels must be strings, got {shown(label)} at index {index}: put the label in quotes"
            )
        if not label.strip():
            raise ZeroTuningError(f"labels must not be empty, got {label!r} at index {index}")
        check_text(label, f"the label at index {index}")
        if label in labels[:index]:
            raise ZeroTuningError(f"labels must differ, got {label!r} at index {labels.index(label)} and {index}")
    if len(labels) < 2:
        raise ZeroTuningError(f"labels must be at least two, got {list(labels)}")
    return tuple(labels)


def _read_task(path: Path, *, builtin: bool) -> Task:
    description = _read_description(path)
    for key in description:
        if key not in _KEYS:
            raise ZeroTuningError(f"task file {path}: unknown field {key!r}; known fields are {', '.join(_KEYS)}")
    for key in _REQUIRED_KEYS:
        if key not in description:
            raise ZeroTuningError(f"task file {path}: field {key!r} is missing")
    if "labels" not in description and "continuation" not in description:
        raise ZeroTuningError(f"task file {path}: field 'labels' is missing, or 'continuation' in its place")
    labels = description.get("labels", [])
    if not isinstance(labels, (list, str)):
        raise ZeroTuningError(f'task file {path}: labels must be a list of strings or "{LETTERS}", got {shown(labels)}')
    try:
        hub = HubSource.from_yaml(description["hub"]) if "hub" in description else None
        return Task(**(description | {"hub": hub}), builtin=builtin)
    except ZeroTuningError as error:
        raise ZeroTuningError(f"task file {path}: {error}") from error


def _read_description(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file contains."""
    content = read_bytes(path, "task file")
    try:
        description = yaml.safe_load(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ZeroTuningError(f"task file {path} is not UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else f"task file {path}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ZeroTuningError(f"{place}: not YAML: {problem}") from error
    if not isinstance(description, dict):
        raise ZeroTuningError(f"task file {path} must be a mapping with name, prompt, labels, got {shown(description)}")
    return description
