"""The model `zerotuning` of lm-evaluation-harness, and lm-eval's command line with this model registered.

    zerotuning lm-eval run --model zerotuning --model_args pretrained=NAME,scales=DIR --tasks TASK
    lm_eval.simple_evaluate(model=ZeroTuningLM("demo", scales="sst2-scales"), tasks=["arc_easy"])

lm-eval's own command finds the model too. Releases after 0.4.13 use the entry point `lm_eval.models` of this package.
Release 0.4.13 needs a task that is a YAML file, named by its path, which imports this module with

    metadata: {model: !function zerotuning.lm_evaluation.ZeroTuningLM}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from zerotuning.errors import ZeroTuningError
from zerotuning.models.loading import load_model
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import patch
from zerotuning.patching.scaled_model import apply_scales_to, read_scales

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as missing:
    raise ZeroTuningError(
        f'lm-evaluation-harness cannot be imported ({missing}): pip install "zerotuning[lm-eval]"'
    ) from missing

#: Arguments of HFLM that apply to a model that is loaded already. Its other arguments are for loading a model.
_OPTIONS = frozenset(
    {
        "truncation",
        "logits_cache",
        "max_length",
        "softmax_dtype",
        "mixed_precision_dtype",
        "add_bos_token",
        "prefix_token_id",
        "think_end_token",
        "enable_thinking",
        "chat_template_args",
    }
)


@register_model("zerotuning")
class ZeroTuningLM(HFLM):
    """A patched model for lm-evaluation-harness, in one process.

    Args:
        pretrained: A model that is patched or not, or what `load_model` accepts: demo, a .gguf file, a folder, a hub
            name.
        scales: HeadScales, their folder or owner/name on the hub. None: every γ is 1; a model that is patched already
            keeps its scales.
        tokenizer: For a model that is given as an object (default: the tokenizer of its name).
        dtype: As of `load_model`; "auto" is its default. Not for a model that is given as an object.
        device: As of `load_model`. On a machine without a GPU, cuda means the default device: lm-eval passes cuda:0
            when the user names no device. Not for a model that is given as an object.
        device_map: As of `load_model`, in place of device. Not for a model that is given as an object.
        batch_size: As of lm-eval, "auto" included.
        max_batch_size: As of lm-eval.
        options: Further arguments of lm-eval's `hf` model that concern the use of a model, not its loading.

    Raises:
        ZeroTuningError: A model or scales cannot be read, scales have another shape, or an argument is unknown.
    """

    def __init__(
        self,
        pretrained: Any,
        scales: HeadScales | str | os.PathLike[str] | None = None,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        device_map: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **options: Any,
    ) -> None:
        unknown = sorted(options.keys() - _OPTIONS)
        if unknown:
            raise ZeroTuningError(
                f"unknown model argument {unknown[0]}: the model zerotuning has the arguments pretrained, scales, "
                f"tokenizer, dtype, device_map, {', '.join(sorted(_OPTIONS))}"
            )
        head_scales = None if scales is None else read_scales(scales)
        model, name = pretrained, getattr(pretrained, "name_or_path", "")
        if isinstance(pretrained, (str, os.PathLike)):
            name = os.fspath(pretrained)
            default_device = str(device).startswith("cuda") and (
                device_map is not None or not torch.cuda.is_available()
            )
            model, own_tokenizer = load_model(
                pretrained, None if dtype == "auto" else dtype, None if default_device else device, device_map
            )
            tokenizer = tokenizer or own_tokenizer
        elif dtype not in (None, "auto") or device_map is not None:
            given = f"device_map, got {device_map}" if dtype in (None, "auto") else f"dtype, got {dtype}"
            raise ZeroTuningError(f"a model that is loaded already accepts no {given}")
        patch(model)
        if head_scales is not None:
            apply_scales_to(model, head_scales, name, scales)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=max_batch_size, **options
        )


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval's own command line, with `--model zerotuning` registered.

    Args:
        arguments: Of lm-eval.

    Raises:
        ZeroTuningError: lm-eval refuses the arguments with a ValueError. (Its parser raises SystemExit.)
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except ZeroTuningError:
        raise
    except ValueError as error:
        raise ZeroTuningError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before
