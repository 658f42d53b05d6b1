"""Two processes that share one model by transformers' tensor parallelism, against one process with the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parallel_figures
import pytest
import torch
import zerotuning as zt
from several_processes import torchrun
from transformers import GPT2Config, LlamaConfig
from zerotuning import ops
from zerotuning.errors import ZeroTuningError
from zerotuning.models import tensor_parallel
from zerotuning.patching.head_scales import HeadScales

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gpt_neox": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "phi3": {},
}
WHOLE = {"phi3"}  # transformers gathers Phi-3's queries: every process computes all heads
TASK = f"name: films\nprompt: {json.dumps(parallel_figures.PROMPT)}\nlabels: {json.dumps(parallel_figures.LABELS)}\n"
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not ops.runs_on("cuda"), reason="needs two GPUs and a CUDA build"
)


def save_models(place: Path, tokenizer: Any) -> list[Path]:
    return [
        parallel_figures.save_random_model(place / kind, kind, tokenizer, **changes) for kind, changes in MODELS.items()
    ]


def check_against_one_process(folder: Path, device: str, tolerance: float) -> None:
    model, tokenizer = zt.load_model(folder, dtype=torch.float32, device=device)
    alone, evaluated = parallel_figures.figures(model), parallel_figures.evaluations(model, tokenizer)
    assert len(set(alone["gradient"].flatten().tolist())) == alone["gradient"].numel()
    for rank in (0, 1):
        together = torch.load(folder / f"process-{rank}.pt")
        for name, wanted in alone.items():
            torch.testing.assert_close(together["figures"][name], wanted, atol=tolerance, rtol=tolerance)
        for name, figures in evaluated.items():
            assert together["evaluations"][name] == pytest.approx(figures, abs=tolerance), name


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder of models; each model's folder has the figures of two processes."""
    place = tmp_path_factory.mktemp("models")
    together = torchrun(place, parallel_figures.__file__, *save_models(place, tiny_tokenizer))
    assert together.returncode == 0, together.stderr
    return place


@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_give_the_logits_gradients_texts_and_accuracy_of_one(measured: Path, kind: str) -> None:
    check_against_one_process(measured / kind, "cpu", 1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_each_process_computes_its_own_half_of_the_heads(measured: Path, kind: str) -> None:
    for rank in (0, 1):
        found = torch.load(measured / kind / f"process-{rank}.pt")
        assert (found["own_heads"], found["backend"]) == (4 if kind in WHOLE else 2, "gloo")


# The command line.


@pytest.fixture
def place(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in parallel_figures.RECORDS)
    (tmp_path / "data.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def command(name: str, output: str, *more: str) -> list[str]:
    where = ("--model", "model", "--task", "task.yaml", "--data", "data.jsonl", "--dtype", "float32")
    return [name, *where, "--output", output, *more]


def check_calibration(place: Path, device: str, tolerance: float, *more: str) -> None:
    """Compare `calibrate` in two processes, with the options `more`, with one process; GPUs are hidden for a CPU."""
    gpus, options = device != "cpu", ("--steps", "10")
    together = torchrun(place, "-m", "zerotuning", *command("calibrate", "two", *options, *more), gpus=gpus)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("held-out examples") == 1
    model, tokenizer = zt.load_model(place / "model", dtype="float32", device=device)
    alone = zt.calibrate(model, tokenizer, str(place / "task.yaml"), records=place / "data.jsonl", steps=10)
    two = HeadScales.from_pretrained(place / "two")
    assert alone.improved
    torch.testing.assert_close(two.gamma, alone.scales.gamma, atol=tolerance, rtol=0)


def test_calibrate_finds_the_scales_of_one_process(place: Path) -> None:
    check_calibration(place, "cpu", 1e-4, "--tensor-parallel")


def test_evaluate_writes_the_figures_of_one_process_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    HeadScales(torch.rand(2, 4) + 0.5).save_pretrained(place / "scales")
    arguments = command("evaluate", "two.json", "--scales", "scales", "--tensor-parallel")
    together = torchrun(place, "-m", "zerotuning", *arguments)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("16 examples") == 1
    model, tokenizer = zt.load_model(place / "model", dtype="float32", device="cpu")
    zt.apply_scales(model, HeadScales.from_pretrained(place / "scales"))
    alone = zt.evaluate(model, tokenizer, str(place / "task.yaml"), place / "data.jsonl")
    found = json.loads((place / "two.json").read_text("utf-8"))
    for name in ("accuracy", "loss", "entropy"):
        assert found[name] == pytest.approx(getattr(alone, name), abs=1e-5)


# Refusals.


def test_tensor_parallelism_in_a_single_process_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ZeroTuningError, match=r"this process is alone: start it with torchrun"):
        zt.load_model(place / "model", tensor_parallel=True)


def test_a_device_map_beside_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ZeroTuningError, match=r"^device_map and tensor_parallel each place the model"):
        zt.load_model("demo", device_map="auto", tensor_parallel=True)


@pytest.mark.model
def test_heads_that_the_processes_do_not_divide_are_an_error_of_the_command_line(place: Path) -> None:
    arguments = ["evaluate", "--model", "demo", "--task", "sst2", "--limit", "4", "--tensor-parallel"]
    together = torchrun(place, "-m", "zerotuning", *arguments)
    assert together.returncode != 0
    wanted = (
        "error: tensor_parallel: the number of processes must divide the 9 heads and 3 key/value heads of model demo"
    )
    assert f"{wanted}, got 2\n" in together.stderr


def test_a_model_without_a_plan_or_with_heads_that_cannot_be_shared_is_named() -> None:
    with pytest.raises(ZeroTuningError, match=r"no tensor-parallel plan for model m \(gpt2\)$"):
        tensor_parallel.check_plan("m", GPT2Config(), 2)
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2)
    tensor_parallel.check_plan("m", config, 2)
    with pytest.raises(ZeroTuningError, match=r"divide the 8 heads and 2 key/value heads of model m, got 4$"):
        tensor_parallel.check_plan("m", config, 4)


# Two GPUs.


@pytest.mark.gpu
@two_gpus
def test_two_gpus_give_the_logits_gradients_texts_and_accuracy_of_one(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folders = save_models(tmp_path, tiny_tokenizer)
    together = torchrun(tmp_path, parallel_figures.__file__, *folders, gpus=True)
    assert together.returncode == 0, together.stderr
    for folder in folders:
        assert torch.load(folder / "process-1.pt")["backend"] == "nccl"
        check_against_one_process(folder, "cuda:0", 1e-4)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("more", [[], ["--tensor-parallel"]], ids=["examples", "model"])
def test_two_gpus_that_share_examples_or_a_model_find_the_scales_of_one(place: Path, more: list[str]) -> None:
    check_calibration(place, "cuda:0", 1e-3, *more)
