"""The study of robustness on a tiny random model, and its parts: shared prefixes, rounded weights, distractors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zerotuning.patching.patch import patch
from zerotuning.study import Setting, run_study, tuned_scales
from zerotuning.study.robustness import Draw
from zerotuning.study.robustness_conditions import GRIDS, PARTS, distractors
from zerotuning.study.rounded_weights import ROUNDINGS, eight_bit, four_bit, rounded_weights
from zerotuning.study.tuned_scales import TunedScales
from zerotuning.study.wordings import WORDINGS
from zerotuning.tasks.task import Task


@pytest.fixture
def long_model(tiny_model: Any) -> Any:
    tiny_model.config.max_position_embeddings = 4096
    return patch(tiny_model)


@pytest.fixture
def setting(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Setting:
    tiny_model.config.max_position_embeddings = 4096
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return Setting(
        str(tmp_path / "model"), dtype="float32", size="small", tasks=("sst2",), examples=6, limit=4, num_draws=1
    )


def test_every_part_measures_equal_examples_untuned_and_tuned_and_a_second_run_tunes_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRIDS, "small", dataclasses.replace(GRIDS["small"], own_shots=(1,), context=(0, 500)))
    first = run_study("robustness", setting, tmp_path / "out")
    parts = [row["key"]["part"] for row in first.rows]
    assert set(parts) == {"scales", *PARTS}
    tuned_on = [(row["key"]["examples"], row["key"]["shots"]) for row in first.rows if row["key"]["part"] == "scales"]
    assert tuned_on == [(6, 0), (6, 1), (4, 0)]  # each setting is tuned once
    for row in first.rows:
        if row["key"]["part"] != "scales":
            for which in ("untuned", "tuned"):
                assert row[which]["accuracy"] == pytest.approx(sum(row[which]["right"]) / 4)
    assert {f"robustness_{part}.png" for part in PARTS} <= {path.name for path in first.files}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("tuned again")

    monkeypatch.setattr(tuned_scales, "calibrate", refuse)
    # The row of one cell is lost; the row with the scales of this cell is not.
    file = tmp_path / "out" / "robustness.json"
    text = file.read_text()
    held = json.loads(text)
    held["rows"] = [row for row in held["rows"] if row["key"]["part"] != "wordings"]
    file.write_text(json.dumps(held))
    again = run_study("robustness", setting, tmp_path / "out")

    def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
        return sorted(found, key=lambda row: json.dumps(row["key"]))

    assert figures(again.rows) == figures(first.rows)


def test_the_base_setting_is_the_same_in_every_part(setting: Setting) -> None:
    rows = run_study("robustness", setting).rows
    base = {"shots": 0, "context": 0, "quantisation": "as loaded", "wordings": 0}
    found = [row["tuned"] for row in rows if row["key"].get("condition") == base.get(row["key"]["part"], ...)]
    assert len(found) == 4
    for one in found[1:]:
        assert one["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)
        assert one["right"] == found[0]["right"]


def test_eight_bits_are_255_steps_of_a_row() -> None:
    weight = torch.tensor([[1.27, -0.634, 0.004, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(eight_bit(weight), torch.tensor([[1.27, -0.63, 0.0, 0.0], [0.0] * 4]))


def test_four_bits_are_16_steps_between_the_ends_of_a_block() -> None:
    block = torch.linspace(-1.0, 2.0, 32)
    rounded = four_bit(torch.stack((block, 10 * block)))
    for row, scale in zip(rounded, (1.0, 10.0), strict=True):
        assert len(row.unique()) == 16
        assert float(row[0]) == pytest.approx(-1.0 * scale)
        assert float(row[-1]) == pytest.approx(2.0 * scale)
        assert float((row - scale * block).abs().max()) <= scale * 3.0 / 15 / 2 + 1e-6


@pytest.mark.parametrize("name", [name for name, rounding in ROUNDINGS.items() if rounding is not None])
def test_rounded_weights_are_put_back_also_after_an_exception(tiny_model: Any, name: str) -> None:
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    layer = tiny_model.model.layers[0].mlp.down_proj
    with rounded_weights(tiny_model, name):
        assert not torch.equal(layer.weight, before["model.layers.0.mlp.down_proj.weight"])
        assert torch.equal(tiny_model.lm_head.weight, before["lm_head.weight"])
    with pytest.raises(RuntimeError, match="stop"), rounded_weights(tiny_model, name):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())


@pytest.mark.parametrize("tokens", [0, 1, 57, 700])
def test_distractors_have_the_length_asked_for_and_come_from_other_tasks(tiny_tokenizer: Any, tokens: int) -> None:
    text = distractors(tiny_tokenizer, tokens, "boolq", 0)
    assert abs(len(tiny_tokenizer(text)["input_ids"]) - tokens) <= 2
    own = {value for record in Task.load("boolq").examples("validation") for value in record.values()}
    assert not any(part in own for part in text.split("\n\n"))
    assert text == distractors(tiny_tokenizer, tokens, "boolq", 0)
    assert tokens < 50 or text != distractors(tiny_tokenizer, tokens, "boolq", 1)


def test_a_long_prompt_is_distractors_and_then_the_tasks_own(setting: Setting) -> None:
    complete = setting.with_defaults({"small": None})  # type: ignore[dict-item]
    draw = Draw(complete, "sst2", 0, TunedScales(complete, steps=1, step_examples=4))
    task, record = draw._varied_task("context", 900), draw.tests[0]
    own = draw.task.render(record).own
    text = task.render(record).own
    assert text.endswith("\n\n" + own)
    longest = max(len(example.prompt) for example in complete.scorer(task, draw.tests).examples)
    assert 880 <= longest <= 900


@pytest.mark.parametrize("name", WORDINGS)
def test_there_are_five_wordings_with_the_tasks_fields_and_no_two_alike(name: str) -> None:
    task = Task.load(name)
    prompts = [task.prompt, *WORDINGS[name]]
    assert len(set(prompts)) == 5
    for prompt in prompts:
        other = dataclasses.replace(task, prompt=prompt)
        assert other.fields == task.fields
        for label in task.labels:
            assert label.strip().lower() in prompt.lower()
