"""A study's file of rows, rewritten as a whole after each row, so that an interrupted study can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_json_atomically
from zerotuning.study.experiment import Row


class RowsFile:
    """Rows by the keys of their cells.

    Args:
        path: A .json file; None: nothing is written.
        header: The facts on which all rows depend: study, model, dtype, …
        overwrite: Start with no rows, whatever the file holds.

    Attributes:
        weights: Digest of the weights of the model that measured the rows; None for a file without a digest.

    Raises:
        ZeroTuningError: The file holds something else, or rows with another study, model or dtype in the header.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.header = dict(header)
        self.weights: str | None = None
        self.rows: list[Row] = []
        if path is not None and path.exists() and not overwrite:
            self.rows = self._read(path)
        self._by_key = {_name(row["key"]): row for row in self.rows}

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The row with this key, whatever the order of the key's names; None if there is none."""
        return self._by_key.get(_name(key))

    def check_weights(self, digest: str) -> None:
        """Note the weights that the next rows are measured with; call this before measuring.

        Raises:
            ZeroTuningError: The file's rows were measured with other weights.
        """
        if self.weights not in (None, digest):
            raise self._mismatch("weights", self.weights, digest)
        self.weights = digest

    def add(self, row: Row) -> None:
        """Add a row and rewrite the file."""
        self.rows.append(row)
        self._by_key[_name(row["key"])] = row
        if self.path is not None:
            write_json_atomically(self.path, {**self.header, "weights": self.weights, "rows": self.rows})

    def _read(self, path: Path) -> list[Row]:
        try:
            content = json.loads(path.read_text("utf-8"))
            rows = list(content.pop("rows"))
            if not all(isinstance(row["key"], dict) for row in rows):
                raise TypeError("key")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ZeroTuningError(f"{path} holds no study; choose another folder or overwrite it") from error
        for name in ("study", "model", "dtype"):
            if content.get(name) != self.header[name]:
                raise self._mismatch(name, content.get(name), self.header[name])
        self.weights = content.get("weights")
        return rows

    def _mismatch(self, name: str, in_file: Any, value: Any) -> ZeroTuningError:
        return ZeroTuningError(
            f"{self.path} holds rows of {name} {in_file!r}, expected {value!r}: choose another folder or overwrite it"
        )


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
