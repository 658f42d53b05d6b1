"""Tasks: a prompt template and labels, and the examples that fill them in.

A task is a YAML file, a built-in one no less than a user's (design.md §7):

    name: agnews
    prompt: "Classify the article into World, Sports, Business, or Technology.\\nArticle: {text}\\nCategory:"
    labels: [" World", " Sports", " Business", " Technology"]

`{field}` names a field of an example; `{{` and `}}` stand for braces. An example is one line of a JSON lines
file with the fields of the prompt and `label`, a zero-based index into `labels`. With `labels: letters` each
example brings its own `choices`, `{choices}` becomes "A. …\\nB. …" and the labels are " A", " B", ….

With `continuation: " {answer}"` in place of labels the right answer is a text of any length, made of fields.

`chat: true` makes each prompt a user's turn in the tokenizer's chat template; `scoring` is one of SCORINGS. `hub`
says where the data set lies on the hub (hub_source.py).
"""

from __future__ import annotations

import difflib
import json
import numbers
import os
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.hub_source import HubSource
from zerotuning.tasks.prompts import SCORINGS, Prompt, Shot

LETTERS = "letters"
SPLITS = ("validation", "test")

_DATA = Path(__file__).parents[1] / "data"
_KNOWN_KEYS = ("name", "prompt", "labels", "continuation", "description", "source", "chat", "scoring", "hub")
_REQUIRED_KEYS = ("name", "prompt")
_ALPHABET = string.ascii_uppercase


class Record(dict[str, Any]):
    """One example as its JSON line has it; `origin` says which line, for error messages ("test.jsonl:12")."""

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        super().__init__(fields)
        self.origin = origin


