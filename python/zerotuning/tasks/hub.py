"""Examples from the hub through the library `datasets`, which the extra zerotuning[datasets] brings.

Data are named `hub` (the data set that the task names), `hub:owner/name`, `hub:owner/name/config`, or a local folder of
data files `hub:FOLDER`; each may end in `:split`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.hub_access import connection_error, fetch_error, first_line, is_offline
from zerotuning.tasks.hub_source import HubSource
from zerotuning.tasks.task import Record, Task, read_examples

HUB = "hub"


def is_hub_name(data: Any) -> bool:
    """Whether data are named as of the hub: `hub` or `hub:…`."""
    return isinstance(data, str) and (data == HUB or data.startswith(f"{HUB}:"))


def read_data(task: Task, data: str | os.PathLike[str], split: str) -> list[Record]:
    """The examples of a JSON lines file, or of the hub. `split`, "validation" or "test", is for a hub name without one."""
    return hub_examples(task, data, split) if isinstance(data, str) and is_hub_name(data) else read_examples(data)


def without_split(data: str) -> str:
    """A hub name less the split that it may name."""
    return HUB if data == HUB else f"{HUB}:{_parsed(data).place}"


def hub_examples(task: Task, data: str, split: str) -> list[Record]:
    """The examples of a data set of the hub (or of a local folder), as the task's `hub` maps its columns.

    Columns that it does not map keep their names. Origins are "owner/name[split]:index".
    Errors: ZeroTuningError where `datasets` is missing, the hub cannot be reached or has no such data set, a column is
    missing, an answer is unknown.
    """
    wanted = _parsed(data)
    if not wanted.place and task.hub is None:
        raise ZeroTuningError(f"task {task.name!r} names no data set of the hub: name one as hub:owner/name, or a file")
    source = task.hub or HubSource(wanted.place)
    name, config = (source.name, source.config) if not wanted.place else (wanted.name, wanted.config)
    if wanted.place and config is None and name == source.name:
        config = source.config
    chosen = wanted.split or source.splits.get(split, split)
    if importlib.util.find_spec("datasets") is None:
        raise ZeroTuningError(
            f'data {data} need the package datasets: pip install "zerotuning[datasets]", or name a JSON lines file'
        )
    return records_of(source, _load(name, config, chosen), f"{name}[{chosen}]")


def records_of(source: HubSource, dataset: Any, origin: str) -> list[Record]:
    """The rows of a `datasets.Dataset` as records: `source` maps its columns, ClassLabel columns give zero-based
    numbers, and -1, a label that is kept secret, none at all."""
    for column in source.columns.values():
        for one in column if isinstance(column, list) else [column]:
            if one.partition(".")[0] not in dataset.column_names:
                raise ZeroTuningError(
                    f"data {origin} have no column {one!r}: there are {', '.join(dataset.column_names)}"
                )
    return [Record(_fields(source, row, f"{origin}:{index}"), f"{origin}:{index}") for index, row in enumerate(dataset)]


@dataclass(frozen=True)
class _HubName:
    place: str  # all but the split
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


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets

    local = Path(name).is_dir()
    shown = name if config is None else f"{name}/{config}"
    try:
        with _quiet(datasets), _one_try(datasets, local):
            return datasets.load_dataset(str(Path(name).resolve()) if local else name, config, split=split)
    except Exception as error:  # of datasets, of the hub's library, of a reader of files
        what, reason = f"cannot load data {shown}[{split}]", first_line(error)
        if local:
            raise ZeroTuningError(f"{what}: {reason}") from error
        raise fetch_error(what, reason, "name a JSON lines file in its place") from error


@contextmanager
def _one_try(datasets: Any, local: bool) -> Iterator[None]:
    """Within it, where one request does not reach the hub, `datasets` knows that it is offline, and looks into its cache
    or fails at once: by itself it tries for 23 s."""
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
    """No warnings and no progress bars of `datasets`."""
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


def _fields(source: HubSource, row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    found = dict(row)
    for name, column in source.columns.items():
        value = [_value(row, one) for one in column] if isinstance(column, list) else _value(row, column)
        found[name] = value
    if source.choice is not None and "choices" in found:
        found["choices"] = _choices(source.choice, found["choices"], origin)
    if "label" in found:
        found["label"] = _label(source, found["label"], origin)
    return found


def _value(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _choices(pattern: str, value: Any, origin: str) -> list[str]:
    if isinstance(value, str):
        return [found.strip() for found in re.findall(pattern, value)]
    kept = []
    for one in value if isinstance(value, list) else [value]:
        match = re.search(pattern, one) if isinstance(one, str) else None
        if match is None:
            raise ZeroTuningError(f"{origin}: choice {one!r} does not match {pattern!r}")
        kept.append(match.group(1).strip())
    return kept


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
