"""Names that were replaced are gone, except where the old name is kept as an alias for one version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".md", ".ipynb", ".toml", ".yml", ".txt", ".cmake"}
FOLDERS = ["csrc", "python/zerotuning", "tests", "docs", "notebooks"]
FILES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CMakeLists.txt", "setup.py", "pyproject.toml", "mkdocs.yml"]
#: Files that list the new name of each old name.
RENAMES = ["docs/python.md", "CHANGELOG.md"]
#: Old name (a regular expression) -> the files, or folders, in which it may stand.
OLD_NAMES: dict[str, list[str]] = {
    r"\bHeadScaling\b": [],
    r"\bdepartures?(_\w+)?\b": [],
    r"\brecognises?\b|\bRecognised\b": [],
    r"\bstock(_\w+)?\b|\bStock[A-Z]\w*|\b[A-Z_]+_STOCK\b": [],
    r"\b\w+_(takes|knows)\b": [],
    r"\bpacked_code\b|\bdense_codes?\b|\bis_packed_code\b": [],
    r"\b(Setbacks|can_be_survived)\b": [],
    r"\b(class Judge|Verdict)\b": [
        "python/zerotuning/mt_bench",
        "python/zerotuning/cli/mt_bench.py",
        "tests/python/mt_bench",
    ],
    r"\bfit_scales\b": [],
    r"\b(is_first|from_first)\b": [],
    r"--(seeds|shot-draws|penalty)\b": [*RENAMES, "python/zerotuning/cli", "tests/python/cli"],
    r"\bzt\.rows\b": [*RENAMES, "tests/python/patching"],
    r"\baten::dense\b": [],
    r"\bdesign\.md\b": [],
}  # fmt: skip
#: Old names within csrc; outside csrc they are ordinary words.
OLD_CPP_NAMES: dict[str, list[str]] = {
    r"\b(\w*Sight|sight_of|in_sight)\b": [],
    r"\b(look|weigh|settle|settled|take_queries)\(": [],
}


def sources() -> list[Path]:
    found = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        found += [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    return [path for path in found if path != Path(__file__) and "data" not in path.relative_to(ROOT).parts]


def places(pattern: str, allowed: list[str], folder: str = "") -> list[str]:
    found = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(folder) or any(name == one or name.startswith(f"{one}/") for one in allowed):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if match := re.search(pattern, line):
                found.append(f"{name}:{number}: {match[0]}")
    return found


@pytest.mark.parametrize("pattern", OLD_NAMES)
def test_an_old_name_is_gone(pattern: str) -> None:
    found = places(pattern, OLD_NAMES[pattern])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pattern", OLD_CPP_NAMES)
def test_an_old_name_is_gone_from_the_kernels(pattern: str) -> None:
    found = places(pattern, OLD_CPP_NAMES[pattern], "csrc/")
    assert not found, "\n".join(found)
