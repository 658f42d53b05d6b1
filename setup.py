"""Build csrc with CMake and install its two libraries into the package.

The environment variable CMAKE_ARGS is passed to CMake, for example
CMAKE_ARGS="-DZEROTUNING_BUILD_CUDA=OFF" or CMAKE_ARGS="-DZEROTUNING_CUDA_ARCHITECTURES=90a-real".
MAX_JOBS limits the number of compilers that run at the same time.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """One CMake build of the operators (zerotuning/lib) and the optimisers (zerotuning/_search)."""

    def run(self) -> None:
        source = Path(__file__).parent.resolve()
        build = Path(self.build_temp).resolve()
        package_root = source / "python" if self.inplace else Path(self.build_lib).resolve()
        configure = [
            "cmake",
            f"-S{source}",
            f"-B{build}",
            "-DZEROTUNING_BUILD_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
            subprocess.run(["cmake", "--install", build, "--component", "python", "--prefix", package_root], check=True)
        except FileNotFoundError as error:
            raise SystemExit("zerotuning: cmake not found; install it (pip install cmake)") from error

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib).rglob("*.so")]


# A source distribution contains the files that extensions depend on.
SOURCES = [path for path in Path("csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".cmake", ".txt"}]

setup(
    ext_modules=[Extension("zerotuning._search", sources=[], depends=["CMakeLists.txt", *map(str, sorted(SOURCES))])],
    cmdclass={"build_ext": CMakeBuild},
)