@dataclass(frozen=True)
class Task:
    """A prompt template and its labels. `labels` is a tuple, or "letters" where each example brings its
    choices; empty where `continuation`, a template like the prompt, gives the text that should follow. `shots` are
    solved examples that stand before every prompt (`with_shots`), drawn by `shot_seed`. With `chat` the prompt is a user's turn in the
    tokenizer's chat template, and labels lose the space before them. `scoring` is one of SCORINGS; a continuation is
    scored by all its tokens (per token), or generated.

    Errors: ZeroTuningError for a template that holds anything but plain fields, for empty or repeated labels,
    for labels and a continuation together or neither, for an unknown scoring, for text that UTF-8 cannot hold.
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
    _pieces: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)
    _continuation_pieces: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("name", "prompt", "continuation", "description", "source"):
            if not isinstance(getattr(self, key), str):
                raise ZeroTuningError(f"{key} must be a string, got {_shown(getattr(self, key))}")
            check_text(getattr(self, key), key)
        if not isinstance(self.chat, bool):
            raise ZeroTuningError(f"chat must be true or false, got {_shown(self.chat)}")
        if self.scoring not in SCORINGS:
            raise ZeroTuningError(f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}")
        if self.continuation and self.scoring == "first-token":
            raise ZeroTuningError("scoring first-token needs labels to choose among, a continuation has none")
        if not self.name.strip():
            raise ZeroTuningError("name must not be empty")
        object.__setattr__(self, "_pieces", _template_pieces("prompt", self.prompt))
        object.__setattr__(self, "_continuation_pieces", ())
        if self.continuation:
            if self.labels:
                raise ZeroTuningError("a task has labels or a continuation, not both")
            pieces = _template_pieces("continuation", self.continuation)
            object.__setattr__(self, "_continuation_pieces", pieces)
        elif isinstance(self.labels, str):
            if self.labels != LETTERS:
                raise ZeroTuningError(f'labels must be a list of strings or "{LETTERS}", got {self.labels!r}')
            if "choices" not in self.fields:
                raise ZeroTuningError(f"labels: {LETTERS} needs {{choices}} in the prompt, got fields {self.fields}")
        else:
            object.__setattr__(self, "labels", _checked_labels(self.labels))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that the prompt uses, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))

    def template_before_fields(self) -> str:
        """The text that stands before the first field: the same for all examples."""
        return self._pieces[0][0]

    @property
    def has_examples(self) -> bool:
        """Whether the package brings examples of it."""
        return self.builtin and (_DATA / self.name).is_dir()

    @staticmethod
    def load(name_or_path: str | os.PathLike[str]) -> Task:
        """The built-in task of that name, or the task that a .yaml (.yml) file describes."""
        text = os.fspath(name_or_path)
        if text.lower().endswith((".yaml", ".yml")):
            return _read_task(Path(text), builtin=False)
        known = builtin_task_names()
        if text in known:
            return _read_task(_DATA / "tasks" / f"{text}.yaml", builtin=True)
        nearest = difflib.get_close_matches(text.lower(), known, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ZeroTuningError(
            f"unknown task {text!r}{hint} (known tasks: {', '.join(known)}, or the path of a .yaml file)"
        )

    def with_shots(self, records: Iterable[Mapping[str, Any]], seed: int | None = None) -> Task:
        """The same task with these examples, solved, before every prompt, in place of any that it had.

        Each is its prompt, its right label or continuation, and a blank line. shots.draw_shots draws them; `seed` is
        that of the draw, for reports.
        Errors: ZeroTuningError for a record that lacks a field or its label.
        """
        shots = []
        for record in as_records(records):
            prompt = self.render(record, require_label=True)
            assert prompt.label is not None
            shots.append(Shot(prompt.own, prompt.labels[prompt.label]))
        return replace(self, shots=tuple(shots), shot_seed=seed)

    def render(self, record: Mapping[str, Any], *, require_label: bool = False, origin: str | None = None) -> Prompt:
        """The prompt of one example.

        A missing `label` gives `Prompt.label = None`, or an error with `require_label`. `origin` names the
        example in errors; by default the line that it was read from.
        Errors: ZeroTuningError that names the example and the field that is missing or wrong.
        """
        origin = str(origin or getattr(record, "origin", "example"))
        labels: tuple[str, ...] | str = self.labels
        if self.continuation:
            return self._with_continuation(record, origin)
        if isinstance(labels, str):
            labels = tuple(f" {letter}" for letter in _ALPHABET[: len(_checked_choices(record, origin))])
        text = "".join(piece for _, piece in self.pieces(record, origin=origin))
        label = _checked_label(record, len(labels), require_label, origin)
        return Prompt(text, self._answers(labels), label, self.shots, self.chat)

    def pieces(self, record: Mapping[str, Any], *, origin: str | None = None) -> list[tuple[str | None, str]]:
        """The prompt of one example in pieces: (None, text of the template) or (field name, its text).

        Joined they are `render(record).own`. Errors: as `render`.
        """
        origin = str(origin or getattr(record, "origin", "example"))
        values: dict[str, str] = {}
        if self.labels == LETTERS:
            choices = _checked_choices(record, origin)
            values["choices"] = "\n".join(
                f"{letter}. {choice}" for letter, choice in zip(_ALPHABET, choices, strict=False)
            )
        return _filled_pieces(self._pieces, record, origin, values)

    def _with_continuation(self, record: Mapping[str, Any], origin: str) -> Prompt:
        continuation = _filled(self._continuation_pieces, record, origin, {})
        if not continuation.strip():
            raise ZeroTuningError(f"{origin}: the continuation is empty")
        text = _filled(self._pieces, record, origin, {})
        return Prompt(text, self._answers((continuation,)), 0, self.shots, self.chat)

    def _answers(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """In a chat the answer begins a turn, without the space that parts it from a prompt."""
        return tuple(text.lstrip() for text in texts) if self.chat else texts

    def examples(self, split: str = "test", limit: int | None = None) -> list[Record]:
        """The first `limit` examples that ship with a built-in task. Any other task, and a built-in one that brings no
        sample: ZeroTuningError that says what would do."""
        if not self.builtin:
            raise ZeroTuningError(f"task {self.name!r} has no built-in examples: name a JSON lines file of its own")
        if not self.has_examples:
            hub = f", or its data set {self.hub.name}: --data hub, with zerotuning[datasets]" if self.hub else ""
            raise ZeroTuningError(
                f"task {self.name!r} comes without examples: name a JSON lines file (--data FILE.jsonl){hub}"
            )
        return builtin_examples(self.name, split, limit)


def builtin_task_names() -> list[str]:
    """The names of the built-in tasks, sorted."""
    return sorted(path.stem for path in (_DATA / "tasks").glob("*.yaml"))


def builtin_examples(task_name: str, split: str = "test", limit: int | None = None) -> list[Record]:
    """The first `limit` (default: all) examples of a built-in task's "validation" or "test" sample."""
    if split not in SPLITS:
        raise ZeroTuningError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if task_name not in builtin_task_names():
        raise ZeroTuningError(f"no built-in task {task_name!r}: there are {', '.join(builtin_task_names())}")
    return first_examples(read_examples(_DATA / task_name / f"{split}.jsonl"), limit)


