"""The choice of few-shot examples: the candidates, the examples that compare them, short searches, errors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from zerotuning.calibration import few_shot_choice
from zerotuning.calibration.calibrate import Calibration, calibrate
from zerotuning.calibration.few_shot_choice import TRIAL_OPTIONS, choose_shots, comparison_examples, shot_candidates
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales
from zerotuning.tasks.examples import as_records
from zerotuning.tasks.few_shot import draw_shots
from zerotuning.tasks.task import Task

FILMS = Task("films", "Review: {text}\nSentiment:", (" negative", " positive"))
WORDS = ("good", "bad", "a good story", "far too long", "told", "well told")
RECORDS = as_records([{"text": f"the film is {word} {i}", "label": i % 2} for i in range(8) for word in WORDS])


@pytest.fixture
def short(monkeypatch: Any) -> None:
    monkeypatch.setitem(TRIAL_OPTIONS, "steps", 3)


def prompts(records: Any) -> list[str]:
    return [FILMS.render(record).own for record in records]


def test_candidates_have_consecutive_seeds_and_one_has_no_shots() -> None:
    found = shot_candidates(FILMS, RECORDS, 4, 7, 3)
    assert [task.shot_seed for task in found] == [7, 8, 9, None]
    expected = [FILMS.with_shots(draw_shots(FILMS, RECORDS, 4, seed)).shots for seed in (7, 8, 9)]
    assert [task.shots for task in found] == [*expected, ()]
    (only,) = shot_candidates(FILMS, RECORDS, 4, 7, 1)
    assert only.shots == expected[0]
    assert only == FILMS.with_shots(draw_shots(FILMS, RECORDS, 4, 7))  # tasks are equal whatever seed drew their shots
    for draws in (0, True, 2.0):
        with pytest.raises(ZeroTuningError, match="num_shot_candidates must be an integer of at least 1"):
            shot_candidates(FILMS, RECORDS, 4, 7, draws)  # type: ignore[arg-type]


def test_examples_that_any_candidate_shows_are_not_used_to_compare_candidates() -> None:
    candidates = shot_candidates(FILMS, RECORDS, 4, 0, 3)
    shown = {shot.prompt for task in candidates for shot in task.shots}
    assert len(shown) > 4
    left = comparison_examples(candidates, RECORDS)
    assert prompts(left) == [text for text in prompts(RECORDS) if text not in shown]
    with pytest.raises(ZeroTuningError) as caught:
        comparison_examples(candidates, RECORDS[:20])
    assert "task 'films' needs at least 32 examples outside every set, got " in str(caught.value)
    assert str(caught.value).endswith(" of 20")


def test_the_candidate_of_least_held_out_loss_is_chosen(short: None, tiny_model: Any, tiny_tokenizer: Any) -> None:
    candidates = shot_candidates(FILMS, RECORDS, 4, 0, 2)
    options = {"batch_size": 5, "seed": 3, "tie": "layer"}
    asked = {**options, "steps": 50, "folds": 1, "method": "paper", "examples": 8, "num_searches": 4}
    choice = choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS, **asked)
    judges = comparison_examples(candidates, RECORDS)
    expected = []
    for task in candidates:
        report = calibrate(tiny_model, tiny_tokenizer, task, records=judges, steps=3, folds=2, **options).report
        assert report["examples"] == report["held_out_examples"] == len(judges)
        expected.append(report["tuned"]["loss"])
    assert choice.losses == expected
    assert len(set(expected)) == 3
    assert choice.task is candidates[expected.index(min(expected))]
    assert choice.warnings == []
    start = HeadScales(torch.full((2, 4), 1.5))
    assert choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS, start=start, **options).losses != expected


def test_only_the_best_of_many_candidates_after_a_first_round_are_searched_to_the_end(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    candidates = shot_candidates(FILMS, RECORDS, 2, 0, 3)
    monkeypatch.setattr(few_shot_choice, "FINALISTS", 2)
    monkeypatch.setattr(few_shot_choice, "comparison_examples", lambda candidates, records: list(records))
    first_round, final = {0: 0.4, 1: 0.2, 2: 0.5, None: 0.3}, {1: 0.15, None: 0.1}
    searched = []

    def searches(model: Any, tokenizer: Any, task: Task, *, options: Any, **more: Any) -> Any:
        searched.append((task.shot_seed, options.steps))
        loss = {10: first_round, 30: final}[options.steps][task.shot_seed]
        return Calibration(HeadScales.ones(2, 4), {"tuned": {"loss": loss}, "warnings": [f"{task.shot_seed}"]})

    monkeypatch.setattr(few_shot_choice, "calibrate", searches)
    choice = choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS, output=tmp_path)
    assert searched == [(0, 10), (1, 10), (2, 10), (None, 10), (1, 30), (None, 30)]
    assert choice.task is candidates[3]
    assert choice.losses == [0.4, 0.15, 0.5, 0.1]
    assert choice.steps == [10, 30, 10, 30]
    assert choice.warnings == ["0", "1", "2", "None", "1", "None"]
    searched.clear()
    again = choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS, output=tmp_path)
    assert (again.losses, searched) == (choice.losses, [])


def test_losses_are_saved_and_each_search_runs_once(
    short: None, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    candidates = shot_candidates(FILMS, RECORDS, 4, 0, 2)
    searched = []

    def counted(model: Any, tokenizer: Any, task: Task, **options: Any) -> Any:
        searched.append(task.shot_seed)
        if len(searched) == 3:
            raise KeyboardInterrupt
        return calibrate(model, tokenizer, task, **options)

    def choose(**options: Any) -> Any:
        searched.clear()
        return choose_shots(tiny_model, tiny_tokenizer, candidates, RECORDS, output=tmp_path, **options)

    monkeypatch.setattr(few_shot_choice, "calibrate", counted)
    with pytest.raises(KeyboardInterrupt):
        choose()
    assert searched == [0, 1, None]
    found = choose()
    assert searched == [None]  # the interrupted search
    assert choose().losses == found.losses
    assert searched == []
    kept = tmp_path / "shot_trials.json"
    assert sorted(json.loads(kept.read_text("utf-8")).values()) == sorted(found.losses)
    with pytest.raises(KeyboardInterrupt):
        choose(seed=1)  # another seed is another comparison
    with pytest.raises(KeyboardInterrupt):
        choose(overwrite=True)
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(1.1)
    with pytest.raises(KeyboardInterrupt):
        choose()  # other weights are another comparison
    for damage in ("[", "[1]", '{"a": "b"}'):
        kept.write_text(damage, encoding="utf-8")
        with pytest.raises(ZeroTuningError, match=r"shot_trials\.json cannot be read .*; overwrite to start anew$"):
            choose()


def test_a_continuation_can_be_compared(short: None, tiny_model: Any, tiny_tokenizer: Any) -> None:
    asked = Task("asked", "Review: {text}\nSentiment:", continuation=" {answer}")
    records = as_records([{**record, "answer": ("bad", "good")[record["label"]]} for record in RECORDS])
    choice = choose_shots(tiny_model, tiny_tokenizer, shot_candidates(asked, records, 3, 0, 2), records)
    assert all(map(math.isfinite, choice.losses))


def test_a_single_candidate_is_chosen_without_a_search() -> None:
    choice = choose_shots(None, None, [FILMS], RECORDS)  # type: ignore[arg-type]
    assert choice.task is FILMS
    assert math.isnan(choice.losses[0])


def test_incomparable_candidates_and_unknown_options_are_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
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
    assert "field 'label' is missing" in refusal(pair, [*RECORDS, as_records([{"text": "unlabelled"}])[0]])
    with pytest.raises(ZeroTuningError, match="calibrate has no option 'speed': there are method, "):
        choose_shots(tiny_model, tiny_tokenizer, pair, RECORDS, speed=1)
