"""`zerotuning bench`: files, pictures and wrong arguments. No time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from zerotuning.bench import attention_cpu, runner
from zerotuning.bench.rows import OURS
from zerotuning.errors import ZeroTuningError


def test_a_benchmark_writes_its_rows_and_machine_as_json(tmp_path, monkeypatch, capsys) -> None:
    small = [{"what": "forward", "shape": "1", "dtype": "float32", "peers": {OURS: {"ms": 1.0, "ratio": 1.0}}}]
    monkeypatch.setattr(attention_cpu, "attention_rows", lambda: small)
    runner.run_bench("attention", tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rows"] == small
    assert written["machine"]["torch"] == torch.__version__
    assert "1.00x" in capsys.readouterr().out


def test_figures_are_written_as_csv_and_as_a_picture(tmp_path, monkeypatch) -> None:
    peers = {"base": {"ms": 2.0, "ratio": 1.0}, OURS: {"ms": 3.0, "ratio": 1.5}, "broken": {"error": "why"}}
    rows = [{"what": "forward", "shape": "1 x 2", "dtype": "bfloat16", "peers": peers}]
    monkeypatch.setattr(attention_cpu, "decode_rows", lambda: rows)
    runner.run_bench("decode", tmp_path / "figures.csv", "cpu", tmp_path / "ratios.png")
    lines = (tmp_path / "figures.csv").read_text().splitlines()
    assert lines[0] == "what,shape,dtype,peer,unit,value"
    assert "forward,1 x 2,bfloat16,zerotuning,ratio,1.5" in lines
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_kinds_and_suffixes_and_a_missing_gpu_are_named(tmp_path) -> None:
    with pytest.raises(ZeroTuningError, match=r"kind must be one of attention, .*, got 'speed'"):
        runner.run_bench("speed")
    with pytest.raises(ZeroTuningError, match=r"output must end in \.json or \.csv"):
        runner.run_bench("decode", tmp_path / "figures.txt", "cpu")
    with pytest.raises(ZeroTuningError, match=r"plot must end in \.png or \.svg"):
        runner.run_bench("decode", None, "cpu", tmp_path / "figures.pdf")
    if not torch.cuda.is_available():
        with pytest.raises(ZeroTuningError, match="device cuda"):
            runner.run_bench("decode", None, "cuda")