def first_examples(records: list[Record], limit: int | None) -> list[Record]:
    """The first `limit` of `records`; all of them for None or when there are fewer."""
    if limit is None:
        return records
    if isinstance(limit, bool) or not isinstance(limit, numbers.Integral) or limit < 1:
        raise ZeroTuningError(f"limit must be a positive integer, got {limit!r}")
    return records[:limit]


def read_examples(path: str | os.PathLike[str]) -> list[Record]:
    """The examples of a JSON lines file (UTF-8, one object a line, blank lines skipped).

    Errors: ZeroTuningError for a file that is missing or holds no example, and for a bad line, which it
    names.
    """
    path = Path(path)
    records = []
    for number, line in enumerate(_read_bytes(path, "data file").split(b"\n"), start=1):
        origin = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ZeroTuningError(f"{origin}: not UTF-8 (byte {error.start + 1} of the line)") from error
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ZeroTuningError(f"{origin}: not JSON: {error.msg} (column {error.colno})") from error
        except (RecursionError, ValueError) as error:
            raise ZeroTuningError(f"{origin}: not JSON that can be read: {error}") from error
        if not isinstance(fields, dict):
            raise ZeroTuningError(f"{origin}: a line must be a JSON object, got {_shown(fields)}")
        records.append(Record(fields, origin))
    if not records:
        raise ZeroTuningError(f"data file {path} holds no example")
    return records


