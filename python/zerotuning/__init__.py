"""ZeroTuning: one number per attention head scales a frozen language model's attention to the initial token.

    import zerotuning as zt
    zt.patch(model)                                                        # every γ is 1: outputs as before
    scales = zt.calibrate(model, tokenizer, task="sst2").scales
    zt.apply_scales(model, scales)

The names below are loaded on first use: neither `import zerotuning` nor `zerotuning --help` imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zerotuning.errors import ZeroTuningError
from zerotuning.version import __version__

if TYPE_CHECKING:
    from zerotuning import ops
    from zerotuning.calibration.calibrate import calibrate
    from zerotuning.calibration.few_shot_choice import choose_shots
    from zerotuning.calibration.options import CalibrationOptions
    from zerotuning.evaluation.evaluate import evaluate
    from zerotuning.models.loading import load_model
    from zerotuning.patching.head_scales import HeadScales
    from zerotuning.patching.patch import apply_scales, patch, rows, scaled_keys, select_scales, unpatch, untuned
    from zerotuning.tasks.task import Task

__all__ = [
    "CalibrationOptions",
    "HeadScales",
    "Task",
    "ZeroTuningError",
    "__version__",
    "apply_scales",
    "calibrate",
    "choose_shots",
    "evaluate",
    "load_model",
    "ops",
    "patch",
    "rows",
    "scaled_keys",
    "select_scales",
    "unpatch",
    "untuned",
]

#: The module of each lazily loaded name.
_MODULE_OF = {
    "CalibrationOptions": "calibration.options",
    "HeadScales": "patching.head_scales",
    "Task": "tasks.task",
    "apply_scales": "patching.patch",
    "calibrate": "calibration.calibrate",
    "choose_shots": "calibration.few_shot_choice",
    "evaluate": "evaluation.evaluate",
    "load_model": "models.loading",
    "patch": "patching.patch",
    "rows": "patching.patch",  # the former name of select_scales, kept for one version
    "scaled_keys": "patching.patch",
    "select_scales": "patching.patch",
    "unpatch": "patching.patch",
    "untuned": "patching.patch",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("zerotuning.ops")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zerotuning.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
