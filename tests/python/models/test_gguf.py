"""GGUF files that are missing, damaged or of another format: each is refused with one line."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from refusals import one_line_error
from zerotuning.models import demo_model as demo
from zerotuning.models.loading import load_model


def test_a_gguf_file_that_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    assert f"model file {tmp_path / 'a.gguf'} does not exist" in one_line_error(load_model, tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 and so on")
    assert "a.gguf is not GGUF: it starts with b'PK" in one_line_error(load_model, tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert "a.gguf is not GGUF" in one_line_error(load_model, tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00")
    assert f"cannot load model {tmp_path / 'a.gguf'}: " in one_line_error(load_model, tmp_path / "a.gguf")


@pytest.mark.model
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_truncated_gguf_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "part.gguf"
    shutil.copyfile(demo.demo_model_path(), path)
    os.truncate(path, int(demo.FILE_BYTES * share))
    assert f"cannot load model {path}: " in one_line_error(load_model, path)


def test_a_missing_gguf_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    message = one_line_error(load_model, "demo")
    assert "needs the package gguf" in message
    assert 'pip install "zerotuning[gguf]"' in message
