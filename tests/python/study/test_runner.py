"""Runs of studies: files that resume, rows of another model, the command, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zerotuning.cli.main import main
from zerotuning.errors import ZeroTuningError
from zerotuning.study import Setting, run_study
from zerotuning.study.names import STUDIES
from zerotuning.study.runner import study

MINE = ("positions", "layers", "heads", "gamma")


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


def test_an_interrupted_study_resumes_to_the_same_bytes_and_measures_no_row_twice(
    name: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_study(name, setting, whole)
    with monkeypatch.context() as patched:
        # The study gamma makes one pass per row, the other studies several passes per row.
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
    with pytest.raises(ZeroTuningError, match="holds rows of model 'demo', expected 'another'"):
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
    held["rows"].pop()  # so that the second run has a row to measure
    path.write_text(json.dumps(held), "utf-8")
    with torch.no_grad():
        setting.loaded()[0].lm_head.weight.neg_()
    with pytest.raises(ZeroTuningError, match=f"holds rows of weights '{held['weights']}', expected '.*': choose"):
        run_study("gamma", setting, tmp_path)
    assert json.loads(path.read_text("utf-8")) == held
    other = held.pop("weights")
    path.write_text(json.dumps(held), "utf-8")  # as an older version wrote it
    run_study("gamma", setting, tmp_path)
    assert json.loads(path.read_text("utf-8"))["weights"] != other


def test_rows_of_the_small_and_the_full_size_have_different_keys(setting: Setting) -> None:
    for name in ("positions", "heads"):
        keys = {}
        for size in ("small", "full"):
            sized = Setting(size=size, tasks=("sst2",), num_draws=1, examples=4, limit=3, _loaded=setting.loaded())
            cells = study(name).cells(sized.with_defaults(study(name).numbers))
            keys[size] = {json.dumps(cell.key) for cell in cells if cell.key.get("measure") in (None, "group")}
        assert keys["small"].isdisjoint(keys["full"])


def test_the_study_command_runs_on_a_saved_model(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--size", "small", "--examples", "4", "--limit", "2"]
    assert (
        main(["study", "positions", *options, "--task", "cb", "--num-draws", "2", "--output", str(tmp_path / "out")])
        == 0
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
        (["gamma", "--num-draws", "0", "--output", "{out}"], "--num-draws"),
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


def test_unknown_names_and_numbers_are_refused_with_the_accepted_ones() -> None:
    with pytest.raises(
        ZeroTuningError, match=r"unknown study 'layer', did you mean 'layers'\? \(known studies: positions,"
    ):
        study("layer")
    with pytest.raises(ZeroTuningError, match="size must be one of small, full, got 'huge'"):
        Setting(size="huge")
    with pytest.raises(ZeroTuningError, match="limit must be a positive integer, got True"):
        Setting(limit=True)
    assert set(MINE) <= set(STUDIES)
