"""`evaluate` and `calibrate` from the command line on checkpoints of several architectures, and on a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from random_models import DEEPSEEK, random_model
from zerotuning.cli.main import main
from zerotuning.models.demo_model import demo_model_path
from zerotuning.patching.head_scales import HeadScales

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {"head_dim": 32, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": DEEPSEEK,
}
TASK = 'name: films\nprompt: "Review: {text}\\nSentiment:"\nlabels: [" negative", " positive"]\n'
# All examples have one label: a change that helps one example helps the others, so that calibration lowers the loss.
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": 1}
    for first in ("good", "bad", "far too long")
    for second in ("told", "long", "well told", "a story")
]


def evaluated(*arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--output", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text("utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_checkpoint_is_evaluated_calibrated_and_evaluated_again(
    family: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model = random_model(family, vocab_size=len(tiny_tokenizer), **{**SMALL, **FAMILIES[family]})
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    Path("task.yaml").write_text(TASK, encoding="utf-8")
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    common = ["--model", "model", "--task", "task.yaml", "--data", "data.jsonl", "--dtype", "float32"]
    untuned = evaluated(*common)
    assert main(["calibrate", *common, "--steps", "6", "--folds", "1", "--output", "scales"]) == 0
    report = json.loads(Path("scales/report.json").read_text("utf-8"))
    losses = [entry["fit_loss"] for entry in report["history"] if entry.get("fit_loss") is not None]
    assert losses[-1] < losses[0]
    # Random routers make DeepSeek's loss jump, so that the few held-out examples need not get better.
    assert report["improved"] or family == "deepseek_v3"
    assert HeadScales.from_pretrained(Path("scales")).gamma.shape == (2, 4)
    tuned = evaluated(*common, "--scales", "scales")
    assert tuned["examples"] == untuned["examples"] == 12
    if report["improved"]:
        assert tuned["loss"] < untuned["loss"]
    else:
        assert tuned["loss"] == pytest.approx(untuned["loss"], abs=1e-5)


@pytest.mark.model
def test_a_gguf_file_is_evaluated_and_calibrated(tmp_path: Path, monkeypatch: Any) -> None:
    path = str(demo_model_path())
    monkeypatch.chdir(tmp_path)
    common = ["--model", path, "--task", "sst2"]
    assert evaluated(*common, "--limit", "8", "--shots", "2", "--chat")["chat"] is True
    assert main(["calibrate", *common, "--examples", "8", "--steps", "1", "--folds", "1", "--output", "scales"]) == 0
    assert HeadScales.from_pretrained(Path("scales")).gamma.shape == (30, 9)
    assert evaluated(*common, "--limit", "8", "--scales", "scales")["examples"] == 8
