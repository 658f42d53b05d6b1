"""The inputs that several commands read before they load a model: tasks with their examples, and head scales."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from zerotuning.errors import ZeroTuningError
from zerotuning.output import SCALES_FILE, STATE_FILE

if TYPE_CHECKING:
    from zerotuning.patching.head_scales import HeadScales
    from zerotuning.tasks.examples import Record
    from zerotuning.tasks.task import Task


def read_task(arguments: argparse.Namespace, split: str) -> tuple[Task, list[Record]]:
    """Read --task and its examples.

    Args:
        arguments: task, data, chat and scoring of the command line.
        split: The part of the data that is read by default: validation or test.

    Returns:
        The task, with the command line's chat and scoring, and its examples.

    Raises:
        ZeroTuningError: A task or data that cannot be read; a task without examples of its own and no --data.
    """
    from zerotuning.tasks.hub import read_data
    from zerotuning.tasks.task import Task

    task = Task.load(arguments.task)
    changes = {name: value for name in ("chat", "scoring") if (value := getattr(arguments, name)) is not None}
    task = replace(task, **changes)
    if arguments.data is not None:
        return task, read_data(task, arguments.data, split)
    if not task.builtin:
        raise ZeroTuningError(f"task {task.name!r} has no examples of its own: name a JSON lines file with --data")
    return task, task.examples(split, None)


def check_prompts(task: Task, records: Sequence[Record], *, require_label: bool) -> None:
    """Render every prompt, so that a bad line of data is an error before the model is loaded."""
    for record in records:
        task.render(record, require_label=require_label)


def read_scales(name: str) -> HeadScales:
    """Read the head scales in a folder, or in a repository owner/name of the Hugging Face hub."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ZeroTuningError(f"scales {name} must be a folder, got a file")
    if not folder.exists() and name.count("/") != 1:
        raise ZeroTuningError(f"scales folder {name} does not exist")
    if (folder / STATE_FILE).exists() and not (folder / SCALES_FILE).exists():
        raise ZeroTuningError(
            f"scales {name}: the calibration there is unfinished; run its command again to resume the calibration"
        )
    from zerotuning.patching.head_scales import HeadScales

    return HeadScales.from_pretrained(name)


def percent(fraction: float | None) -> str:
    """Write a fraction as a percentage, None as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"
