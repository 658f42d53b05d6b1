"""`zerotuning calibrate`: search head scales for a task, or for several tasks together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerotuning.calibration.options import (
    COMBINATIONS,
    DEFAULT_FOLDS,
    DEFAULT_STEPS,
    LABEL_FREE_FOLDS,
    MANY_EXAMPLES,
    METHODS,
    OBJECTIVES,
    SEARCHES_OF_MANY,
    STEPS_OF_MANY,
    TIES,
    CalibrationOptions,
)
from zerotuning.cli.arguments import (
    RenamedOption,
    add_command,
    add_model_and_task,
    add_prompts,
    layer_head_pairs,
    layers,
    non_negative_int,
    non_negative_numbers,
    positive_int,
    prior,
    seconds,
)
from zerotuning.cli.inputs import check_prompts, percent, read_scales, read_task
from zerotuning.cli.placement import joined_processes, load_placed_model
from zerotuning.errors import ZeroTuningError
from zerotuning.output import REPORT_PAGE_FILE, RESULT_FILES, STATE_FILE, TRIALS_FILE, result_folder

if TYPE_CHECKING:
    from zerotuning.calibration.calibrate import Calibration
    from zerotuning.calibration.few_shot_choice import ShotChoice
    from zerotuning.patching.head_scales import HeadScales
    from zerotuning.tasks.examples import Record
    from zerotuning.tasks.task import Task

DEFAULTS = CalibrationOptions()


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    parser = add_command(
        commands,
        "calibrate",
        run,
        "search head scales for a task; the same command resumes an unfinished search",
        epilog="example: zerotuning calibrate --model demo --task sst2 --examples 64 --output sst2-scales",
    )
    parser.set_defaults(is_resumable=lambda arguments: (Path(arguments.output) / STATE_FILE).exists())
    add_model_and_task(parser, "the built-in task's validation sample", several_tasks=True)
    _add_shot_candidates(add_prompts(parser, several_tasks=True))
    _add_search(parser.add_argument_group("search").add_argument)
    _add_folds_and_penalties(parser.add_argument_group("validation and regularisation").add_argument)
    _add_heads(parser.add_argument_group("heads").add_argument)
    parser.add_argument("--overwrite", action="store_true", help="replace a result in DIR, or restart a search there")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the result")


def _add_shot_candidates(add: Any) -> None:
    add(
        "--num-shot-candidates",
        metavar="N",
        type=positive_int,
        default=1,
        help="number of random sets of few-shot examples to compare: with N > 1 a short search runs for each of the "
        "seeds SEED to SEED + N - 1 and for prompts without few-shot examples, and the calibration continues with the "
        "set of least held-out loss (default: %(default)s, no comparison)",
    )
    add(
        "--shot-draws",
        action=RenamedOption,
        new_name="--num-shot-candidates",
        dest="num_shot_candidates",
        metavar="N",
        type=positive_int,
    )


def _add_search(add: Any) -> None:
    add(
        "--method",
        choices=METHODS,
        default=DEFAULTS.method,
        help="how scales are searched: by the gradient of the objective, by the ZeroTuning paper's profiling of "
        "heads, or by CMA-ES, an evolution strategy that needs no gradient (default: %(default)s)",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        default=DEFAULTS.objective,
        help="what is minimised: the cross-entropy of the right label, the entropy of the predictions, or minus the "
        "mutual information between example and predicted label; the last two need no labels (default: %(default)s)",
    )
    add("--examples", metavar="N", type=positive_int, help="use N random examples of each task (default: all)")
    add(
        "--steps",
        metavar="N",
        type=positive_int,
        help=f"number of gradient steps (default: {DEFAULT_STEPS['gradient']}, or {STEPS_OF_MANY} from "
        f"{MANY_EXAMPLES} examples on), or of CMA-ES evaluations (default: {DEFAULT_STEPS['cma-es']})",
    )
    add(
        "--seconds",
        metavar="S",
        type=seconds,
        help="end the search after S seconds, time before an interruption included (default: no limit)",
    )
    add(
        "--seed",
        metavar="SEED",
        type=non_negative_int,
        default=DEFAULTS.seed,
        help="seed of the choice of examples, the folds, the order of batches and CMA-ES (default: %(default)s)",
    )
    add(
        "--num-searches",
        metavar="N",
        type=positive_int,
        help="number of searches, with seeds SEED to SEED + N - 1: the gradient method averages their results, the "
        f"others keep the best (default: 1; gradient method with labels and one fold: {SEARCHES_OF_MANY} from "
        f"{MANY_EXAMPLES} examples on)",
    )
    add("--seeds", action=RenamedOption, new_name="--num-searches", dest="num_searches", metavar="N", type=positive_int)
    add(
        "--prior",
        metavar="P",
        type=prior,
        default=DEFAULTS.prior,
        help="for --objective information, the share of each label: unknown (as equal as possible), estimate (from "
        "the untuned predictions) or numbers such as 0.5,0.3,0.2 (default: %(default)s)",
    )


def _add_folds_and_penalties(add: Any) -> None:
    add(
        "--folds",
        metavar="K",
        type=positive_int,
        help="number of cross-validation folds of the gradient method; 1 is a single 80/20 split (default: "
        f"{DEFAULT_FOLDS}; 1 from {MANY_EXAMPLES} examples on; {LABEL_FREE_FOLDS} without labels)",
    )
    add(
        "--combine",
        choices=COMBINATIONS,
        default=DEFAULTS.combine,
        help="average: the result is the mean of the folds' log γ; refit: one more search on all examples, with the "
        "number of steps that was best on the held-out examples (default: %(default)s)",
    )
    l2_penalties = ",".join(f"{penalty:g}" for penalty in DEFAULTS.l2_penalties)
    add(
        "--l2-penalties",
        metavar="P[,P…]",
        type=non_negative_numbers,
        default=DEFAULTS.l2_penalties,
        help="strengths p of the penalty p/2 · |log γ|² that is added to the objective; with several, the held-out "
        f"loss chooses one (default: {l2_penalties})",
    )
    add(
        "--penalty",
        action=RenamedOption,
        new_name="--l2-penalties",
        dest="l2_penalties",
        metavar="P[,P…]",
        type=non_negative_numbers,
    )


def _add_heads(add: Any) -> None:
    add("--layers", metavar="L[,L-M…]", type=layers, help="tune only heads of these layers, such as 0-7,12")
    add("--heads", metavar="L:H[,L:H…]", type=layer_head_pairs, help="tune only these heads, given as layer:head pairs")
    add(
        "--exclude-heads",
        metavar="L:H[,L:H…]",
        type=layer_head_pairs,
        default=DEFAULTS.exclude_heads,
        help="do not tune these heads, given as layer:head pairs",
    )
    add(
        "--tie",
        choices=TIES,
        default=DEFAULTS.tie,
        help="share one γ among the heads of a layer or among all heads (default: %(default)s)",
    )
    add(
        "--start",
        metavar="DIR",
        help="folder of head scales to start from; heads that are not tuned keep their scales (default: every γ is 1)",
    )


def options_of(arguments: argparse.Namespace) -> CalibrationOptions:
    """Return the options of a parsed command line. Fields without an argument have their default."""
    names = [field.name for field in fields(CalibrationOptions) if hasattr(arguments, field.name)]
    return CalibrationOptions(**{name: getattr(arguments, name) for name in names})


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    candidates, records = _read_candidates(arguments)
    options = options_of(arguments)
    start = None if arguments.start is None else read_scales(arguments.start)
    from zerotuning.models.process_group import Processes

    with joined_processes(arguments, share_examples=True) as device:
        with _output_folder(arguments) as folder:
            calibration = _calibrate(arguments, candidates, records, options, start, device, folder)
        if Processes().is_main_process:
            _print_calibration(calibration, folder, start)


def _read_candidates(arguments: argparse.Namespace) -> tuple[list[list[Task]], list[list[Record]]]:
    """Each task with each candidate set of few-shot examples, and each task's records."""
    data_files = _one_file_per_task(arguments.task, arguments.data, "--data")
    shot_files = _one_file_per_task(arguments.task, arguments.shot_data, "--shot-data")
    if arguments.num_shot_candidates > 1 and not arguments.shots:
        raise ZeroTuningError(
            f"--num-shot-candidates {arguments.num_shot_candidates} compares sets of few-shot examples: "
            "--shots must be at least 1, got 0"
        )
    candidates, records = [], []
    for name, data, shot_data in zip(arguments.task, data_files, shot_files, strict=True):
        task, part = read_task(argparse.Namespace(**vars(arguments) | {"task": name, "data": data}), "validation")
        candidates.append(_candidates(arguments, task, part, shot_data))
        records.append(part)
    return candidates, records


