"""Run a study: measure the rows that its file lacks, then write its pictures and its table."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zerotuning.calibration.fingerprint import weights_digest
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_text_atomically
from zerotuning.output import made_folder
from zerotuning.plots.style import can_plot
from zerotuning.study.experiment import Cell, Experiment, Row
from zerotuning.study.names import STUDIES
from zerotuning.study.pictures import save_pictures
from zerotuning.study.rows_file import RowsFile
from zerotuning.study.setting import Setting


@dataclass(frozen=True)
class StudyResult:
    """The result of `run_study`.

    Attributes:
        rows: As in the study's file: {"key": …, figures …, "seconds": …}.
        table: The findings as a Markdown table.
        figures: matplotlib figures by name; none without matplotlib.
        files: The files that were written.
    """

    rows: list[Row]
    table: str
    figures: dict[str, Any]
    files: list[Path]


def study(name: str) -> Experiment:
    """Return the study of that name.

    Raises:
        ZeroTuningError: There is no such study; the error lists the names.
    """
    if name not in STUDIES:
        nearest = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ZeroTuningError(f"unknown study {name!r}{hint} (known studies: {', '.join(STUDIES)})")
    experiment: Experiment = importlib.import_module(f"zerotuning.study.{name}").STUDY
    return experiment


def run_study(
    name: str,
    setting: Setting | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> StudyResult:
    """Measure the cells of a study that `output`/NAME.json lacks, and draw pictures and tables of all rows.

    Where the file holds all rows, the model is not loaded and its weights are not compared with the file's.

    Args:
        name: One of `STUDIES`.
        setting: Model, size, tasks, … Default: the full size on the embedded model.
        output: A folder for NAME.json, NAME*.png, NAME*.svg and NAME.md; None: nothing is written.
        overwrite: Measure all cells again.
        progress: Draw a bar on stderr, if stderr is a terminal.

    Returns:
        Rows, table, figures, and the files that were written.

    Raises:
        ZeroTuningError: An unknown study, task or part; or a file in `output` with rows of another model or of other
            weights.
    """
    experiment = study(name)
    complete = (setting or Setting()).with_defaults(experiment.numbers)
    _check_parts(experiment, complete.parts)
    for task in complete.numbers.tasks:
        complete.task(task)
    folder = None if output is None else made_folder(output)
    cells = list(experiment.cells(complete))
    path = None if folder is None else folder / f"{name}.json"
    file = RowsFile(path, _header(experiment, complete), overwrite)
    rows = [_row(cell, file, complete) for cell in _shown(cells, progress)]
    return _written(experiment, rows, folder)


def _row(cell: Cell, file: RowsFile, setting: Setting) -> Row:
    row = file.find(cell.key)
    if row is None:
        file.check_weights(weights_digest(setting.loaded()[0]))
        started = time.perf_counter()
        figures = dict(cell.measure())
        row = {"key": dict(cell.key), **figures, "seconds": round(time.perf_counter() - started, 3)}
        file.add(row)
    if cell.recall is not None:
        cell.recall(row)
    return row


def _shown(cells: Sequence[Cell], progress: bool) -> Any:
    return tqdm(cells, unit=" cells", disable=not (progress and sys.stderr.isatty()))


def _check_parts(experiment: Experiment, parts: Sequence[str]) -> None:
    for part in parts:
        if part not in experiment.parts:
            known = ", ".join(experiment.parts) or "none"
            raise ZeroTuningError(f"part must be one of {known} in the study {experiment.name}, got {part!r}")


def _header(experiment: Experiment, setting: Setting) -> dict[str, Any]:
    from zerotuning.machine import machine

    return {
        "study": experiment.name,
        "question": experiment.question,
        "model": setting.model,
        "dtype": setting.dtype,
        "machine": machine(),
    }


def _written(experiment: Experiment, rows: list[Row], folder: Path | None) -> StudyResult:
    table = experiment.table(rows)
    figures = dict(experiment.figures(rows)) if can_plot() else {}
    files: list[Path] = []
    if folder is not None:
        files.append(folder / f"{experiment.name}.json")
        files.append(write_text_atomically(folder / f"{experiment.name}.md", table + "\n"))
        for part, figure in figures.items():
            files.extend(save_pictures(figure, folder, f"{experiment.name}{'_' * bool(part)}{part}"))
    return StudyResult(rows, table, figures, files)
