"""The model and folders of the tests of MT-Bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zerotuning.patching.head_scales import HeadScales

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def long_model(tiny_tokenizer: Any) -> Any:
    """A random Llama whose context holds MT-Bench's dialogues in a byte's vocabulary."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any, long_model: Any, tiny_tokenizer: Any) -> Path:
    """The current folder, with model/ (which has a chat template), plain/ (which has none) and scales/."""
    for name, template in (("model", TEMPLATE), ("plain", None)):
        long_model.save_pretrained(tmp_path / name)
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    HeadScales([[20.0, 0.05, 10.0, 0.1], [0.1, 30.0, 5.0, 0.02]]).save_pretrained(tmp_path / "scales")
    HeadScales.ones(2, 4).save_pretrained(tmp_path / "ones")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path
