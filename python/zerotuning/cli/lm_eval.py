"""`zerotuning lm-eval`: lm-evaluation-harness with ZeroTuning's model registered."""

from __future__ import annotations

import argparse
from typing import Any

from zerotuning.cli.arguments import add_command


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    add_command(
        commands,
        "lm-eval",
        run,
        "run lm-evaluation-harness's own command line, "
        "with --model zerotuning --model_args pretrained=MODEL,scales=DIR",
        add_help=False,
        prefix_chars="\0",  # lm-eval parses every argument, --help among them
    ).add_argument("arguments", nargs="*", help="arguments of lm_eval")


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    from zerotuning.lm_evaluation import run_lm_eval

    run_lm_eval(arguments.arguments)
