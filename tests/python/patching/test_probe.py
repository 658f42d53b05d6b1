"""Finding a model's layers: models that cannot be scaled are named, and the probe leaves no trace."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from random_models import SMALL, small_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import (
    apply_scales,
    is_patched,
    patch,
    patched_shape,
)


def test_a_model_can_be_patched_while_another_thread_runs_one() -> None:
    running, begun, ended = patch(small_model("mistral")), threading.Event(), threading.Event()

    def run() -> None:
        while not ended.is_set():
            running(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]]))
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(60)
        for _ in range(20):
            assert is_patched(patch(small_model("llama")))
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bloom", {"n_head": 4}, "Bloom"),
        ("falcon", {}, "Falcon"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "Mpt"),
        ("gemma2", {"head_dim": 16}, r"layers\.0\.self_attn .*softcap"),
        (
            "gpt_oss",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
            r"layers\.0\.self_attn .*s_aux",
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"1 of 2 layers .*layers\.0 .*partial=True"),
    ],
)
def test_a_model_that_cannot_be_scaled_is_named_and_left_as_it_was(kind, changes, message) -> None:
    config = CONFIG_MAPPING[kind](**{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 128, (1, 6))
    before = model(input_ids=ids).logits
    implementation = model.config._attn_implementation
    with pytest.raises(ZeroTuningError, match=message):
        patch(model)
    assert not is_patched(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(input_ids=ids).logits, before)


def test_an_encoder_decoder_is_refused() -> None:
    config = CONFIG_MAPPING["t5"](d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    with pytest.raises(ZeroTuningError, match="cross-attention"):
        patch(transformers.T5ForConditionalGeneration(config))


def test_a_partial_patch_tunes_a_hybrids_attention_layers_and_refuses_scales_for_others() -> None:
    model = small_model("lfm2", layer_types=["conv", "full_attention"])
    patch(model, partial=True)
    gamma = torch.ones(patched_shape(model))
    gamma[1, 2] = 3.0
    ids = torch.randint(3, 128, (1, 6))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        apply_scales(model, HeadScales(gamma))
        assert (model(input_ids=ids).logits - before).abs().max() > 1e-4
    gamma[0, 0] = 2.0
    with pytest.raises(ZeroTuningError, match="change layer 0"):
        apply_scales(model, HeadScales(gamma))


def test_the_probe_preserves_training_mode_and_random_state() -> None:
    model = small_model("llama").train()
    torch.manual_seed(1)
    want = torch.rand(2)
    torch.manual_seed(1)
    patch(model)
    assert torch.equal(torch.rand(2), want)
    assert all(module.training for name, module in model.named_modules() if not name.endswith("zerotuning"))
