"""Several candidates in one forward pass, and behind a shared prefix, have the scores that each candidate has alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zerotuning as zt
from limited_memory import memory_for
from zerotuning.calibration.batched_candidates import CPU_TOKENS
from zerotuning.calibration.holdout_search import HoldoutSearch
from zerotuning.calibration.objective import CalibrationObjective, TaskExamples
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.out_of_memory import OutOfMemoryRetry
from zerotuning.evaluation.label_scorer import GRADIENT_TOKENS, LabelScorer
from zerotuning.models.process_group import Processes
from zerotuning.patching.patch import head_parameters, patch
from zerotuning.tasks.examples import as_records
from zerotuning.tasks.task import Task

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
WORDY = Task("wordy", "Review: {text}\nIs it good?", (" not at all", " very much so", " it is good", " no"))
TEXTS = ("good", "far too long and bad", "a story", "well told", "the film is bad and far too long, the story too")
RECORDS = [{"text": text, "label": place % 2} for place, text in enumerate(TEXTS)]
STORIES = Task("stories", "Tell: {text}\n", continuation=" {answer}")
TOLD = [{"text": text, "answer": "a good story" + " too" * place} for place, text in enumerate(TEXTS)]
TASKS = {
    "labels of one token": [(FILMS, RECORDS)],
    "labels of several tokens": [(WORDY, RECORDS)],
    "means over tokens": [(replace(WORDY, scoring="mean"), RECORDS)],
    "continuations": [(STORIES, TOLD)],
    "two tasks": [(FILMS, RECORDS), (WORDY, RECORDS[:3])],
}


@contextmanager
def measuring(
    model: Any, tokenizer: Any, tasks: list[tuple[Task, list[Any]]], **options: Any
) -> Iterator[tuple[CalibrationObjective, list[torch.Tensor]]]:
    chosen = CalibrationOptions(**{"method": "cma-es", "batch_size": 4, **options})
    with head_parameters(patch(model)) as parameters:
        examples = [
            TaskExamples(task, as_records(records), LabelScorer(model, tokenizer, task, records, batch_size=4))
            for task, records in tasks
        ]
        yield (
            CalibrationObjective(model, tokenizer, examples, parameters, chosen, OutOfMemoryRetry(), Processes()),
            parameters,
        )


def all_indices(objective: CalibrationObjective) -> list[list[int]]:
    return [list(range(len(task.records))) for task in objective.tasks]


def points_of(method: str, count: int = 7) -> list[np.ndarray]:
    """The points of a search: γ = 1, then a population or heads moved one by one."""
    if method == "cma-es":
        return list(np.random.default_rng(0).normal(0.0, 0.8, (count, 8)))
    return [np.zeros(8), *(np.eye(8)[: count - 1] * math.log(1.5))]


def by_themselves(
    objective: CalibrationObjective, parameters: list[torch.Tensor], point: np.ndarray
) -> list[torch.Tensor]:
    """Return the scores of each example alone, without padding, at the model's current point."""
    with torch.no_grad():
        for parameter, row in zip(parameters, point.reshape(2, 4), strict=True):
            parameter.copy_(torch.from_numpy(row))
        return [
            torch.cat([task.scorer.scores(task.scorer.batches_of([place], 1)[0]) for place in range(len(task.records))])
            for task in objective.tasks
        ]


@contextmanager
def passes(model: Any) -> Iterator[list[torch.Size]]:
    """Record the shape of input_ids in each of the model's forward passes."""
    shapes: list[torch.Size] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, options: shapes.append(options["input_ids"].shape), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize("method", ["cma-es", "paper"])
@pytest.mark.parametrize("name", list(TASKS))
def test_batched_candidates_score_as_each_candidate_alone(
    tiny_model: Any, tiny_tokenizer: Any, name: str, method: str
) -> None:
    points = points_of(method)
    with measuring(tiny_model, tiny_tokenizer, TASKS[name], method=method) as (objective, parameters):
        indices = all_indices(objective)
        with passes(tiny_model) as shapes:
            found = objective.scores_at(points, indices)
        batches = sum(len(task.scorer.batches) for task in objective.tasks)
        assert len(shapes) < len(points) * batches
        assert max(shape.numel() for shape in shapes) <= CPU_TOKENS
        for point, scores in zip(points, found, strict=True):
            for one, expected in zip(scores, by_themselves(objective, parameters, point), strict=True):
                torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_losses_come_in_the_order_of_the_points(tiny_model: Any, tiny_tokenizer: Any) -> None:
    points = points_of("cma-es")
    with measuring(tiny_model, tiny_tokenizer, TASKS["two tasks"]) as (objective, _):
        indices = [[4, 0, 2], [1]]
        together = objective.losses(points, indices)
        alone = [objective.losses([point], indices)[0] for point in points]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == len(points)


