"""Patching, unpatching and applying scales: what is refused, and the restored state of an unpatched model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from eager_formula import formula_logits, left_padded
from random_models import MODELS, SMALL, random_model, random_scales, small_model
from torch import nn
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import (
    apply_scales,
    head_scales,
    is_patched,
    patch,
    unpatch,
    untuned,
)


@pytest.mark.parametrize("kind", MODELS)
def test_gamma_1_equals_sdpa_and_unpatching_restores_sdpa_exactly(kind) -> None:
    model = small_model(kind)
    ids, mask, positions = left_padded([20, 9])
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        before = model(**arguments).logits
        keys = set(model.state_dict())
        patch(model)
        assert set(model.state_dict()) == keys
        real = mask.bool()
        torch.testing.assert_close(model(**arguments).logits[real], before[real], rtol=1e-4, atol=1e-4)
        apply_scales(model, random_scales(model))
        with untuned(model):
            torch.testing.assert_close(model(**arguments).logits[real], before[real], rtol=1e-4, atol=1e-4)
        unpatch(model)
        assert torch.equal(model(**arguments).logits, before)
        assert model.config._attn_implementation == "sdpa"


class Wrapper(nn.Module):
    """Forwards attribute access to the wrapped model, as PEFT's wrappers do."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, **arguments: Any) -> Any:
        return self.base(**arguments)


def test_a_model_patched_before_it_was_wrapped_is_unpatched_through_the_wrapper() -> None:
    model = patch(small_model("llama"))
    wrapped = Wrapper(model)
    assert is_patched(wrapped)
    unpatch(wrapped)
    assert not is_patched(wrapped)
    assert not is_patched(model)
    apply_scales(wrapped, HeadScales.ones(2, 4))
    with pytest.raises(ZeroTuningError, match=r"layers\.0\.self_attn\.zerotuning was patched through another model"):
        patch(model)
    unpatch(wrapped)
    assert model.config._attn_implementation == "sdpa"
    patch(model)


def test_a_part_that_is_patched_must_be_unpatched_before_the_whole_is_patched() -> None:
    model = small_model("llama")
    patch(model.model)
    with pytest.raises(ZeroTuningError, match="was patched through another model"):
        patch(model)
    unpatch(model.model)
    unpatch(patch(model))
    assert model.config._attn_implementation == "sdpa"


def test_applying_scales_restores_the_attention_that_another_library_replaced() -> None:
    model = patch(small_model("llama"))
    scales = random_scales(model)
    ids, mask, _ = left_padded([20])
    model.set_attn_implementation("sdpa")
    apply_scales(model, scales)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, formula_logits(model, scales, ids, mask), rtol=1e-4, atol=1e-4)


def test_a_model_that_was_loaded_with_this_attention_goes_back_to_the_default() -> None:
    model = random_model("llama", "zerotuning", **SMALL)
    assert unpatch(patch(model)).config._attn_implementation == "sdpa"


def test_scales_of_another_model_are_refused_with_both_named() -> None:
    model = patch(small_model("llama"))
    with pytest.raises(ZeroTuningError, match="3 layers x 5 heads, the model has 2 x 4"):
        apply_scales(model, HeadScales.ones(3, 5))
    with pytest.raises(ZeroTuningError, match="made for a qwen2 model, this is a llama model"):
        apply_scales(model, HeadScales(torch.ones(2, 4), {"model_type": "qwen2"}))
    with pytest.raises(ZeroTuningError, match="not patched"):
        head_scales(small_model("llama"))
    with pytest.raises(ZeroTuningError, match="must be a transformers model, got Linear"):
        patch(nn.Linear(2, 2))


def test_a_patched_model_can_be_copied() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    copied = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    apply_scales(copied, HeadScales.ones(2, 4))
    assert not torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
