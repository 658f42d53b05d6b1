"""Label log-probabilities against an independent count: lm-evaluation-harness's for the same texts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.tasks.task import Task

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

SST5_WORDS = (" very negative", " negative", " neutral", " positive", " very positive")


def built_in(name: str) -> Task:
    """A built-in task; "sst5 in words" has labels of two tokens for the demo model's tokenizer."""
    return replace(Task.load("sst5"), labels=SST5_WORDS) if name == "sst5 in words" else Task.load(name)


def harness_log_probabilities(model: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> list[float]:
    harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, backend="causal")
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
    return [found[0] for found in harness.loglikelihood(requests, disable_tqdm=True)]


@torch.no_grad()
def assert_agreement(model: Any, tokenizer: Any, task: Task, count: int) -> int:
    """Check the task's first examples; return the largest number of tokens of a label."""
    records = task.examples("test", count)
    scorer = LabelScorer(model, tokenizer, task, records)
    found = scorer.gather([scorer.log_probabilities(batch) for batch in scorer.batches])
    prompts = [task.render(record) for record in records]
    texts = [(prompt.text, label) for prompt in prompts for label in prompt.labels]
    expected = iter(harness_log_probabilities(model, tokenizer, texts))
    for row, prompt in zip(found.tolist(), prompts, strict=True):
        own = [next(expected) for _ in prompt.labels]
        assert row[: len(own)] == pytest.approx(own, abs=1e-4)
    return max(len(tokens) for example in scorer.examples for tokens in example.labels)


@pytest.mark.parametrize(("name", "tokens"), [("sst2", 1), ("trec", 11), ("arc_challenge", 2)])
def test_a_random_models_label_scores_equal_the_harnesss(
    name: str, tokens: int, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tiny_model.config.max_position_embeddings = 2048
    assert assert_agreement(tiny_model, tiny_tokenizer, Task.load(name), 6) == tokens


def test_shots_are_in_the_text_that_both_score(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.config.max_position_embeddings = 2048
    task = Task.load("sst5")
    shown = task.with_shots(task.examples("validation", 3))
    assert assert_agreement(tiny_model, tiny_tokenizer, shown, 4) > 1


@pytest.mark.model
@pytest.mark.parametrize(("name", "tokens"), [("sst2", 1), ("sst5 in words", 2), ("arc_challenge", 1)])
def test_the_embedded_models_label_scores_equal_the_harnesss(
    name: str, tokens: int, demo_model: tuple[Any, Any]
) -> None:
    model, tokenizer = copy.deepcopy(demo_model[0]).float(), demo_model[1]
    assert assert_agreement(model, tokenizer, built_in(name), 4) == tokens
