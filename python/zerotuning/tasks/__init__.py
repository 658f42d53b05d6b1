"""Tasks: prompts, labels, examples, few-shot prompts and their tokens."""

from zerotuning.tasks.examples import Record, as_records
from zerotuning.tasks.task import Task

__all__ = ["Record", "Task", "as_records"]
