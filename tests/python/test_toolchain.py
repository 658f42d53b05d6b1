"""Compilers that link libstdc++ statically: made harmless by the link options, or refused by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
STATIC = "-static-libstdc++ -static-libgcc"
#: Link a copy of the whole static runtime before the shared runtime: no later link option removes this copy.
WHOLE = '-Wl,--whole-archive "$(g++ -print-file-name=libstdc++.a)" -Wl,--no-whole-archive ' + STATIC

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("cmake") and sys.platform == "linux"), reason="needs g++, CMake and Linux"
)


def compiler(folder: Path, shared_options: str) -> Path:
    """A g++ that adds options where it links a shared library."""
    path = folder / "wrapped-g++"
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" -shared "*) exec g++ {shared_options} "$@" ;; *) exec g++ "$@" ;; esac\n'
    )
    path.chmod(0o755)
    return path


def configure(folder: Path, cxx: Path) -> subprocess.CompletedProcess[str]:
    command = [
        "cmake",
        "-S",
        SOURCE,
        "-B",
        folder / "build",
        f"-DCMAKE_CXX_COMPILER={cxx}",
        "-DZEROTUNING_BUILD_CUDA=OFF",
    ]
    command.append(f"-DPython3_EXECUTABLE={sys.executable}")
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_static_libstdcxx_is_replaced_by_the_one_that_torch_uses(tmp_path: Path) -> None:
    done = configure(tmp_path, compiler(tmp_path, STATIC))
    assert done.returncode == 0, done.stderr
    assert "shared with torch" in done.stdout
    libraries = tmp_path / "build" / "toolchain_check" / "libthrowing.so"
    needed = subprocess.run(["readelf", "-d", libraries], capture_output=True, text=True, check=True).stdout
    assert "libstdc++.so.6" in needed


def test_a_compiler_whose_libraries_hold_a_runtime_of_their_own_is_refused_by_name(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, WHOLE)
    refused = configure(tmp_path, cxx)
    assert refused.returncode != 0
    message = " ".join(refused.stderr.split())
    assert f"the compiler {cxx} cannot build for this torch: it links libstdc++ statically" in message
    assert "Set CXX (and CC) to a compiler that links libstdc++.so.6" in message
