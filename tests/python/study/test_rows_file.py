"""The file of a study's rows."""

from __future__ import annotations

from pathlib import Path

from zerotuning.study.rows_file import RowsFile


def test_rows_are_found_by_their_key_whatever_its_order(tmp_path: Path) -> None:
    header = {"study": "s", "model": "m", "dtype": None}
    file = RowsFile(tmp_path / "s.json", header)
    file.add({"key": {"a": 1, "b": 2.0}, "value": 3})
    again = RowsFile(tmp_path / "s.json", header)
    assert again.find({"b": 2.0, "a": 1}) == {"key": {"a": 1, "b": 2.0}, "value": 3}
    assert again.find({"a": 1, "b": 3.0}) is None
    assert RowsFile(None, header).find({"a": 1}) is None
