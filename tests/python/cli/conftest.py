"""The folder in which the tests of the command line run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import RECORDS, TASK, write_lines


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The current folder, with model/, task.yaml and data.jsonl; no hub can be reached from it."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    write_lines(tmp_path / "data.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZEROTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path
