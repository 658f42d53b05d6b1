"""ZeroTuning: one number per attention head scales a frozen language model's attention to the initial token.

    import zerotuning as zt
    zt.patch(model)                                                        # every γ is 1: outputs as before
    scales = zt.calibrate(model, tokenizer, task="sst2").scales
    zt.apply_scales(model, scales)

The names below are loaded on first use: neither `import zerotuning` nor `zerotuning --help` waits for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zerotuning.errors import ZeroTuningError
from zerotuning.version import __version__

if TYPE_CHECKING:
    from zerotuning import ops
    from zerotuning.calibrate import calibrate
    from zerotuning.evaluate import evaluate
    from zerotuning.models import load_model
    from zerotuning.patch import apply_scales, patch, rows, scaled_keys, unpatch, untuned
    from zerotuning.scales import HeadScales
    from zerotuning.tasks import Task

__all__ = [
    "HeadScales",
    "Task",
    "ZeroTuningError",
    "__version__",
    "apply_scales",
    "calibrate",
    "evaluate",
    "load_model",
    "ops",
    "patch",
    "rows",
    "scaled_keys",
    "unpatch",
    "untuned",
]

#: Where each lazily loaded name lives.
_HOME = {
    "HeadScales": "scales",
    "Task": "tasks",
    "apply_scales": "patch",
    "calibrate": "calibrate",
    "evaluate": "evaluate",
    "load_model": "models",
    "patch": "patch",
    "rows": "patch",
    "scaled_keys": "patch",
    "unpatch": "patch",
    "untuned": "patch",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("zerotuning.ops")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zerotuning.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package's own type, which keeps `zerotuning.patch` a function.

    Importing the submodule zerotuning.patch, anywhere, makes the import system store the submodule under that
    name in the package. Where a submodule has a function of its own name, that function is stored instead;
    the submodule stays in reach of `from zerotuning.patch import …`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
