"""`zerotuning study`: one of the paper's findings, measured on a model."""

from __future__ import annotations

import argparse
from typing import Any

from zerotuning.cli.arguments import DEVICE_HELP, RenamedOption, add_batch_size, add_command, add_dtype, positive_int
from zerotuning.study.names import STUDIES


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    parser = add_command(
        commands, "study", run, "measure one of the paper's findings; the same command resumes an unfinished study"
    )
    add = parser.add_argument
    add("name", choices=STUDIES, metavar="NAME", help=f"the study: {', '.join(STUDIES)}")
    add(
        "--size",
        choices=("small", "full"),
        default="full",
        help="small is a quick check with few examples, full gives figures to report (default: %(default)s)",
    )
    add(
        "--part",
        metavar="PART",
        action="append",
        dest="parts",
        default=[],
        help="measure this part of the study only; may be repeated (default: every part)",
    )
    add(
        "--model",
        metavar="MODEL",
        default="demo",
        help="a local folder, a name on the Hugging Face hub, a .gguf file, or demo (default: %(default)s)",
    )
    add(
        "--task",
        metavar="TASK",
        action="append",
        dest="tasks",
        help="measure on this task; may be repeated (default: the study's own tasks)",
    )
    add(
        "--num-draws",
        metavar="N",
        type=positive_int,
        help="number of random draws of the examples, with seeds 0 to N - 1 (default: by --size)",
    )
    add("--seeds", action=RenamedOption, new_name="--num-draws", dest="num_draws", metavar="N", type=positive_int)
    add(
        "--examples",
        metavar="N",
        type=positive_int,
        help="number of validation examples that settings are chosen on (default: by --size)",
    )
    add("--limit", metavar="N", type=positive_int, help="number of test examples of each task (default: by --size)")
    add_batch_size(parser)
    add_dtype(parser)
    add("--device", metavar="DEVICE", help=DEVICE_HELP)
    add("--overwrite", action="store_true", help="discard the measurements in DIR and measure everything again")
    add("--output", metavar="DIR", required=True, help="folder of the measurements, pictures and table")


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    from zerotuning.study.runner import run_study
    from zerotuning.study.setting import Setting

    names = ("model", "dtype", "device", "size", "tasks", "examples", "limit", "parts", "batch_size")
    settings = {name: getattr(arguments, name) for name in names}
    setting = Setting(num_draws=arguments.num_draws, **settings)
    result = run_study(arguments.name, setting, arguments.output, overwrite=arguments.overwrite, progress=True)
    print(result.table)
    print(f"\nIn {arguments.output}: {', '.join(path.name for path in result.files)}")
