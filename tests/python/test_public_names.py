"""The public names of zerotuning, whichever modules define them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import FunctionType, ModuleType

import pytest
import zerotuning

#: Module paths that the documentation names.
DOCUMENTED = ["ops", "errors", "files", "output", "version", "demo", "lm_evaluation", "study", "mt_bench"]


def test_public_functions_are_functions_after_their_modules_are_imported() -> None:
    for name in ("patching.patch", "calibration.calibrate", "evaluation.evaluate"):
        module = importlib.import_module(f"zerotuning.{name}")
        function = name.rpartition(".")[2]
        assert isinstance(getattr(zerotuning, function), FunctionType), name
        assert getattr(zerotuning, function) is getattr(module, function)
    assert isinstance(zerotuning.ops, ModuleType)


def test_a_task_is_imported_from_its_package_without_torch() -> None:
    code = "import sys; from zerotuning.tasks import Record, Task, as_records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert importlib.import_module("zerotuning.tasks").Task is zerotuning.Task


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_modules_are_importable(name: str) -> None:
    if name == "lm_evaluation":
        pytest.importorskip("lm_eval")
    assert importlib.import_module(f"zerotuning.{name}").__doc__


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(zerotuning.__all__) <= set(dir(zerotuning))
    for name in zerotuning.__all__:
        assert getattr(zerotuning, name) is not None
    with pytest.raises(AttributeError, match="module 'zerotuning' has no attribute 'tune'"):
        _ = zerotuning.tune  # type: ignore[attr-defined]


def test_the_former_name_of_select_scales_still_works() -> None:
    assert zerotuning.rows is zerotuning.select_scales
    assert {"rows", "select_scales"} <= set(zerotuning.__all__)