def test_a_pass_too_large_for_the_memory_is_retried_with_fewer_candidates(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = points_of("cma-es")
    with measuring(tiny_model, tiny_tokenizer, TASKS["two tasks"]) as (objective, _):
        indices = all_indices(objective)
        expected = objective.scores_at(points, indices)
        with memory_for(tiny_model, 9):
            found = objective.scores_at(points, indices)
        assert objective.memory.max_candidates in (1, 2)
        assert any("candidates in a pass, retried with at most" in note for note in objective.memory.notes)
        for one, other in zip(found, expected, strict=True):
            for scores, before in zip(one, other, strict=True):
                torch.testing.assert_close(scores, before, rtol=1e-5, atol=1e-5)


def test_a_candidate_without_finite_scores_has_infinite_loss_and_the_others_do_not(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    points = points_of("cma-es")
    points[2] = points[2].copy()
    points[2][0] = 3.5
    with measuring(tiny_model, tiny_tokenizer, TASKS["labels of one token"]) as (objective, _):
        indices = all_indices(objective)
        expected = objective.losses(points, indices)
        layer = tiny_model.model.layers[0].self_attn

        def no_numbers_at_the_third(module: Any, args: Any, output: Any) -> Any:
            scales = layer.zerotuning.current(len(output.logits)).expand(len(output.logits), 4)
            output.logits = output.logits.masked_fill((scales[:, 0] > 3)[:, None, None], math.nan)
            return output

        hook = tiny_model.register_forward_hook(no_numbers_at_the_third)
        found = objective.losses(points, indices)
        hook.remove()
    assert found[2] == math.inf
    assert found[:2] + found[3:] == pytest.approx(expected[:2] + expected[3:], abs=1e-5)
    assert any("no finite loss at some scales" in note for note in objective.memory.notes)


@pytest.mark.parametrize("method", ["cma-es", "paper"])
def test_a_search_that_was_interrupted_ends_with_the_same_bytes(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def run(name: str) -> None:
        settings = {"records": RECORDS * 3, "objective": "entropy", "guard": False, "steps": 60}
        zt.calibrate(tiny_model, tiny_tokenizer, FILMS, method=method, output=tmp_path / name, **settings)

    run("whole")
    advance, left = HoldoutSearch.advance, [1]

    def interrupted(self: HoldoutSearch) -> None:
        if left[0] == 0:
            left[0] = 1
            raise KeyboardInterrupt
        left[0] -= 1
        advance(self)

    monkeypatch.setattr(HoldoutSearch, "advance", interrupted)
    starts = 1
    while True:
        try:
            run("killed")
            break
        except KeyboardInterrupt:
            starts += 1
    assert starts > 1
    for name in ("head_scales.safetensors", "zerotuning_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Behind a shared prefix.


def with_many_shots(model: Any, task: Task = WORDY) -> tuple[Task, list[Any]]:
    model.config.max_position_embeddings = 2048
    shots = [{"text": f"the film is {text}", "label": place % 2} for place, text in enumerate(TEXTS * 2)]
    return task.with_shots(shots), RECORDS


def test_shots_are_computed_once_per_candidate_with_the_same_scores(tiny_model: Any, tiny_tokenizer: Any) -> None:
    points = points_of("cma-es", 3)
    with measuring(tiny_model, tiny_tokenizer, [with_many_shots(tiny_model)]) as (objective, parameters):
        (task,) = objective.tasks
        assert task.shares_prefix
        with passes(tiny_model) as shapes:
            found = objective.scores_at(points, all_indices(objective))
        whole = sum(batch.input_ids.numel() for batch in task.scorer.batches)
        assert sum(shape.numel() for shape in shapes) < len(points) * whole / 4
        assert len(shapes) == len(points) * (1 + len(task.scorer.batches))
        for point, (scores,) in zip(points, found, strict=True):
            (expected,) = by_themselves(objective, parameters, point)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["task-loss", "information"])
@pytest.mark.parametrize("task", [FILMS, WORDY], ids=["one token", "several tokens"])
def test_gradients_flow_through_shots_that_are_computed_once_per_batch(
    tiny_model: Any, tiny_tokenizer: Any, task: Task, name: str
) -> None:
    point = points_of("cma-es", 1)[0]
    # Attention is nearly uniform here, and one token of hundreds has little weight: gradients are about 1e-8.
    several = [with_many_shots(tiny_model.double(), task)]
    with measuring(tiny_model, tiny_tokenizer, several, method="gradient", objective=name) as (objective, _):
        (one,) = objective.tasks
        indices = all_indices(objective)
        with passes(tiny_model) as shapes:
            loss, gradient = objective.loss_and_gradient(point, indices)
        objective.memory.checkpointed = True  # checkpointed layers read whole prompts
        with passes(tiny_model) as checkpointed:
            kept_less = objective.loss_and_gradient(point, indices)
        one.shares_prefix = False
        objective.memory.checkpointed = False
        with passes(tiny_model) as whole:
            expected = objective.loss_and_gradient(point, indices)
        assert sum(shape.numel() for shape in shapes) < sum(shape.numel() for shape in whole) / 2
        assert sum(shape.numel() for shape in checkpointed) > 1.5 * sum(shape.numel() for shape in shapes)
        for found in ((loss, gradient), kept_less):
            assert found[0] == pytest.approx(expected[0], abs=1e-5)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-4 * np.abs(expected[1]).max())


def test_tokens_of_a_shared_prefix_do_not_count_toward_the_tokens_of_a_pass(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    task, records = with_many_shots(tiny_model)
    length = len(LabelScorer(tiny_model, tiny_tokenizer, task, records).shared_prefix)
    with passes(tiny_model) as shapes:
        zt.calibrate(tiny_model, tiny_tokenizer, task, records=records * 8, batch_size=64, steps=1, folds=2)
    assert any(rows * (length + width) > GRADIENT_TOKENS for rows, width in shapes)
    assert all(rows * width <= GRADIENT_TOKENS for rows, width in shapes)


def test_a_lack_of_memory_behind_a_prefix_is_retried(tiny_model: Any, tiny_tokenizer: Any) -> None:
    points = points_of("paper", 2)
    with measuring(tiny_model, tiny_tokenizer, [with_many_shots(tiny_model, FILMS)]) as (objective, _):
        indices = all_indices(objective)
        expected = objective.losses(points, indices)
        with memory_for(tiny_model, 2):
            assert objective.losses(points, indices) == pytest.approx(expected, abs=1e-4)
        assert objective.memory.max_batch_size == 2
