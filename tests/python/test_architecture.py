"""The layout of the package: imports point downwards only (docs/how-it-works.md, "Layout")."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import zerotuning

PACKAGE = Path(zerotuning.__file__).parent
#: From the top to the bottom. Members of one layer do not import each other.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"study", "bench", "mt_bench", "demo", "lm_evaluation"},
    {"calibration"},
    {"plots", "patching", "evaluation"},
    {"attention", "models", "tasks"},
    {"_search", "ops", "files", "output", "hub_access", "machine", "statistics"},
    {"errors", "version", "cuda_routes"},
]
LAYER_OF = {member: depth for depth, layer in enumerate(LAYERS) for member in layer}
#: Modules that only name objects of other modules: the lazy public names, and paths kept for one version.
EXEMPT = {"__init__", "shot_choice"}


def imported_members(path: Path) -> Iterator[tuple[int, str]]:
    """(line, package or module directly below zerotuning) of each import in a file, lazy and typing ones included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "zerotuning":
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zerotuning."):
            yield node.lineno, str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("zerotuning."):
                    yield node.lineno, alias.name.split(".")[1]


def test_imports_point_downwards_only() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if importer in EXEMPT:
            continue
        assert importer in LAYER_OF, f"{importer} belongs to no layer: add it to LAYERS"
        for line, imported in imported_members(path):
            if imported != importer and LAYER_OF.get(imported, -1) <= LAYER_OF[importer]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {imported}")
    assert not wrong, "imports that do not point downwards:\n" + "\n".join(wrong)
