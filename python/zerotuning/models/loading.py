"""Loading a causal language model and its tokenizer: the embedded model, a .gguf file, a folder or a hub name."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from zerotuning import ops
from zerotuning.errors import ZeroTuningError
from zerotuning.hub_access import fetch_error, first_line, is_repository_name, repository_connection_error
from zerotuning.models import device_maps
from zerotuning.models.demo_model import demo_model_path
from zerotuning.models.gguf import check_gguf_file, check_gguf_packages, dequantizing_arguments, gguf_parsed_once
from zerotuning.models.tensor_parallel import check_plan, join_processes, load_arguments

DEMO = "demo"
#: Types of weights. torch stores its 8-bit floating types but does not compute in them.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    tensor_parallel: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model for inference, and its tokenizer.

    At most one of `device`, `device_map` and `tensor_parallel` may be given. Code from the hub is never run.

    Args:
        name: "demo" (the embedded SmolLM2-135M-Instruct), a .gguf file, a local folder, or a hub name.
        dtype: Type of the weights, a torch.dtype or its name. Default: on a CPU bfloat16 where the processor multiplies
            bfloat16 natively (AMX, AVX-512), else float32; on a GPU the checkpoint's own type (bfloat16 for .gguf).
        device: Device of the whole model. Default: the first GPU that the operators support, else the CPU.
        device_map: For a model too big for one GPU: "auto", "balanced" or another map that transformers accepts. The
            layers are spread over GPUs, CPU and disk. Needs the package accelerate.
        tensor_parallel: For processes that torchrun started: transformers shards the model by its own plan, and each
            process holds its shard on a GPU of its own (on the CPU where there is no GPU). All processes must then make
            the same calls in the same order.

    Returns:
        (model, tokenizer): the model in evaluation mode with weights that need no gradient; the tokenizer pads on the
        left.

    Raises:
        ZeroTuningError: The file or folder is missing, truncated or no model; the weights do not cover the model; the
            hub cannot be reached; or the model cannot be placed as requested. The message is one line.
    """
    text = os.fspath(name)
    is_gguf = text == DEMO or text.lower().endswith(".gguf")
    target, placement = _placement(device, device_map, tensor_parallel, is_gguf)
    arguments: dict[str, Any] = {}
    if is_gguf:
        check_gguf_packages()  # before the download of 93 MB, which only these packages can read
        path = demo_model_path() if text == DEMO else Path(text)
        check_gguf_file(path)
        source, arguments["gguf_file"] = str(path.parent), path.name
    else:
        source = _folder_or_hub_name(text)
    weight_dtype = _checked_dtype(dtype, target, is_gguf)
    downloads = not is_gguf and not Path(source).is_dir()
    if downloads:
        _check_hub(text)
    try:
        with _quiet_transformers(progress=downloads), gguf_parsed_once() if is_gguf else nullcontext():
            if tensor_parallel:
                config = transformers.AutoConfig.from_pretrained(source, **arguments)
                check_plan(text, config, join_processes())
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
            arguments |= placement | (dequantizing_arguments() if is_gguf else {})
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=weight_dtype, output_loading_info=True, **arguments
            )
    except ZeroTuningError:
        raise
    except Exception as error:  # the file readers that transformers uses raise any type, struct.error among them
        raise _load_error(text, error, downloads, bool(placement)) from error
    _check_complete(text, report)
    if device_map is not None:
        device_maps.input_device(model)
    if is_gguf:
        model.name_or_path = model.config._name_or_path = path.name  # transformers sets the folder's name
    if not placement:
        model = model.to(target)
    return model.eval().requires_grad_(False), _left_padding(tokenizer)


def _check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without some of the weights: transformers would warn and leave these weights random."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ZeroTuningError(
            f"cannot load model {name}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them"
        )


