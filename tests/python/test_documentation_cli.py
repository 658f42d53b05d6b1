"""docs/cli.md is what docs/generate_cli.py makes of the command line's parser."""

from __future__ import annotations

import importlib.util
from typing import Any

from documentation import ROOT


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_matches_the_parser() -> None:
    generate_cli = generator()
    assert generate_cli.PAGE.read_text("utf-8") == generate_cli.page(), "run python docs/generate_cli.py"
