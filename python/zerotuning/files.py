"""Atomic writes: a file is written under a temporary name in its folder, then renamed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zerotuning.errors import ZeroTuningError


def write_bytes_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path` atomically: a reader sees the old file or the new file, also after a crash.

    Returns:
        The path.

    Raises:
        ZeroTuningError: The folder does not exist or cannot be written.
    """
    path = Path(path)
    # The temporary name contains at most 40 characters of the name: file systems limit the length of names.
    unfinished = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        # os.open rather than tempfile: the file then has the permissions of the user's umask, not 0600.
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ZeroTuningError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_text_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` in UTF-8 by `write_bytes_atomically`.

    Raises:
        ZeroTuningError: The file cannot be written, or the text contains half of a surrogate pair.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ZeroTuningError(f"cannot write {path} as UTF-8: {error}") from error
    return write_bytes_atomically(path, content)


def write_json_atomically(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON with a final newline by `write_bytes_atomically`.

    Raises:
        ZeroTuningError: The file cannot be written, or JSON cannot represent the value (NaN and infinities included).
            Nothing is written in the latter case.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ZeroTuningError(f"cannot write {path} as JSON: {error}") from error
    return write_text_atomically(path, text + "\n")


def write_json_lines_atomically(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line by `write_bytes_atomically`.

    Raises:
        ZeroTuningError: As in `write_json_atomically`.
    """
    try:
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    except (TypeError, ValueError) as error:
        raise ZeroTuningError(f"cannot write {path} as JSON: {error}") from error
    return write_text_atomically(path, "".join(lines))
