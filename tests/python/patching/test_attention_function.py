"""The attention function of patched models against an eager one: the caller's masks, autocast, compilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from eager_formula import formula_logits, left_padded
from random_models import MODELS, random_scales, small_model
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import (
    apply_scales,
    head_parameters,
    patch,
    untuned,
)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_with_random_scales_equal_the_formula_padded_or_not(kind) -> None:
    model = patch(small_model(kind))
    scales = random_scales(model)
    apply_scales(model, scales)
    for lengths in ([20, 20], [20, 13, 5]):
        ids, mask, positions = left_padded(lengths)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        want = formula_logits(model, scales, ids, mask, position_ids=positions)
        real = mask.bool()
        torch.testing.assert_close(logits[real], want[real], rtol=1e-4, atol=1e-4)
        with untuned(model), torch.no_grad():
            plain = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert (plain[real] - want[real]).abs().max() > 1e-2  # the scales do matter here


def test_a_causal_mask_of_the_callers_own_gives_the_same_logits() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(6))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        for mask in (visible, additive):
            torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [-1e4, -65504.0, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_an_additive_mask_hides_keys_by_large_numbers_and_adds_its_biases(hidden) -> None:
    model = small_model("llama", num_hidden_layers=1)
    plain = copy.deepcopy(model)
    scales = random_scales(patch(model))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(7))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    biases = -0.3 * distance * torch.tensor([1.0, 0.5, 0.25, 0.1])[:, None, None]  # as ALiBi has them, of each head
    for mask in (torch.zeros(1, 1, 9, 9).masked_fill(~causal, hidden), biases[None].masked_fill(~causal, hidden)):
        with torch.no_grad():
            apply_scales(model, HeadScales.ones(1, 4))
            want = plain(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, want, rtol=1e-4, atol=1e-4)
            apply_scales(model, scales)
            biased = mask.expand(1, 4, 9, 9).clone()
            biased[..., 0] += scales.log_scale[0][:, None]  # what γ of the initial token comes to
            want = plain(input_ids=ids, attention_mask=biased).logits
            torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_a_mask_of_whole_numbers_in_four_dimensions_is_refused(dtype) -> None:
    model = patch(small_model("llama"))
    with pytest.raises(ZeroTuningError, match=f"attention_mask must be bool or floating point.* got {dtype}"):
        model(input_ids=torch.ones(1, 9, dtype=torch.long), attention_mask=torch.ones(1, 1, 9, 9, dtype=dtype))


def test_a_sliding_mask_of_the_callers_own_gives_the_same_logits_as_the_models() -> None:
    model = patch(small_model("mistral", sliding_window=7))
    apply_scales(model, random_scales(model))
    ids, padding, positions = left_padded([20, 11])
    column = torch.arange(20)
    visible = (column <= column[:, None]) & (column > column[:, None] - 7) & padding[:, None, None].bool()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=padding, position_ids=positions).logits[padding.bool()]
        got = model(input_ids=ids, attention_mask=visible, position_ids=positions).logits[padding.bool()]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_patching_evaluation_training_and_generation_work_under_autocast(kind) -> None:
    model = small_model(kind)
    ids, mask, positions = left_padded([20, 9])
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**arguments).logits
        patch(model)
        got = model(**arguments).logits
        got[mask.bool()].float().square().mean().backward()
        assert model.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None).shape == (2, 23)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got[mask.bool()].float(), want[mask.bool()].float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_compiled_without_graph_breaks_gives_the_same_logits(kind) -> None:
    model = patch(small_model(kind))
    apply_scales(model, random_scales(model))
    ids, mask, positions = left_padded([20, 9])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in ({"attention_mask": mask, "position_ids": positions}, {}):
            want = model(input_ids=ids, **arguments).logits
            got = compiled(input_ids=ids, **arguments).logits
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_compiled_with_inductor_gives_the_same_logits_and_gradients() -> None:
    model = patch(small_model("llama", num_hidden_layers=1))
    ids, _, _ = left_padded([20, 20])
    with head_parameters(model) as parameters:
        want = torch.autograd.grad(model(input_ids=ids).logits.square().mean(), parameters)
        loss = torch.compile(lambda x: model(input_ids=x).logits.square().mean(), fullgraph=True)(ids)
        for got, expected in zip(torch.autograd.grad(loss, parameters), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = patch(small_model("llama"))
    model.train()
    ids, _, _ = left_padded([20, 20])
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with head_parameters(model) as parameters:
            results.append(
                torch.autograd.grad(model(input_ids=ids, use_cache=False).logits.square().mean(), parameters)
            )
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def test_attention_dropout_in_training_is_refused_with_the_layer_named() -> None:
    model = patch(small_model("llama", attention_dropout=0.1))
    model.eval()(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ZeroTuningError, match=r"layers\.0\.self_attn.*attention dropout 0.1"):
        model.train()(input_ids=torch.tensor([[1, 2]]))
