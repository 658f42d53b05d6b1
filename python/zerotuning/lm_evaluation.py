"""lm-evaluation-harness with head scales: its model `zerotuning`, and its command line with that model registered.

    zerotuning lm-eval run --model zerotuning --model_args pretrained=NAME,scales=DIR --tasks TASK
    lm_eval.simple_evaluate(model=ZeroTuningLM("demo", scales="sst2-scales"), tasks=["arc_easy"])

lm-eval's own command finds the model too: from the release after 0.4.13 on by the entry point `lm_eval.models` of this
package; in 0.4.13 when the task is a YAML file named by its path that imports this module, by

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

#: What HFLM does with a model that is loaded already; its other arguments say how to load one.
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
        pretrained: A model that is patched or not, or what `load_model` accepts: demo, a .gguf file, a folder, a hub name.
        scales: HeadScales, their folder or owner/name on the hub. None: every γ is 1; a model that is patched already
            keeps its scales.
        tokenizer: For a model that is given as an object (default: the tokenizer of its name).
        dtype: As of `load_model`; "auto" is its default. Not for a model that is given as an object.
        device: As of `load_model`. A GPU on a machine without one means the default device: lm-eval passes cuda:0 when
            the user names no device. Not for a model that is given as an object.
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
                f"model argument {unknown[0]} is not known: the model zerotuning takes pretrained, scales, tokenizer,"
                f" dtype, device_map, {', '.join(sorted(_OPTIONS))}"
            )
        chosen = None if scales is None else read_scales(scales)
        model, name = pretrained, getattr(pretrained, "name_or_path", "")
        if isinstance(pretrained, (str, os.PathLike)):
            name = os.fspath(pretrained)
            default = str(device).startswith("cuda") and (device_map is not None or not torch.cuda.is_available())
            model, own_tokenizer = load_model(
                pretrained, None if dtype == "auto" else dtype, None if default else device, device_map
            )
            tokenizer = tokenizer or own_tokenizer
        elif dtype not in (None, "auto") or device_map is not None:
            given = f"device_map, got {device_map}" if dtype in (None, "auto") else f"dtype, got {dtype}"
            raise ZeroTuningError(f"a model that is loaded already takes no {given}")
        patch(model)
        if chosen is not None:
            apply_scales_to(model, chosen, name, scales)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=max_batch_size, **options
        )


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, in which `--model zerotuning` is known.

    Errors: ZeroTuningError for what lm-eval refuses; SystemExit as its parser raises it.
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
