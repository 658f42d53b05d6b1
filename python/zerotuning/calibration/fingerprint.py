"""Digests of a model's weights and of examples' tokens, which a resumed calibration compares with the saved ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zerotuning.tasks.tokenization import TokenizedPrompt

#: Number of elements of each weight in the digest, spread evenly over the weight.
SAMPLE = 64


def weights_digest(model: nn.Module) -> str:
    """Digest the names, the shapes and SAMPLE elements of each weight; weights on the meta device add no elements.

    Other weights nearly always give another digest; a change of a few elements may leave the digest as it was.

    Returns:
        16 hexadecimal digits of SHA-256.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        if not local.is_meta:
            digest.update(_sample(local.detach()).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """At most SAMPLE elements, float64 on the CPU."""
    flat = weight.reshape(-1)
    count = min(len(flat), SAMPLE)
    indices = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
    return flat[indices].double().cpu()


def tokens_digest(examples: Sequence[Sequence[TokenizedPrompt]]) -> str:
    """Digest the tokens of each task's examples.

    Returns:
        16 hexadecimal digits of SHA-256.
    """
    tokens = [[(example.prompt, example.labels) for example in part] for part in examples]
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]
