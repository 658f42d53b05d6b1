"""The description of a study: cells that are measured one after another, and the table and pictures of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotuning.study.setting import Setting

#: A measured cell as it stands in the study's file: {"key": …, figures …, "seconds": …}.
Row = dict[str, Any]
SIZES = ("small", "full")


@dataclass(frozen=True)
class Cell:
    """One figure, or a few figures that are measured together.

    Attributes:
        key: Identifies the cell within the study: task, seed, γ, …; JSON values.
        measure: Measures the figures: JSON values by name.
        recall: Called with the row, measured now or in an earlier run, before later cells are measured.
    """

    key: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    recall: Callable[[Row], None] | None = None


@dataclass(frozen=True)
class Numbers:
    """How much a study measures.

    Attributes:
        tasks: Names of tasks.
        num_draws: How many random draws of the examples, with the seeds 0, 1, …
        examples: Validation examples of a draw, by which choices are made.
        limit: Test examples of a task.
    """

    tasks: tuple[str, ...]
    num_draws: int
    examples: int
    limit: int


@dataclass(frozen=True)
class Experiment:
    """A study.

    Attributes:
        name: The study's name on the command line, in file names and of its notebook.
        question: The study's question, in one sentence.
        numbers: For each of SIZES, the defaults of how much is measured.
        cells: Setting -> what is measured, in order.
        figures: Rows -> matplotlib figures by a short name ("" for the main one).
        table: Rows -> the findings as a Markdown table.
        parts: The names of a study's parts, if it has several; `Setting.parts` chooses among them.
    """

    name: str
    question: str
    numbers: Mapping[str, Numbers]
    cells: Callable[[Setting], Iterable[Cell]]
    figures: Callable[[Sequence[Row]], Mapping[str, Any]]
    table: Callable[[Sequence[Row]], str]
    parts: tuple[str, ...] = ()
