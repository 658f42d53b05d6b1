"""The choice among draws of shots: its comparison by hand, who judges whom, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from zerotuning import shot_choice
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluate import label_scores
from zerotuning.scoring import LabelScorer
from zerotuning.shot_choice import choose_shots, losses_after_fit, means_over_all_judges, shot_candidates
from zerotuning.shots import draw_shots
from zerotuning.tasks import Task, as_records

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
WORDS = ("good", "bad", "a good story", "far too long", "told", "well told")
RECORDS = as_records([{"text": f"the film is {word} {i}", "label": i % 2} for i in range(3) for word in WORDS])


def test_means_are_those_of_all_judges_where_losses_add_up() -> None:
    random = np.random.default_rng(0)
    draws, judges = random.normal(size=5), random.normal(size=30) * 10
    losses = draws[:, None] + judges
    full = losses.mean(axis=1)
    losses[random.random(losses.shape) < 0.3] = np.nan
    np.testing.assert_allclose(means_over_all_judges(losses), full, atol=1e-9)
    assert not np.allclose(np.nanmean(losses, axis=1), full, atol=0.1)  # plain means are those of other judges


def test_means_are_least_squares_where_losses_do_not_add_up() -> None:
    random = np.random.default_rng(1)
    losses = random.normal(size=(4, 12))
    np.testing.assert_allclose(means_over_all_judges(losses), losses.mean(axis=1), atol=1e-12)
    losses[0, :4] = losses[2, 3:9] = np.nan
    rows, values = [], []
    for draw, judge in zip(*np.nonzero(np.isfinite(losses)), strict=True):
        rows.append(np.concatenate((np.eye(4)[draw], np.eye(12)[judge])))
        values.append(losses[draw, judge])
    solution = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    np.testing.assert_allclose(means_over_all_judges(losses), solution[:4] + solution[4:].mean(), atol=1e-9)


def test_a_draw_that_nobody_judged_has_no_mean() -> None:
    losses = np.array([[1.0, 2.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(means_over_all_judges(losses), [1.5, np.nan])


def test_labels_that_shots_favour_and_flat_scores_cost_a_draw_nothing() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (200,))
    knowing = torch.randn(200, 2) + 2 * torch.nn.functional.one_hot(labels, 2)
    biased = knowing * 0.1 + torch.tensor([3.0, 0.0])
    assert torch.nn.functional.cross_entropy(biased, labels) > 1
    fair, unfair = (float(losses_after_fit(FILMS, scores, labels).mean()) for scores in (knowing, biased))
    assert unfair == pytest.approx(fair, abs=0.02)
    quiz = Task("quiz", "{question}\n{choices}\nAnswer:", "letters")
    assert float(losses_after_fit(quiz, biased, labels).mean()) > fair + 0.1  # choices of each example's own: no biases


def test_candidates_are_the_draws_of_following_seeds_and_no_shots() -> None:
    found = shot_candidates(FILMS, RECORDS, 4, 7, 3)
    assert [task.shot_seed for task in found] == [7, 8, 9, None]
    expected = [FILMS.with_shots(draw_shots(FILMS, RECORDS, 4, seed)).shots for seed in (7, 8, 9)]
    assert [task.shots for task in found] == [*expected, ()]
    (only,) = shot_candidates(FILMS, RECORDS, 4, 7, 1)
    assert only.shots == expected[0]
    assert only == FILMS.with_shots(draw_shots(FILMS, RECORDS, 4, 7))  # a seed makes no other task
    for draws in (0, True, 2.0):
        with pytest.raises(ZeroTuningError, match="shot draws must be an integer of at least 1"):
            shot_candidates(FILMS, RECORDS, 4, 7, draws)  # type: ignore[arg-type]


def test_every_draw_is_judged_by_the_examples_that_it_does_not_show(tiny_model: Any, tiny_tokenizer: Any) -> None:
    candidates = shot_candidates(FILMS, RECORDS, 4, 0, 3)
    choice = choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS, batch_size=5)
    table = np.full((4, len(RECORDS)), np.nan)
    for row, task in zip(table, candidates, strict=True):
        shown = {shot.prompt for shot in task.shots}
        own = [place for place, record in enumerate(RECORDS) if task.render(record).own not in shown]
        assert len(own) == len(RECORDS) - len(task.shots)
        scorer = LabelScorer(tiny_model, tiny_tokenizer, task, [RECORDS[place] for place in own])
        with torch.no_grad():
            row[own] = losses_after_fit(task, label_scores(scorer), scorer.labels)
    np.testing.assert_allclose(choice.losses, means_over_all_judges(table), atol=1e-4)
    assert choice.task is candidates[int(np.argmin(choice.losses))]
    assert len(set(choice.losses)) == 4
    assert choice.setbacks == []


def test_the_least_loss_is_taken(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    candidates = shot_candidates(FILMS, RECORDS, 4, 0, 3)

    def scores(scorer: LabelScorer, setbacks: Any) -> torch.Tensor:
        knowing = torch.nn.functional.one_hot(scorer.labels, 2).float()
        return knowing * (3.0 if scorer.task.shots == candidates[1].shots else 0.5)

    monkeypatch.setattr(shot_choice, "_scores", scores)
    assert choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS).task.shot_seed == 1


def test_judges_are_so_many_at_most(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(shot_choice, "MOST_JUDGES", 8)
    candidates = shot_candidates(FILMS, RECORDS[8:], 4, 0, 2)
    few, all_of_them = (choose_shots(tiny_model, tiny_tokenizer, candidates, part) for part in (RECORDS[:8], RECORDS))
    assert few.losses == all_of_them.losses


def test_memory_that_runs_out_is_survived(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    candidates = shot_candidates(FILMS, RECORDS, 2, 0, 2)
    expected = choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS).losses
    scores = LabelScorer.scores

    def limited(self: LabelScorer, batch: Any) -> torch.Tensor:
        if len(batch) > 4:
            raise torch.OutOfMemoryError("no room")
        return scores(self, batch)

    monkeypatch.setattr(LabelScorer, "scores", limited)
    found = choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS)
    assert found.losses == pytest.approx(expected, abs=1e-4)
    assert any("retried with at most" in note for note in found.setbacks)


def test_a_continuation_is_judged_by_its_own_loss(tiny_model: Any, tiny_tokenizer: Any) -> None:
    asked = Task("asked", "Review: {text}\nSentiment:", continuation=" {answer}")
    records = as_records([{**record, "answer": ("bad", "good")[record["label"]]} for record in RECORDS])
    candidates = shot_candidates(asked, records, 3, 0, 2)
    choice = choose_shots(tiny_model, tiny_tokenizer, candidates, records)
    scorer = LabelScorer(tiny_model, tiny_tokenizer, asked, records)
    with torch.no_grad():
        plain = -label_scores(scorer).mean()
    assert choice.losses[2] == pytest.approx(float(plain), abs=0.2)  # no shots: judged by all
    assert choice.task is candidates[int(np.argmin(choice.losses))]


def test_one_candidate_is_taken_unread() -> None:
    choice = choose_shots(None, None, [FILMS], RECORDS)  # type: ignore[arg-type]
    assert choice.task is FILMS
    assert math.isnan(choice.losses[0])


def test_what_cannot_be_compared_is_refused(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    def refusal(candidates: Any, records: Any = RECORDS) -> str:
        with pytest.raises(ZeroTuningError) as caught:
            choose_shots(tiny_model, tiny_tokenizer, candidates, records)
        return str(caught.value)

    assert refusal([]) == "candidates must be at least one task, got none"
    written = dataclasses.replace(FILMS, scoring="generate")
    assert "scoring generate does not have" in refusal([written, written])
    with pytest.raises(ZeroTuningError, match="scoring generate does not have"):
        shot_candidates(written, RECORDS, 2, 0, 2)
    assert len(shot_candidates(written, RECORDS, 2, 0, 1)) == 1
    pair = shot_candidates(FILMS, RECORDS, 2, 0, 2)
    shown = [record for record in RECORDS if FILMS.render(record).own in {shot.prompt for shot in pair[0].shots}]
    assert refusal(pair, shown) == "all 2 examples of task 'films' are shots, none is left to judge them"
    assert "field 'label' is missing" in refusal(pair, [*RECORDS, as_records([{"text": "unlabelled"}])[0]])
    monkeypatch.setattr(LabelScorer, "scores", lambda self, batch: torch.full((len(batch), 2), torch.nan))
    assert refusal(pair) == "task 'films': the model's scores are not finite"
