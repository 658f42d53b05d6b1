"""The program: exit codes, one line for an error, outputs that cannot be written, help without torch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zerotuning
from command_line import calibrate, evaluate, refusal
from zerotuning.cli.main import main
from zerotuning.patching.head_scales import HeadScales

# Errors.


@pytest.mark.parametrize("command", [calibrate, lambda output: ["demo", "--output", output]])
@pytest.mark.parametrize("output", ["data.jsonl", "data.jsonl/deep", "/proc/scales", "/dev/null/scales"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    place: Path, capsys: Any, monkeypatch: Any, command: Callable[..., list[str]], output: str
) -> None:
    for name in ("load_model", "demo_model_path"):
        monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), name, None)
    assert f"output {output} " in refusal(capsys, command(output=output))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (evaluate("--output", "model"), "output model must be a file, got a folder"),
        (evaluate("--output", "pipe"), "output pipe must be a regular file, got a device or a pipe"),
        (evaluate("--output", ""), "output must name a file, got an empty name"),
        (calibrate(output=""), "output must name a folder, got an empty name"),
        (evaluate("--output", "missing/figures.json"), "output missing/figures.json cannot be written"),
        (["inspect", "ones", "--plot", "missing/map.png"], "output missing/map.png cannot be written"),
        (["inspect", "ones", "--plot", "map.jpg"], "output map.jpg must end in .png or .svg or .pdf"),
        (
            ["bench", "attention", "--output", "missing/bench.json"],
            "output missing/bench.json cannot be written",
        ),
    ],
)
def test_an_output_file_that_cannot_be_written_is_refused_first(
    place: Path, capsys: Any, command: list[str], message: str
) -> None:
    HeadScales.ones(2, 4).save_pretrained("ones")
    os.mkfifo("pipe")
    assert message in refusal(capsys, command)


def test_a_lack_of_memory_gets_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), "load_model", exhausted)
    assert "not enough memory (CUDA out of memory. Tried to allocate 2 GiB)" in refusal(capsys, evaluate())


def test_a_mistake_in_the_program_keeps_its_traceback(place: Path, monkeypatch: Any) -> None:
    def mistaken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(importlib.import_module("zerotuning.models.loading"), "load_model", mistaken)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(evaluate())


# The program.


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_the_program_prints_version_and_help_without_importing_torch() -> None:
    version = run("-m", "zerotuning", "--version")
    assert (version.returncode, version.stdout) == (0, f"zerotuning {zerotuning.__version__}\n")
    code = "import sys; from zerotuning.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    shown = run("-c", code)
    assert shown.returncode == 0, shown.stderr
    for name in ("demo", "calibrate", "evaluate", "inspect", "bench"):
        assert f"    {name} " in shown.stdout or f"    {name}\n" in shown.stdout


def test_the_program_ends_with_code_2_and_one_line() -> None:
    result = run("-m", "zerotuning", "evaluate", "--model", "demo", "--task", "trek")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("zerotuning: error: unknown task 'trek', did you mean 'trec'? (known tasks: agnews, aqua,")


def test_a_terminal_without_greek_letters_gets_question_marks(place: Path, monkeypatch: Any) -> None:
    HeadScales.ones(2, 4).save_pretrained("ones")
    code = "import sys; from zerotuning.cli.main import main; sys.exit(main(['inspect', 'ones']))"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "? from 1 to 1" in result.stdout


def test_the_whole_parser_is_made_without_torch_or_transformers() -> None:
    code = (
        "import sys; from zerotuning.cli.main import make_parser; parser = make_parser(); parser.format_help(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    made = run("-c", code)
    assert made.returncode == 0, made.stderr
