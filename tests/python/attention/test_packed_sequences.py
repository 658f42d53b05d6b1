"""Packed sequences against the formula with a dense mask, and against each sequence alone; what is not taken for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packings import PACKINGS, code_of, ids_of, numbers_and_positions, packed_mask_function
from random_models import random_scales, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function, or_masks, sdpa_mask
from zerotuning.attention import packed_sequences, reference
from zerotuning.attention.packed_sequences import attend, dense_codes
from zerotuning.patching import packed_mask
from zerotuning.patching.packed_mask import packed_code
from zerotuning.patching.patch import apply_scales, head_parameters, patch, scaled_keys, select_scales

LENGTH = 24
KINDS = ["llama", "mistral", "gemma3_text", "qwen3", "deepseek_v3"]


def visible_and_initial(
    lengths: Sequence[Sequence[int]], window: int = 0, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bool [B, 1, T, T], token by token: which keys a query sees, and which of them is its sequence's initial token."""
    numbers, _ = numbers_and_positions(lengths)
    real = torch.ones_like(numbers) if real is None else real
    batch, length = numbers.shape
    visible = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    initial = torch.zeros_like(visible)
    for b in range(batch):
        for i in range(length):
            own = [j for j in range(i + 1) if numbers[b, j] == numbers[b, i] and real[b, j]]
            seen = [j for j in own if not window or j > i - window]
            visible[b, 0, i, seen] = True
            initial[b, 0, i, [j for j in own[:1] if j in seen]] = True
    return visible, initial


def random_inputs(batch: int, per_row: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, LENGTH, 4, 8), (batch, LENGTH, 2, 8), (batch, LENGTH, 2, 6)]
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    return [*tensors, torch.randn((batch, 4) if per_row else (4,), generator=generator)]


