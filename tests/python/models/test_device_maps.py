"""Models with layers on several devices, or offloaded to CPU and disk, against the same model on one device."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import parallel_figures
import pytest
import torch
import zerotuning as zt
from refusals import one_line_error
from zerotuning import ops
from zerotuning.cli.main import main
from zerotuning.evaluation.cuda_graphs import supports_recording
from zerotuning.models.device_maps import input_device, is_offloaded
from zerotuning.patching.layer_scales import LayerScales

TASK = parallel_figures.TASKS["one token"]
LAYERS = [f"model.layers.{index}" for index in range(3)]
AROUND = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
ON_CPU = dict.fromkeys([*LAYERS, *AROUND], "cpu")
MAPS: dict[str, Any] = {
    "worked out": "auto",
    "one device": {"": "cpu"},
    "one layer waits on the disk": ON_CPU | {LAYERS[1]: "disk"},
    "all but the norm waits on the disk": dict.fromkeys(ON_CPU, "disk") | {"model.norm": "cpu"},
}
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not ops.runs_on("cuda"), reason="needs two GPUs and a CUDA build"
)


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return parallel_figures.save_random_model(tmp_path / "model", "llama", tiny_tokenizer)


def check_figures(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=tolerance, rtol=tolerance, msg=name)


def calibrated(model: Any, tokenizer: Any) -> Any:
    return zt.calibrate(model, tokenizer, TASK, records=parallel_figures.RECORDS, steps=6, folds=1)


# Without a GPU.


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("accelerate's automatic map would use the GPUs")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", MAPS)
def test_a_mapped_model_gives_the_figures_of_one_on_the_cpu(folder: Path, name: str) -> None:
    alone, tokenizer = zt.load_model(folder, dtype=torch.float32, device="cpu")
    mapped, _ = zt.load_model(folder, dtype=torch.float32, device_map=MAPS[name])
    assert is_offloaded(mapped) == ("disk" in name)
    assert input_device(mapped) == torch.device("cpu")
    check_figures(parallel_figures.figures(mapped), parallel_figures.figures(alone), 1e-6)
    found, wanted = calibrated(mapped, tokenizer), calibrated(alone, tokenizer)
    assert wanted.improved
    torch.testing.assert_close(found.scales.gamma, wanted.scales.gamma, atol=1e-4, rtol=0)
    of = parallel_figures.evaluations(mapped, tokenizer)
    for name, figures in parallel_figures.evaluations(alone, tokenizer).items():
        assert of[name] == pytest.approx(figures, abs=1e-5)


@pytest.mark.usefixtures("no_gpu")
def test_offloaded_weights_are_offloaded_again_after_a_calibration(folder: Path) -> None:
    model, tokenizer = zt.load_model(folder, dtype=torch.float32, device_map=MAPS["one layer waits on the disk"])
    waiting = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert waiting
    calibrated(model, tokenizer)
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == waiting


@pytest.mark.usefixtures("no_gpu")
def test_loading_with_a_device_map_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    zt.load_model(folder, device_map=MAPS["one layer waits on the disk"])
    assert capfd.readouterr() == ("", "")


# Refusals.


def test_a_map_and_a_device_exclude_each_other(folder: Path) -> None:
    message = one_line_error(zt.load_model, folder, device="cpu", device_map="auto")
    assert message == "device and device_map each place the model: give one of them"


@pytest.mark.parametrize("wrong", ["nowhere", {"": "nowhere"}, {"": None}, 1.5, True])
def test_a_wrong_device_map_is_named_with_the_accepted_ones(folder: Path, wrong: Any) -> None:
    message = one_line_error(zt.load_model, folder, device_map=wrong)
    assert message.startswith(
        "device_map must be one of auto, balanced, balanced_low_0, sequential, a device, or a map"
    )


def test_a_map_that_leaves_parts_out_is_an_error_that_names_the_model(folder: Path) -> None:
    assert (
        one_line_error(zt.load_model, folder, device_map={})
        == "device_map must give every part of the model a device, got an empty mapping"
    )
    partial = {"model.embed_tokens": "cpu", "model.norm": "disk"}
    assert f"cannot load model {folder}: ValueError: " in one_line_error(zt.load_model, folder, device_map=partial)


def test_parts_of_a_gguf_model_do_not_go_to_the_disk(tmp_path: Path) -> None:
    assert one_line_error(zt.load_model, tmp_path / "a.gguf", device_map={"": "disk"}) == (
        "device_map: transformers cannot offload a .gguf model to the disk"
    )


def test_a_missing_gpu_and_a_missing_package_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "names a GPU, but torch finds none" in one_line_error(zt.load_model, folder, device_map={"": 0})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    wanted = 'device_map needs the package accelerate: pip install "zerotuning[device-map]"'
    assert one_line_error(zt.load_model, folder, device_map="auto") == wanted


# The command line.


def test_evaluate_accepts_a_device_map(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    of = ["--model", str(folder), "--task", "sst2", "--limit", "4", "--output", str(output)]
    assert main(["evaluate", *of, "--device-map", "cpu"]) == 0
    assert json.loads(output.read_text("utf-8"))["examples"] == 4


@pytest.mark.parametrize("name", ["calibrate", "evaluate"])
def test_options_that_each_place_the_model_exclude_each_other(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [name, "--model", "m", "--task", "sst2", "--output", "out.json"]
    assert main([*common, "--device", "cpu", "--device-map", "auto"]) == 2
    assert "argument --device-map: not allowed with argument --device" in capsys.readouterr().err
    assert main([*common, "--tensor-parallel", "--device-map", "auto"]) == 2
    assert "argument --device-map: not allowed with argument --tensor-parallel" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*common, "--device-map", "auto"]) == 2
    wanted = "zerotuning: error: --device-map spreads the model of one process, torchrun started several\n"
    assert capsys.readouterr().err == wanted


# Two GPUs.

ON_TWO_GPUS = {"model.embed_tokens": 0, "model.rotary_emb": 0, LAYERS[0]: 0, LAYERS[1]: 1, LAYERS[2]: 1}
ON_TWO_GPUS |= {"model.norm": 1, "lm_head": 1}


@pytest.fixture
def folder_for_gpus(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A saved model whose head size every kernel supports."""
    sizes = {"hidden_size": 256, "head_dim": 64}
    return parallel_figures.save_random_model(tmp_path / "model", "llama", tiny_tokenizer, **sizes)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_layers_on_two_gpus_give_the_logits_gradients_and_texts_of_one(
    folder_for_gpus: Path, dtype: torch.dtype, tolerance: float
) -> None:
    alone, _ = zt.load_model(folder_for_gpus, dtype=dtype, device="cuda:0")
    mapped, _ = zt.load_model(folder_for_gpus, dtype=dtype, device_map=ON_TWO_GPUS)
    check_figures(parallel_figures.figures(mapped), parallel_figures.figures(alone), tolerance)


