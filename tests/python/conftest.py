"""Models that several test files share: a tiny random one, and the demo model.

Tests that use `demo_model` are marked `model`: they run by default, and fetch 98 MB once into the user's
cache; `pytest -m "not model"` leaves them out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zerotuning import ops
from zerotuning.models.loading import load_model

CORPUS = [
    "Classify the review as positive or negative.",
    "Review: the film is a good story, well told. Sentiment: positive",
    "Review: the film is bad and far too long. Sentiment: negative",
]


@pytest.hookimpl(tryfirst=True)  # before fixtures that make tensors on a GPU
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and ops.runs_on("cuda")):
        pytest.skip("needs a GPU and a build with CUDA")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 330 tokens: " positive" is one token, a new word several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def tiny_model(tiny_tokenizer: Any) -> Any:
    """A random Llama of two layers in float32, whose logits spread enough to tell labels apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def demo_model() -> tuple[Any, Any]:
    """(model, tokenizer) of the embedded model on the CPU, in the type that load_model chooses there.

    All tests of a session share this model: a test that changes the model restores it.
    """
    return load_model("demo", device="cpu")
