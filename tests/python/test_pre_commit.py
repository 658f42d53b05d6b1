"""The hooks of pre-commit are the checks that continuous integration runs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_hooks_are_the_checks_of_tests_style_and_fetch_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    every_check = re.search(r"then set -- (.+); fi", (ROOT / "tests/style").read_text("utf-8"))
    assert every_check is not None
    assert [hook["entry"] for hook in hooks] == [f"bash tests/style {name}" for name in every_check[1].split()]


def test_continuous_integration_runs_every_check() -> None:
    assert "\nbash tests/style\n" in (ROOT / "tests/run").read_text("utf-8")
    assert "\nbash tests/run\n" in (ROOT / ".ci/run").read_text("utf-8")
