"""`zerotuning evaluate`: accuracy, loss and entropy of a model on a task, with or without head scales."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerotuning.cli.arguments import add_command, add_model_and_task, add_prompts, positive_int
from zerotuning.cli.inputs import check_prompts, percent, read_scales, read_task
from zerotuning.cli.placement import joined_processes, load_placed_model
from zerotuning.output import check_result_file
from zerotuning.version import __version__

if TYPE_CHECKING:
    from zerotuning.evaluation.evaluate import Evaluation
    from zerotuning.patching.head_scales import HeadScales
    from zerotuning.tasks.examples import Record
    from zerotuning.tasks.task import Task


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        "measure accuracy, loss and entropy of a model on a task",
        epilog="example: zerotuning evaluate --model demo --task sst2 --scales sst2-scales --output tuned.json",
    )
    add_model_and_task(parser, "the built-in task's test sample")
    add_prompts(parser)
    add = parser.add_argument
    add("--scales", metavar="DIR", help="folder of the head scales to apply (default: none, the untuned model)")
    add("--limit", metavar="N", type=positive_int, help="use the first N examples (default: all)")
    add("--output", metavar="FILE.json", help="write the figures to this file; an existing file is replaced")


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    task, records = read_task(arguments, "test")
    from zerotuning.tasks.examples import first_examples

    records = first_examples(records, arguments.limit)
    if arguments.shots:
        from zerotuning.calibration.few_shot_choice import with_shots_outside

        task = with_shots_outside(
            task, records, arguments.shots, arguments.shot_seed, data=arguments.data, shot_data=arguments.shot_data
        )
    check_prompts(task, records, require_label=True)
    output = None if arguments.output is None else check_result_file(arguments.output)
    scales = None if arguments.scales is None else read_scales(arguments.scales)
    from zerotuning.models.process_group import Processes

    with joined_processes(arguments, share_examples=False) as device:
        evaluation = _evaluate(arguments, task, records, scales, device)
        processes = Processes()
        if processes.is_main_process:
            _report(arguments, evaluation, output)
        processes.wait_for_main()


def _evaluate(
    arguments: argparse.Namespace, task: Task, records: list[Record], scales: HeadScales | None, device: str | None
) -> Evaluation:
    from zerotuning.evaluation.evaluate import evaluate
    from zerotuning.models.process_group import Processes
    from zerotuning.patching.scaled_model import apply_scales_to

    model, tokenizer = load_placed_model(arguments, device)
    if scales is not None:
        apply_scales_to(model, scales, arguments.model, arguments.scales)
    return evaluate(
        model,
        tokenizer,
        task,
        records,
        batch_size=arguments.batch_size,
        truncate=arguments.truncate,
        progress=Processes().is_main_process,
    )


def _report(arguments: argparse.Namespace, evaluation: Evaluation, output: Path | None) -> None:
    from zerotuning.files import write_json_atomically

    applied = arguments.scales or "none (γ = 1)"
    print(f"{evaluation.task}, {evaluation.examples} examples, model {arguments.model}, scales {applied}\n")
    print("  accuracy     loss   entropy   seconds")
    loss, entropy = ("–" if value is None else f"{value:.4f}" for value in (evaluation.loss, evaluation.entropy))
    print(f"  {percent(evaluation.accuracy):>8}  {loss:>7}   {entropy:>7}  {evaluation.seconds:8.1f}")
    if output is not None:  # last, so that the figures are printed even if writing fails
        figures = {
            **evaluation.to_json(),
            "model": arguments.model,
            "scales": arguments.scales,
            "version": __version__,
        }
        write_json_atomically(output, figures)
