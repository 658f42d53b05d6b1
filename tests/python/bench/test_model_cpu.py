"""The CPU benchmark of a model: its peers score alike."""

from __future__ import annotations

import torch
from zerotuning.bench import model_cpu
from zerotuning.bench.rows import GRADIENT, OURS, UNTUNED


def test_the_peers_of_a_calibration_give_equal_scores_with_and_without_shots(
    tiny_model, tiny_tokenizer, monkeypatch
) -> None:
    tiny_model.config.max_position_embeddings = 4096
    monkeypatch.setattr(model_cpu, "load_model", lambda name: (tiny_model, tiny_tokenizer))
    found = []
    monkeypatch.setattr(model_cpu, "take_turns", lambda peers, _: found.append({n: p() for n, p in peers.items()}))
    plain, behind_shots = model_cpu.calibration_rows()
    assert int(behind_shots["shape"].split()[2]) > 2 * int(plain["shape"].split()[2])
    for results in found:
        torch.testing.assert_close(results[OURS], results[UNTUNED], rtol=1e-4, atol=1e-5)
        assert len(results[GRADIENT]) == 2
    once = {
        name.removesuffix(", shots read once"): result for name, result in found[1].items() if name.endswith("once")
    }
    torch.testing.assert_close(once[OURS], found[1][OURS], rtol=1e-4, atol=1e-5)
    for read_once, read_whole in zip(once[GRADIENT], found[1][GRADIENT], strict=True):
        torch.testing.assert_close(read_once, read_whole, rtol=1e-3, atol=1e-9)
