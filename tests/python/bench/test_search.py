"""`zerotuning bench search`: its statistics, its methods on a tiny model, and its resumption."""

from __future__ import annotations

import json

import pytest
import torch
from zerotuning.bench import adapters, runner
from zerotuning.bench import search as bench_search
from zerotuning.bench import sensitivity as bench_sensitivity
from zerotuning.bench.rows import Row
from zerotuning.bench.search import SearchBench, mean_rows, read_rows
from zerotuning.calibration.few_shot_choice import ShotChoice
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.statistics import wilson_interval
from zerotuning.tasks.task import Task


@pytest.fixture
def tiny_bench(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """The tiny model, and a task whose text determines which of two labels is right."""
    task = tmp_path / "reviews.yaml"
    task.write_text('name: reviews\nprompt: "Review: {text} Sentiment:"\nlabels: [" positive", " negative"]\n')
    words = ("good", "bad")
    records = [{"text": f"the film is {words[n % 2]} {n}", "label": n % 2} for n in range(40)]
    monkeypatch.setattr(bench_search, "load_model", lambda name, device=None: (tiny_model, tiny_tokenizer))
    monkeypatch.setattr(
        Task,
        "examples",
        lambda self, split="test", limit=None: records[20:][:limit] if split == "test" else records[:20],
    )
    return SearchBench(tasks=(str(task),), examples=(8, 16), limit=20, batch_size=8, shots=0, num_shot_candidates=1)


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_means_are_over_tasks_and_only_of_methods_that_every_task_has() -> None:
    def row(task: str, method: str, accuracy: float) -> Row:
        figures = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "numbers": 2, "s": 1.0}
        return {"what": "search", "task": task, "method": method, "examples": 16, "seed": 0, "peers": {method: figures}}

    rows = [row("a", "x", 0.5), row("b", "x", 0.7), row("a", "y", 0.9)]
    (mean,) = mean_rows(rows)
    figures = mean["peers"]["x"]
    assert figures["accuracy"] == pytest.approx(0.6)
    assert figures["high"] - figures["low"] == pytest.approx(0.2 / 2**0.5)