def output_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def assert_equal_to_formula(
    inputs: Sequence[Tensor],
    code: Tensor,
    visible: Tensor,
    scaled: Tensor,
    span: Tensor | None = None,
    rows_that_count: Tensor | None = None,
) -> None:
    weights = torch.randn(inputs[0].shape[0], 4, LENGTH, 6, generator=torch.Generator().manual_seed(1))
    if rows_that_count is not None:
        weights = weights * rows_that_count[:, None, :, None]
    got = output_and_gradients(lambda *tensors: attend(*tensors, code, span=span), inputs, weights)
    want = output_and_gradients(
        lambda *tensors: reference.scaled_attention(*tensors, visible=visible, scaled=scaled)[0],
        [tensor.double() for tensor in inputs],
        weights,
    )
    if rows_that_count is not None:
        got[0], want[0] = (output.transpose(1, 2)[rows_that_count > 0] for output in (got[0], want[0]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("packing", PACKINGS)
def test_outputs_and_gradients_equal_the_formula(packing, window, per_row) -> None:
    lengths = PACKINGS[packing]
    inputs = random_inputs(len(lengths), per_row)
    assert_equal_to_formula(inputs, code_of(lengths, window), *visible_and_initial(lengths, window))


@pytest.mark.parametrize("window", [0, 5])
def test_padding_is_not_seen_and_the_first_real_token_is_the_initial_one(window) -> None:
    lengths = [[11, 13], [4, 12, 8]]
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[0, :3] = real[0, 20:] = real[1, 4:6] = real[1, 9] = real[1, 16:] = 0  # a hole, and a sequence of padding alone
    visible, initial = visible_and_initial(lengths, window, real)
    assert_equal_to_formula(random_inputs(2), code_of(lengths, window, real), visible, initial, rows_that_count=real)


@pytest.mark.parametrize("window", [0, 5])
def test_scaled_keys_are_places_in_the_row_for_the_queries_that_see_them(window) -> None:
    lengths = PACKINGS["uneven_rows"]
    span = torch.tensor(
        [[0, 5], [7, 7], [6, 19]]
    )  # two sequences in part, none, one in full and its neighbours in part
    visible, _ = visible_and_initial(lengths, window)
    column = torch.arange(LENGTH)
    chosen = ((column >= span[:, :1]) & (column < span[:, 1:]))[:, None, None]
    assert_equal_to_formula(random_inputs(3), code_of(lengths, window), visible, visible & chosen, span=span)


@pytest.mark.parametrize("window", [0, 5])
def test_the_dense_form_of_a_code_says_what_transformers_mask_and_the_initial_tokens_are(window) -> None:
    lengths = PACKINGS["uneven_rows"]
    numbers, positions = numbers_and_positions(lengths)
    real = torch.ones_like(numbers)
    real[1, :3] = real[2, 20:] = 0
    function = packed_mask_function(numbers, positions, window)
    mask = sdpa_mask(
        batch_size=3, q_length=LENGTH, kv_length=LENGTH, mask_function=function, attention_mask=real.bool(),
        allow_is_causal_skip=False,
    )  # fmt: skip
    codes = dense_codes(code_of(lengths, window, real))
    assert codes.dtype == torch.int8
    assert torch.equal(codes > 0, mask)
    assert torch.equal(codes == 2, visible_and_initial(lengths, window, real)[1])


def test_a_copy_of_a_code_says_the_same() -> None:
    inputs = random_inputs(3)
    code = code_of(PACKINGS["uneven_rows"], 5)
    assert torch.equal(attend(*inputs, code.clone()), attend(*inputs, code))


def test_a_layout_lives_as_long_as_its_code() -> None:
    before = len(packed_sequences._layouts)
    code = code_of(PACKINGS["uneven_rows"])
    assert len(packed_sequences._layouts) == before + 1
    del code
    assert len(packed_sequences._layouts) == before


def test_transformers_older_composition_without_positions_is_recognised() -> None:
    numbers, _ = numbers_and_positions(PACKINGS["uneven_rows"])
    same = masking_utils.packed_sequence_mask_function(numbers)
    windowed = masking_utils.sliding_window_causal_mask_function(5)
    for function, window in ((causal_mask_function, 0), (windowed, 5)):
        code = packed_code(and_masks(function, same), None, 3, LENGTH, "cpu")
        assert code is not None
        assert torch.equal(code, code_of(PACKINGS["uneven_rows"], window))


def always(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= 0


def other_masks() -> dict[str, Any]:
    numbers, positions = numbers_and_positions([[11, 13]])
    same = masking_utils.packed_sequence_mask_function(numbers)
    packed = packed_mask_function(numbers, positions)
    torn = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 1] * 12]))
    chunked = masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long))
    masks = {
        "not_packed": and_masks(causal_mask_function, always),
        "not_causal": same,
        "united": or_masks(packed, always),
        "with_another_part": and_masks(packed, always),
        "with_another_part_inside": packed_mask_function(
            numbers, positions, base=or_masks(causal_mask_function, always)
        ),
        "chunked": packed_mask_function(numbers, positions, base=chunked),
        "torn_sequences": and_masks(causal_mask_function, torn),
        "packed_twice": and_masks(packed, same),
        "of_another_length": and_masks(
            causal_mask_function, masking_utils.packed_sequence_mask_function(torch.zeros(1, 30, dtype=torch.long))
        ),
        "window_in_a_tensor": and_masks(packed, masking_utils.sliding_window_overlay(torch.tensor(3))),
        "numbers_that_are_not_whole": and_masks(
            causal_mask_function, masking_utils.packed_sequence_mask_function(numbers / 2)
        ),
        "no_function": None,
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        remap = masking_utils.remap_positions_for_packed_sequence
        masks |= {
            "positions_that_do_not_count_up": and_masks(remap(causal_mask_function, positions.flip(1)), same),
            "sequences_taken_at_positions": remap(and_masks(causal_mask_function, same), positions),
            "positions_of_positions": and_masks(remap(remap(causal_mask_function, positions), positions), same),
        }
    return masks


@pytest.mark.parametrize("name", other_masks())
def test_other_masks_are_not_taken_for_packed_ones(name) -> None:
    assert packed_code(other_masks()[name], None, 1, LENGTH, "cpu") is None


def test_parts_that_another_transformers_gave_another_meaning_are_not_taken(monkeypatch) -> None:
    numbers, positions = numbers_and_positions([[11, 13]])

    def inclusive(window: int) -> Any:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx >= q_idx - window

        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", inclusive)
    packed_mask._parts_mean_what_they_did.cache_clear()
    try:
        assert packed_code(packed_mask_function(numbers, positions), None, 1, LENGTH, "cpu") is None
    finally:
        packed_mask._parts_mean_what_they_did.cache_clear()


# Models.


def logits_alone(model: Any, embeddings: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
    """[B, T, vocabulary], each sequence run by itself."""
    packed = []
    for row, sizes in zip(embeddings, lengths, strict=True):
        parts = [model(inputs_embeds=part[None], use_cache=False).logits[0] for part in row.split(list(sizes))]
        packed.append(torch.cat(parts))
    return torch.stack(packed)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_each_sequence_what_it_gives_it_alone_and_the_same_gradients(kind, packing) -> None:
    model = patch(small_model(kind))
    if kind != "deepseek_v3":  # whose experts have no float64
        model.double()
    lengths = PACKINGS[packing]
    ids, positions = ids_of(lengths)
    embeddings = model.get_input_embeddings()(ids).detach()
    results = []
    for alone in (False, True):
        leaf = embeddings.clone().requires_grad_()
        with head_parameters(model) as parameters:
            for seed, parameter in enumerate(parameters):
                parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
            if alone:
                logits = logits_alone(model, leaf, lengths)
            else:
                logits = model(inputs_embeds=leaf, position_ids=positions, use_cache=False).logits
            results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), [leaf, *parameters])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # the norms compute in float32


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_no_tensor_grows_with_the_square_of_the_length(kind) -> None:
    model = patch(small_model(kind, max_position_embeddings=4096))
    largest = []
    for length in (512, 2048):
        ids, positions = ids_of([[length // 2, 1, length // 4 - 1] + [16] * (length // 64)])
        with head_parameters(model) as parameters, LargestTensor() as seen:
            loss = model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()
            torch.autograd.grad(loss, parameters)
        largest.append(seen.elements)
    assert largest[1] == 4 * largest[0] == 128 * 2048  # the logits, over a vocabulary of 128


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_layout_is_made_once_a_mask_and_checkpointing_gives_the_same_gradients(monkeypatch, reentrant) -> None:
    model = patch(
        small_model("gemma3_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    )
    model.train()
    ids, positions = ids_of(PACKINGS["uneven_rows"])
    made = []
    lay_out = packed_sequences.lay_out
    monkeypatch.setattr(packed_sequences, "lay_out", lambda *arguments: made.append(1) or lay_out(*arguments))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with head_parameters(model) as parameters:
            loss = model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()
            loss.backward()
            results.append([parameter.grad for parameter in parameters])
        assert len(made) == 2  # one for full attention, one for the window
        made.clear()
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def test_named_scales_serve_different_packed_rows() -> None:
    model = patch(small_model("llama"))
    named = {"a": random_scales(model, 1), "b": random_scales(model, 2)}
    ids, positions = ids_of(PACKINGS["uneven_rows"])
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        alone = {name: apply_scales(model, scales)(**arguments).logits for name, scales in named.items()}
        apply_scales(model, named)
        with select_scales(model, ["b", "a", "b"]):
            mixed = model(**arguments).logits
    for row, name in enumerate("bab"):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-5, atol=1e-5)


def test_scaled_keys_of_a_packed_row_equal_those_of_its_sequences() -> None:
    model = patch(small_model("mistral"))
    apply_scales(model, random_scales(model))
    ids, positions = ids_of([[11, 13]])
    with torch.no_grad():
        with scaled_keys(model, torch.tensor([[9, 14]])):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = []
        for part, span in zip(ids.split((11, 13), dim=1), ([[9, 11]], [[0, 3]]), strict=True):
            with scaled_keys(model, torch.tensor(span)):
                alone.append(model(input_ids=part, use_cache=False).logits)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_a_flattening_collators_sequence_lengths_change_nothing() -> None:
    model = patch(small_model("llama"))
    apply_scales(model, random_scales(model))
    ids, positions = ids_of([[11, 13]])
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    ends = torch.tensor([0, 11, 24], dtype=torch.int32)
    flattened = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 13, "max_length_k": 13}
    with torch.no_grad():
        assert torch.equal(model(**arguments, **flattened).logits, model(**arguments).logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "layer by layer"])
def test_compiled_without_graph_breaks_packed_sequences_give_the_same_logits(kind, whole) -> None:
    model = patch(small_model(kind))
    apply_scales(model, random_scales(model))
    ids, positions = ids_of(PACKINGS["uneven_rows"])
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        want = model(**arguments).logits
        for module in [model] if whole else model.model.layers:
            module.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(**arguments).logits, want, rtol=1e-4, atol=1e-4)
