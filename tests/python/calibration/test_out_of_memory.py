"""A calibration where memory runs out or a loss is not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from film_reviews import RECORDS, calibrate
from limited_memory import memory_for
from zerotuning.calibration.out_of_memory import checkpointed_layers
from zerotuning.patching.patch import head_parameters, patch, unpatch


def test_a_batch_too_large_for_the_memory_is_retried_in_halves(tiny: Any) -> None:
    whole = calibrate(tiny)
    with memory_for(tiny[0], 3):
        found = calibrate(tiny)
    assert any("not enough memory for a batch of" in note for note in found.report["warnings"])
    assert torch.allclose(found.scales.gamma, whole.scales.gamma, atol=1e-4)


def test_activations_are_recomputed_where_one_example_exceeds_the_memory(tiny: Any, monkeypatch: Any) -> None:
    whole = calibrate(tiny)
    forward = type(tiny[0]).forward
    block = tiny[0].model.layers[0]

    def checkpointed_only(self: Any, *arguments: Any, **more: Any) -> Any:
        if torch.is_grad_enabled() and "forward" not in vars(block):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, **more)

    checkpointed_only.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(tiny[0]), "forward", checkpointed_only)
    found = calibrate(tiny)
    assert any("activations are computed twice" in note for note in found.report["warnings"])
    assert torch.allclose(found.scales.gamma, whole.scales.gamma, atol=1e-4)
    assert "forward" not in vars(block)


def test_checkpointed_layers_save_fewer_activations_and_give_the_same_gradient(tiny: Any) -> None:
    model = patch(tiny[0])
    ids = torch.arange(24)[None]

    def kept_and_gradient() -> tuple[int, torch.Tensor]:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with head_parameters(model) as parameters:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(ids, use_cache=False).logits[0, -1].square().sum()
            kept = sum(sizes)
            return kept, torch.stack(torch.autograd.grad(loss, parameters))

    plain, gradient = kept_and_gradient()
    with checkpointed_layers(model):
        less, again = kept_and_gradient()
    unpatch(model)
    assert less < plain / 2
    assert torch.equal(gradient, again)


def test_an_example_without_a_finite_loss_is_left_out_of_a_step_and_reported(tiny: Any, monkeypatch: Any) -> None:
    forward, calls = type(tiny[0]).forward, [0]

    def sometimes_nan(self: Any, input_ids: Any = None, **more: Any) -> Any:
        output = forward(self, input_ids=input_ids, **more)
        # With gradients enabled, the logits of one example are NaN.
        bad = (input_ids == marked).any(dim=-1) if torch.is_grad_enabled() else torch.zeros(len(input_ids), dtype=bool)
        calls[0] += int(bad.any())
        output.logits = output.logits.masked_fill(bad[:, None, None], math.nan)
        return output

    marked = tiny[1]("#")["input_ids"][0]
    sometimes_nan.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(tiny[0]), "forward", sometimes_nan)
    records = [{"text": "the film # is bad", "label": 1}, *RECORDS]
    found = calibrate(tiny, records=records)
    assert calls[0] > 0
    assert found.improved
    assert any("example 0: no finite loss" in note for note in found.report["warnings"])
