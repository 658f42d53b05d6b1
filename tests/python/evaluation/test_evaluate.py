"""Evaluation: the figures against sums over examples written out, and where the examples come from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.evaluate import evaluate, label_scores
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.tasks.task import Task

TASK = Task("sentiment", "Review: {text}\nSentiment:", (" negative", " positive", " good film"))
RECORDS = [
    {"text": text, "label": label}
    for text, label in [("good", 1), ("a bad story", 0), ("long", 2), ("the film is not good", 0), ("bad", 1)]
]


def plain_figures(model: Any, tokenizer: Any) -> tuple[float, float, float]:
    """Accuracy, loss and entropy from one unpadded sequence for each example and label."""
    right, loss, entropy = 0, 0.0, 0.0
    for record in RECORDS:
        prompt = TASK.render(record).text
        start = len(tokenizer(prompt)["input_ids"])
        scores = []
        for label in TASK.labels:
            ids = tokenizer(prompt + label)["input_ids"]
            next_token = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
            scores.append(sum(float(next_token[place - 1, ids[place]]) for place in range(start, len(ids))))
        total = math.log(sum(math.exp(score) for score in scores))
        logs = [score - total for score in scores]
        right += max(range(3), key=lambda i: logs[i]) == record["label"]
        loss -= logs[record["label"]]
        entropy -= sum(math.exp(log) * log for log in logs)
    return right / len(RECORDS), loss / len(RECORDS), entropy / len(RECORDS)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 16])
def test_accuracy_loss_and_entropy_equal_sums_over_unpadded_examples(
    tiny_model: Any, tiny_tokenizer: Any, batch_size: int
) -> None:
    result = evaluate(tiny_model, tiny_tokenizer, TASK, RECORDS, batch_size=batch_size)
    accuracy, loss, entropy = plain_figures(tiny_model, tiny_tokenizer)
    assert (result.task, result.examples) == ("sentiment", 5)
    assert result.accuracy == pytest.approx(accuracy)
    assert result.loss == pytest.approx(loss, abs=1e-4)
    assert result.entropy == pytest.approx(entropy, abs=1e-4)
    assert result.seconds > 0


def test_examples_come_from_a_list_a_file_or_the_builtin_test_sample(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    from_list = evaluate(tiny_model, tiny_tokenizer, TASK, RECORDS, limit=4)
    from_file = evaluate(tiny_model, tiny_tokenizer, TASK, path, limit=4)
    assert from_list.examples == from_file.examples == 4
    assert from_list.loss == from_file.loss
    assert evaluate(tiny_model, tiny_tokenizer, "trec", limit=3).examples == 3
    with pytest.raises(ZeroTuningError, match="'sentiment' has no built-in examples"):
        evaluate(tiny_model, tiny_tokenizer, TASK)
    with pytest.raises(ZeroTuningError, match="examples must be mappings, or the name of a file, got int 5"):
        evaluate(tiny_model, tiny_tokenizer, TASK, 5)  # type: ignore[arg-type]
    numbers: dict[str, Any] = {"limit": np.int64(2), "batch_size": np.int64(2)}
    assert evaluate(tiny_model, tiny_tokenizer, TASK, RECORDS, **numbers).examples == 2


def test_a_task_may_be_the_path_of_a_yaml_file(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nprompt: "Review: {text}"\nlabels: [" a", " b"]\n', encoding="utf-8")
    assert evaluate(tiny_model, tiny_tokenizer, path, [{"text": "good", "label": 1}]).task == "mine"


def test_the_json_file_holds_the_figures_and_is_written_atomically(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    result = evaluate(tiny_model, tiny_tokenizer, TASK, RECORDS)
    names = ["task", "examples", "accuracy", "loss", "entropy", "seconds", "scoring", "shots", "chat"]
    assert list(result.to_json()) == names
    result.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == result.to_json()
    assert 0.0 <= result.accuracy <= 1.0


def test_label_scores_are_in_the_examples_order_and_hold_no_graph(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.requires_grad_(True)
    scores = label_scores(LabelScorer(tiny_model, tiny_tokenizer, TASK, RECORDS, batch_size=2))
    assert not scores.requires_grad
    for index, record in enumerate(RECORDS):
        alone = label_scores(LabelScorer(tiny_model, tiny_tokenizer, TASK, [record]))
        torch.testing.assert_close(scores[index : index + 1], alone, atol=1e-4, rtol=0)


def test_no_progress_bar_is_drawn_where_there_is_no_terminal(
    tiny_model: Any, tiny_tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(tiny_model, tiny_tokenizer, TASK, RECORDS, progress=True)
    assert capfd.readouterr() == ("", "")


def test_an_example_without_its_label_is_named_with_its_line(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good", "label": 1}\n{"text": "bad"}\n', encoding="utf-8")
    with pytest.raises(ZeroTuningError, match=r"data\.jsonl:2: field 'label' is missing"):
        evaluate(tiny_model, tiny_tokenizer, TASK, path)


def test_scores_that_are_nan_are_an_error_that_names_an_example(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ZeroTuningError, match="example 0: the model's scores are NaN"):
        evaluate(tiny_model, tiny_tokenizer, TASK, RECORDS)


@pytest.mark.parametrize("method", ["scores", "continuations"])
def test_a_right_answer_without_probability_is_an_error_that_names_its_example(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    task = TASK if method == "scores" else Task("t", "Review: {text}\nSentiment:", continuation=" {text}")
    measured = getattr(LabelScorer, method)

    def without_third(self: LabelScorer, batch: Any) -> Any:
        found = measured(self, batch)
        column = found[:, 0] if method == "scores" else found.log_probability  # the example's label is 0
        column[batch.indices == 3] = -torch.inf
        return found

    monkeypatch.setattr(LabelScorer, method, without_third)
    with pytest.raises(ZeroTuningError, match=r"^example 3: the model's loss is infinite$"):
        evaluate(tiny_model, tiny_tokenizer, task, RECORDS, batch_size=2)


@pytest.mark.model
def test_the_embedded_model_does_better_than_chance_on_sst2(demo_model: tuple[Any, Any]) -> None:
    result = evaluate(*demo_model, "sst2", limit=64)
    assert result.examples == 64
    assert 0.6 < result.accuracy < 0.95


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_continuation_is_scored_token_by_token(tiny_model: Any, tiny_tokenizer: Any, batch_size: int) -> None:
    task = Task("answers", "Say: {text}\n", continuation=" {answer}")
    records = [{"text": "x" * n, "answer": "the film is" + " good" * n} for n in (1, 3, 2, 4)]
    losses, entropies, exact = [], [], 0
    for record in records:
        start = tiny_tokenizer(f"Say: {record['text']}\n")["input_ids"]
        whole = tiny_tokenizer(f"Say: {record['text']}\n {record['answer']}")["input_ids"]
        logits = tiny_model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        places = range(len(start) - 1, len(whole) - 1)
        losses.append(-sum(float(logits[k, whole[k + 1]]) for k in places) / len(places))
        entropies.append(-sum(float((logits[k].exp() * logits[k]).sum()) for k in places) / len(places))
        exact += all(int(logits[k].argmax()) == whole[k + 1] for k in places)
    found = evaluate(tiny_model, tiny_tokenizer, task, records, batch_size=batch_size)
    assert found.loss == pytest.approx(sum(losses) / 4, abs=1e-4)
    assert found.entropy == pytest.approx(sum(entropies) / 4, abs=1e-4)
    assert found.accuracy == exact / 4
