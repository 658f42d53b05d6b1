"""The tiny random model of the tests of studies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from study_formula import HEADS, LAYERS
from transformers import LlamaConfig, LlamaForCausalLM
from zerotuning.patching.patch import patch
from zerotuning.study import Setting


@pytest.fixture
def model() -> Any:
    """A random Llama of LAYERS layers and HEADS heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def setting(model: Any, tiny_tokenizer: Any) -> Setting:
    """The small size of a study on the tiny model."""
    return Setting(size="small", examples=4, limit=3, _loaded=(patch(model), tiny_tokenizer))
