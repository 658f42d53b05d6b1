r"""Examples from the Hugging Face hub, read by the library `datasets` (the extra zerotuning[datasets]).

The name of data is `hub` (the task's data set), `hub:owner/name`, `hub:owner/name/config`, or `hub:FOLDER` for a local
folder of data files; each name may end in `:split`. In a task file, `hub:` names the data set and maps its columns to
the task's fields:

    hub:
      name: allenai/ai2_arc                         # owner/name
      config: ARC-Easy                              # if the data set has several configurations
      splits: {validation: validation, test: test}  # the data set's own names of the two splits
      columns: {question: question, choices: choices.text, label: answerKey}
      choice: "[a-e] \\) (.*)"                      # keep only this part of each choice
      answers: {A: 0, B: 1, C: 2, D: 3}             # for labels that are not zero-based numbers

A dot separates the names of nested columns. `choices` may also be a list of columns, one for each choice, or one column
of text in which the expression `choice` matches every choice.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerotuning.errors import ZeroTuningError
from zerotuning.hub_access import connection_error, fetch_error, first_line, is_offline
from zerotuning.tasks.examples import Record, read_examples

if TYPE_CHECKING:
    from zerotuning.tasks.task import Task

HUB = "hub"


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub and the mapping of its columns to a task's fields: the value of `hub:` in a task file.

    Attributes:
        name: "owner/name".
        config: The configuration, for a data set with several configurations.
        splits: The data set's names for "validation" and "test", if other than these.
        columns: Field to column, or to a list of columns for `choices`. Columns that are not mapped keep their names.
        choice: A regular expression with one group: the part of each choice to keep.
        answers: Maps an answer to a zero-based label.

    Raises:
        ZeroTuningError: A value has the wrong type or form; the error names the key.
    """

    name: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    choice: str | None = None
    answers: Mapping[Any, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ZeroTuningError(f"hub: name must be owner/name, got {self.name!r}")
        if self.config is not None and not isinstance(self.config, str):
            raise ZeroTuningError(f"hub: config must be a string, got {self.config!r}")
        if not isinstance(self.splits, dict) or not all(isinstance(name, str) for name in self.splits.values()):
            raise ZeroTuningError(f"hub: splits must map names to names, got {self.splits!r}")
        if not isinstance(self.columns, dict) or not all(_is_column(name) for name in self.columns.values()):
            raise ZeroTuningError(f"hub: columns must map names to names, got {self.columns!r}")
        if self.answers is not None and not (
            isinstance(self.answers, dict) and all(type(index) is int and index >= 0 for index in self.answers.values())
        ):
            raise ZeroTuningError(f"hub: answers must map answers to zero-based indices, got {self.answers!r}")
        if self.choice is not None:
            try:
                groups = re.compile(self.choice).groups
            except (re.error, TypeError) as error:
                raise ZeroTuningError(f"hub: choice must be a regular expression: {error}") from error
            if groups != 1:
                raise ZeroTuningError(f"hub: choice must have one group in brackets, got {self.choice!r}")

    @staticmethod
    def from_yaml(description: Any) -> HubSource:
        """The source that the value of `hub:` in a task file describes.

        Raises:
            ZeroTuningError: The value is no mapping, or a key is unknown, missing or wrong.
        """
        if not isinstance(description, dict):
            raise ZeroTuningError(f"hub must be a mapping with name and columns, got {description!r}")
        keys = [key.name for key in fields(HubSource)]
        for key in description:
            if key not in keys:
                raise ZeroTuningError(f"hub: unknown field {key!r}; known fields are {', '.join(keys)}")
        if "name" not in description:
            raise ZeroTuningError("hub: field 'name' is missing")
        return HubSource(**description)


def _is_column(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


# Names of data.


def is_hub_name(data: Any) -> bool:
    """Whether a name of data has the form `hub` or `hub:...`."""
    return isinstance(data, str) and (data == HUB or data.startswith(f"{HUB}:"))


def without_split(data: str) -> str:
    """A hub name without its split."""
    return HUB if data == HUB else f"{HUB}:{_parsed(data).place}"


@dataclass(frozen=True)
class _HubName:
    """A parsed hub name; `place` is everything but the split."""

    place: str
    name: str
    config: str | None
    split: str | None


def _parsed(data: str) -> _HubName:
    if data == HUB:
        return _HubName("", "", None, None)
    place = data[len(HUB) + 1 :]
    split: str | None = None
    if place and not Path(place).is_dir():
        place, colon, after = place.rpartition(":") if ":" in place else (place, "", "")
        split = after if colon else None
    if place and Path(place).is_dir():
        return _HubName(place, place, None, split)
    parts = place.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts) or split == "":
        raise ZeroTuningError(f"data must be hub, hub:owner/name[/config][:split] or hub:FOLDER[:split], got {data}")
    return _HubName(place, "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split)


# Reading data.


def read_data(task: Task, data: str | os.PathLike[str], split: str) -> list[Record]:
    """The examples of a JSON lines file, or of the hub.

    Args:
        task: The task, whose `hub` maps the columns of data from the hub.
        data: The path of a file, or a hub name.
        split: "validation" or "test", for a hub name without a split.

    Raises:
        ZeroTuningError: As in `examples.read_examples` and `hub_examples`.
    """
    return hub_examples(task, data, split) if isinstance(data, str) and is_hub_name(data) else read_examples(data)


def hub_examples(task: Task, data: str, split: str) -> list[Record]:
    """The examples of a data set of the hub, or of a local folder of data files.

    Args:
        task: The task, whose `hub` maps the columns.
        data: A hub name.
        split: "validation" or "test", for a name without a split.

    Returns:
        Records with the origins "owner/name[split]:index".

    Raises:
        ZeroTuningError: `datasets` is not installed; the hub cannot be reached or has no such data set; a column is
            missing; an answer is unknown.
    """
    hub_name = _parsed(data)
    if not hub_name.place and task.hub is None:
        raise ZeroTuningError(f"task {task.name!r} names no data set of the hub: give hub:owner/name or a file")
    source = task.hub or HubSource(hub_name.place)
    name, config = (source.name, source.config) if not hub_name.place else (hub_name.name, hub_name.config)
    if hub_name.place and config is None and name == source.name:
        config = source.config
    split = hub_name.split or source.splits.get(split, split)
    if importlib.util.find_spec("datasets") is None:
        raise ZeroTuningError(
            f'data {data} need the package datasets: pip install "zerotuning[datasets]", or name a JSON lines file'
        )
    return records_of(source, _load(name, config, split), f"{name}[{split}]")


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets

    local = Path(name).is_dir()
    where = name if config is None else f"{name}/{config}"
    try:
        with _quiet(datasets), _offline_unless_reachable(datasets, local):
            return datasets.load_dataset(str(Path(name).resolve()) if local else name, config, split=split)
    except Exception as error:  # raised by datasets, by huggingface_hub or by a reader of files
        what, reason = f"cannot load data {where}[{split}]", first_line(error)
        if local:
            raise ZeroTuningError(f"{what}: {reason}") from error
        raise fetch_error(what, reason, "name a JSON lines file in its place") from error


@contextmanager
def _offline_unless_reachable(datasets: Any, local: bool) -> Iterator[None]:
    """Within the context `datasets` is offline if the hub does not answer one request.

    `datasets` then reads its cache or fails at once; without this context it would retry for 23 s.
    """
    import huggingface_hub

    constants = huggingface_hub.constants
    if local or is_offline() or datasets.config.HF_HUB_OFFLINE:
        yield
        return
    if connection_error() is not None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Within the context `datasets` prints no warnings and no progress bars."""
    log = datasets.utils.logging
    verbosity, bars = log.get_verbosity(), datasets.utils.are_progress_bars_disabled()
    log.set_verbosity(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


# Columns to fields.


def records_of(source: HubSource, dataset: Any, origin: str) -> list[Record]:
    """The rows of a `datasets.Dataset` as records.

    ClassLabel columns give zero-based numbers. The number -1 marks a hidden label: the record then has no label.

    Args:
        source: Maps the columns.
        dataset: The data set.
        origin: "owner/name[split]", to which each record's index is added.

    Raises:
        ZeroTuningError: A column is missing, a choice does not match, or an answer is unknown.
    """
    for column in source.columns.values():
        for name in column if isinstance(column, list) else [column]:
            if name.partition(".")[0] not in dataset.column_names:
                raise ZeroTuningError(
                    f"data {origin} have no column {name!r}: there are {', '.join(dataset.column_names)}"
                )
    return [Record(_fields(source, row, f"{origin}:{index}"), f"{origin}:{index}") for index, row in enumerate(dataset)]


def _fields(source: HubSource, row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    result = dict(row)
    for name, column in source.columns.items():
        result[name] = [_value(row, one) for one in column] if isinstance(column, list) else _value(row, column)
    if source.choice is not None and "choices" in result:
        result["choices"] = _choices(source.choice, result["choices"], origin)
    if "label" in result:
        result["label"] = _label(source, result["label"], origin)
    return result


def _value(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _choices(pattern: str, value: Any, origin: str) -> list[str]:
    if isinstance(value, str):
        return [choice.strip() for choice in re.findall(pattern, value)]
    choices = []
    for one in value if isinstance(value, list) else [value]:
        match = re.search(pattern, one) if isinstance(one, str) else None
        if match is None:
            raise ZeroTuningError(f"{origin}: choice {one!r} does not match {pattern!r}")
        choices.append(match.group(1).strip())
    return choices


def _label(source: HubSource, value: Any, origin: str) -> Any:
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "" or (isinstance(value, int) and not isinstance(value, bool) and value == -1):
        return None
    if source.answers is None:
        return value
    if value not in source.answers:
        raise ZeroTuningError(f"{origin}: answer {value!r} is none of {', '.join(map(str, source.answers))}")
    return source.answers[value]
