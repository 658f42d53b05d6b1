"""The mask function of patched models: padding, holes and packed sequences; every kind of cache in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from eager_formula import formula_logits, left_padded
from random_models import MODELS, random_scales, small_model
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from zerotuning.attention.mask_encoding import decode
from zerotuning.patching.mask_function import zerotuning_mask
from zerotuning.patching.patch import (
    apply_scales,
    patch,
)


@pytest.mark.parametrize("kind", MODELS)
def test_padding_on_either_side_does_not_change_the_logits(kind) -> None:
    model = patch(small_model(kind))
    apply_scales(model, random_scales(model))
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros(1, 6, dtype=torch.long)
    ones = torch.ones(1, 12, dtype=torch.long)
    positions = torch.arange(12)[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        left = model(
            input_ids=torch.cat((zeros, ids), 1),
            attention_mask=torch.cat((zeros, ones), 1),
            position_ids=torch.cat((zeros, positions), 1),
        ).logits[:, 6:]
        right = model(input_ids=torch.cat((ids, zeros), 1), attention_mask=torch.cat((ones, zeros), 1)).logits[:, :12]
    torch.testing.assert_close(left, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long], ids=str)
@pytest.mark.parametrize(("keys", "rows"), [(9, 1), (16, 3), (40, 16), (5000, 1)])
@pytest.mark.parametrize("beyond", [0, 5])
@pytest.mark.parametrize("later", [0, 2], ids=["last", "not last"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_decode_mask_is_the_same_with_positions_on_the_host_and_on_the_device(
    device, keys, rows, later, beyond, dtype
) -> None:
    several = (torch.arange(keys + beyond) >= torch.tensor([0, 3, keys - 1, keys])[:, None]).to(device, dtype)
    several[1, 4] = 0
    several[3, keys:] = 0  # a sample of padding alone
    for mask in (several, several[1:2]):
        samples = len(mask)
        found, wanted = (
            decode(zerotuning_mask(samples, rows, keys, start, attention_mask=mask, device=device), rows, keys)
            for start in (keys - rows - later, torch.tensor(keys - rows - later, device=device))
        )
        assert wanted.query_start.tolist() == [keys - rows - later] * samples
        assert torch.equal(found.query_start, wanted.query_start)
        assert torch.equal(found.span, wanted.span)
        assert torch.equal(found.key_mask, wanted.key_mask)


@pytest.mark.parametrize("samples", [1, 2])
def test_generation_past_a_sliding_window_equals_one_without_a_cache(samples) -> None:
    model = patch(small_model("mistral", sliding_window=8))
    apply_scales(model, random_scales(model))
    ids = torch.randint(3, 128, (samples, 13), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cached, whole = (
        model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache,
            return_dict_in_generate=True, output_logits=True,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    assert torch.equal(cached.sequences, whole.sequences)
    for logits, want in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_generation_with_a_static_cache_equals_a_dynamic_one_and_no_cache(kind) -> None:
    model = patch(small_model(kind))
    apply_scales(model, random_scales(model))
    ids, mask, _ = left_padded([9, 4], 9)
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    dynamic = model.generate(ids, **arguments)
    assert dynamic.shape == (2, 21)
    assert torch.equal(model.generate(ids, use_cache=False, **arguments), dynamic)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **arguments), dynamic)
    beams = model.generate(ids, num_beams=3, **arguments)
    assert beams.shape == (2, 21)


def test_generated_logits_equal_the_formula_on_the_whole_text() -> None:
    model = patch(small_model("mistral", sliding_window=64))
    scales = random_scales(model)
    apply_scales(model, scales)
    ids, mask, _ = left_padded([9, 4], 9)
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    mask = torch.cat((mask, torch.ones(2, 6, dtype=torch.long)), 1)
    want = formula_logits(model, scales, result.sequences, mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for step, logits in enumerate(result.logits):
        torch.testing.assert_close(logits, want[:, 8 + step], rtol=1e-4, atol=1e-4)


def test_a_prompt_read_in_chunks_equals_one_read_at_once() -> None:
    for kind in ("llama", "mistral"):
        model = patch(small_model(kind))
        apply_scales(model, random_scales(model))
        ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            whole = model(input_ids=ids).logits
            cache = transformers.DynamicCache(config=model.config)
            parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split((5, 1, 11, 7), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_tokens_after_right_padding_do_not_attend_to_the_padding() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    ids = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(4))
    holes = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]])
    spread = torch.zeros(1, 13, dtype=torch.long).masked_scatter(holes.bool(), ids)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        cache = transformers.DynamicCache(config=model.config)
        model(input_ids=spread[:, :9], attention_mask=holes[:, :9], past_key_values=cache)
        after = model(
            input_ids=spread[:, 9:],
            attention_mask=holes,
            past_key_values=cache,
            position_ids=torch.tensor([[6, 7, 8, 9]]),
        ).logits
    torch.testing.assert_close(after, alone[:, 6:], rtol=1e-4, atol=1e-4)


def test_packed_sequences_each_have_an_initial_token() -> None:
    for kind in ("llama", "mistral"):
        model = patch(small_model(kind))
        apply_scales(model, random_scales(model))
        ids = torch.randint(3, 128, (1, 19), generator=torch.Generator().manual_seed(5))
        positions = torch.cat((torch.arange(11), torch.arange(8)))[None]
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            first, second = (model(input_ids=part).logits for part in ids.split((11, 8), dim=1))
        torch.testing.assert_close(packed, torch.cat((first, second), 1), rtol=1e-4, atol=1e-4)


def test_a_hidden_key_is_not_the_first_of_a_packed_sequence() -> None:
    model = patch(small_model("llama"))
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(8))
    hole = torch.ones_like(ids)
    hole[:, 5] = 0

    def prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query < 3) & (key < 3)

    for mask, functions in (
        (hole, {"or_mask_function": prefix}),
        (None, {"and_mask_function": lambda batch, head, query, key: key != 5}),
    ):
        embeddings = model.get_input_embeddings()(ids)
        encoded = create_causal_mask(model.config, embeddings, mask, past_key_values=None, **functions)
        assert decode(encoded, 12, 12).scaled.nonzero()[:, 2:].tolist() == [[row, 0] for row in range(12)]
