"""HeadScales: one number γ for each attention head and the metadata of its calibration, saved as two small files."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_bytes_atomically, write_json_atomically
from zerotuning.hub_access import fetch_error, first_line, is_repository_name, repository_connection_error

SCALES_FILE = "head_scales.safetensors"
CONFIG_FILE = "zerotuning_config.json"


class HeadScales:
    """γ of every head: the factor of its attention to the initial token (arXiv 2505.11739); 1 changes nothing.

    Args:
        gamma: (layers, heads), positive and finite; a tensor, an array or nested sequences.
        metadata: kept beside γ: model_type, model_name, task, method, objective, versions, calibration.

    Attributes:
        gamma: float32 (layers, heads), on the CPU.
        metadata: a dictionary.

    Raises:
        ZeroTuningError: gamma has another shape, or a value that is not a positive finite number; metadata is no
            mapping.
    """

    def __init__(self, gamma: Any, metadata: Mapping[str, Any] | None = None) -> None:
        try:
            tensor = torch.as_tensor(gamma, dtype=torch.float32).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ZeroTuningError(f"gamma must be numbers [layers, heads]: {error}") from error
        if tensor.dim() != 2 or tensor.numel() == 0:
            raise ZeroTuningError(f"gamma must be [layers, heads], got {list(tensor.shape)}")
        bad = ~(torch.isfinite(tensor) & (tensor > 0))
        if bool(bad.any()):
            layer, head = bad.nonzero()[0].tolist()
            raise ZeroTuningError(
                f"gamma must be positive and finite, got {tensor[layer, head].item()} at layer {layer}, head {head}"
            )
        if metadata is not None and not isinstance(metadata, Mapping):
            raise ZeroTuningError(f"metadata must be a mapping, got {metadata!r}")
        self.gamma = tensor
        self.metadata = dict(metadata or {})

    @classmethod
    def ones(cls, layers: int, heads: int) -> HeadScales:
        """Return scales that change nothing.

        Args:
            layers: number of layers.
            heads: number of query heads of a layer.

        Raises:
            ZeroTuningError: a count is no positive integer.
        """
        for name, count in (("layers", layers), ("heads", heads)):
            if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
                raise ZeroTuningError(f"{name} must be a positive integer, got {count!r}")
        return cls(torch.ones(layers, heads))

    @property
    def log_scale(self) -> Tensor:
        """log γ, float32 (layers, heads)."""
        return self.gamma.log()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.gamma.shape[0]

    @property
    def num_heads(self) -> int:
        """Number of query heads of a layer."""
        return self.gamma.shape[1]

    def __repr__(self) -> str:
        return f"HeadScales({self.num_layers} layers x {self.num_heads} heads, {self.metadata})"

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write head_scales.safetensors and zerotuning_config.json, each whole or not at all.

        Args:
            folder: created if it does not exist.
            overwrite: replace scales that the folder holds.

        Raises:
            ZeroTuningError: the folder holds scales already (without overwrite) or cannot be written.
        """
        path = Path(folder)
        if (path / SCALES_FILE).exists() and not overwrite:
            raise ZeroTuningError(f"{path} already holds head scales; choose another folder or overwrite them")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZeroTuningError(f"cannot create {path}: {error.strerror or error}") from error
        config = {**self.metadata, "layers": self.num_layers, "heads": self.num_heads}
        write_json_atomically(path / CONFIG_FILE, config)
        write_bytes_atomically(path / SCALES_FILE, save_tensors({"gamma": self.gamma}))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> HeadScales:
        """Read scales that `save_pretrained` wrote.

        Args:
            name: a folder, or the name owner/repository of such a folder on the Hugging Face hub.

        Raises:
            ZeroTuningError: a file is missing, damaged or holds something else; the message names the file.
        """
        folder = Path(name)
        if folder.is_dir():
            return cls._read(folder / SCALES_FILE, folder / CONFIG_FILE)
        repository = str(name)
        if os.sep in repository and not is_repository_name(repository):
            raise ZeroTuningError(f"no folder {folder}")
        return cls._read(*(_download(repository, file) for file in (SCALES_FILE, CONFIG_FILE)))

    @classmethod
    def _read(cls, scales: Path, config: Path) -> HeadScales:
        try:
            tensors = load_tensors(scales.read_bytes())
            metadata = json.loads(config.read_text("utf-8"))
        except FileNotFoundError as error:
            raise ZeroTuningError(f"{error.filename} is missing: {scales.parent} holds no head scales") from error
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise ZeroTuningError(f"{scales.parent}: head scales cannot be read: {error}") from error
        if "gamma" not in tensors or not isinstance(metadata, dict):
            raise ZeroTuningError(f"{scales} must hold the tensor gamma, and {config} a JSON object")
        return cls(tensors["gamma"], {k: v for k, v in metadata.items() if k not in ("layers", "heads")})


def _download(repository: str, file: str) -> Path:
    """Download a file of a repository on the hub into the hub's cache and return its path there."""
    from huggingface_hub import hf_hub_download

    failure = f"no folder {repository}, and the hub delivered no head scales of that name"
    reason = repository_connection_error(repository, file)
    if reason is not None:
        raise fetch_error(failure, reason, "name a local folder")
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise fetch_error(failure, first_line(error), "name a local folder") from error
