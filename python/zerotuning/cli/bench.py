"""`zerotuning bench`: speed, and accuracy by number of examples, against other implementations and methods."""

from __future__ import annotations

import argparse
from typing import Any

from zerotuning.bench.names import BENCHMARKS
from zerotuning.cli.arguments import RenamedOption, add_command, positive_int, positive_ints, shot_count
from zerotuning.errors import ZeroTuningError
from zerotuning.output import check_result_file

#: Options of `bench search` alone: the fields of bench/search.py's SearchBench.
SEARCH_OPTIONS = (
    "model",
    "tasks",
    "methods",
    "examples",
    "limit",
    "num_draws",
    "batch_size",
    "shots",
    "num_shot_candidates",
)


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    parser = add_command(commands, "bench", run, "measure speed against other implementations in the same run")
    parser.add_argument("kind", choices=BENCHMARKS, help="the benchmark")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="the device to measure on (default: the GPU if there is one)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the figures to this .json or .csv file; an existing file is replaced"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios to this .png or .svg file")
    parser.add_argument(
        "--routes",
        action="store_true",
        help="bench attention: measure nothing; print which kernel computes which call on which GPU",
    )
    _add_search(parser.add_argument_group("bench search"))


def _add_search(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="MODEL", help="a local folder, a name on the hub, a .gguf file, or demo (default: demo)")
    add(
        "--task",
        metavar="TASK",
        action="append",
        dest="tasks",
        help="a task to measure on; may be repeated (default: five built-in tasks)",
    )
    add(
        "--method",
        metavar="METHOD",
        action="append",
        dest="methods",
        help="a method to measure; may be repeated (default: all)",
    )
    add(
        "--examples",
        type=positive_ints,
        metavar="N[,N…]",
        help="numbers of labelled examples to tune on (default: 16,64,200)",
    )
    add("--limit", type=positive_int, metavar="N", help="number of test examples of each task (default: 400)")
    add(
        "--num-draws",
        type=positive_int,
        metavar="N",
        help="number of random draws of the labelled examples, with seeds 0 to N - 1 (default: 1)",
    )
    add("--seeds", action=RenamedOption, new_name="--num-draws", dest="num_draws", metavar="N", type=positive_int)
    add("--batch-size", type=positive_int, metavar="N", help="number of prompts in one forward pass (default: 64)")
    add(
        "--shots",
        type=shot_count,
        metavar="N",
        help="number of few-shot examples in front of each prompt, taken from the labelled examples (default: 4)",
    )
    add(
        "--num-shot-candidates",
        type=positive_int,
        metavar="N",
        help="number of random sets of few-shot examples to compare by short searches, beside prompts without any "
        "(default: 4)",
    )
    add(
        "--shot-draws",
        action=RenamedOption,
        new_name="--num-shot-candidates",
        dest="num_shot_candidates",
        metavar="N",
        type=positive_int,
    )


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    if arguments.routes:
        if arguments.kind != "attention":
            raise ZeroTuningError(f"--routes: an option of bench attention alone, got bench {arguments.kind}")
        from zerotuning.bench.routes import route_table

        print(route_table())
        return
    output, plot = (None if path is None else check_result_file(path) for path in (arguments.output, arguments.plot))
    from zerotuning.bench.runner import run_bench

    options = {name: value for name in SEARCH_OPTIONS if (value := getattr(arguments, name)) is not None}
    if options and arguments.kind != "search":
        raise ZeroTuningError(f"{', '.join(options)}: options of bench search alone, got bench {arguments.kind}")
    run_bench(arguments.kind, output, arguments.device, plot, **options)
