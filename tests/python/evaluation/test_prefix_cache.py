"""Scores behind a cached prefix against those of whole prompts."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from zerotuning.evaluation.evaluate import evaluate, label_scores
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.evaluation.prefix_cache import is_worth_sharing, scores_behind_prefix, supports_prefix_cache
from zerotuning.patching.patch import head_parameters, patch
from zerotuning.tasks.few_shot import draw_shots
from zerotuning.tasks.task import Task


@pytest.fixture
def long_model(tiny_model: Any) -> Any:
    tiny_model.config.max_position_embeddings = 4096
    return patch(tiny_model)


def with_shots(name: str, count: int) -> Task:
    task = Task.load(name)
    return task.with_shots(draw_shots(task, task.examples("validation"), count))


@pytest.mark.parametrize("shots", [0, 3])
def test_scores_behind_a_shared_prefix_are_those_of_whole_prompts(
    long_model: Any, tiny_tokenizer: Any, shots: int
) -> None:
    task = with_shots("trec", shots)
    records = task.examples("test", 5)
    scorer = LabelScorer(long_model, tiny_tokenizer, task, records)
    assert len(scorer.shared_prefix) > (300 if shots else 20)
    with head_parameters(long_model) as parameters:
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(torch.tensor([0.7, -0.5, 0.0, 1.2]))
        expected = label_scores(scorer)
        found = scores_behind_prefix(scorer)
    assert max(len(tokens) for example in scorer.examples for tokens in example.labels) > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_of_many_shots_is_computed_once_with_the_same_figures(
    long_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = with_shots("trec", 6)
    records = task.examples("test", 5)
    read: list[int] = []
    hook = long_model.register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    found = evaluate(long_model, tiny_tokenizer, task, records)
    hook.remove()
    scorer = LabelScorer(long_model, tiny_tokenizer, task, records)
    assert sum(read) < sum(batch.input_ids.numel() for batch in scorer.batches) / 4
    assert not is_worth_sharing(
        LabelScorer(long_model, tiny_tokenizer, Task.load("sst2"), Task.load("sst2").examples("test", 5))
    )
    monkeypatch.setattr(sys.modules["zerotuning.evaluation.evaluate"], "is_worth_sharing", lambda _: False)
    plain = evaluate(long_model, tiny_tokenizer, task, records)
    assert (found.accuracy, found.examples) == (plain.accuracy, plain.examples)
    assert found.loss == pytest.approx(plain.loss, abs=1e-4)
    assert found.entropy == pytest.approx(plain.entropy, abs=1e-4)


def test_prompts_stay_whole_where_padding_would_shift_a_sliding_window(long_model: Any, tiny_tokenizer: Any) -> None:
    scorer = LabelScorer(long_model, tiny_tokenizer, with_shots("trec", 3), Task.load("trec").examples("test", 5))
    assert supports_prefix_cache(scorer)
    long_model.config.sliding_window = 64
    assert not supports_prefix_cache(scorer)
