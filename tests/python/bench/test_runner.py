"""The benchmark's peers compute the same function, and its tables hold what they say. No time is asserted."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from zerotuning.attention import reference
from zerotuning.bench import attention_cpu, model_cpu, peers, runner, timing
from zerotuning.bench.generation_steps import steps_by_turns
from zerotuning.bench.rows import OURS, UNTUNED
from zerotuning.errors import ZeroTuningError


@pytest.mark.parametrize("peer", [peers.ours, peers.paper_eager, peers.additive_mask])
def test_every_tuned_peer_computes_the_formula(peer) -> None:
    torch.manual_seed(0)
    inputs = peers.attention_inputs((4, 2, 32), 40, torch.float32)
    want, _ = reference.attention(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(peer(*inputs).double(), want, rtol=1e-5, atol=1e-5)


def test_the_untuned_peer_is_the_formula_at_gamma_1() -> None:
    inputs = peers.attention_inputs((4, 2, 32), 40, torch.float32)
    inputs[3] = torch.zeros(4)
    torch.testing.assert_close(peers.untuned_sdpa(*inputs), peers.ours(*inputs), rtol=1e-5, atol=1e-5)


def test_ratios_are_to_the_first_peer_and_every_peer_is_called_in_turn() -> None:
    calls: list[str] = []
    figures = timing.take_turns({name: (lambda name=name: calls.append(name)) for name in "ab"}, seconds=0.0)
    assert calls == ["a", "a", "b", "b"] * 5  # one call to warm up, one that counts
    assert figures["a"]["ratio"] == 1.0
    assert figures["b"]["ms"] > 0


def test_a_calibration_s_peers_score_alike_with_and_without_shots(tiny_model, tiny_tokenizer, monkeypatch) -> None:
    tiny_model.config.max_position_embeddings = 4096
    monkeypatch.setattr(model_cpu, "load_model", lambda name: (tiny_model, tiny_tokenizer))
    found = []
    monkeypatch.setattr(model_cpu, "take_turns", lambda peers, _: found.append({n: p() for n, p in peers.items()}))
    plain, behind_shots = model_cpu.calibration_rows()
    assert int(behind_shots["shape"].split()[2]) > 2 * int(plain["shape"].split()[2])
    for results in found:
        torch.testing.assert_close(results[OURS], results[UNTUNED], rtol=1e-4, atol=1e-5)
        assert len(results[model_cpu.GRADIENT]) == 2
    once = {
        name.removesuffix(", shots read once"): result for name, result in found[1].items() if name.endswith("once")
    }
    torch.testing.assert_close(once[OURS], found[1][OURS], rtol=1e-4, atol=1e-5)
    for read_once, read_whole in zip(once[model_cpu.GRADIENT], found[1][model_cpu.GRADIENT], strict=True):
        torch.testing.assert_close(read_once, read_whole, rtol=1e-3, atol=1e-9)


def test_models_that_generate_by_turns_take_every_step_one_at_a_time(tiny_model) -> None:
    models, calls = {"a": tiny_model, "b": copy.deepcopy(tiny_model)}, []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(f"{name} begins"))
        model.register_forward_hook(lambda *_, name=name: calls.append(f"{name} ends"))
    steps = steps_by_turns(models, torch.ones(2, 5, dtype=torch.long), new=4, runs=2)
    assert calls == ["a begins", "a ends", "b begins", "b ends"] * 8
    assert {name: [len(run) for run in runs] for name, runs in steps.items()} == {"a": [3, 3], "b": [3, 3]}
    assert all(second > 0 for runs in steps.values() for run in runs for second in run)


def test_a_model_that_fails_leaves_the_turns_to_the_other_and_its_error_is_raised(tiny_model) -> None:
    class Broken:
        def generate(self, **_) -> None:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        steps_by_turns({"a": Broken(), "b": tiny_model}, torch.ones(1, 5, dtype=torch.long), new=3, runs=1)


def test_a_benchmark_writes_its_rows_and_machine_as_json(tmp_path, monkeypatch, capsys) -> None:
    small = [{"what": "forward", "shape": "1", "dtype": "float32", "peers": {OURS: {"ms": 1.0, "ratio": 1.0}}}]
    monkeypatch.setattr(attention_cpu, "attention_rows", lambda: small)
    runner.run_bench("attention", tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rows"] == small
    assert written["machine"]["torch"] == torch.__version__
    assert "1.00x" in capsys.readouterr().out


def test_attention_rows_cover_both_passes_and_memory_grows_linearly() -> None:
    rows = list(attention_cpu.attention_rows([(2, 1, 16)], [32], seconds=0.0, flex=False))
    passes = {(row["what"], row["dtype"]) for row in rows}
    assert {("forward", "bfloat16"), ("forward + backward", "float32")} <= passes
    per_token = [row["peers"][OURS]["KiB per token"] for row in rows if row["what"] == "memory"]
    assert max(per_token) < 1.2 * min(per_token)


def test_figures_as_csv_and_as_a_picture(tmp_path, monkeypatch) -> None:
    peers = {"base": {"ms": 2.0, "ratio": 1.0}, OURS: {"ms": 3.0, "ratio": 1.5}, "broken": {"error": "why"}}
    rows = [{"what": "forward", "shape": "1 x 2", "dtype": "bfloat16", "peers": peers}]
    monkeypatch.setattr(attention_cpu, "decode_rows", lambda: rows)
    runner.run_bench("decode", tmp_path / "figures.csv", "cpu", tmp_path / "ratios.png")
    lines = (tmp_path / "figures.csv").read_text().splitlines()
    assert lines[0] == "what,shape,dtype,peer,unit,value"
    assert "forward,1 x 2,bfloat16,zerotuning,ratio,1.5" in lines
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_suffixes_and_a_missing_gpu_are_named(tmp_path) -> None:
    with pytest.raises(ZeroTuningError, match=r"output must end in \.json or \.csv"):
        runner.run_bench("decode", tmp_path / "figures.txt", "cpu")
    with pytest.raises(ZeroTuningError, match=r"plot must end in \.png or \.svg"):
        runner.run_bench("decode", None, "cpu", tmp_path / "figures.pdf")
    if not torch.cuda.is_available():
        with pytest.raises(ZeroTuningError, match="device cuda"):
            runner.run_bench("decode", None, "cuda")
