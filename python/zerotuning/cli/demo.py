"""`zerotuning demo`: the whole path from a model to better answers, in one command."""

from __future__ import annotations

import argparse
from typing import Any

from zerotuning.cli.arguments import add_command


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    parser = add_command(
        commands,
        "demo",
        run,
        "calibrate SmolLM2-135M-Instruct on 64 SST-2 examples and measure the model before and after",
    )
    parser.add_argument(
        "--output", metavar="DIR", default="zerotuning-demo", help="folder of the result (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a result in DIR")


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    from zerotuning.demo import run_demo

    run_demo(arguments.output, overwrite=arguments.overwrite)
