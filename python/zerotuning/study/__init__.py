"""`zerotuning study NAME`: the paper's findings, measured on a model of your choice.

Each study is a module of this package whose STUDY is an `Experiment`.

from zerotuning.study import Setting, run_study
result = run_study("gamma", Setting(size="small"), output="results")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotuning.study.runner import StudyResult, run_study
    from zerotuning.study.setting import Setting

__all__ = ["Setting", "StudyResult", "run_study"]

_MODULES = {"Setting": "setting", "StudyResult": "runner", "run_study": "runner"}


# Loaded on first use: the command line imports this package only for the names of the studies.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"zerotuning.study.{_MODULES[name]}"), name)