def test_adapter_epochs_without_a_finite_loss_are_skipped(tiny_bench, monkeypatch) -> None:
    pytest.importorskip("peft")
    tiny_bench.methods = ("ia3",)
    epochs = adapters._epochs

    def diverging(run, model, *rest):
        weights = adapters._weights(model)
        yield float("nan"), {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
        yield from (epochs(run, model, *rest) if converges else ())

    monkeypatch.setattr(adapters, "_epochs", diverging)
    converges = True
    row = next(tiny_bench.rows())
    assert row["peers"]["ia3"]["loss"] < 2
    converges = False
    with pytest.raises(ZeroTuningError, match=r"no epoch of IA3 on .* finite loss"):
        next(tiny_bench.rows())


def test_every_method_gives_a_row_and_leaves_the_model_as_it_was(tiny_bench, tiny_model, tiny_tokenizer) -> None:
    pytest.importorskip("peft")
    ids = tiny_tokenizer("Review: the film is good", return_tensors="pt").input_ids
    before = tiny_model(ids).logits
    tiny_bench.methods = tuple(name for name in bench_search.METHODS if not name.startswith("paper"))
    rows = list(tiny_bench.rows())
    torch.testing.assert_close(tiny_model(ids).logits, before, rtol=0, atol=0)
    made = [(row["method"], row["examples"]) for row in rows if row["what"] == "search"]
    assert made == [
        ("untuned", 0), ("label-bias", 16), ("shared", 16), ("gradient", 8), ("gradient", 16), ("information", 16),
        ("ia3", 16), ("lora", 16),
    ]  # fmt: skip
    for row in rows:
        for figures in row["peers"].values():
            assert 0 <= figures["low"] <= figures["accuracy"] <= figures["high"] <= 1 or row["what"] == "mean"
    numbers = {row["method"]: row["peers"][row["method"]]["numbers"] for row in rows if row["what"] == "search"}
    assert (numbers["untuned"], numbers["label-bias"], numbers["shared"], numbers["gradient"]) == (0, 1, 1, 8)
    assert numbers["lora"] > numbers["ia3"] > 8


def test_shots_come_from_a_methods_own_examples_and_stand_before_every_prompt(
    tiny_model, tiny_tokenizer, tiny_bench, monkeypatch
) -> None:
    tiny_bench.shots, tiny_bench.methods = 2, ("untuned", "gradient", "information")
    runs = []
    for name in tiny_bench.methods:
        method = bench_search.METHODS[name]
        monkeypatch.setitem(bench_search.METHODS, name, lambda run, method=method: (runs.append(run), method(run))[1])
    rows = [row for row in tiny_bench.rows() if row["what"] == "search"]
    assert [(row["method"], row["examples"], row["shots"]) for row in rows] == [
        ("untuned", 0, 0), ("untuned", 2, 2), ("gradient", 8, 2), ("gradient", 16, 2), ("information", 16, 0),
    ]  # fmt: skip
    assert [len(run.task.shots) for run in runs] == [0, 2, 2, 2, 0]
    for run in runs[2:4]:
        shots = [shot.prompt for shot in run.task.shots]
        own = [run.task.render(record).own for record in run.records]
        assert len(shots) == 2
        assert len(own) == run.count - 2
        assert not set(shots) & set(own)
        text = tiny_tokenizer.decode(run.test_scorer.examples[0].prompt)
        assert all(shot in text for shot in shots)
    with pytest.raises(ZeroTuningError, match="shots must leave 4 of the 8 examples, got 5"):
        SearchBench(examples=(8, 16), shots=5)


def test_the_shots_of_a_row_are_the_best_of_several_draws_or_none(tiny_bench, monkeypatch) -> None:
    tiny_bench.shots, tiny_bench.num_shot_candidates = 2, 3
    tiny_bench.methods = ("untuned", "label-bias", "gradient")
    asked = []

    def choose(model, tokenizer, candidates, records, batch_size):
        asked.append((len(records), [task.shot_seed for task in candidates]))
        return ShotChoice(candidates[-2 if len(candidates) > 1 else 0], [0.0] * len(candidates), [], [])

    monkeypatch.setattr(bench_search, "choose_shots", choose)
    # Two draws of two shots leave 16 - 2 * 2 = 12 examples for the comparison; three draws would leave too few.
    monkeypatch.setattr(bench_search, "MIN_COMPARISON_EXAMPLES", 12)
    rows = [row for row in tiny_bench.rows() if row["what"] == "search"]
    # No examples choose the shots of the untuned model; label-bias and gradient share one choice by their 16 examples.
    assert asked == [(16, [0]), (16, [0, 1, None]), (8, [0])]
    assert [(row["method"], row["examples"], row["num_shot_candidates"], row["shot_seed"]) for row in rows] == [
        ("untuned", 0, 1, None), ("untuned", 2, 1, 0), ("label-bias", 16, 2, 1), ("gradient", 8, 1, 0),
        ("gradient", 16, 2, 1),
    ]  # fmt: skip
    known = [dict(row) for row in rows]
    assert [row for row in tiny_bench.rows(known) if row["what"] == "search"] == known
    tiny_bench.num_shot_candidates, tiny_bench.methods, tiny_bench.examples = 1, ("gradient",), (16,)
    # The saved rows have another number of shot candidates.
    assert [row["num_shot_candidates"] for row in tiny_bench.rows(known) if row["what"] == "search"] == [1]
    with pytest.raises(ZeroTuningError, match="num_shot_candidates must be at least 1, got 0"):
        SearchBench(num_shot_candidates=0)


def test_a_second_start_measures_only_the_missing_rows(tiny_bench, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "search.json"
    monkeypatch.setattr(bench_search, "SearchBench", lambda device, **options: tiny_bench)
    tiny_bench.methods = ("untuned", "label-bias")
    runner.run_bench("search", output, "cpu")
    first = json.loads(output.read_text())["rows"]
    tiny_bench.methods = ("untuned", "label-bias", "shared")
    monkeypatch.setitem(bench_search.METHODS, "untuned", None)
    monkeypatch.setitem(bench_search.METHODS, "label-bias", None)
    runner.run_bench("search", output, "cpu")
    second = json.loads(output.read_text())["rows"]
    assert second[:2] == first[:2]
    assert [row["method"] for row in second if row["what"] == "search"] == ["untuned", "label-bias", "shared"]


def test_bad_options_and_files_are_named(tmp_path) -> None:
    with pytest.raises(ZeroTuningError, match=r"methods must be of untuned, .*, got 'magic'"):
        SearchBench(methods=("magic",))
    with pytest.raises(ZeroTuningError, match=r"examples must be numbers of at least 4, got \[2\]"):
        SearchBench(examples=(2,))
    path = tmp_path / "other.json"
    path.write_text('{"benchmark": "decode", "rows": []}')
    with pytest.raises(ZeroTuningError, match="holds no figures of bench search"):
        read_rows(path)


def test_measured_and_derived_sensitivities_rank_the_heads_alike(tiny_model, tiny_tokenizer, monkeypatch) -> None:
    task = Task("reviews", prompt="Review: {text} Sentiment:", labels=[" positive", " negative"])
    records = [{"text": f"the film is good {n}", "label": n % 2} for n in range(8)]
    monkeypatch.setattr(bench_sensitivity, "load_model", lambda *arguments: (tiny_model, tiny_tokenizer))
    monkeypatch.setattr(bench_sensitivity.Task, "load", lambda name: task)
    monkeypatch.setattr(Task, "examples", lambda self, split, limit: records)
    (row,) = bench_sensitivity.sensitivity_rows()
    assert row["peers"]["two evaluations a head"]["rank correlation"] > 0.97
    assert LabelScorer(tiny_model, tiny_tokenizer, task, records).examples  # unpatched, still usable
