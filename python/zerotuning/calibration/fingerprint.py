"""What tells a model from another of the same shape: digests cheap enough to take at every start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zerotuning.tasks.tokenization import TokenizedPrompt

#: Elements of a weight that are looked at, spread over all of it.
SAMPLE = 64


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of SHA-256 over the weights' names, shapes and SAMPLE elements each; of a weight that is not in
    memory, name and shape alone. Other weights nearly always give another digest; a change of few elements may not."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        if not local.is_meta:
            digest.update(_sample(local.detach()).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """float64 [at most SAMPLE], on the CPU."""
    flat = weight.reshape(-1)
    count = min(len(flat), SAMPLE)
    places = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
    return flat[places].double().cpu()


def tokens_digest(examples: Sequence[Sequence[TokenizedPrompt]]) -> str:
    """16 hex digits of SHA-256 over the tokens of each task's examples."""
    tokens = [[(example.prompt, example.labels) for example in part] for part in examples]
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]
