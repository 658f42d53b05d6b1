"""Patched models against an eager attention written out here; padding, caches, named scales, refusals."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
import transformers
from random_models import MODELS, SMALL, random_model, random_scales, small_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, eager_mask
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.attention_function import _read_geometry
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.mask_function import zerotuning_mask
from zerotuning.patching.patch import (
    apply_scales,
    head_parameters,
    head_scales,
    is_patched,
    patch,
    patched_shape,
    scaled_keys,
    select_scales,
    unpatch,
    untuned,
)

_eager_gamma: dict[int, Tensor] = {}
_eager_spans: list[Tensor] = []


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax in float64 with the model's own dense mask, scale the spans' columns, renormalise."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    logits = query.double() @ key.transpose(-1, -2) * scaling
    assert attention_mask is not None
    weights = torch.softmax(logits + attention_mask.double(), dim=-1)
    column, spans = torch.arange(key.shape[2]), _eager_spans[0]
    scaled = (column >= spans[:, :1]) & (column < spans[:, 1:])
    gamma = _eager_gamma[module.layer_idx].double()[None, :, None, None]
    weights = weights * torch.where(scaled[:, None, None], gamma, torch.ones_like(gamma))
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights @ value).to(query.dtype).transpose(1, 2), None


AttentionInterface.register("eager_formula", eager_attention)
AttentionMaskInterface.register("eager_formula", eager_mask)


@torch.no_grad()
def formula_logits(
    model: Any, scales: HeadScales, ids: Tensor, mask: Tensor, spans: Tensor | None = None, **arguments: Any
) -> Tensor:
    first = mask.int().argmax(-1)
    copied = copy.deepcopy(model)
    if is_patched(copied):
        unpatch(copied)
    copied.set_attn_implementation("eager_formula")
    _eager_gamma.update(dict(enumerate(scales.gamma)))
    _eager_spans[:] = [torch.stack((first, first + 1), dim=1) if spans is None else spans]
    return copied(input_ids=ids, attention_mask=mask, **arguments).logits


def left_padded(lengths: list[int], longest: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 128, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp_min(0)


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


@pytest.mark.parametrize("kind", MODELS)
def test_gamma_1_gives_what_sdpa_gives_and_unpatch_gives_it_exactly(kind) -> None:
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


@pytest.mark.parametrize("kind", MODELS)
def test_padding_on_either_side_changes_nothing(kind) -> None:
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
def test_what_a_step_says_of_padding_is_the_same_with_positions_on_the_host_and_on_the_device(
    device, keys, rows, later, beyond, dtype
) -> None:
    several = (torch.arange(keys + beyond) >= torch.tensor([0, 3, keys - 1, keys])[:, None]).to(device, dtype)
    several[1, 4] = 0
    several[3, keys:] = 0  # of which nothing is real
    for mask in (several, several[1:2]):
        samples = len(mask)
        found, wanted = (
            _read_geometry(zerotuning_mask(samples, rows, keys, start, attention_mask=mask, device=device), keys)
            for start in (keys - rows - later, torch.tensor(keys - rows - later, device=device))
        )
        assert wanted.query_start.tolist() == [keys - rows - later] * samples
        # Queries that are the last keys need no word of where they are.
        assert (found.query_start is None) == (later == 0)
        assert found.query_start is None or torch.equal(found.query_start, wanted.query_start)
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


def test_a_hole_left_by_right_padding_is_not_seen_by_what_follows() -> None:
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


def test_a_mask_of_the_callers_own_is_taken_at_its_word() -> None:
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
def test_an_additive_mask_hides_keys_by_any_large_number_and_its_biases_count(hidden) -> None:
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_mask_of_whole_numbers_in_four_dimensions_is_refused(dtype) -> None:
    model = patch(small_model("llama"))
    with pytest.raises(ZeroTuningError, match=f"attention_mask must be bool or floating point.* got {dtype}"):
        model(input_ids=torch.ones(1, 9, dtype=torch.long), attention_mask=torch.ones(1, 1, 9, 9, dtype=dtype))


def test_a_sliding_mask_of_the_callers_own_says_what_the_models_says() -> None:
    model = patch(small_model("mistral", sliding_window=7))
    apply_scales(model, random_scales(model))
    ids, padding, positions = left_padded([20, 11])
    column = torch.arange(20)
    visible = (column <= column[:, None]) & (column > column[:, None] - 7) & padding[:, None, None].bool()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=padding, position_ids=positions).logits[padding.bool()]
        got = model(input_ids=ids, attention_mask=visible, position_ids=positions).logits[padding.bool()]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_key_that_is_hidden_begins_no_sequence() -> None:
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
        codes = create_causal_mask(model.config, embeddings, mask, past_key_values=None, **functions)
        assert (codes == 2).nonzero()[:, 2:].tolist() == [[row, 0] for row in range(12)]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_under_autocast_a_patched_model_is_patched_runs_trains_and_generates_as_before(kind) -> None:
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


def test_scales_applied_in_inference_mode_can_be_trained_with_later() -> None:
    model = small_model("llama")
    with torch.inference_mode():
        apply_scales(patch(model), HeadScales(torch.full((2, 4), 3.0)))
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


class Wrapper(nn.Module):
    """Shows what is in it as its own, as PEFT's wrappers do."""

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


def test_applying_scales_switches_the_attention_again_that_something_else_switched_off() -> None:
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


def test_scales_stay_float32_when_the_model_changes_its_dtype() -> None:
    model = patch(small_model("llama"))
    scales = random_scales(model)
    apply_scales(model, scales)
    model.to(torch.bfloat16)
    torch.testing.assert_close(head_scales(model).gamma, scales.gamma)
    assert all(m.log_scale.dtype == torch.float32 for m in model.modules() if hasattr(m, "log_scale"))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


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


def test_partial_tunes_the_attention_layers_of_a_hybrid_and_refuses_scales_for_the_others() -> None:
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


def test_attention_dropout_in_training_is_refused_with_the_layer_named() -> None:
    model = patch(small_model("llama", attention_dropout=0.1))
    model.eval()(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ZeroTuningError, match=r"layers\.0\.self_attn.*attention dropout 0.1"):
        model.train()(input_ids=torch.tensor([[1, 2]]))


def test_the_probe_leaves_training_mode_and_random_numbers_alone() -> None:
    model = small_model("llama").train()
    torch.manual_seed(1)
    want = torch.rand(2)
    torch.manual_seed(1)
    patch(model)
    assert torch.equal(torch.rand(2), want)
    assert all(module.training for name, module in model.named_modules() if not name.endswith("zerotuning"))


def test_a_patched_model_can_be_copied() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    copied = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    apply_scales(copied, HeadScales.ones(2, 4))
    assert not torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
