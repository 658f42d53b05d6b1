"""Where results go: checked before the long work starts, left as it was if that work fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from zerotuning.errors import ZeroTuningError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCALES_FILE = "head_scales.safetensors"
CONFIG_FILE = "zerotuning_config.json"
REPORT_FILE = "report.json"
PICTURE_FILE = "head_map.png"
REPORT_PAGE_FILE = "report.png"
STATE_FILE = "calibration_state.json"
TRIALS_FILE = "shot_trials.json"
RESULT_FILES = (SCALES_FILE, CONFIG_FILE, REPORT_FILE, PICTURE_FILE, REPORT_PAGE_FILE)

#: Folders that this process has locked: the command line and `calibrate` within it both enter theirs.
_locked: set[Path] = set()


@contextmanager
def result_folder(path: str | os.PathLike[str], *, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """Within it the folder exists and can be written; made for this, it goes again if nothing was put there.

    overwrite    accept a folder that holds a result, or the state of an unfinished calibration
    resumable    accept a folder that holds the state of an unfinished calibration, unless another process is in here
                 with it
    Errors: ZeroTuningError for a folder that holds a result, that another calibration writes, that is a file, or that
    cannot be written.
    """
    path = _folder(path)
    made = _make(path)
    with _lock(path) if resumable else nullcontext():  # a folder that another process locked is that one's to remove
        try:
            _check_unused(path, overwrite=overwrite, resumable=resumable)
            yield path
        finally:
            _remove(made)


def _folder(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):
        raise ZeroTuningError("output must name a folder, got an empty name")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ZeroTuningError(f"output {path} must be a folder, got a file")
    return path


def _check_unused(path: Path, *, overwrite: bool, resumable: bool) -> None:
    unfinished = (path / STATE_FILE).exists()
    if not overwrite and unfinished and not resumable:
        raise ZeroTuningError(f"output {path} holds an unfinished calibration: choose another folder or overwrite it")
    held = [name for name in RESULT_FILES if (path / name).exists()]
    if not overwrite and held and not unfinished:
        raise ZeroTuningError(
            f"output {path} already holds a result ({held[0]}): choose another folder or overwrite it"
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Within it no other process gets here with the same folder. Where there are no locks, nothing is locked."""
    place = path.resolve()
    if place in _locked or fcntl is None:
        yield
        return
    with ExitStack() as held:
        try:
            descriptor = os.open(place, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ZeroTuningError(f"output {path} is being written by another calibration") from error
        except OSError:  # a file system without locks, a folder that may not be listed
            pass
        _locked.add(place)
        held.callback(_locked.discard, place)
        yield


def _make(path: Path) -> list[Path]:
    """Creates `path` and tries whether it takes files; gives the folders that were missing."""
    made = []
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                with suppress(FileExistsError):  # another process just made it
                    folder.mkdir()
                    made.append(folder)
        with tempfile.TemporaryFile(dir=path):
            pass
        return made
    except OSError as error:
        _remove(made)
        raise ZeroTuningError(f"output {path} cannot be written: {error.strerror or error}") from error


def _remove(made: list[Path]) -> None:
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:  # not empty: the result, or what resumes it
            break


def made_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it was missing, once it takes files. Errors: ZeroTuningError where it does not."""
    path = _folder(path)
    _make(path)
    return path


def check_result_file(path: str | os.PathLike[str], *, suffixes: tuple[str, ...] = ()) -> Path:
    """The path of a file to be written, once its folder takes files and its name ends as it must.

    An existing file is accepted: it is replaced as a whole.
    Errors: ZeroTuningError for another suffix, a path that is a folder, a device or a pipe, a folder missing or
    read-only.
    """
    if not os.fspath(path):
        raise ZeroTuningError("output must name a file, got an empty name")
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ZeroTuningError(f"output {path} must end in {' or '.join(suffixes)}, got {path.suffix!r}")
    if path.is_dir():
        raise ZeroTuningError(f"output {path} must be a file, got a folder")
    if path.exists() and not path.is_file():
        raise ZeroTuningError(f"output {path} must be a regular file, got a device or a pipe")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ZeroTuningError(f"output {path} cannot be written: {error.strerror or error}") from error
    return path
