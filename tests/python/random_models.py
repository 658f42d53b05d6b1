"""Small random models of any architecture that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


def random_model(kind: str, attention: str | None = None, **config: Any) -> Any:
    """A model in evaluation mode whose weights are larger than the default: attention is far from uniform.

    attention   transformers' name of its attention implementation; None: its default
    """
    torch.manual_seed(0)
    named = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), **named).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model
