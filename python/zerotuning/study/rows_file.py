"""A study's file: the rows measured so far, written whole after each, so that a study that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_json_atomically
from zerotuning.study.experiment import Row


class RowsFile:
    """Rows by their cells' keys.

    path      a .json file; None: nothing is kept
    header    what all rows depend on: study, model, size …; a file with another is refused
    weights   digest of the model that measured the rows, in a file of an older version None
    Errors: ZeroTuningError for a file that holds something else, or the rows of another setting.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.header = dict(header)
        self.weights: str | None = None
        self.rows: list[Row] = []
        if path is not None and path.exists() and not overwrite:
            self.rows = self._read(path)
        self._known = {_name(row["key"]): row for row in self.rows}

    def find(self, key: Mapping[str, Any]) -> Row | None:
        return self._known.get(_name(key))

    def check_weights(self, digest: str) -> None:
        """To be called before a row is measured. Errors: ZeroTuningError where other weights measured those here."""
        if self.weights not in (None, digest):
            raise self._of_another("weights", self.weights, digest)
        self.weights = digest

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._known[_name(row["key"])] = row
        if self.path is not None:
            write_json_atomically(self.path, {**self.header, "weights": self.weights, "rows": self.rows})

    def _read(self, path: Path) -> list[Row]:
        try:
            held = json.loads(path.read_text("utf-8"))
            rows = list(held.pop("rows"))
            if not all(isinstance(row["key"], dict) for row in rows):
                raise TypeError("key")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ZeroTuningError(f"{path} holds no study; choose another folder or overwrite it") from error
        for name in ("study", "model", "dtype"):
            if held.get(name) != self.header[name]:
                raise self._of_another(name, held.get(name), self.header[name])
        self.weights = held.get("weights")
        return rows

    def _of_another(self, name: str, held: Any, value: Any) -> ZeroTuningError:
        return ZeroTuningError(
            f"{self.path} holds rows of {name} {held!r}, this is {value!r}: choose another folder or overwrite it"
        )


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
