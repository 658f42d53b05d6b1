"""Small random models of any architecture that transformers has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import patched_shape


def random_model(kind: str, attention: str | None = None, **config: Any) -> Any:
    """A model in evaluation mode with larger weights than the default, so that attention is far from uniform.

    Args:
        kind: the model_type of transformers.
        attention: the name of an attention implementation; None: transformers' default.
        config: of the model.
    """
    torch.manual_seed(0)
    named = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), **named).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


DEEPSEEK = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "olmo2": {},
    "deepseek_v3": DEEPSEEK,
    "gpt_neox": {},
    "llama4_text": {
        "head_dim": 16,
        "attention_chunk_size": 7,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
    },
}


def small_model(kind: str, **changes: Any) -> Any:
    return random_model(kind, "sdpa", **{**SMALL, **MODELS.get(kind, {}), **changes})


def random_scales(model: nn.Module, seed: int = 0) -> HeadScales:
    layers, heads = patched_shape(model)
    return HeadScales(torch.exp(torch.randn(layers, heads, generator=torch.Generator().manual_seed(seed))))
