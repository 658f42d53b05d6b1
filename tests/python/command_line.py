"""Commands for a tiny model in the current folder, and functions that run them and read their results."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from zerotuning.cli.main import main
from zerotuning.patching.head_scales import HeadScales

TASK = """\
name: films
prompt: "Review: {text}\\nSentiment:"
labels: [" negative", " positive"]
"""
# All examples have one label: a change that helps one example helps the others, so that calibration lowers the loss.
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": 1}
    for first in ("good", "bad", "a good story", "far too long")
    for second in ("told", "long", "well told", "far too well told", "a story")
]


def write_lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def calibrate(*more: str, output: str = "scales") -> list[str]:
    command = ["calibrate", "--model", "model", "--task", "task.yaml", "--data", "data.jsonl"]
    return [*command, "--steps", "4", "--dtype", "float32", "--output", output, *more]


def evaluate(*more: str) -> list[str]:
    command = ["evaluate", "--model", "model", "--task", "task.yaml", "--data", "data.jsonl"]
    return [*command, "--dtype", "float32", *more]


def instead(command: list[str], option: str, value: str) -> list[str]:
    """Replace the value of one of a command's options."""
    at = command.index(option) + 1
    return [*command[:at], value, *command[at + 1 :]]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Read everything under a folder: relative path -> bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refusal(capsys: Any, command: Sequence[str]) -> str:
    """Run a command that must be refused and return its line on stderr; stdout is empty and no file changes."""
    before = contents(Path.cwd())
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zerotuning: error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert contents(Path.cwd()) == before
    return err


def gamma_of(folder: str) -> torch.Tensor:
    return HeadScales.from_pretrained(Path(folder)).gamma


def interrupt_after(monkeypatch: Any, answers: int) -> Callable[[], None]:
    """Raise KeyboardInterrupt in the n-th step of the search. The returned function removes this interruption."""
    search = importlib.import_module("zerotuning.calibration.gradient_search").GradientSearch
    advance = search.advance
    left = [answers]

    def interrupted(self: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(search, "advance", interrupted)
    return lambda: monkeypatch.setattr(search, "advance", advance)