def _candidates(arguments: argparse.Namespace, task: Task, records: list[Record], shot_data: str | None) -> list[Task]:
    if not arguments.shots:
        return [task]
    from zerotuning.calibration.few_shot_choice import shot_candidates
    from zerotuning.tasks.hub import read_data

    source = records if shot_data is None else read_data(task, shot_data, "validation")
    return shot_candidates(task, source, arguments.shots, arguments.shot_seed, arguments.num_shot_candidates)


def _one_file_per_task(tasks: Sequence[str], files: Sequence[str] | None, option: str) -> Sequence[str | None]:
    if files is not None and len(files) != len(tasks):
        raise ZeroTuningError(f"{option} must be given once for each --task ({len(tasks)}), got {len(files)}")
    return files or [None] * len(tasks)


def _output_folder(arguments: argparse.Namespace) -> AbstractContextManager[Path]:
    """The output folder, checked before the model is loaded. Only the main process creates and locks the folder."""
    from zerotuning.models.process_group import Processes

    if not Processes().is_main_process:
        return nullcontext(Path(arguments.output))
    return result_folder(arguments.output, overwrite=arguments.overwrite, resumable=True)


def _calibrate(
    arguments: argparse.Namespace,
    candidates: list[list[Task]],
    records: list[list[Record]],
    options: CalibrationOptions,
    start: HeadScales | None,
    device: str | None,
    folder: Path,
) -> Calibration:
    from zerotuning.calibration.calibrate import calibrate
    from zerotuning.calibration.few_shot_choice import choose_shots, draw_for_candidates

    drawn = []
    for tasks, part in zip(candidates, records, strict=True):
        drawn.append(draw_for_candidates(tasks, part, options))
        check_prompts(tasks[0], part, require_label=options.objective == "task-loss" or len(tasks) > 1)
    model, tokenizer = load_placed_model(arguments, device)
    settings: dict[str, Any] = {
        "options": options,
        "start": start,
        "output": folder,
        "overwrite": arguments.overwrite,
        "progress": True,
    }
    chosen = []
    for tasks, part in zip(candidates, drawn, strict=True):
        choice = choose_shots(model, tokenizer, tasks, part, **settings)
        chosen.append(choice.task)
        _print_choice(tasks, choice)
    return calibrate(model, tokenizer, chosen, records=records, model_name=arguments.model, **settings)


