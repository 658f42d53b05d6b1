"""Studies on a tiny random model: figures against the paper's formula in float64, files that resume, bad input."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from zerotuning.cli.main import main
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.patch import patch, unpatch
from zerotuning.study import Setting, run_study
from zerotuning.study.heads import agreement, checked_heads, group_directions, other_wordings, pairs
from zerotuning.study.layers import third_of
from zerotuning.study.names import STUDIES
from zerotuning.study.positions import step_down, table
from zerotuning.study.rows_file import RowsFile
from zerotuning.study.runner import study
from zerotuning.study.setting import best_gamma
from zerotuning.tasks.task import Task

LAYERS, HEADS = 2, 4
#: Of log γ in differences: losses are exact to 1e-7 only, since the model's norms compute in float32 whatever its dtype.
STEP = 0.02
MINE = ("positions", "layers", "heads", "gamma")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def setting(model: Any, tiny_tokenizer: Any) -> Setting:
    return Setting(size="small", examples=4, limit=3, _loaded=(patch(model), tiny_tokenizer))


# The paper's formula, one unpadded prompt at a time in float64.

_formula: dict[str, Any] = {}


def eager_formula(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    weights = torch.softmax(logits, -1)
    first, end = _formula["span"]
    factors = torch.ones(HEADS, length, dtype=torch.float64)
    factors[:, first:end] = torch.as_tensor(_formula["log_scale"][module.layer_idx]).exp()[:, None]
    weights = weights * factors[:, None]
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), None


AttentionInterface.register("study_formula", eager_formula)


def formula_figures(
    setting: Setting, task: Task, records: Sequence[Any], log_scale: Any, spans: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """(accuracy, loss), by the formula; labels scored by the log-probability of all their tokens."""
    model, tokenizer = setting.loaded()
    plain = unpatch(copy.deepcopy(model)).double()
    plain.set_attn_implementation("study_formula")
    right, losses = [], []
    for record, span in zip(records, spans, strict=True):
        _formula.update(log_scale=np.broadcast_to(log_scale, (LAYERS, HEADS)).copy(), span=span)
        prompt = task.render(record)
        ids = tokenizer(prompt.text)["input_ids"]
        scores = []
        for label in prompt.labels:
            both = tokenizer(prompt.text + label)["input_ids"]
            with torch.no_grad():
                logits = torch.log_softmax(plain(torch.tensor([both]), use_cache=False).logits[0].double(), -1)
            scores.append(sum(float(logits[place - 1, both[place]]) for place in range(len(ids), len(both))))
        log_total = math.log(sum(math.exp(score - max(scores)) for score in scores)) + max(scores)
        right.append(int(np.argmax(scores)) == prompt.label)
        losses.append(log_total - scores[prompt.label or 0])
    return float(np.mean(right)), float(np.mean(losses))


def ends(setting: Setting, task: Task, records: Sequence[Any]) -> list[int]:
    return [len(setting.loaded()[1](task.render(record).text)["input_ids"]) for record in records]


def rows_of(rows: Sequence[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row["key"].get(name) == value for name, value in key.items())]


@pytest.mark.parametrize("position", ["initial", "token 4", "middle", "last"])
def test_figures_of_a_position_equal_the_formula(setting: Setting, position: str) -> None:
    (row,) = rows_of(run_study("positions", setting).rows, position=position)
    task = Task.load("sst2")
    complete = setting.with_defaults(study("positions").numbers)
    validation, test = complete.drawn("sst2", 0), complete.tests("sst2", 0)

    def spans(records: Sequence[Any]) -> list[tuple[int, int]]:
        places = [
            {"initial": 0, "token 4": 4, "middle": n // 2, "last": n - 1}[position]
            for n in ends(setting, task, records)
        ]
        return [(place, place + 1) for place in places]

    for found in row["validation"]:
        want = formula_figures(setting, task, validation, math.log(found["gamma"]), spans(validation))
        assert (found["accuracy"], found["loss"]) == pytest.approx(want, abs=2e-4)
    untuned = formula_figures(setting, task, test, 0.0, spans(test))
    shared = formula_figures(setting, task, test, math.log(row["gamma"]), spans(test))
    assert row["accuracy_gain"] == pytest.approx(shared[0] - untuned[0], abs=1e-9)
    assert row["loss_gain"] == pytest.approx(untuned[1] - shared[1], abs=2e-4)
    slopes = np.zeros((LAYERS, HEADS))
    for place in np.ndindex(LAYERS, HEADS):
        losses = []
        for step in (-STEP, STEP):
            log_scale = np.zeros((LAYERS, HEADS))
            log_scale[place] = step
            losses.append(formula_figures(setting, task, validation, log_scale, spans(validation))[1])
        slopes[place] = (losses[1] - losses[0]) / (2 * STEP)
    assert row["slope_norm"] == pytest.approx(np.linalg.norm(slopes), rel=3e-3, abs=2e-5)
    by_head = formula_figures(setting, task, test, step_down(slopes), spans(test))
    assert row["by_head_loss_gain"] == pytest.approx(untuned[1] - by_head[1], abs=5e-4)


def test_layers_move_the_loss_as_the_formula_says(setting: Setting) -> None:
    rows = run_study("layers", setting).rows
    task = Task.load("sst2")
    test = setting.with_defaults(study("layers").numbers).tests("sst2", 0)
    initial = [(0, 1)] * len(test)

    def loss(layers: Sequence[int], gamma: float) -> float:
        log_scale = np.zeros((LAYERS, HEADS))
        log_scale[list(layers)] = math.log(gamma)
        return formula_figures(setting, task, test, log_scale, initial)[1]

    for gamma in (0.3, 3.0):
        (row,) = rows_of(rows, measure="layer", layer=0, gamma=gamma)
        assert row["loss"] == pytest.approx(loss([0], gamma), abs=2e-4)
    (row,) = rows_of(rows, measure="third", third="middle", gamma=2.0)
    assert row["loss"] == pytest.approx(loss([1], 2.0), abs=2e-4)  # of two layers none is deep
    (slopes,) = rows_of(rows, measure="slopes")
    for layer in range(LAYERS):
        want = (loss([layer], math.exp(STEP)) - loss([layer], math.exp(-STEP))) / (2 * STEP)
        assert slopes["slopes"][layer] == pytest.approx(want, rel=3e-3, abs=2e-5)


def test_groups_of_heads_get_the_gamma_of_their_direction(setting: Setting) -> None:
    rows = run_study("heads", setting).rows
    task = Task.load("sst2")
    validation = setting.with_defaults(study("heads").numbers).drawn("sst2", 0)
    initial = [(0, 1)] * len(validation)
    slopes = np.array(rows_of(rows, measure="slopes", wording=0)[0]["slopes"])
    log_scale = np.where(slopes < 0, math.log(2), -math.log(2))
    (row,) = rows_of(rows, group="up and down")
    measured = next(found for found in row["validation"] if found["gamma"] == 2.0)
    assert measured["loss"] == pytest.approx(
        formula_figures(setting, task, validation, log_scale, initial)[1], abs=2e-4
    )
    assert {row["key"]["wording"] for row in rows_of(rows, measure="slopes")} == {0, 1, 2}
    check = rows_of(rows, measure="check")[0]
    log_scale = np.zeros((LAYERS, HEADS))
    log_scale[check["key"]["layer"], check["key"]["head"]] = 0.5
    assert check["high"] == pytest.approx(formula_figures(setting, task, validation, log_scale, initial)[1], abs=2e-4)


# What is made of the figures.


def position_row(task: str, seed: int, position: str, gain: float) -> dict[str, Any]:
    key = {"task": task, "seed": seed, "position": position}
    gains = dict.fromkeys(("accuracy_gain", "loss_gain", "by_head_accuracy_gain", "by_head_loss_gain"), gain)
    return {"key": key, "slope_norm": 1.0, **gains}


def test_the_positions_table_says_where_the_initial_token_leads_and_where_not() -> None:
    rows = []
    for place, task in enumerate(("a", "b", "c")):
        for seed in range(3):
            base = 0.1 * place + 0.01 * seed
            rows.append(position_row(task, seed, "initial", base))
            rows.append(position_row(task, seed, "token 1", base - 0.1))
            rows.append(position_row(task, seed, "token 4", base + 0.1))
            rows.append(position_row(task, seed, "last", base + 0.1 * (seed - 1)))
    text = table(rows)
    assert "ahead of token 1; behind token 4; not told apart from last" in text
    assert "| token 1 | 9 | +1.0" in text  # mean of the base, 11 points, less 10
    assert "+10.0 [+10.0, +10.0]" in text
    one_draw = table([row for row in rows if row["key"]["seed"] == 0])
    assert "no finding" in one_draw
    assert "ahead" not in one_draw


def test_the_gamma_of_most_accuracy_is_chosen_and_of_equals_that_of_least_loss() -> None:
    curve = {g: {"accuracy": a, "loss": x} for g, a, x in ((1.0, 0.5, 0.6), (2.0, 0.7, 0.9), (0.5, 0.7, 0.8))}
    assert best_gamma(curve) == 0.5


def test_the_step_has_one_size_and_goes_down() -> None:
    slopes = np.array([[3.0, -4.0], [0.0, 0.0]])
    step = step_down(slopes)
    assert np.sqrt(np.mean(step**2)) == pytest.approx(0.3)
    np.testing.assert_allclose(step, step_down(1e-3 * slopes))
    assert step[0, 0] < 0 < step[0, 1]
    assert np.abs(step_down(np.eye(20))).max() == 1.0
    assert not step_down(np.zeros((2, 2))).any()


def test_thirds_heads_and_groups_are_what_their_names_say() -> None:
    assert [third_of(layer, 7) for layer in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert checked_heads((2, 3), 2) == [(0, 0), (1, 2)]
    assert len(checked_heads((2, 3), 99)) == 6
    slopes = np.array([[-1.0, 2.0, 0.0]])
    assert group_directions(slopes, "up").tolist() == [[1, 0, 0]]
    assert group_directions(slopes, "down").tolist() == [[0, 1, 0]]
    assert group_directions(slopes, "up and down").tolist() == [[1, -1, 0]]


def test_stability_compares_maps_that_differ_in_one_thing_only() -> None:
    def row(task: str, seed: int, wording: int, slopes: list[float]) -> dict[str, Any]:
        return {"key": {"measure": "slopes", "task": task, "seed": seed, "wording": wording}, "slopes": [slopes]}

    rows = [
        row("a", 0, 0, [1, 2, 3]),
        row("a", 1, 0, [1, 2, 4]),
        row("b", 0, 0, [-3, -2, -1]),
        row("a", 0, 1, [3, 2, -1]),
    ]
    assert pairs(rows, "seed") == [pytest.approx((1.0, 1.0))]
    assert pairs(rows, "task") == [pytest.approx((1.0, 0.0))]
    assert pairs(rows, "wording") == [pytest.approx((-1.0, 2 / 3))]
    assert agreement(np.array([[1.0, -1.0]]), np.array([[2.0, 3.0]]))[1] == 0.5


@pytest.mark.parametrize("name", ["sst2", "mr", "trec"])
def test_other_wordings_keep_the_labels_and_name_them_all(name: str) -> None:
    task = Task.load(name)
    others = other_wordings(task)
    assert len({task.prompt, *(other.prompt for other in others)}) == 3
    for other in others:
        assert other.labels == task.labels
        assert other.fields == task.fields
        assert all(label.strip().lower() in other.prompt.lower() for label in task.labels)


# Files.


@pytest.mark.parametrize("name", MINE)
def test_a_study_writes_rows_table_and_pictures_with_named_axes(name: str, setting: Setting, tmp_path: Path) -> None:
    result = run_study(name, setting, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in result.files}
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["rows"] == result.rows
    assert (tmp_path / f"{name}.md").read_text("utf-8") == result.table + "\n"
    assert result.figures
    for part, figure in result.figures.items():
        stem = f"{name}_{part}" if part else name
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{stem}.svg").read_text("utf-8")
        for axes in figure.axes:
            assert axes.get_ylabel()
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>"


class Stopping:
    """Setting.scores that is interrupted at one call."""

    def __init__(self, last: int) -> None:
        self.calls, self.last, self.inner = 0, last, Setting.scores

    def __get__(self, setting: Any, owner: Any) -> Any:
        def scores(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls > self.last:
                raise KeyboardInterrupt
            return self.inner(setting, *arguments)

        return scores


def without_seconds(path: Path) -> str:
    held = json.loads(path.read_text("utf-8"))
    for row in held["rows"]:
        del row["seconds"]
    return json.dumps(held)


@pytest.fixture(params=MINE)
def name(request: Any) -> str:
    return request.param


def test_an_interrupted_study_goes_on_to_the_same_bytes_and_measures_no_row_twice(
    name: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_study(name, setting, whole)
    with monkeypatch.context() as patched:
        # gamma makes one pass a row, the others a row of several.
        patched.setattr(Setting, "scores", Stopping(2 if name == "gamma" else 8))
        with pytest.raises(KeyboardInterrupt):
            run_study(name, setting, parts)
    begun = json.loads((parts / f"{name}.json").read_text("utf-8"))["rows"]
    assert begun
    run_study(name, setting, parts)
    finished = json.loads((parts / f"{name}.json").read_text("utf-8"))["rows"]
    assert finished[: len(begun)] == begun
    assert without_seconds(parts / f"{name}.json") == without_seconds(whole / f"{name}.json")
    for path in whole.iterdir():
        if path.suffix != ".json":
            assert (parts / path.name).read_bytes() == path.read_bytes(), path.name
    bytes_before = (parts / f"{name}.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Setting, "scores", Stopping(0))
        patched.setattr(Setting, "slopes", Stopping(0))
        run_study(name, setting, parts)
    assert (parts / f"{name}.json").read_bytes() == bytes_before


def test_rows_of_another_model_and_files_of_another_kind_are_refused_and_kept(setting: Setting, tmp_path: Path) -> None:
    run_study("gamma", setting, tmp_path)
    before = (tmp_path / "gamma.json").read_bytes()
    other = Setting(size="small", model="another", examples=4, limit=3, _loaded=setting.loaded())
    with pytest.raises(ZeroTuningError, match="holds rows of model 'demo', this is 'another'"):
        run_study("gamma", other, tmp_path)
    assert (tmp_path / "gamma.json").read_bytes() == before
    run_study("gamma", other, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "gamma.json").read_text("utf-8"))["model"] == "another"
    for text in ("", "[]", '{"rows": 1}', '{"rows": [1]}', '{"rows": [{"key": 1}]}'):
        (tmp_path / "gamma.json").write_text(text, "utf-8")
        with pytest.raises(ZeroTuningError, match="holds no study"):
            run_study("gamma", other, tmp_path)
        assert (tmp_path / "gamma.json").read_text("utf-8") == text


def test_rows_of_other_weights_under_the_same_name_are_refused(setting: Setting, tmp_path: Path) -> None:
    run_study("gamma", setting, tmp_path)
    path = tmp_path / "gamma.json"
    held = json.loads(path.read_text("utf-8"))
    held["rows"].pop()  # so that there is something to measure
    path.write_text(json.dumps(held), "utf-8")
    with torch.no_grad():
        setting.loaded()[0].lm_head.weight.neg_()
    with pytest.raises(ZeroTuningError, match=f"holds rows of weights '{held['weights']}', this is '.*': choose"):
        run_study("gamma", setting, tmp_path)
    assert json.loads(path.read_text("utf-8")) == held
    other = held.pop("weights")
    path.write_text(json.dumps(held), "utf-8")  # as an older version wrote it
    run_study("gamma", setting, tmp_path)
    assert json.loads(path.read_text("utf-8"))["weights"] != other


def test_rows_of_the_small_size_are_not_taken_for_those_of_the_full_one(setting: Setting) -> None:
    for name in ("positions", "heads"):
        keys = {}
        for size in ("small", "full"):
            sized = Setting(size=size, tasks=("sst2",), seeds=1, examples=4, limit=3, _loaded=setting.loaded())
            cells = study(name).cells(sized.with_defaults(study(name).numbers))
            keys[size] = {json.dumps(cell.key) for cell in cells if cell.key.get("measure") in (None, "group")}
        assert keys["small"].isdisjoint(keys["full"])


def test_rows_are_found_by_their_key_whatever_its_order(tmp_path: Path) -> None:
    header = {"study": "s", "model": "m", "dtype": None}
    file = RowsFile(tmp_path / "s.json", header)
    file.add({"key": {"a": 1, "b": 2.0}, "value": 3})
    again = RowsFile(tmp_path / "s.json", header)
    assert again.find({"b": 2.0, "a": 1}) == {"key": {"a": 1, "b": 2.0}, "value": 3}
    assert again.find({"a": 1, "b": 3.0}) is None
    assert RowsFile(None, header).find({"a": 1}) is None


def test_the_command_goes_through_a_saved_model(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--size", "small", "--examples", "4", "--limit", "2"]
    assert (
        main(["study", "positions", *options, "--task", "cb", "--seeds", "2", "--output", str(tmp_path / "out")]) == 0
    )
    out = capsys.readouterr().out
    assert "| initial | 2 |" in out
    assert "positions.svg" in out
    keys = [row["key"] for row in json.loads((tmp_path / "out" / "positions.json").read_text("utf-8"))["rows"]]
    assert {(key["task"], key["seed"], key["limit"]) for key in keys} == {("cb", 0, 2), ("cb", 1, 2)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["position", "--output", "{out}"], "positions"),
        (["gamma", "--task", "sst3", "--output", "{out}"], "unknown task 'sst3', did you mean 'sst5'?"),
        (["gamma", "--size", "medium", "--output", "{out}"], "medium"),
        (["gamma", "--seeds", "0", "--output", "{out}"], "seeds"),
        (["gamma", "--part", "shots", "--output", "{out}"], "part must be one of none"),
        (["gamma", "--model", "{out}/missing", "--output", "{out}"], "missing"),
        (["gamma"], "--output"),
    ],
)
def test_bad_input_of_the_command_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["study", *(one.format(out=out) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list(out.glob("*")) if out.exists() else True


def test_unknown_names_and_numbers_are_refused_with_what_is_known() -> None:
    with pytest.raises(
        ZeroTuningError, match=r"unknown study 'layer', did you mean 'layers'\? \(known studies: positions,"
    ):
        study("layer")
    with pytest.raises(ZeroTuningError, match="size must be one of small, full, got 'huge'"):
        Setting(size="huge")
    with pytest.raises(ZeroTuningError, match="limit must be a positive integer, got True"):
        Setting(limit=True)
    assert set(MINE) <= set(STUDIES)
