"""lm-evaluation-harness: its command line and Python interface against log-probabilities by plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import zerotuning as zt
from zerotuning.cli.main import main
from zerotuning.errors import ZeroTuningError
from zerotuning.patching.head_scales import HeadScales

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model, model_registry  # noqa: E402
from zerotuning.lm_evaluation import ZeroTuningLM  # noqa: E402

CHOICES = ("negative", "positive and well told")
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": index % 2}
    for index, (first, second) in enumerate(
        (first, second) for first in ("good", "bad", "far too long") for second in ("told", "long and well told")
    )
]
GAMMA = [[20.0, 0.05, 10.0, 0.1], [0.1, 30.0, 5.0, 0.02]]
TASK = """\
task: films
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Review: {{{{text}}}}\\nSentiment:"
doc_to_choice: [{choices}]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The current folder, with model/, scales/ and tasks/films.yaml over tasks/data.jsonl."""
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    HeadScales(GAMMA).save_pretrained(tmp_path / "scales")
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks" / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    (tmp_path / "tasks" / "films.yaml").write_text(TASK.format(data=data, choices=", ".join(CHOICES)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def tuned_by_formula(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of one unpadded sequence, attention weights scaled and renormalised in eager attention."""
    model.set_attn_implementation("eager")
    hooks = []
    softmax = torch.nn.functional.softmax

    def scaled(weights: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        layer = len(hooks) % len(GAMMA)
        hooks.append(layer)
        after = softmax(weights, *arguments, **named)
        factor = torch.ones(weights.shape[1], weights.shape[-1], dtype=after.dtype)
        factor[:, 0] = torch.tensor(GAMMA[layer])
        after = after * factor[None, :, None, :]
        return after / after.sum(dim=-1, keepdim=True)

    torch.nn.functional.softmax = scaled  # type: ignore[assignment]
    try:
        return model(torch.tensor([tokens])).logits[0]
    finally:
        torch.nn.functional.softmax = softmax
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def written_out(model: Any, tokenizer: Any, context: str, continuation: str, tuned: bool) -> float:
    prompt, whole = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    logits = tuned_by_formula(model, whole) if tuned else model(torch.tensor([whole])).logits[0]
    logs = torch.log_softmax(logits, dim=-1)
    return sum(float(logs[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))


def expected(model: Any, tokenizer: Any, tuned: bool) -> list[list[float]]:
    """log P of every choice of every record."""
    return [
        [written_out(model, tokenizer, f"Review: {r['text']}\nSentiment:", f" {c}", tuned) for c in CHOICES]
        for r in RECORDS
    ]


def accuracy(scores: list[list[float]]) -> float:
    right = [row.index(max(row)) == record["label"] for row, record in zip(scores, RECORDS, strict=True)]
    return sum(right) / len(right)


def samples(folder: Path) -> list[list[float]]:
    """log P of every choice as lm-eval wrote them."""
    (path,) = folder.rglob("samples_films_*.jsonl")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [[float(pair[0][0]) for pair in line["resps"]] for line in sorted(found, key=lambda line: line["doc_id"])]


def result(folder: Path) -> float:
    (path,) = folder.rglob("results_*.json")
    value: float = json.loads(path.read_text(encoding="utf-8"))["results"]["films"]["acc,none"]
    return value


RUN = ["run", "--model", "zerotuning", "--batch_size", "4", "--log_samples", "--output_path", "out"]


@pytest.mark.parametrize("tuned", [False, True])
def test_lm_evals_command_line_gives_the_written_out_scores_and_accuracy(
    place: Path, tiny_model: Any, tiny_tokenizer: Any, tuned: bool
) -> None:
    model_args = "pretrained=model,dtype=float32" + (",scales=scales" if tuned else "")
    command = [sys.executable, "-m", "zerotuning", "lm-eval", *RUN, "--model_args", model_args]
    command += ["--tasks", "films", "--include_path", "tasks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    scores = expected(tiny_model, tiny_tokenizer, tuned)
    assert samples(place / "out") == [pytest.approx(row, abs=1e-4) for row in scores]
    assert result(place / "out") == pytest.approx(accuracy(scores))
    assert abs(scores[0][1] - expected(tiny_model, tiny_tokenizer, not tuned)[0][1]) > 0.01


def test_plain_lm_eval_finds_the_model_through_the_tasks_yaml(
    place: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    task = place / "tasks" / "films.yaml"
    line = "metadata: {model: !function zerotuning.lm_evaluation.ZeroTuningLM}\n"
    task.write_text(task.read_text(encoding="utf-8") + line, encoding="utf-8")
    arguments = [*RUN, "--model_args", "pretrained=model,dtype=float32,scales=scales", "--tasks", str(task)]
    command = [sys.executable, "-m", "lm_eval", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert samples(place / "out") == [
        pytest.approx(row, abs=1e-4) for row in expected(tiny_model, tiny_tokenizer, True)
    ]


def test_simple_evaluate_takes_names_and_models_that_are_patched_already(
    place: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    from lm_eval.tasks import TaskManager

    scores = expected(tiny_model, tiny_tokenizer, True)
    by_name = ZeroTuningLM("model", scales="scales", dtype="float32", device="cpu", batch_size=16)
    zt.apply_scales(tiny_model, HeadScales(GAMMA))
    by_object = ZeroTuningLM(tiny_model, tokenizer=tiny_tokenizer, batch_size=3)
    mapped = ZeroTuningLM("model", scales="scales", dtype="float32", device="cuda:0", device_map="cpu", batch_size=16)
    for model in (by_name, by_object, mapped):
        found = lm_eval.simple_evaluate(
            model=model, tasks=["films"], task_manager=TaskManager(include_path="tasks"), bootstrap_iters=0
        )
        assert found["results"]["films"]["acc,none"] == pytest.approx(accuracy(scores))
        logs = [[float(pair[0][0]) for pair in sample["resps"]] for sample in found["samples"]["films"]]
        assert logs == [pytest.approx(row, abs=1e-4) for row in scores]


def test_a_model_that_is_loaded_already_is_not_placed_or_converted(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ZeroTuningError, match="a model that is loaded already accepts no device_map, got auto"):
        ZeroTuningLM(tiny_model, tokenizer=tiny_tokenizer, device_map="auto")
    with pytest.raises(ZeroTuningError, match="a model that is loaded already accepts no dtype, got float32"):
        ZeroTuningLM(tiny_model, tokenizer=tiny_tokenizer, dtype="float32")


def test_a_patched_model_keeps_its_scales_and_given_scales_replace_them(tiny_model: Any, tiny_tokenizer: Any) -> None:
    zt.apply_scales(tiny_model, HeadScales(GAMMA))
    ZeroTuningLM(tiny_model, tokenizer=tiny_tokenizer)
    assert zt.patch(tiny_model) is tiny_model
    layer = tiny_model.model.layers[0].self_attn.zerotuning
    assert layer.log_scale[0].exp().tolist() == pytest.approx(GAMMA[0], rel=1e-5)
    ZeroTuningLM(tiny_model, HeadScales.ones(2, 4), tokenizer=tiny_tokenizer)
    assert layer.log_scale.abs().max() == 0


@torch.no_grad()
def test_generation_in_left_padded_batches_equals_generation_alone(place: Path, tiny_tokenizer: Any) -> None:
    model = ZeroTuningLM("model", scales="scales", dtype="float32", device="cpu", batch_size=3)
    contexts = ["Review: the film", "Review: the film is a good story, well told. Sentiment:", "the"]
    settings = {"until": ["@@"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, settings), index) for index, context in enumerate(contexts)]
    found = model.generate_until(requests, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = tiny_tokenizer(context, return_tensors="pt")["input_ids"]
        for _ in range(12):  # one token after the other, without padding and without a cache
            ids = torch.cat((ids, model.model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
            if ids[0, -1] == model.model.generation_config.eos_token_id:
                break
        alone = ids[0, len(tiny_tokenizer(context)["input_ids"]) :]
        assert text == tiny_tokenizer.decode(alone, skip_special_tokens=True)


def test_the_entry_point_is_one_that_lm_evals_registry_loads() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."lm_eval.models"]\n', 1)[1].splitlines()[0]
    name, value = (part.strip(' "') for part in section.split("="))
    assert (name, value) == ("zerotuning", "zerotuning.lm_evaluation:ZeroTuningLM")
    model_registry.register("by-entry-point", target=EntryPoint(name, value, "lm_eval.models"))
    assert get_model("by-entry-point") is ZeroTuningLM


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("scales=nowhere", "scales folder nowhere does not exist"),
        ("scales=small", "scales small do not fit model model: scales are for 1 layers x 4 heads, the model has 2 x 4"),
        ("scales=model", "model/head_scales.safetensors is missing"),
        ("peft=adapter", "unknown model argument peft"),
        ("pretrained=nowhere/at/all", "model folder nowhere/at/all does not exist"),
    ],
)
def test_a_bad_model_argument_ends_with_one_line(place: Path, capsys: Any, more: str, said: str) -> None:
    HeadScales([[2.0] * 4]).save_pretrained("small")
    command = ["lm-eval", "run", "--model", "zerotuning", "--model_args", f"pretrained=model,dtype=float32,{more}"]
    assert main([*command, "--tasks", "films", "--include_path", "tasks"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zerotuning: error: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_an_unknown_task_ends_with_one_line_and_help_is_lm_evals(place: Path, capsys: Any) -> None:
    assert main(["lm-eval", "run", "--model", "zerotuning", "--tasks", "no_such_task"]) == 2
    assert "zerotuning: error: lm-eval: Tasks not found: no_such_task" in capsys.readouterr().err
    assert main(["lm-eval", "--help"]) == 0
    assert "Language Model Evaluation Harness" in capsys.readouterr().out
