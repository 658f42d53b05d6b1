"""Loading a model from a folder or from the hub, and the one-line error for a path that is no model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from refusals import one_line_error
from safetensors.torch import load_file, save_file
from zerotuning.models.loading import default_cpu_dtype, load_model


@pytest.fixture
def folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A saved checkpoint of the tiny model."""
    tiny_model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_local_folder_gives_its_model_and_tokenizer(folder: Path, tiny_model: Any) -> None:
    model, tokenizer = load_model(folder, dtype=torch.float32, device="cpu")
    ids = torch.tensor([tokenizer("Review: good")["input_ids"]])
    torch.testing.assert_close(model(ids).logits, tiny_model(ids).logits, atol=0, rtol=0)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.padding_side == "left"
    assert load_model(str(folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_token(folder: Path, tiny_tokenizer: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["pad_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert load_model(folder, device="cpu")[1].pad_token == tiny_tokenizer.eos_token


def test_loading_prints_nothing_and_restores_transformers_verbosity(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    one_line_error(load_model, folder / "none")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [
        (True, True, torch.bfloat16),
        (False, True, torch.bfloat16),
        (True, False, torch.bfloat16),
        (False, False, torch.float32),
        (None, None, torch.float32),
    ],
)
def test_the_type_on_a_cpu_is_bfloat16_only_where_the_processor_multiplies_it(
    amx: bool | None, avx512: bool | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, supported in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        if supported is None:
            monkeypatch.delattr(torch.cpu, name)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported)
    assert default_cpu_dtype() == expected


def test_a_path_that_is_no_model_is_named(folder: Path, tmp_path: Path) -> None:
    assert f"model folder {tmp_path / 'none'} does not exist" in one_line_error(load_model, tmp_path / "none")
    assert "model folder ./none does not exist" in one_line_error(load_model, "./none")
    assert one_line_error(load_model, "") == "model name must not be empty"
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in one_line_error(load_model, tmp_path / "empty")
    assert "got a file of another kind" in one_line_error(load_model, folder / "model.safetensors")


@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_truncated_weights_are_an_error_that_names_the_model(folder: Path, length: int) -> None:
    os.truncate(folder / "model.safetensors", length)
    assert f"cannot load model {folder}: " in one_line_error(load_model, folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "no-such-model"}'),
        ("config.json", '{"model_type": "t5"}'),
        ("tokenizer.json", "{"),
    ],
)
def test_a_damaged_or_unsuitable_checkpoint_is_an_error(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="utf-8")
    assert f"cannot load model {folder}: " in one_line_error(load_model, folder)


def test_a_checkpoint_that_lacks_a_weight_is_an_error_that_names_it(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = one_line_error(load_model, folder)
    assert "the checkpoint lacks 1 weights, model.layers.1.mlp.up_proj.weight among them" in message


@pytest.mark.parametrize("offline", [True, False], ids=["told to stay offline", "without a network"])
def test_an_unreachable_hub_name_is_an_error_that_names_the_alternatives(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoNetwork:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_session", NoNetwork)
    message = one_line_error(load_model, "no-such-owner/no-such-model")
    assert "cannot load model no-such-owner/no-such-model: no such folder, and the hub did not" in message
    assert "name a local folder or a .gguf file" in message


def test_a_wrong_dtype_or_device_is_named(folder: Path) -> None:
    known = "dtype must be one of float16, bfloat16, float32, float64, got "
    for dtype in ("int8", "float8_e4m3fn", torch.float8_e5m2):
        assert one_line_error(load_model, folder, dtype=dtype, device="cpu") == f"{known}{dtype!r}"
    for device in ("mps", "xla", "meta"):
        assert (
            one_line_error(load_model, folder, device=device) == f"device must be of type cpu or cuda, got {device!r}"
        )
    assert "got 'double trouble'" in one_line_error(load_model, folder, dtype="double trouble", device="cpu")
    assert "device must be a torch device" in one_line_error(load_model, folder, device="toaster")


def test_a_gpu_beyond_those_there_are_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (
        one_line_error(load_model, folder, device="cuda:2")
        == "device must be available, got cuda:2, but torch sees 2 GPUs"
    )
