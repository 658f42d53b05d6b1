"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from zerotuning import output
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_bytes_atomically, write_json_atomically, write_text_atomically
from zerotuning.output import result_folder


def test_a_written_file_is_read_back_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    assert write_bytes_atomically(tmp_path / "b", b"\x00\xff") == tmp_path / "b"
    write_text_atomically(str(tmp_path / "t"), "γ\n")
    write_json_atomically(tmp_path / "j", {"γ": [1.5, None]})
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t").read_bytes() == "γ\n".encode()
    assert json.loads((tmp_path / "j").read_text(encoding="utf-8")) == {"γ": [1.5, None]}
    assert sorted(os.listdir(tmp_path)) == ["b", "j", "t"]


def test_a_file_has_the_permissions_that_open_would_give_it(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text_atomically(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ZeroTuningError, match=r"^cannot write .*report\.json: No space left on device$"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("value", [{"loss": math.nan}, {"loss": math.inf}, {"loss": object()}])
def test_values_that_json_cannot_represent_are_refused_before_writing(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroTuningError, match="as JSON"):
        write_json_atomically(tmp_path / "report.json", value)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_locked_while_a_result_is_made_and_entered_again_by_the_same_process(tmp_path: Path) -> None:
    descriptor = os.open(
        tmp_path, os.O_RDONLY
    )  # A lock belongs to a file descriptor: a second descriptor acts like another process.
    with result_folder(tmp_path, overwrite=False, resumable=True):
        with result_folder(tmp_path / "." / "", overwrite=False, resumable=True):
            pass
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (
        pytest.raises(ZeroTuningError, match=f"^output {tmp_path} is being written by another calibration$"),
        result_folder(tmp_path, overwrite=True, resumable=True),
    ):
        pass
    os.close(descriptor)
    with result_folder(tmp_path, overwrite=False, resumable=True):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_another_process_locks_as_it_is_made_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, locked = output._create, []

    def make_and_lose(path: Path) -> list[Path]:
        made = make(path)
        locked.append(os.open(path, os.O_RDONLY))
        fcntl.flock(locked[0], fcntl.LOCK_EX)
        return made

    monkeypatch.setattr(output, "_create", make_and_lose)
    with (
        pytest.raises(ZeroTuningError, match="is being written by another calibration"),
        result_folder(tmp_path / "out", overwrite=False, resumable=True),
    ):
        pass
    assert (tmp_path / "out").is_dir()
    os.close(locked[0])


def test_results_are_written_on_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with result_folder(tmp_path, overwrite=False, resumable=True) as folder:
        assert folder == tmp_path


def test_a_folder_that_is_missing_or_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none" / "a.json", tmp_path / "file" / "a.json"):
        with pytest.raises(ZeroTuningError, match=f"^cannot write {path}: "):
            write_json_atomically(path, {})