def _print_choice(candidates: list[Task], choice: ShotChoice) -> None:
    from zerotuning.models.process_group import Processes

    if len(candidates) == 1 or not Processes().is_main_process:
        return
    print(f"{choice.task.name}: held-out loss of a short search with each set of few-shot examples")
    for task, loss, steps in zip(candidates, choice.losses, choice.steps, strict=True):
        name = "no shots" if task.shot_seed is None else f"--shot-seed {task.shot_seed}"
        note = "  chosen" if task is choice.task else "" if steps == max(choice.steps) else f"  after {steps} steps"
        print(f"  {name:<15} {loss:.4f}{note}")
    for note in choice.warnings:
        print(f"  warning: {note}")


def _print_calibration(calibration: Calibration, folder: Path, start: HeadScales | None) -> None:
    keeps_start = start is not None and calibration.report["free_heads"] < start.gamma.numel()
    print(_table(calibration.report, "untuned" if keeps_start else "γ = 1"))
    for note in calibration.report["warnings"]:
        print(f"  warning: {note}")
    if not calibration.improved:
        rest = "the tuned heads stay at 1, the others as --start has them" if keeps_start else "every γ stays 1"
        print(f"\nNothing better than γ = 1 was found on the held-out examples: {rest}.")
        print(f"  ({calibration.report['reason']})")
    print(f"\nIn {folder}: {', '.join(name for name in (*RESULT_FILES, TRIALS_FILE) if (folder / name).exists())}")
    if not (folder / REPORT_PAGE_FILE).exists():
        print('No plots: matplotlib is missing (pip install "zerotuning[plot]")')


def _table(report: dict[str, Any], before_name: str) -> str:
    is_error_rate = report["method"] == "paper" and report["objective"] == "task-loss"
    loss = "error rate" if is_error_rate else {"metric": "minus metric"}.get(report["objective"], report["objective"])
    before, after = report["baseline"], report["tuned"]
    return "\n".join(
        (
            f"{report['task']}: {report['method']}, {report['steps']} steps, {report['seconds']:.1f} s",
            "",
            f"  {report['held_out_examples']:4d} held-out examples{before_name:>11}     tuned",
            f"  {'accuracy':<22} {percent(before['accuracy']):>9} {percent(after['accuracy']):>9}",
            f"  {loss:<22} {before['loss']:>9.4f} {after['loss']:>9.4f}",
        )
    )
