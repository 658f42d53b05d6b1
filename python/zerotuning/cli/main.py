"""The entry point `zerotuning`: one parser, one command, one exit code.

Wrong input ends with one line on stderr and exit code 2. torch and transformers are imported inside the commands, after
everything that can be checked without them: `--help` and most errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from zerotuning.cli import bench, calibrate, demo, evaluate, inspect, lm_eval, mt_bench, study
from zerotuning.cli.arguments import Parser
from zerotuning.errors import ZeroTuningError
from zerotuning.version import __version__

EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; by default those of this process.

    Returns:
        The exit code: 0, 2 for wrong input, 130 after an interruption.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters prints ? for γ
    arguments = None
    try:
        arguments = make_parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except SystemExit as finished:  # --help and --version
        return finished.code if isinstance(finished.code, int) else 0
    except KeyboardInterrupt:
        print(f"\nzerotuning: interrupted{_how_to_resume(arguments)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `zerotuning inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ZeroTuningError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        print(f"zerotuning: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with every command. Neither torch nor transformers is imported."""
    parser = Parser(
        prog="zerotuning",
        description="Better answers from a frozen language model: one number per attention head scales its "
        "attention to the initial token.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zerotuning {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (demo, calibrate, evaluate, inspect, study, lm_eval, mt_bench, bench):
        module.add_to(commands)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, ZeroTuningError):
        text = str(error)
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        text = place + (error.strerror or str(error))
    else:
        text = f"not enough memory ({error}); a smaller --batch-size needs less"
    return " ".join(text.split())


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory. The test is by name: torch may not be imported."""
    return type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)


def _how_to_resume(arguments: argparse.Namespace | None) -> str:
    is_resumable = getattr(arguments, "is_resumable", None)
    if arguments is None or is_resumable is None or not is_resumable(arguments):
        return ""
    if arguments.overwrite:
        return "; the same command without --overwrite resumes"
    return "; the same command resumes"
