"""Reading GGUF checkpoints through transformers: checks before loading, and loading without repeated parsing."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import transformers

from zerotuning.errors import ZeroTuningError

_MAGIC = b"GGUF"


def check_gguf_packages() -> None:
    """Check that the packages which read GGUF files are installed.

    Raises:
        ZeroTuningError: A package is missing; the message names the extra that installs it.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ZeroTuningError(f'reading a .gguf model needs the package {package}: pip install "zerotuning[gguf]"')
    import gguf

    # transformers compares gguf's version. On Python 3.10 its lookup (importlib.metadata.packages_distributions) skips
    # packages without a top_level.txt; the package gguf has neither this file nor a __version__.
    if not hasattr(gguf, "__version__"):
        gguf.__version__ = importlib.metadata.version("gguf")


def check_gguf_file(path: Path) -> None:
    """Check that a file exists, is readable and starts with the GGUF magic bytes.

    Raises:
        ZeroTuningError: The file is missing, unreadable or of another format.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_MAGIC))
    except FileNotFoundError as error:
        raise ZeroTuningError(f"model file {path} does not exist") from error
    except OSError as error:
        raise ZeroTuningError(f"cannot read model file {path}: {error.strerror or error}") from error
    if magic != _MAGIC:
        raise ZeroTuningError(f"model file {path} is not GGUF: it starts with {magic!r}, not {_MAGIC!r}")


def dequantizing_arguments() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that unpack GGUF weights into dense tensors.

    Versions of transformers without GgufConfig always unpack the weights. Newer versions may keep them packed, in
    layers without gradients and with an attention implementation of their own.
    """
    if hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Within the context, transformers parses a .gguf file once.

    transformers parses the file for the tokenizer, the configuration and the weights separately, and builds the table
    of weight names once for each module. Together these repetitions are most of the loading time. The context also
    silences the loader's progress bar, which ignores transformers' own setting.
    """
    import gguf as gguf_package
    from transformers import modeling_gguf_pytorch_utils as gguf_loader

    with ExitStack() as patches:
        for name in ("GGUFReader", "get_tensor_name_map"):
            cached = functools.lru_cache(maxsize=1)(getattr(gguf_package, name))
            patches.enter_context(_replaced_attribute(gguf_package, name, cached))
        if hasattr(gguf_loader, "tqdm"):
            silent = functools.partial(gguf_loader.tqdm, disable=True)
            patches.enter_context(_replaced_attribute(gguf_loader, "tqdm", silent))
        yield


@contextmanager
def _replaced_attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, the attribute `name` of `module` is `value`."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
