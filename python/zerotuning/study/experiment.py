"""What a study is: cells that are measured one after another, and what is made of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotuning.study.setting import Setting

#: One cell's key and its figures, as they stand in the study's file.
Row = dict[str, Any]
SIZES = ("small", "full")


@dataclass(frozen=True)
class Cell:
    """One figure, or a few that are measured together.

    key       what tells the cell from the study's others: JSON values; task, seed, γ, …
    measure   makes the figures: JSON values
    recall    is given the row, measured now or in an earlier run, before the cells after it are measured
    """

    key: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    recall: Callable[[Row], None] | None = None


@dataclass(frozen=True)
class Numbers:
    """How much a study measures.

    tasks      names of tasks
    seeds      draws of the examples: 0, 1, …
    examples   validation examples that something is chosen on
    limit      test examples of a task
    """

    tasks: tuple[str, ...]
    seeds: int
    examples: int
    limit: int


@dataclass(frozen=True)
class Experiment:
    """A study.

    name       on the command line, of its files and its notebook
    question   what it asks, in one sentence
    numbers    for each of SIZES how much is measured unless the caller says otherwise
    cells      what is to be measured, in order
    figures    rows -> matplotlib figures by a short name ("" for the only one)
    table      rows -> the findings as a Markdown table
    parts      of a study of several questions their names; `Setting.parts` chooses
    """

    name: str
    question: str
    numbers: Mapping[str, Numbers]
    cells: Callable[[Setting], Iterable[Cell]]
    figures: Callable[[Sequence[Row]], Mapping[str, Any]]
    table: Callable[[Sequence[Row]], str]
    parts: tuple[str, ...] = ()
