"""MT-Bench's proxy against one forward pass a token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from mt_bench_commands import chat, proxy, write_answers
from zerotuning.cli.main import main
from zerotuning.errors import ZeroTuningError
from zerotuning.mt_bench.questions import load_questions


def by_hand(model: Any, tokenizer: Any, prompt: str, text: str) -> tuple[float, float]:
    """Mean log-probability and entropy, one forward pass a token."""
    ids = tokenizer(prompt)["input_ids"]
    logs, entropies = [], []
    for token in tokenizer(text)["input_ids"]:
        shares = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1).tolist()
        logs.append(math.log(shares[token]))
        entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
        ids.append(token)
    return fmean(logs), fmean(entropies)


@torch.no_grad()
def test_the_proxy_is_labelled_a_proxy_and_equals_one_forward_pass_per_token(
    place: Path, long_model: Any, tiny_tokenizer: Any, capsys: Any
) -> None:
    write_answers()
    assert main(proxy("--output", "proxy.json")) == 0
    assert capsys.readouterr().out.startswith("Proxy: ")
    found = json.loads(Path("proxy.json").read_text(encoding="utf-8"))
    assert "a proxy, no judgment of quality" in found["proxy"]
    figures = {}
    for number in (81, 111):
        one, two = load_questions()[number - 81].turns
        first, second = f"first {{answer}} {number}", f"second {number}"
        figures[number, 1] = by_hand(long_model, tiny_tokenizer, chat(one), first)
        figures[number, 2] = by_hand(long_model, tiny_tokenizer, chat(one, first, two), second)
    for index, name in enumerate(("log_likelihood", "entropy")):
        mean = {place: pair[index] for place, pair in figures.items()}
        assert found["mean"][name] == pytest.approx(fmean(mean.values()), abs=1e-4)
        assert found["turns"]["2"][name] == pytest.approx(fmean((mean[81, 2], mean[111, 2])), abs=1e-4)
        assert found["categories"]["math"][name] == pytest.approx(fmean((mean[111, 1], mean[111, 2])), abs=1e-4)
    assert (found["answers"], found["empty"], found["cut"]) == (4, 0, 0)


def test_the_proxy_is_printed_even_if_its_file_cannot_be_written(place: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise ZeroTuningError("cannot write proxy.json: No space left on device")

    write_answers(ids=(81,))
    monkeypatch.setattr("zerotuning.files.write_json_atomically", full)
    assert main(proxy("--output", "proxy.json")) == 2
    assert capsys.readouterr().out.startswith("Proxy: ")


def test_the_proxy_under_scales_differs_and_empty_answers_are_counted(place: Path) -> None:
    write_answers(ids=(81,))
    record = {"question_id": 82, "model_id": "someone", "choices": [{"turns": ["", "words"]}]}
    with open("answers.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    assert main(proxy("--output", "untuned.json")) == 0
    assert main(proxy("--scales", "scales", "--output", "tuned.json")) == 0
    untuned, tuned = (json.loads(Path(f"{name}.json").read_text(encoding="utf-8")) for name in ("untuned", "tuned"))
    assert (untuned["answers"], untuned["empty"]) == (3, 1)
    assert abs(untuned["mean"]["log_likelihood"] - tuned["mean"]["log_likelihood"]) > 1e-3
