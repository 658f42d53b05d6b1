"""Two calls of `generate` whose steps alternate. No time is asserted."""

from __future__ import annotations

import copy

import pytest
import torch
from zerotuning.bench.generation_steps import steps_by_turns


def test_models_that_generate_in_turns_alternate_after_every_step(tiny_model) -> None:
    models, calls = {"a": tiny_model, "b": copy.deepcopy(tiny_model)}, []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(f"{name} begins"))
        model.register_forward_hook(lambda *_, name=name: calls.append(f"{name} ends"))
    steps = steps_by_turns(models, torch.ones(2, 5, dtype=torch.long), new=4, runs=2)
    assert calls == ["a begins", "a ends", "b begins", "b ends"] * 8
    assert {name: [len(run) for run in runs] for name, runs in steps.items()} == {"a": [3, 3], "b": [3, 3]}
    assert all(second > 0 for runs in steps.values() for run in runs for second in run)


def test_a_model_that_fails_lets_the_other_finish_and_its_error_is_raised(tiny_model) -> None:
    class Broken:
        def generate(self, **_) -> None:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        steps_by_turns({"a": Broken(), "b": tiny_model}, torch.ones(1, 5, dtype=torch.long), new=3, runs=1)