def as_records(records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """`records` as a list in which each knows its origin: its line in a file, or "example 0", …

    Errors: ZeroTuningError for anything but mappings.
    """
    if not isinstance(records, Iterable):
        raise ZeroTuningError(f"examples must be mappings, or the name of a file, got {_shown(records)}")
    found = []
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ZeroTuningError(f"example {index} must be a mapping of its fields, got {_shown(record)}")
        found.append(record if isinstance(record, Record) else Record(record, f"example {index}"))
    return found


def _read_task(path: Path, *, builtin: bool) -> Task:
    content = _read_bytes(path, "task file")
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
        raise ZeroTuningError(
            f"task file {path} must be a mapping with name, prompt, labels, got {_shown(description)}"
        )
    for key in description:
        if key not in _KNOWN_KEYS:
            raise ZeroTuningError(f"task file {path}: unknown field {key!r}; known fields are {', '.join(_KNOWN_KEYS)}")
    for key in _REQUIRED_KEYS:
        if key not in description:
            raise ZeroTuningError(f"task file {path}: field {key!r} is missing")
    if "labels" not in description and "continuation" not in description:
        raise ZeroTuningError(f"task file {path}: field 'labels' is missing, or 'continuation' in its place")
    labels = description.get("labels", [])
    if not isinstance(labels, (list, str)):
        raise ZeroTuningError(
            f'task file {path}: labels must be a list of strings or "{LETTERS}", got {_shown(labels)}'
        )
    try:
        hub = HubSource.from_yaml(description["hub"]) if "hub" in description else None
        return Task(**(description | {"hub": hub}), builtin=builtin)
    except ZeroTuningError as error:
        raise ZeroTuningError(f"task file {path}: {error}") from error


def _filled(
    pieces: Iterable[tuple[str, str | None]], record: Mapping[str, Any], origin: str, values: Mapping[str, str]
) -> str:
    """The template's text, its fields from `values` or else from the record."""
    return "".join(text for _, text in _filled_pieces(pieces, record, origin, values))


def _filled_pieces(
    pieces: Iterable[tuple[str, str | None]], record: Mapping[str, Any], origin: str, values: Mapping[str, str]
) -> list[tuple[str | None, str]]:
    """(field name or None, text) in order.

    By hand: str.format, which can reach into objects, never sees the template.
    """
    filled: list[tuple[str | None, str]] = []
    for literal, name in pieces:
        if literal:
            filled.append((None, literal))
        if name is not None:
            filled.append((name, values[name] if name in values else _field_text(record, name, origin)))
    return filled


def _template_pieces(key: str, template: str) -> tuple[tuple[str, str | None], ...]:
    """The template as (literal text, field name or None) pairs; anything but plain `{field}` is refused."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ZeroTuningError(f"{key}: {error}; write {{{{ and }}}} for braces that are text") from error
    pieces = []
    for literal, name, format_spec, conversion in parsed:
        if name is not None:
            shown = (
                "{" + name + (f"!{conversion}" if conversion else "") + (f":{format_spec}" if format_spec else "") + "}"
            )
            if conversion or format_spec:
                raise ZeroTuningError(f"{key}: {shown} must be a plain {{field}}, without conversion or format")
            if not name.isidentifier():
                raise ZeroTuningError(
                    f"{key}: {shown} must be a plain {{field}}: a name of letters, digits and underscores,"
                    " without attributes, indices or positions"
                )
            if name == "label" and key == "prompt":
                raise ZeroTuningError("prompt: {label} would show the model the answer")
        pieces.append((literal, name))
    if all(name is None for _, name in pieces):
        raise ZeroTuningError(f"{key} must hold at least one {{field}}, or every example would read the same")
    return tuple(pieces)


def _checked_labels(labels: Any) -> tuple[str, ...]:
    if not isinstance(labels, (list, tuple)):
        raise ZeroTuningError(f'labels must be a list of strings or "{LETTERS}", got {_shown(labels)}')
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ZeroTuningError(f"labels must be strings, got {_shown(label)} at index {index}: put it in quotes")
        if not label.strip():
            raise ZeroTuningError(f"labels must not be empty, got {label!r} at index {index}")
        check_text(label, f"the label at index {index}")
        if label in labels[:index]:
            raise ZeroTuningError(f"labels must differ, got {label!r} at index {labels.index(label)} and {index}")
    if len(labels) < 2:
        raise ZeroTuningError(f"labels must be at least two, got {list(labels)}")
    return tuple(labels)


def _checked_choices(record: Mapping[str, Any], origin: str) -> list[str]:
    choices = record.get("choices")
    if choices is None:
        raise ZeroTuningError(f"{origin}: field 'choices' is missing")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ZeroTuningError(f"{origin}: field 'choices' must be a list of strings, got {_shown(choices)}")
    if not 2 <= len(choices) <= len(_ALPHABET):
        raise ZeroTuningError(f"{origin}: field 'choices' must hold 2 to {len(_ALPHABET)} strings, got {len(choices)}")
    for choice in choices:
        check_text(choice, f"{origin}: field 'choices'")
    return choices


def _field_text(record: Mapping[str, Any], name: str, origin: str) -> str:
    if name not in record:
        raise ZeroTuningError(f"{origin}: field {name!r} is missing")
    value = record[name]
    if isinstance(value, str):
        check_text(value, f"{origin}: field {name!r}")
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ZeroTuningError(f"{origin}: field {name!r} must be a string or a number, got {_shown(value)}")


def _checked_label(record: Mapping[str, Any], count: int, required: bool, origin: str) -> int | None:
    label = record.get("label")
    if label is None:
        if required:
            raise ZeroTuningError(f"{origin}: field 'label' is missing")
        return None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        raise ZeroTuningError(f"{origin}: field 'label' must be an integer from 0 to {count - 1}, got {_shown(label)}")
    return label


def check_text(text: str, what: str) -> None:
    """Errors: ZeroTuningError for half of a surrogate pair, which no tokenizer takes; it calls the text `what`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ZeroTuningError(f"{what} holds {text[error.start]!r}, half of a surrogate pair") from error


def _read_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ZeroTuningError(f"{what} {path} does not exist") from error
    except OSError as error:
        raise ZeroTuningError(f"cannot read {what} {path}: {error.strerror or error}") from error


def _shown(value: Any) -> str:
    """A value as an error message shows it: its type and, cut short, itself."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
