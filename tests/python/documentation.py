"""The code blocks of a Markdown page, and what a test does with each kind of block.

A block that cannot run in a test has the line `<!-- not run: reason -->` before it. A language that `RUNNERS` lacks is
an error, so that no block is left out silently.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerotuning.cli.main import main, make_parser
from zerotuning.tasks.examples import read_examples
from zerotuning.tasks.task import Task

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*) *$")
NOT_RUN = re.compile(r"^ *<!-- not run: (?P<reason>.+) -->$")


@dataclass(frozen=True)
class Block:
    """One fenced code block: its page, the line of its first line of code, its language and its text."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass
class Session:
    """What the blocks of one page share: Python's names, the folder of their files, the task of the last YAML block."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    task: Task | None = None


class BrokenBlock(AssertionError):
    """A code block of the documentation does not work; the message begins with page and line."""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced code blocks of a page, in order."""
    lines = page.read_text("utf-8").splitlines()
    place = 0
    while place < len(lines):
        opening = FENCE.match(lines[place])
        if opening is None:
            place += 1
            continue
        marker = NOT_RUN.match(lines[place - 1]) if place else None
        indent, first = opening["indent"], place + 1
        place = next((i for i in range(first, len(lines)) if lines[i] == f"{indent}```"), len(lines))
        if place == len(lines):
            raise BrokenBlock(f"{page.name}:{first}: the code block has no end")
        text = "\n".join(line.removeprefix(indent) for line in lines[first:place])
        yield Block(page, first + 1, opening["language"], text, marker["reason"] if marker else None)
        place += 1


def run(block: Block, session: Session) -> None:
    """Execute or check one block. Raises: BrokenBlock."""
    if block.language not in RUNNERS:
        raise BrokenBlock(f"{block}: no test for the language {block.language!r}, expected {', '.join(RUNNERS)}")
    if block.not_run is not None:
        return
    try:
        RUNNERS[block.language](block, session)
    except BrokenBlock:
        raise
    except BaseException as error:
        raise BrokenBlock(f"{block}: {type(error).__name__}: {error}") from error


def _run_python(block: Block, session: Session) -> None:
    # Blank lines in front: tracebacks have the page's line numbers.
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), session.names)


def _check_shell(block: Block, session: Session) -> None:
    for command in block.text.replace("\\\n", " ").splitlines():
        for part in command.partition("#")[0].split("&&"):
            words = shlex.split(part)
            if words:
                _check_command(words, session)


def _check_command(words: list[str], session: Session) -> None:
    if words[0] == "torchrun":
        assert words[3:5] == ["-m", "zerotuning"], f"expected torchrun OPTION N -m zerotuning …, got {words}"
        words = words[4:]
    if words[0] == "zerotuning":
        _check_zerotuning(words[1:], session)
        return
    known = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    assert known is not None, f"no test for the command {' '.join(words)}"
    COMMANDS[known](words[len(known.split()) :])


def _check_zerotuning(arguments: list[str], session: Session) -> None:
    """Parse the arguments; run `inspect`, --help, --version and --routes, which are fast."""
    is_result = arguments[0] == "inspect" and (session.folder / arguments[1]).is_dir()
    if is_result or {"--help", "--version", "--routes"}.intersection(arguments):
        assert main(arguments) == 0
    else:
        make_parser().parse_args(arguments)


def _check_pip(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = re.findall(r"^([\w-]+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    for argument in arguments:
        for extra in re.findall(r"(?:\.|zerotuning)\[(.+)\]", argument):
            for name in extra.split(","):
                assert name in extras, f"pyproject.toml has no extra {name}"


def _check_paths(arguments: list[str]) -> None:
    for argument in arguments:
        if "/" in argument or argument.endswith((".py", ".md")):
            place = argument.split("::")[0].split("=")[-1]
            assert (ROOT / place).exists() or place.startswith("build"), f"there is no {place}"


#: The check of the arguments of each command other than zerotuning; these commands are not run.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "pip install": _check_pip,
    "bash": _check_paths,
    "python -m pytest": _check_paths,
    "python": _check_paths,
    "mkdocs build": _check_paths,
    "cmake": _check_paths,
    "ctest": _check_paths,
    "pre-commit": _check_paths,
}


def _load_yaml(block: Block, session: Session) -> None:
    path = session.folder / f"line{block.line}.yaml"
    path.write_text(block.text, "utf-8")
    session.task = Task.load(path)


def _load_json_lines(block: Block, session: Session) -> None:
    path = session.folder / f"line{block.line}.jsonl"
    path.write_text(block.text, "utf-8")
    records = read_examples(path)
    assert session.task is not None, "JSON lines need a task: a YAML block before them"
    for record in records:
        session.task.render(record, require_label=True)


def _load_json(block: Block, session: Session) -> None:
    json.loads(block.text)


def _nothing(block: Block, session: Session) -> None:
    pass


RUNNERS: dict[str, Callable[[Block, Session], None]] = {
    "python": _run_python,
    "bash": _check_shell,
    "yaml": _load_yaml,
    "jsonl": _load_json_lines,
    "json": _load_json,
    "text": _nothing,  # output, formulas and drawings
}