def _left_padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def default_cpu_dtype() -> torch.dtype:
    """Return bfloat16 where the processor has bfloat16 matrix instructions (AMX-BF16, AVX-512-BF16), else float32."""
    for instruction_set in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(
            torch.cpu, instruction_set, None
        )  # private to torch: a later version may lack this function
        if supported is not None and supported():
            return torch.bfloat16
    return torch.float32


def _placement(
    device: torch.device | str | None, device_map: Any, tensor_parallel: bool, is_gguf: bool
) -> tuple[torch.device, dict[str, Any]]:
    """Return the device whose type decides the weights' dtype, and the placement arguments of `from_pretrained`.

    The placement arguments are empty where the whole model is moved to that device after loading.
    """
    is_given = {"device": device is not None, "device_map": device_map is not None, "tensor_parallel": tensor_parallel}
    placements = [name for name in is_given if is_given[name]]
    if len(placements) > 1:
        raise ZeroTuningError(f"{' and '.join(placements)} each place the model: give one of them")
    if device_map is not None:
        types = device_maps.device_types(device_map)
        if is_gguf and isinstance(device_map, Mapping) and device_maps.DISK in device_map.values():
            raise ZeroTuningError("device_map: transformers cannot offload a .gguf model to the disk")
        return torch.device("cpu" if types == {"cpu"} else "cuda"), {"device_map": device_map}
    if tensor_parallel:
        count = join_processes()
        return _checked_device(None), load_arguments(count)
    return _checked_device(device), {}


def _checked_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() and ops.runs_on("cuda") else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ZeroTuningError(f"device must be a torch device such as cpu or cuda:0, got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ZeroTuningError(f"device must be of type cpu or cuda, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ZeroTuningError(f"device must be available, got {device}, but torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ZeroTuningError(
            f"device must be available, got {device}, but torch sees {torch.cuda.device_count()} GPUs"
        )
    return device


def _checked_dtype(dtype: torch.dtype | str | None, device: torch.device, is_gguf: bool) -> torch.dtype | str:
    if dtype is None:
        if device.type == "cpu":
            return default_cpu_dtype()
        return torch.bfloat16 if is_gguf else "auto"
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or resolved not in DTYPES:
        names = ", ".join(str(supported).removeprefix("torch.") for supported in DTYPES)
        raise ZeroTuningError(f"dtype must be one of {names}, got {dtype!r}")
    return resolved


def _folder_or_hub_name(text: str) -> str:
    if not text:
        raise ZeroTuningError("model name must not be empty")
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ZeroTuningError(f"model folder {text} has no config.json")
        return str(path)
    if path.is_file():
        raise ZeroTuningError(f"model {text} must be a folder, a .gguf file or a hub name, got a file of another kind")
    if not is_repository_name(text):
        raise ZeroTuningError(f"model folder {text} does not exist")
    return text


def _check_hub(name: str) -> None:
    """Refuse a model that is neither in the hub's local cache nor can be downloaded."""
    reason = repository_connection_error(name, "config.json")
    if reason is not None:
        raise _not_on_hub(name, reason)


def _not_on_hub(name: str, reason: str) -> ZeroTuningError:
    return fetch_error(
        f"cannot load model {name}",
        f"no such folder, and the hub did not deliver the model: {reason}",
        "name a local folder or a .gguf file",
    )


def _load_error(name: str, error: Exception, downloads: bool, placed: bool) -> ZeroTuningError:
    if downloads:
        return _not_on_hub(name, first_line(error))
    reason = f"{type(error).__name__}: {first_line(error)}"
    if not placed:  # with a placement the files may be intact and the placement impossible
        reason = f"the files are damaged or of a kind that transformers cannot read ({reason})"
    return ZeroTuningError(f"cannot load model {name}: {reason}")


@contextmanager
def _quiet_transformers(*, progress: bool) -> Iterator[None]:
    """Silence transformers' warnings within the context; show progress bars only for downloads on a terminal."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    levels = [logger.level for logger in loggers]
    log.set_verbosity(logging.CRITICAL)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if not (progress and sys.stderr.isatty()):
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            log.enable_progress_bar()
