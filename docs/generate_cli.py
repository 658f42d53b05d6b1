"""Write docs/cli.md from the command line's parser.

python docs/generate_cli.py            writes the page
python docs/generate_cli.py --check    fails if the page differs

A test compares the page with the parser too (tests/python/test_documentation_cli.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from zerotuning.cli.main import make_parser

PAGE = Path(__file__).with_name("cli.md")

HEADER = """\
# Command line

<!-- This page is generated: edit the help texts in python/zerotuning/cli, then run `python docs/generate_cli.py`. -->

Wrong input ends with one line on stderr and exit code 2, an interruption with 130. Long commands show a progress bar on
a terminal.
"""


def page() -> str:
    """The text of docs/cli.md."""
    parser = make_parser()
    parts = [HEADER, *(_section(name, command) for name, command in _commands(parser, parser.prog))]
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command without commands of its own, with its full name."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, parser
    for action in nested:
        for command, subparser in action.choices.items():
            yield from _commands(subparser, f"{name} {command}")


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## {name}", "", _text(parser.description or ""), ""]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if "--help" not in action.option_strings]
        if not actions:
            continue
        if group.title not in ("options", "optional arguments", "positional arguments"):
            lines += [f"### {name}: {group.title}", ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [f"| {_name(action)} | {_text(_help(parser, action))} |" for action in actions]
        lines.append("")
    return "\n".join(lines)


def _name(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = action.metavar if isinstance(action.metavar, str) else None
    if value is None and action.choices is not None:
        value = "|".join(map(str, action.choices))
    if value is None and action.nargs != 0:
        value = action.dest.upper()
    shown = "" if value is None or action.nargs == 0 else f"`{value}`".replace("|", "\\|")
    return " ".join(part for part in (names, shown) if part)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"{text} (required)" if action.required and action.option_strings else text


def _text(text: str) -> str:
    """Help as one line of a Markdown table."""
    return re.sub(r"([|*\[])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def main() -> int:
    """Write the page, or compare it with the parser."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text("utf-8") == text:
            return 0
        print(f"{PAGE} differs from the parser: run python docs/generate_cli.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
