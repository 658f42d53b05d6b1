"""Loading a causal language model and its tokenizer: the demo model, a .gguf file, a folder or a hub name."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from zerotuning import ops
from zerotuning.errors import ZeroTuningError
from zerotuning.models import device_maps
from zerotuning.models.demo_model import demo_model_path
from zerotuning.models.tensor_parallel import check_plan, join_processes, load_arguments

DEMO = "demo"
#: Of weights. torch's smaller floating types are for storage alone: it does not compute in them.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GGUF_MAGIC = b"GGUF"


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    tensor_parallel: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer), in evaluation mode, without weight gradients, the tokenizer padding on the left.

    name     "demo" (the embedded SmolLM2-135M-Instruct), a .gguf file, a local folder, or a hub name
    dtype    of the weights, a torch.dtype or its name; None: on a CPU bfloat16 where the processor multiplies
             it natively (AMX, AVX-512), else float32; on a GPU the checkpoint's own (bfloat16 for .gguf)
    device   None: the first GPU if there is one that the operators run on, else the CPU
    device_map
             in its place, for a model too big for one GPU: "auto", "balanced", or what else transformers takes; its layers
             are spread over GPUs, CPU and disk (needs accelerate)
    tensor_parallel
             in its place, in processes that torchrun started: transformers cuts the model by its own plan and each process
             holds a part, on its own GPU (on CPUs where there is none). All of them then have to do the same with it.
    Errors: ZeroTuningError, one line, for a file or folder that is missing, truncated or no model, for
    weights that do not cover the model, for a hub name that cannot be reached, and for a model that cannot be placed as
    asked. Code from the hub is never run.
    """
    text = os.fspath(name)
    gguf = text == DEMO or text.lower().endswith(".gguf")
    target, placement = _placement(device, device_map, tensor_parallel, gguf)
    arguments: dict[str, Any] = {}
    if gguf:
        # Before the file is fetched: without the packages that read it, 93 MB would come for nothing.
        _check_gguf_packages()
        path = demo_model_path() if text == DEMO else Path(text)
        _check_gguf_file(path)
        source, arguments["gguf_file"] = str(path.parent), path.name
    else:
        source = _folder_or_hub_name(text)
    weights = _dtype(dtype, target, gguf)
    downloads = not gguf and not Path(source).is_dir()
    if downloads:
        _check_hub(text)
    try:
        with _quiet_transformers(progress=downloads), _gguf_read_once(gguf):
            if tensor_parallel:
                config = transformers.AutoConfig.from_pretrained(source, **arguments)
                check_plan(text, config, join_processes())
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
            arguments |= placement | _dense_gguf_weights(gguf)
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=weights, output_loading_info=True, **arguments
            )
    except ZeroTuningError:
        raise
    except Exception as error:  # the readers below transformers raise anything, struct.error among them
        raise ZeroTuningError(f"cannot load model {text}: {_reason(error, downloads, bool(placement))}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would only warn, and leave those weights random.
        raise ZeroTuningError(
            f"cannot load model {text}: {len(missing)} weights are not in it, {missing[0]} among them"
        )
    if device_map is not None:
        device_maps.input_device(model)
    if gguf:
        model.name_or_path = model.config._name_or_path = path.name  # transformers has the folder's name there
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if not placement:
        model = model.to(target)
    return model.eval().requires_grad_(False), tokenizer


def default_cpu_dtype() -> torch.dtype:
    """bfloat16 where the processor has matrix instructions for it (AMX-BF16, AVX-512-BF16), else float32."""
    for instruction_set in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(torch.cpu, instruction_set, None)  # private to torch, so it may go
        if supported is not None and supported():
            return torch.bfloat16
    return torch.float32


def _placement(
    device: torch.device | str | None, device_map: Any, tensor_parallel: bool, gguf: bool
) -> tuple[torch.device, dict[str, Any]]:
    """The device that the weights' type is chosen for; and what tells transformers where they go, nothing where they go
    to that device as they are."""
    given = {"device": device is not None, "device_map": device_map is not None, "tensor_parallel": tensor_parallel}
    named = [name for name, is_given in given.items() if is_given]
    if len(named) > 1:
        raise ZeroTuningError(f"{' and '.join(named)} each say where the model goes: give one of them")
    if device_map is not None:
        types = device_maps.device_types(device_map)
        if gguf and isinstance(device_map, Mapping) and device_maps.DISK in device_map.values():
            raise ZeroTuningError("device_map: transformers puts no part of a .gguf model on the disk")
        return torch.device("cpu" if types == {"cpu"} else "cuda"), {"device_map": device_map}
    if tensor_parallel:
        count = join_processes()
        return _device(None), load_arguments(count)
    return _device(device), {}


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() and ops.runs_on("cuda") else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ZeroTuningError(f"device must be a torch device such as cpu or cuda:0, got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ZeroTuningError(f"device must be of type cpu or cuda, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ZeroTuningError(f"device {device} is asked for, but torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ZeroTuningError(f"device {device} is asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def _dtype(dtype: torch.dtype | str | None, device: torch.device, gguf: bool) -> torch.dtype | str:
    if dtype is None:
        if device.type == "cpu":
            return default_cpu_dtype()
        return torch.bfloat16 if gguf else "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ZeroTuningError(f"dtype must be one of {names}, got {dtype!r}")
    return found


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
    # A hub name is "name" or "owner/name"; anything else was meant as a path.
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text:
        raise ZeroTuningError(f"model folder {text} does not exist")
    return text


def _check_hub(name: str) -> None:
    """One try to reach the hub, for a model that is not in its cache: transformers keeps trying for most of a
    minute, which is long for a mistyped folder."""
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE or huggingface_hub.try_to_load_from_cache(name, "config.json") is not None:
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whichever HTTP client the hub's library uses
        reason = f"cannot connect to {constants.ENDPOINT} ({error})"
        raise ZeroTuningError(f"cannot load model {name}: {_not_given(reason)}") from error


def _check_gguf_file(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except FileNotFoundError as error:
        raise ZeroTuningError(f"model file {path} does not exist") from error
    except OSError as error:
        raise ZeroTuningError(f"cannot read model file {path}: {error.strerror or error}") from error
    if magic != _GGUF_MAGIC:
        raise ZeroTuningError(f"model file {path} is not GGUF: it starts with {magic!r}, not {_GGUF_MAGIC!r}")


def _check_gguf_packages() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ZeroTuningError(f'reading a .gguf model needs the package {package}: pip install "zerotuning[gguf]"')
    import gguf

    # transformers compares the version; on Python 3.10 importlib.metadata.packages_distributions, where it
    # looks, does not see a package without top_level.txt, and gguf has neither that nor a __version__.
    if not hasattr(gguf, "__version__"):
        gguf.__version__ = importlib.metadata.version("gguf")


def _dense_gguf_weights(gguf: bool) -> dict[str, Any]:
    """Arguments that make transformers unpack GGUF weights: it always did before it had GgufConfig; since
    then it may keep them packed, in layers without gradients, and choose an attention of its own."""
    if gguf and hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


@contextmanager
def _gguf_read_once(gguf: bool) -> Iterator[None]:
    """Within it transformers, which parses a .gguf file three times (tokenizer, config, weights) and builds
    its table of weight names once a module, does each once: they are most of the loading time. Its progress
    bar there heeds no setting, so it is put out here."""
    if not gguf:
        yield
        return
    import gguf as gguf_package
    from transformers import modeling_gguf_pytorch_utils as gguf_loader

    with ExitStack() as patches:
        for name in ("GGUFReader", "get_tensor_name_map"):
            cached = functools.lru_cache(maxsize=1)(getattr(gguf_package, name))
            patches.enter_context(_replaced(gguf_package, name, cached))
        if hasattr(gguf_loader, "tqdm"):
            silent = functools.partial(gguf_loader.tqdm, disable=True)
            patches.enter_context(_replaced(gguf_loader, "tqdm", silent))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within it `module.name` is `value`."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _reason(error: Exception, downloads: bool, placed: bool) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if len(reason) > 200:
        reason = reason[:199] + "…"
    if downloads:
        return _not_given(reason)
    if placed:  # the files may be sound, and the place unfit
        return f"{type(error).__name__}: {reason}"
    return f"the files are damaged or of no kind that transformers reads ({type(error).__name__}: {reason})"


def _not_given(reason: str) -> str:
    return (
        f"no such folder, and the hub did not give it: {reason.rstrip('.')}"
        " (without a network, name a local folder or a .gguf file)"
    )


@contextmanager
def _quiet_transformers(*, progress: bool) -> Iterator[None]:
    """No warnings from transformers while it loads; progress bars only for downloads, only on a terminal."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    others = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    levels = [other.level for other in others]
    log.set_verbosity(logging.CRITICAL)
    for other in others:
        other.setLevel(logging.ERROR)
    if not (progress and sys.stderr.isatty()):
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)
        if bars:
            log.enable_progress_bar()
