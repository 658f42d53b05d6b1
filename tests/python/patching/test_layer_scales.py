"""The scales of a model's layers: named settings, other keys than the initial token, leaves for a search."""

from __future__ import annotations

import math

import pytest
import torch
from eager_formula import formula_logits, left_padded
from random_models import MODELS, random_scales, small_model
from torch import Tensor
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import (
    apply_scales,
    head_parameters,
    head_scales,
    patch,
    scaled_keys,
    select_scales,
)


def test_scales_applied_in_inference_mode_can_be_trained_with_later() -> None:
    model = small_model("llama")
    with torch.inference_mode():
        apply_scales(patch(model), HeadScales(torch.full((2, 4), 3.0)))
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_named_scales_serve_different_rows_of_one_batch() -> None:
    model = patch(small_model("llama"))
    named = {"a": random_scales(model, 1), "b": random_scales(model, 2)}
    ids, mask, positions = left_padded([20, 9, 14])
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    alone = {}
    with torch.no_grad():
        for name, scales in named.items():
            alone[name] = apply_scales(model, scales)(**arguments).logits
        apply_scales(model, named)
        assert torch.equal(model(**arguments).logits, alone["a"])
        with select_scales(model, ["b", "a", "b"]):
            mixed = model(**arguments).logits
            generated = model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=3)
        assert generated.shape[0] == 3
    for sample, name in enumerate("bab"):
        torch.testing.assert_close(mixed[sample], alone[name][sample], rtol=1e-5, atol=1e-5)
    with pytest.raises(ZeroTuningError, match=r"'a', 'b'.*'c'"), select_scales(model, ["c"]):
        pass
    with pytest.raises(ZeroTuningError, match="2 samples, the batch has 3"), select_scales(model, ["a", "b"]):
        model(**arguments)


@pytest.mark.parametrize("kind", MODELS)
def test_scaled_keys_in_place_of_the_initial_token_equal_the_formula(kind) -> None:
    model = patch(small_model(kind))
    scales = random_scales(model)
    apply_scales(model, scales)
    ids, mask, positions = left_padded([20, 13, 5])
    spans = torch.tensor([[3, 4], [9, 14], [17, 17]])  # one key, several, none
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        initial = model(**arguments).logits
        with scaled_keys(model, spans):
            logits = model(**arguments).logits
        assert torch.equal(model(**arguments).logits, initial)
    want = formula_logits(model, scales, ids, mask, spans, position_ids=positions)
    torch.testing.assert_close(logits[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_generation_with_scaled_keys_equals_the_formula_on_the_whole_text() -> None:
    model = patch(small_model("llama"))
    scales = random_scales(model)
    apply_scales(model, scales)
    ids, mask, _ = left_padded([9, 4], 9)
    spans = torch.tensor([[2, 4], [6, 7]])
    with scaled_keys(model, spans):
        result = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    mask = torch.cat((mask, torch.ones(2, 6, dtype=torch.long)), 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    want = formula_logits(model, scales, result.sequences, mask, spans, position_ids=positions)
    for step, logits in enumerate(result.logits):
        torch.testing.assert_close(logits, want[:, 8 + step], rtol=1e-4, atol=1e-4)


def test_scaled_keys_apply_under_a_mask_of_the_callers_own() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(6))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    with torch.no_grad(), scaled_keys(model, torch.tensor([[2, 5]])):
        want = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, attention_mask=visible).logits, want, rtol=1e-4, atol=1e-4)


def test_scaled_keys_of_another_shape_or_in_a_sliding_cache_are_refused() -> None:
    model = patch(small_model("mistral"))
    with (
        pytest.raises(ZeroTuningError, match=r"spans must be int64 \[B, 2\], got torch.float32 \[2\]"),
        scaled_keys(model, torch.zeros(2)),
    ):
        pass
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(6))
    with scaled_keys(model, torch.tensor([[1, 2]] * 3)), pytest.raises(ZeroTuningError, match="names the keys of 3"):
        model(input_ids=ids)
    with scaled_keys(model, torch.tensor([[1, 2]] * 2)), pytest.raises(ZeroTuningError, match="sliding-window cache"):
        model.generate(ids, max_new_tokens=4, eos_token_id=None)


def test_gradients_of_head_parameters_equal_finite_differences() -> None:
    model = patch(small_model("qwen3").double())
    ids, mask, positions = left_padded([12, 7], 12)

    def loss() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        return torch.logsumexp(logits, -1).sum()

    with head_parameters(model) as parameters:
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for leaf, gradient in zip(parameters, gradients, strict=True):
                for head in range(4):
                    values = []
                    for value in (2**-6, -(2**-6)):
                        leaf[head] = value
                        values.append(loss().item())
                    leaf[head] = 0.0
                    slope = (values[0] - values[1]) / 2**-5
                    assert math.isclose(slope, gradient[head].item(), rel_tol=5e-3, abs_tol=2e-5)  # RMSNorm is float32


def test_scales_stay_float32_when_the_model_changes_its_dtype() -> None:
    model = patch(small_model("llama"))
    scales = random_scales(model)
    apply_scales(model, scales)
    model.to(torch.bfloat16)
    torch.testing.assert_close(head_scales(model).gamma, scales.gamma)
    assert all(m.log_scale.dtype == torch.float32 for m in model.modules() if hasattr(m, "log_scale"))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