@pytest.mark.gpu
@two_gpus
def test_scales_lie_with_their_layers_and_passes_over_two_gpus_are_not_recorded(folder_for_gpus: Path) -> None:
    mapped, _ = zt.load_model(folder_for_gpus, device_map=ON_TWO_GPUS)
    zt.patch(mapped)
    found = [module.log_scale.device.index for module in mapped.modules() if isinstance(module, LayerScales)]
    assert found == [0, 1, 1]
    assert not supports_recording(mapped)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(
    "device_map",
    ["balanced", ON_TWO_GPUS, ON_TWO_GPUS | {LAYERS[1]: "cpu", LAYERS[2]: "disk"}],
    ids=["balanced", "by hand", "offloaded"],
)
def test_a_model_over_two_gpus_is_calibrated_and_evaluated_as_on_one(folder_for_gpus: Path, device_map: Any) -> None:
    alone, tokenizer = zt.load_model(folder_for_gpus, dtype=torch.float32, device="cuda:0")
    mapped, _ = zt.load_model(folder_for_gpus, dtype=torch.float32, device_map=device_map)
    found, wanted = calibrated(mapped, tokenizer), calibrated(alone, tokenizer)
    torch.testing.assert_close(found.scales.gamma, wanted.scales.gamma, atol=1e-3, rtol=0)
    of = parallel_figures.evaluations(mapped, tokenizer)
    for name, figures in parallel_figures.evaluations(alone, tokenizer).items():
        assert of[name] == pytest.approx(figures, abs=1e-4)
