"""The examples of a task: records with checked fields, read from JSON lines files or from the package's samples."""

from __future__ import annotations

import json
import numbers
import os
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError, shown

SPLITS = ("validation", "test")
#: Letters of an example's choices, and so the largest number of choices.
LETTERS_OF_CHOICES = string.ascii_uppercase
#: The package's data: `tasks/NAME.yaml` for each built-in task, `NAME/SPLIT.jsonl` for tasks with a sample.
DATA = Path(__file__).parents[1] / "data"


class Record(dict[str, Any]):
    """The fields of one example.

    Attributes:
        origin: Where the example comes from, for error messages: "test.jsonl:12".
    """

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        super().__init__(fields)
        self.origin = origin


def as_records(records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Examples as a list of records.

    Args:
        records: Mappings. A Record keeps its origin; another mapping gets "example 0", "example 1" and so on.

    Raises:
        ZeroTuningError: An item is not a mapping.
    """
    if not isinstance(records, Iterable):
        raise ZeroTuningError(f"examples must be mappings, or the name of a file, got {shown(records)}")
    result = []
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ZeroTuningError(f"example {index} must be a mapping of its fields, got {shown(record)}")
        result.append(record if isinstance(record, Record) else Record(record, f"example {index}"))
    return result


def first_examples(records: list[Record], limit: int | None) -> list[Record]:
    """The first `limit` records; all records if `limit` is None or larger than their number."""
    if limit is None:
        return records
    if isinstance(limit, bool) or not isinstance(limit, numbers.Integral) or limit < 1:
        raise ZeroTuningError(f"limit must be a positive integer, got {limit!r}")
    return records[:limit]


def read_examples(path: str | os.PathLike[str]) -> list[Record]:
    """The examples of a JSON lines file: UTF-8, one object a line, blank lines skipped.

    Raises:
        ZeroTuningError: The file is missing or has no example, or a line is bad; the error names the line.
    """
    path = Path(path)
    records = []
    for number, line in enumerate(read_bytes(path, "data file").split(b"\n"), start=1):
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
            raise ZeroTuningError(f"{origin}: a line must be a JSON object, got {shown(fields)}")
        records.append(Record(fields, origin))
    if not records:
        raise ZeroTuningError(f"data file {path} holds no example")
    return records


def read_bytes(path: Path, what: str) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        what: The name of the file in error messages, such as "task file".

    Raises:
        ZeroTuningError: The file does not exist or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ZeroTuningError(f"{what} {path} does not exist") from error
    except OSError as error:
        raise ZeroTuningError(f"cannot read {what} {path}: {error.strerror or error}") from error


# Samples that the package includes.


def builtin_task_names() -> list[str]:
    """The names of the built-in tasks, sorted."""
    return sorted(path.stem for path in (DATA / "tasks").glob("*.yaml"))


def has_builtin_examples(task_name: str) -> bool:
    """Whether the package includes a sample of a built-in task's examples."""
    return (DATA / task_name).is_dir()


def builtin_examples(task_name: str, split: str = "test", limit: int | None = None) -> list[Record]:
    """The first examples of a built-in task's sample.

    Args:
        task_name: A task of `builtin_task_names` with a sample.
        split: "validation" or "test".
        limit: Number of examples; by default all.

    Raises:
        ZeroTuningError: There is no such task, split or sample.
    """
    if split not in SPLITS:
        raise ZeroTuningError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if task_name not in builtin_task_names():
        raise ZeroTuningError(f"no built-in task {task_name!r}: there are {', '.join(builtin_task_names())}")
    return first_examples(read_examples(DATA / task_name / f"{split}.jsonl"), limit)


# The fields of a record, checked.


def field_text(record: Mapping[str, Any], name: str, origin: str) -> str:
    """The text of a field, which is a string or a number.

    Args:
        record: An example.
        name: The field's name.
        origin: The name of the example in error messages.

    Raises:
        ZeroTuningError: The field is missing or has another type.
    """
    if name not in record:
        raise ZeroTuningError(f"{origin}: field {name!r} is missing")
    value = record[name]
    if isinstance(value, str):
        check_text(value, f"{origin}: field {name!r}")
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ZeroTuningError(f"{origin}: field {name!r} must be a string or a number, got {shown(value)}")


def choices_of(record: Mapping[str, Any], origin: str) -> list[str]:
    """The field `choices` of an example: 2 to 26 strings.

    Raises:
        ZeroTuningError: The field is missing or is not such a list.
    """
    choices = record.get("choices")
    if choices is None:
        raise ZeroTuningError(f"{origin}: field 'choices' is missing")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ZeroTuningError(f"{origin}: field 'choices' must be a list of strings, got {shown(choices)}")
    limit = len(LETTERS_OF_CHOICES)
    if not 2 <= len(choices) <= limit:
        raise ZeroTuningError(f"{origin}: field 'choices' must hold 2 to {limit} strings, got {len(choices)}")
    for choice in choices:
        check_text(choice, f"{origin}: field 'choices'")
    return choices


def label_of(record: Mapping[str, Any], num_labels: int, required: bool, origin: str) -> int | None:
    """The field `label` of an example, an index into its labels.

    Args:
        record: An example.
        num_labels: Number of the example's labels.
        required: Whether an example without a label is an error.
        origin: The name of the example in error messages.

    Returns:
        The index; None for an example without a label.

    Raises:
        ZeroTuningError: The label is required and missing, or is no index in [0, num_labels).
    """
    label = record.get("label")
    if label is None:
        if required:
            raise ZeroTuningError(f"{origin}: field 'label' is missing")
        return None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
        raise ZeroTuningError(
            f"{origin}: field 'label' must be an integer from 0 to {num_labels - 1}, got {shown(label)}"
        )
    return label


def check_text(text: str, what: str) -> None:
    """Refuse half of a surrogate pair, which UTF-8 cannot represent and tokenizers do not accept.

    Args:
        text: The text.
        what: The name of the text in error messages.

    Raises:
        ZeroTuningError: The text contains half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ZeroTuningError(f"{what} holds {text[error.start]!r}, half of a surrogate pair") from error
