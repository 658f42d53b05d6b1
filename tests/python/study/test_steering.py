"""Steered attention: against each method's formula written out for single heads, rows and keys in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import apply_scales, head_scales, patch
from zerotuning.study.steering import CalibratedSinks, MarkedSpan, Temperature, steered

LAYERS, HEADS, TOKENS = 2, 4, 9
#: From the attention weights of one head of one sample (for each query, a row over its visible keys) to new weights.
Formula = Callable[[list[list[float]], list[list[float]]], list[list[float]]]


@pytest.fixture
def model() -> Any:
    """A random Llama in float64 with two query heads to a key head, whose attention is far from even."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 50, (2, TOKENS), generator=torch.Generator().manual_seed(2))


def by_hand(model: Any, ids: Tensor, formula: Formula, steered_heads: set[tuple[int, int]]) -> Tensor:
    """The model's logits with the formula applied to some heads, by loops over samples, heads, queries and keys."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        output = torch.zeros(query.shape, dtype=torch.float64)
        for sample in range(query.shape[0]):
            for head in range(query.shape[1]):
                shared = head // (query.shape[1] // key.shape[1])
                logits = [
                    [float(query[sample, head, i] @ key[sample, shared, j]) * scaling for j in range(i + 1)]
                    for i in range(query.shape[2])
                ]
                weights = [softmax(row) for row in logits]
                if (module.layer_idx, head) in steered_heads:
                    weights = formula(weights, logits)
                for i, row in enumerate(weights):
                    for j, weight in enumerate(row):
                        output[sample, head, i] += weight * value[sample, shared, j]
        return output.transpose(1, 2), None

    AttentionInterface.register("by_hand", attention)
    model.set_attn_implementation("by_hand")
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation("sdpa")


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def only(heads: set[tuple[int, int]]) -> Tensor:
    strength = torch.zeros(LAYERS, HEADS)
    for layer, head in heads:
        strength[layer, head] = 1.0
    return strength


SOME = {(0, 1), (1, 2)}


def test_a_temperature_divides_the_logits_of_the_chosen_heads(model: Any, tokens: Tensor) -> None:
    expected = by_hand(
        model, tokens, lambda _, logits: [softmax([value / 1.7 for value in row]) for row in logits], SOME
    )
    with steered(model, Temperature(1.7), only(SOME)):
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_each_head_may_have_a_temperature_of_its_own(model: Any, tokens: Tensor) -> None:
    temperatures = torch.ones(LAYERS, HEADS)
    temperatures[0, 1] = temperatures[1, 2] = 0.6
    with steered(model, Temperature(0.6), only(SOME)):
        expected = model(input_ids=tokens).logits
    with steered(model, Temperature(temperatures)):
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the tensor rounds 0.6 to float32


def act(alpha: float, beta: float, counts: list[int]) -> Formula:
    """Return the formula of Yu et al. 2024, key by key; it appends the number of sinks of each call to `counts`."""

    def formula(weights: list[list[float]], _: Any) -> list[list[float]]:
        length = len(weights)
        means = [sum(weights[i][j] for i in range(j, length)) / (length - j) for j in range(length)]
        sinks = [j for j in range(1, length) if means[j] > alpha / length]
        counts.append(len(sinks))
        calibrated = []
        for row in weights:
            freed = sum((1 - beta) * row[j] for j in sinks if j < len(row))
            others = sum(weight for j, weight in enumerate(row) if j not in sinks)
            calibrated.append(
                [beta * weight if j in sinks else weight + freed * weight / others for j, weight in enumerate(row)]
            )
        return calibrated

    return formula


def test_calibrated_sinks_lose_weight_to_the_other_keys_in_proportion(model: Any, tokens: Tensor) -> None:
    counts: list[int] = []
    expected = by_hand(model, tokens, act(2.0, 0.4, counts), SOME)
    assert sum(counts) >= 2  # the intervention found sinks
    with steered(model, CalibratedSinks(alpha=2.0, beta=0.4), only(SOME)):
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context", [None, (1, 7)])
def test_keys_outside_the_marked_span_are_weakened(model: Any, tokens: Tensor, context: tuple[int, int] | None) -> None:
    span, alpha = (3, 5), 0.05

    def formula(weights: list[list[float]], _: Any) -> list[list[float]]:
        steered_rows = []
        for row in weights:
            changed = [
                weight if span[0] <= j < span[1] or (context and not context[0] <= j < context[1]) else alpha * weight
                for j, weight in enumerate(row)
            ]
            steered_rows.append([weight / sum(changed) for weight in changed])
        return steered_rows

    expected = by_hand(model, tokens, formula, SOME)
    spans = torch.tensor([span, span])
    within = None if context is None else torch.tensor([context, context])
    with steered(model, MarkedSpan(spans, alpha, within), only(SOME)):
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


INTERVENTIONS = {
    "temperature": lambda pad: Temperature(1.5),
    "act": lambda pad: CalibratedSinks(alpha=2.0),
    "pasta": lambda pad: MarkedSpan(torch.tensor([[2 + pad, 5 + pad]])),
    "autopasta": lambda pad: MarkedSpan(torch.tensor([[2 + pad, 5 + pad]]), within=torch.tensor([[1 + pad, 7 + pad]])),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_left_padding_changes_nothing(model: Any, tokens: Tensor, name: str) -> None:
    one = tokens[:1]
    with steered(model, INTERVENTIONS[name](0)):
        expected = model(input_ids=one).logits
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), one), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * TOKENS])
    with steered(model, INTERVENTIONS[name](4)):
        found = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(found[:, 4:], expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, model(input_ids=one).logits, atol=1e-3)  # the intervention changes the logits


@pytest.mark.parametrize(
    "identity",
    [Temperature(1.0), CalibratedSinks(beta=1.0), MarkedSpan(torch.tensor([[0, TOKENS]] * 2))],
    ids=["temperature 1", "beta 1", "everything marked"],
)
def test_an_intervention_that_changes_no_weight_gives_the_models_own_logits(
    model: Any, tokens: Tensor, identity: Any
) -> None:
    expected = model(input_ids=tokens).logits
    with steered(model, identity):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-9, atol=1e-9)


def test_strength_zero_gives_the_models_own_logits(model: Any, tokens: Tensor) -> None:
    expected = model(input_ids=tokens).logits
    with steered(model, Temperature(3.0), torch.zeros(LAYERS, HEADS)):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_in_strength_is_the_effect_of_a_small_share(model: Any, tokens: Tensor) -> None:
    strength = torch.zeros(LAYERS, HEADS, dtype=torch.float64, requires_grad=True)
    with steered(model, Temperature(2.0), strength):
        slopes = torch.autograd.grad(model(input_ids=tokens).logits[:, -1, 7].sum(), strength)[0]
    # Llama's norms compute in float32 even here: the effect of this step is larger than their rounding.
    step, moved = 1e-2, torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        moved[1, 2] = sign * step
        with steered(model, Temperature(2.0), moved):
            values.append(float(model(input_ids=tokens).logits[:, -1, 7].sum()))
    assert float(slopes[1, 2]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)


def test_the_model_is_as_before_after_an_exception(model: Any, tokens: Tensor) -> None:
    expected = model(input_ids=tokens).logits
    with pytest.raises(RuntimeError, match="stop"), steered(model, Temperature(2.0)):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_a_patched_model_keeps_its_scales_and_gets_them_back(model: Any, tokens: Tensor) -> None:
    plain = model.float()
    expected = plain(input_ids=tokens).logits
    patch(plain)
    gamma = torch.full((LAYERS, HEADS), 3.0)
    apply_scales(plain, HeadScales(gamma))
    scaled = plain(input_ids=tokens).logits
    with steered(plain, Temperature(1.0)):
        torch.testing.assert_close(plain(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain(input_ids=tokens).logits, scaled)
    assert torch.equal(head_scales(plain).gamma, gamma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Temperature(0.0), "temperature must be positive"),
        (lambda model: CalibratedSinks(beta=1.5), r"beta must be in \[0, 1\], got 1.5"),
        (lambda model: MarkedSpan(torch.zeros(2, 3, dtype=torch.long)), r"spans must be int64 \[B, 2\]"),
        (lambda model: steered(model, Temperature(1.0), torch.zeros(3, 3)).__enter__(), r"strength must be .*\[2, 4\]"),
    ],
)
def test_bad_arguments_are_named(model: Any, make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ZeroTuningError, match=message):
        make(model)


def test_a_cache_is_refused(model: Any, tokens: Tensor) -> None:
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    with pytest.raises(ZeroTuningError, match="without a cache"), steered(model, Temperature(1.0)):
        model(input_ids=tokens[:, :1], past_key_values=cache)
