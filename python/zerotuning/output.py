"""Output folders and files: checked before long work starts, unchanged if the work fails."""

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

#: Folders that this process has locked. The command line locks its folder and calls `calibrate`, which locks it too.
_locked: set[Path] = set()


@contextmanager
def result_folder(path: str | os.PathLike[str], *, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """Provide a writable output folder within the context.

    Folders that the context created and that stay empty are removed at its end.

    Args:
        path: The folder.
        overwrite: Accept a folder that holds a result or the state of an unfinished calibration.
        resumable: Accept a folder that holds the state of an unfinished calibration, and lock the folder against other
            processes.

    Yields:
        The folder.

    Raises:
        ZeroTuningError: The folder holds a result, is locked by another calibration, is a file, or cannot be written.
    """
    path = _folder(path)
    created = _create(path)
    # The lock is outside `try`: only the process with the lock removes the folder.
    with _lock(path) if resumable else nullcontext():
        try:
            _check_unused(path, overwrite=overwrite, resumable=resumable)
            yield path
        finally:
            _remove(created)


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
    existing = [name for name in RESULT_FILES if (path / name).exists()]
    if not overwrite and existing and not unfinished:
        raise ZeroTuningError(
            f"output {path} already holds a result ({existing[0]}): choose another folder or overwrite it"
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder within the context, where the file system supports locks."""
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
        except OSError:  # the file system has no locks, or the folder may not be listed
            pass
        _locked.add(place)
        held.callback(_locked.discard, place)
        yield


def _create(path: Path) -> list[Path]:
    """Create `path`, check that files can be created in it, and return the folders that were missing."""
    created = []
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                with suppress(FileExistsError):  # another process created it meanwhile
                    folder.mkdir()
                    created.append(folder)
        with tempfile.TemporaryFile(dir=path):
            pass
        return created
    except OSError as error:
        _remove(created)
        raise ZeroTuningError(f"output {path} cannot be written: {error.strerror or error}") from error


def _remove(created: list[Path]) -> None:
    for folder in reversed(created):
        try:
            folder.rmdir()
        except OSError:  # the folder is not empty: a result or an unfinished calibration is in it
            break


def made_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder if it is missing, and return it.

    Raises:
        ZeroTuningError: The path is a file, or files cannot be created in the folder.
    """
    path = _folder(path)
    _create(path)
    return path


def check_result_file(path: str | os.PathLike[str], *, suffixes: tuple[str, ...] = ()) -> Path:
    """Return the path of a file that is to be written, after checking that it can be.

    An existing file is accepted: writing replaces it as a whole.

    Args:
        path: The file.
        suffixes: The suffixes that the name may have, in lower case; empty: any.

    Raises:
        ZeroTuningError: The suffix is not among `suffixes`, the path is a folder, a device or a pipe, or the folder is
            missing or read-only.
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
