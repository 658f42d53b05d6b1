"""Patched models on rows of packed sequences: each sequence has the logits that it has in a row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from packings import PACKINGS, ids_of
from random_models import random_scales, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zerotuning.attention import packed_sequences
from zerotuning.patching.patch import apply_scales, head_parameters, patch, scaled_keys, select_scales

KINDS = ["llama", "mistral", "gemma3_text", "qwen3", "deepseek_v3"]


def logits_alone(model: Any, embeddings: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
    """[B, T, vocabulary], each sequence run by itself."""
    packed = []
    for row, sizes in zip(embeddings, lengths, strict=True):
        parts = [model(inputs_embeds=part[None], use_cache=False).logits[0] for part in row.split(list(sizes))]
        packed.append(torch.cat(parts))
    return torch.stack(packed)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_give_the_logits_and_gradients_of_each_sequence_alone(kind, packing) -> None:
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
def test_the_layout_is_made_once_per_mask_and_checkpointing_gives_the_same_gradients(monkeypatch, reentrant) -> None:
    model = patch(
        small_model("gemma3_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    )
    model.train()
    ids, positions = ids_of(PACKINGS["uneven_rows"])
    made = []
    make_layout = packed_sequences.make_layout
    monkeypatch.setattr(packed_sequences, "make_layout", lambda *arguments: made.append(1) or make_layout(*arguments))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with head_parameters(model) as parameters:
            loss = model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()
            loss.backward()
            results.append([parameter.grad for parameter in parameters])
        assert len(made) == 2  # one layout for full attention, one for the sliding window
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


def test_sequence_lengths_of_a_flattening_collator_do_not_change_the_logits() -> None:
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
