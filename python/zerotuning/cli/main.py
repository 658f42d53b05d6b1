"""The command line (design.md §7). Bad input ends with one line on stderr and exit code 2.

torch and transformers are imported inside the commands, after whatever can be checked without them: help and
most errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from zerotuning.calibration.options import (
    COMBINATIONS,
    DEFAULT_FOLDS,
    DEFAULT_STEPS,
    LABEL_FREE_FOLDS,
    MANY_EXAMPLES,
    METHODS,
    OBJECTIVES,
    PRIORS,
    SEEDS_OF_MANY,
    STEPS_OF_MANY,
    TIES,
    CalibrationOptions,
)
from zerotuning.errors import ZeroTuningError
from zerotuning.output import (
    REPORT_PAGE_FILE,
    RESULT_FILES,
    SCALES_FILE,
    STATE_FILE,
    TRIALS_FILE,
    check_result_file,
    result_folder,
)
from zerotuning.study.names import STUDIES
from zerotuning.tasks.prompts import MOST_SHOTS, SCORINGS
from zerotuning.version import __version__

# As bench.py has them; repeated here because importing that takes seconds.
BENCHMARKS = ("attention", "decode", "calibration", "search", "sensitivity")

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without γ gets a question mark
    arguments = None
    try:
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
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
        return EXIT_BAD_INPUT


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
    return type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)


def _how_to_resume(arguments: argparse.Namespace | None) -> str:
    output = getattr(arguments, "output", None)
    grows = getattr(arguments, "command", None) in (_mt_bench_answer, _mt_bench_judge) and Path(output or "").is_file()
    if not grows and (output is None or not (Path(output) / STATE_FILE).exists()):
        return ""
    if getattr(arguments, "overwrite", False):
        return "; the same command without --overwrite resumes"
    return "; the same command resumes"


# Arguments.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ZeroTuningError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zerotuning",
        description="Better answers from a frozen language model: one number per attention head scales its "
        "attention to the initial token.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zerotuning {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, **more: Any
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False, **more
        )
        added.set_defaults(command=run)
        return added

    demo = command("demo", _demo, "calibrate the embedded model on SST-2 and measure it before and after")
    demo.add_argument(
        "--output",
        metavar="DIR",
        default="zerotuning-demo",
        help="folder of the result (default: %(default)s)",
    )
    demo.add_argument("--overwrite", action="store_true", help="replace a result in DIR")

    calibrate = command(
        "calibrate", _calibrate, "search head scales for a task; run again, an unfinished search resumes"
    )
    _add_model_and_task(calibrate, "the task's own validation sample", several=True)
    _add_prompts(calibrate, several=True)
    _add_search(calibrate)
    _add_heads(calibrate)
    calibrate.add_argument("--overwrite", action="store_true", help="replace a result in DIR, or start it anew")
    calibrate.add_argument("--output", metavar="DIR", required=True, help="folder of the result")

    evaluate = command("evaluate", _evaluate, "accuracy, loss and entropy of a model on a task")
    _add_model_and_task(evaluate, "the task's own test sample")
    _add_prompts(evaluate)
    evaluate.add_argument("--scales", metavar="DIR", help="head scales to apply (default: untuned)")
    evaluate.add_argument("--limit", metavar="N", type=_positive, help="use the first N examples (default: all)")
    evaluate.add_argument("--output", metavar="FILE.json", help="write the figures there; an existing file is replaced")

    inspect = command("inspect", _inspect, "show what a set of head scales does")
    inspect.add_argument("scales", metavar="DIR", help="folder of the head scales")
    inspect.add_argument("--plot", metavar="FILE.png", help="draw the map of γ; an existing file is replaced")

    study = command("study", _study, "measure one of the paper's findings; run again, an unfinished study goes on")
    _add_study(study)
    command(
        "lm-eval",
        _lm_eval,
        "lm-evaluation-harness's own command line, with --model zerotuning --model_args pretrained=M,scales=DIR",
        add_help=False,
        prefix_chars="\0",  # every argument is lm-eval's, --help among them
    ).add_argument("arguments", nargs="*")
    _add_mt_bench(commands.add_parser("mt-bench", help="MT-Bench: two-turn answers, their judge, an offline proxy"))

    bench = command("bench", _bench, "measure speed against other implementations, side by side")
    bench.add_argument("kind", choices=BENCHMARKS, help="what to measure")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    bench.add_argument(
        "--output", metavar="FILE", help="write the figures there, .json or .csv; an existing file is replaced"
    )
    bench.add_argument("--plot", metavar="FILE", help="draw the ratios there, .png or .svg")
    search = bench.add_argument_group("search alone")
    search.add_argument("--model", metavar="M", help="as elsewhere (default: demo)")
    search.add_argument(
        "--task", metavar="T", action="append", dest="tasks", help="repeated: these instead of all five"
    )
    search.add_argument("--method", metavar="M", action="append", dest="methods", help="repeated: these instead of all")
    search.add_argument("--examples", type=_counts, metavar="N,N,…", help="labelled examples (default: 16,64,200)")
    search.add_argument("--limit", type=_positive, metavar="N", help="test examples of each task (default: 400)")
    search.add_argument("--seeds", type=_positive, metavar="N", help="draws of the examples (default: 1)")
    search.add_argument("--batch-size", type=_positive, metavar="N", help="prompts at once (default: 64)")
    search.add_argument(
        "--shots", type=_shots, metavar="N", help="labelled examples that stand solved before each prompt (default: 4)"
    )
    search.add_argument(
        "--shot-draws",
        type=_positive,
        metavar="N",
        help="draws of them to choose among by short searches, besides none (default: 4)",
    )
    return parser


def _add_study(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    add("--size", choices=("small", "full"), default="full", help="how much is measured (default: %(default)s)")
    add("--part", metavar="P", action="append", dest="parts", default=[], help="repeated: these parts of it only")
    add("--model", metavar="M", default="demo", help="as elsewhere (default: %(default)s)")
    add("--task", metavar="T", action="append", dest="tasks", help="repeated: these tasks instead of the study's own")
    add("--seeds", type=_positive, metavar="N", help="draws of the examples (default: by size)")
    add("--examples", type=_positive, metavar="N", help="validation examples to choose on (default: by size)")
    add("--limit", type=_positive, metavar="N", help="test examples of each task (default: by size)")
    add("--batch-size", type=_positive, metavar="N", default=16, help="prompts at once (default: %(default)s)")
    add("--dtype", metavar="TYPE", help="of the weights (default: what suits the device)")
    add("--device", metavar="DEVICE", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="measure everything anew")
    add("--output", metavar="DIR", required=True, help="folder of the figures, pictures and table")


def _add_model_and_task(parser: argparse.ArgumentParser, default_data: str, several: bool = False) -> None:
    parser.add_argument(
        "--model",
        metavar="M",
        required=True,
        help="a folder, a hub name, a .gguf file, or demo for the embedded model",
    )
    action = "append" if several else "store"
    more = "; repeated: tasks tuned together, with one --data each or none" if several else ""
    parser.add_argument(
        "--task", metavar="T", required=True, action=action, help=f"a built-in task's name or a YAML file{more}"
    )
    parser.add_argument(
        "--data",
        metavar="FILE.jsonl",
        action=action,
        help="examples: JSON lines, hub for the task's data set there, or hub:owner/name[/config][:split] "
        f"(default: {default_data})",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        default=16,
        help="prompts per batch (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", metavar="TYPE", help="of the weights, such as float32 (default: what suits the device)"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    place.add_argument(
        "--device-map",
        metavar="MAP",
        help="spread the model's layers over GPUs, CPU and disk: auto, balanced or another of transformers' names",
    )
    place.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="cut the model among the processes that torchrun started, by transformers' own plan",
    )


def _add_prompts(parser: argparse.ArgumentParser, several: bool = False) -> None:
    add = parser.add_argument_group("prompts").add_argument
    action = "append" if several else "store"
    source = "the examples themselves, which lose them" if several else "the task's validation examples"
    add(
        "--shots",
        metavar="N",
        type=_shots,
        default=0,
        help=f"solved examples before each, 0 to {MOST_SHOTS} (default: 0)",
    )
    add("--shot-seed", metavar="S", type=_seed, default=0, help="of their draw (default: %(default)s)")
    if several:
        add(
            "--shot-draws",
            metavar="N",
            type=_positive,
            default=1,
            help="try the draws of N seeds from S on, and no shots, by short searches, and take the best (default: %(default)s)",
        )
    add("--shot-data", metavar="FILE.jsonl", action=action, help=f"draw them from there (default: {source})")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="make prompts a user's turns in the tokenizer's chat template (default: as the task says, else no)",
    )
    add(
        "--scoring",
        choices=SCORINGS,
        help="score labels by all their tokens, their mean, the first, or the text written (default: as the task says, else sum)",
    )
    add("--truncate", action="store_true", help="cut prompts that are too long for the model, from the left")


def _add_search(parser: argparse.ArgumentParser) -> None:
    defaults = CalibrationOptions()
    add = parser.add_argument_group("search").add_argument
    add("--method", choices=METHODS, default="gradient", help="how to search (default: %(default)s)")
    add("--objective", choices=OBJECTIVES, default="task-loss", help="what to minimise (default: %(default)s)")
    add("--examples", metavar="N", type=_positive, help="use N examples of each task (default: all)")
    add(
        "--steps",
        metavar="N",
        type=_positive,
        help=f"gradient steps (default {DEFAULT_STEPS['gradient']}, {STEPS_OF_MANY} from {MANY_EXAMPLES} examples on), or CMA-ES evaluations (default {DEFAULT_STEPS['cma-es']})",
    )
    add(
        "--seconds",
        metavar="S",
        type=_seconds,
        help="stop stepping after S seconds, those before a resumption included",
    )
    add("--seed", metavar="S", type=_seed, default=0, help="of every draw (default: %(default)s)")
    add(
        "--seeds",
        metavar="N",
        type=_positive,
        help=f"searches from seed S on, averaged (default: 1; gradient method with labels and one fold: {SEEDS_OF_MANY} from {MANY_EXAMPLES} examples on)",
    )
    add(
        "--folds",
        metavar="K",
        type=_positive,
        help=f"hold out each of K parts in turn; 1: a fifth, once (default: {DEFAULT_FOLDS}, from {MANY_EXAMPLES} examples on 1, without labels {LABEL_FREE_FOLDS}; gradient only)",
    )
    add("--combine", choices=COMBINATIONS, default=defaults.combine, help="the folds' scales (default: %(default)s)")
    add(
        "--penalty",
        metavar="P[,P…]",
        type=_numbers,
        default=defaults.penalties,
        help="toward γ = 1; of several the held-out loss chooses one (default: "
        + ",".join(f"{penalty:g}" for penalty in defaults.penalties)
        + ")",
    )
    add(
        "--prior",
        metavar="P",
        type=_prior,
        default=defaults.prior,
        help=f"classes' shares for information: {', '.join(PRIORS)} or numbers such as 0.5,0.3,0.2 (default: %(default)s)",
    )


def _add_heads(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("heads").add_argument
    add("--layers", metavar="L[,L-M…]", type=_layers, help="tune heads of these layers only, such as 0-7,12")
    add("--heads", metavar="L:H[,L:H…]", type=_pairs, help="tune these heads only, as layer:head")
    add("--exclude-heads", metavar="L:H[,L:H…]", type=_pairs, default=(), help="leave these heads as they are")
    add("--tie", choices=TIES, default="none", help="one γ for the heads of a layer, or all (default: %(default)s)")
    add("--start", metavar="DIR", help="begin with these scales; heads that are not tuned keep theirs")


def _add_mt_bench(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(metavar="PART", required=True)

    def part(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Callable[..., Any]:
        added = parts.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        added.set_defaults(command=run)
        return added.add_argument

    def add_model(add: Callable[..., Any]) -> None:
        add("--model", metavar="M", required=True, help="a folder, a hub name, a .gguf file, or demo")
        add("--scales", metavar="DIR", help="head scales to apply (default: untuned)")
        add("--dtype", metavar="TYPE", help="of the weights, such as float32 (default: what suits the device)")
        add("--device", metavar="DEVICE", help="such as cpu or cuda:0 (default: a GPU if there is one)")
        add("--device-map", metavar="MAP", help="in its place: spread the layers over GPUs, CPU and disk, such as auto")

    add = part(
        "answer", _mt_bench_answer, "answer both turns of each question; run again, an unfinished file is gone on with"
    )
    add_model(add)
    add("--model-id", metavar="NAME", help="the model's name in the file (default: from --model and --scales)")
    add("--limit", metavar="N", type=_positive, help="the first N questions (default: all 80)")
    add("--max-new-tokens", metavar="N", type=_positive, default=1024, help="of each turn (default: %(default)s)")
    add("--temperature", metavar="T", type=_temperature, default=0.0, help="above 0: sample (default: greedy)")
    add("--top-p", metavar="P", type=_share, default=1.0, help="sample from the likeliest that have this probability")
    add("--top-k", metavar="K", type=_positive, default=0, help="sample from the K likeliest tokens")
    add("--seed", metavar="S", type=_seed, default=0, help="of the draws (default: %(default)s)")
    add("--batch-size", metavar="N", type=_positive, default=8, help="questions at once (default: %(default)s)")
    add("--overwrite", action="store_true", help="start FILE anew")
    add("--output", metavar="FILE.jsonl", required=True, help="answers in FastChat's format")

    add = part("judge", _mt_bench_judge, "score answers from 1 to 10 by a model behind an OpenAI-compatible endpoint")
    add("--answers", metavar="FILE.jsonl", required=True, help="in FastChat's format")
    add("--base-url", metavar="URL", required=True, help="of the endpoint, such as http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", required=True, help="as the endpoint names it")
    add("--api-key-env", metavar="VAR", help="environment variable with the key (default: OPENAI_API_KEY, if set)")
    add("--prompts", metavar="FILE.jsonl", help="FastChat's judge_prompts.jsonl, for its wording (default: our own)")
    add(
        "--references",
        metavar="FILE.jsonl",
        help="reference answers for math, reasoning and coding, as FastChat has them",
    )
    add("--overwrite", action="store_true", help="start FILE anew")
    add("--output", metavar="FILE.jsonl", required=True, help="judgments in FastChat's format")

    add = part(
        "proxy", _mt_bench_proxy, "log-likelihood and entropy of answers under a model: a proxy, no judgment of quality"
    )
    add("--answers", metavar="FILE.jsonl", required=True, help="in FastChat's format")
    add_model(add)
    add("--output", metavar="FILE.json", help="write the figures there; an existing file is replaced")


def _temperature(text: str) -> float:
    return _number(text, "a number of at least 0", lambda value: 0 <= value < float("inf"))


def _share(text: str) -> float:
    return _number(text, "above 0 and at most 1", lambda value: 0 < value <= 1)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def _shots(text: str) -> int:
    if not text.isdecimal() or not int(text) <= MOST_SHOTS:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {MOST_SHOTS}, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    return _number(text, "a positive number of seconds", lambda value: 0 < value < float("inf"))


def _number(text: str, expected: str, is_good: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_good(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value


def _counts(text: str) -> list[int]:
    """16,64,200 -> whole numbers."""
    return [_positive(part) for part in text.split(",")]


def _numbers(text: str) -> tuple[float, ...]:
    expected = "numbers of at least 0 with commas between"
    return tuple(_number(part, expected, lambda value: 0 <= value < float("inf")) for part in text.split(","))


def _prior(text: str) -> str | tuple[float, ...]:
    if text in PRIORS:
        return text
    expected = f"{' or '.join(PRIORS)}, or positive numbers with commas between"
    return tuple(_number(part, expected, lambda value: 0 < value < float("inf")) for part in text.split(","))


def _layers(text: str) -> tuple[int, ...]:
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**6):
            raise argparse.ArgumentTypeError(f"must be layers such as 0-7,12, got {text!r}")
        layers.extend(range(int(first), int(last) + 1))
    return tuple(layers)


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    pairs = []
    for part in text.split(","):
        layer, _, head = part.partition(":")
        if not (layer.isdecimal() and head.isdecimal()):
            raise argparse.ArgumentTypeError(f"must be layer:head pairs such as 3:0,12:8, got {text!r}")
        pairs.append((int(layer), int(head)))
    return tuple(pairs)


# Commands.


def _demo(arguments: argparse.Namespace) -> None:
    from zerotuning.demo import run_demo

    run_demo(arguments.output, overwrite=arguments.overwrite)


def _calibrate(arguments: argparse.Namespace) -> None:
    candidates, records = _candidates_and_records(arguments)
    options = {
        name: getattr(arguments, name) for name in CalibrationOptions.__dataclass_fields__ if hasattr(arguments, name)
    } | {"penalties": arguments.penalty}
    chosen = CalibrationOptions(**options)
    start = None if arguments.start is None else _scales(arguments.start)
    from zerotuning.models.process_group import Processes

    with _joined(arguments, share_examples=True) as device:
        with _calibration_folder(arguments) as folder:
            calibration = _calibrated(arguments, candidates, records, options, chosen, start, device, folder)
        if Processes().is_main_process:
            _print_calibration(calibration, folder, start)


def _calibrated(
    arguments: argparse.Namespace,
    candidates: list[list[Any]],
    records: list[list[Any]],
    options: dict[str, Any],
    chosen: CalibrationOptions,
    start: Any,
    device: str | None,
    folder: Path,
) -> Any:
    from zerotuning.calibration.calibrate import calibrate
    from zerotuning.calibration.few_shot_choice import choose_shots, judging_examples
    from zerotuning.calibration.folds import draw_examples

    drawn = []
    for several, part in zip(candidates, records, strict=True):
        left = [_without_shots(task, part) for task in several]
        draw_examples(min(left, key=len), chosen)
        drawn.append(draw_examples(part, chosen))
        if len(several) > 1:
            judging_examples(several, drawn[-1])
        _check_records(several[0], part, require_label=chosen.objective == "task-loss" or len(several) > 1)
    model, tokenizer = _loaded(arguments, device)
    given = {"start": start, "output": folder, "overwrite": arguments.overwrite, "progress": True, **options}
    tasks = []
    for several, part in zip(candidates, drawn, strict=True):
        choice = choose_shots(model, tokenizer, several, part, **given)
        tasks.append(choice.task)
        _print_choice(several, choice)
    return calibrate(model, tokenizer, tasks, records=records, model_name=arguments.model, **given)


def _print_choice(candidates: list[Any], choice: Any) -> None:
    from zerotuning.models.process_group import Processes

    if len(candidates) == 1 or not Processes().is_main_process:
        return
    print(f"{choice.task.name}: held-out loss of a short search behind shots")
    for task, loss, steps in zip(candidates, choice.losses, choice.steps, strict=True):
        name = "no shots" if task.shot_seed is None else f"--shot-seed {task.shot_seed}"
        note = "  taken" if task is choice.task else "" if steps == max(choice.steps) else f"  after {steps} steps"
        print(f"  {name:<15} {loss:.4f}{note}")
    for note in choice.setbacks:
        print(f"  survived: {note}")


def _loaded(arguments: argparse.Namespace, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, placed as the arguments say."""
    from zerotuning.models.loading import load_model

    return load_model(arguments.model, arguments.dtype, device, arguments.device_map, arguments.tensor_parallel)


@contextmanager
def _joined(arguments: argparse.Namespace, *, share_examples: bool) -> Iterator[str | None]:
    """Within it this process works with those that torchrun started beside it, to share examples or a model; gives the
    device that its model goes to, None where it is placed otherwise."""
    from zerotuning.models import process_group

    several = process_group.is_one_of_several()
    if several and arguments.device_map is not None:
        raise ZeroTuningError("--device-map spreads the model of one process, torchrun started several")
    try:
        if arguments.tensor_parallel:
            from zerotuning.models.tensor_parallel import join_processes

            join_processes()
            yield None
        else:
            yield process_group.join(arguments.device) if several and share_examples else arguments.device
    finally:
        process_group.leave()


def _calibration_folder(arguments: argparse.Namespace) -> Any:
    """The output folder, checked before the model is loaded; of several processes by the first."""
    from zerotuning.models.process_group import Processes

    if not Processes().is_main_process:
        return nullcontext(Path(arguments.output))
    return result_folder(arguments.output, overwrite=arguments.overwrite, resumable=True)


def _print_calibration(calibration: Any, folder: Path, start: Any) -> None:
    keeps_start = start is not None and calibration.report["free_heads"] < start.gamma.numel()
    print(_calibration_table(calibration.report, "untuned" if keeps_start else "γ = 1"))
    for note in calibration.report["setbacks"]:
        print(f"  survived: {note}")
    if not calibration.improved:
        rest = "the tuned heads stay at 1, the others as --start has them" if keeps_start else "every γ stays 1"
        print(f"\nNothing better than γ = 1 was found on the held-out examples: {rest}.")
        print(f"  ({calibration.report['reason']})")
    print(f"\nIn {folder}: {', '.join(name for name in (*RESULT_FILES, TRIALS_FILE) if (folder / name).exists())}")
    if not (folder / REPORT_PAGE_FILE).exists():
        print('No plots: matplotlib is missing (pip install "zerotuning[plot]")')


def _evaluate(arguments: argparse.Namespace) -> None:
    task, records = _task_and_records(arguments, "test")
    from zerotuning.tasks.task import first_examples

    records = first_examples(records, arguments.limit)
    task = _with_shots(arguments, task, records)
    _check_records(task, records, require_label=True)
    output = None if arguments.output is None else check_result_file(arguments.output)
    scales = None if arguments.scales is None else _scales(arguments.scales)
    from zerotuning.models.process_group import Processes

    with _joined(arguments, share_examples=False) as device:
        found = _evaluated(arguments, task, records, scales, device)
        processes = Processes()
        if processes.is_main_process:
            _report_evaluation(arguments, found, output)
        processes.wait_for_main()


def _evaluated(arguments: argparse.Namespace, task: Any, records: list[Any], scales: Any, device: str | None) -> Any:
    from zerotuning.evaluation.evaluate import evaluate
    from zerotuning.models.process_group import Processes
    from zerotuning.patching.scaled_model import apply_scales_to

    model, tokenizer = _loaded(arguments, device)
    if scales is not None:
        apply_scales_to(model, scales, arguments.model, arguments.scales)
    options = {name: getattr(arguments, name) for name in ("batch_size", "truncate")}
    return evaluate(model, tokenizer, task, records, **options, progress=Processes().is_main_process)


def _report_evaluation(arguments: argparse.Namespace, found: Any, output: Path | None) -> None:
    from zerotuning.files import write_json_atomically

    applied = arguments.scales or "none (γ = 1)"
    print(f"{found.task}, {found.examples} examples, model {arguments.model}, scales {applied}\n")
    print("  accuracy     loss   entropy   seconds")
    loss, entropy = ("–" if value is None else f"{value:.4f}" for value in (found.loss, found.entropy))
    print(f"  {_percent(found.accuracy):>8}  {loss:>7}   {entropy:>7}  {found.seconds:8.1f}")
    if output is not None:  # last: what cannot be written was shown
        figures = {
            **found.to_json(),
            "model": arguments.model,
            "scales": arguments.scales,
            "version": __version__,
        }
        write_json_atomically(output, figures)


def _inspect(arguments: argparse.Namespace) -> None:
    from zerotuning.plots.head_map import head_table, plot_head_map
    from zerotuning.plots.style import PICTURE_SUFFIXES

    if arguments.plot is not None:
        check_result_file(arguments.plot, suffixes=PICTURE_SUFFIXES)
    scales = _scales(arguments.scales)
    if arguments.plot is not None:
        plot_head_map(scales, arguments.plot)
    print("\n".join(_metadata_lines(arguments.scales, scales)) + "\n")
    print(head_table(scales))


def _study(arguments: argparse.Namespace) -> None:
    from zerotuning.study.runner import run_study
    from zerotuning.study.setting import Setting

    names = ("model", "dtype", "device", "size", "tasks", "seeds", "examples", "limit", "parts", "batch_size")
    setting = Setting(**{name: getattr(arguments, name) for name in names})
    result = run_study(arguments.name, setting, arguments.output, overwrite=arguments.overwrite, progress=True)
    print(result.table)
    print(f"\nIn {arguments.output}: {', '.join(path.name for path in result.files)}")


def _bench(arguments: argparse.Namespace) -> None:
    output, plot = (None if path is None else check_result_file(path) for path in (arguments.output, arguments.plot))
    from zerotuning.bench.runner import run_bench

    names = ("model", "tasks", "methods", "examples", "limit", "seeds", "batch_size", "shots", "shot_draws")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if options and arguments.kind != "search":
        raise ZeroTuningError(f"{', '.join(options)}: for bench search alone, got bench {arguments.kind}")
    run_bench(arguments.kind, output, arguments.device, plot, **options)


def _lm_eval(arguments: argparse.Namespace) -> None:
    from zerotuning.lm_evaluation import run_lm_eval

    run_lm_eval(arguments.arguments)


def _mt_bench_answer(arguments: argparse.Namespace) -> None:
    scales = None if arguments.scales is None else _scales(arguments.scales)
    from zerotuning.mt_bench.answers import AnswerFile, Decoding, answer_questions, answer_settings
    from zerotuning.mt_bench.questions import load_questions
    from zerotuning.patching.scaled_model import load_scaled_model

    decoding = Decoding(**{name: getattr(arguments, name) for name in Decoding.__dataclass_fields__})
    names = [Path(name).name for name in (arguments.model, arguments.scales) if name is not None]
    model_id = arguments.model_id or "+".join(names)
    settings = answer_settings(arguments.model, model_id, scales, arguments.dtype, decoding)
    file = AnswerFile(arguments.output, settings, load_questions(arguments.limit), overwrite=arguments.overwrite)
    model, tokenizer = load_scaled_model(
        arguments.model, arguments.scales, arguments.dtype, arguments.device, arguments.device_map
    )
    answer_questions(model, tokenizer, file, decoding, progress=True)
    print(f"{len(file.answers)} answers of {model_id}, two turns each, in {file.path}")


def _mt_bench_judge(arguments: argparse.Namespace) -> None:
    from zerotuning.mt_bench import judge as judging
    from zerotuning.mt_bench.judge_prompts import JudgePrompts
    from zerotuning.mt_bench.means import table
    from zerotuning.mt_bench.questions import read_answers

    answers = read_answers(arguments.answers)
    prompts = JudgePrompts(arguments.prompts, arguments.references)
    judge = judging.Judge(arguments.base_url, arguments.judge_model, api_key_env=arguments.api_key_env)
    file = judging.JudgmentFile(
        arguments.output, arguments.judge_model, answers, prompts, overwrite=arguments.overwrite
    )
    path = judging.judge_answers(judge, file, progress=True)
    found = judging.summarise(path)
    print(f"{found['judgments']} judgments by {arguments.judge_model} in {path}\n\n{table(found)}\n")
    print(
        f"  {found['failures']} without a score (-1), left out of the means; failed requests are made again on resuming"
    )
    plain = judging.without_reference(answers, prompts)
    if plain:
        print(f"  {plain} answers on math, reasoning and coding were judged without a reference answer (--references)")


def _mt_bench_proxy(arguments: argparse.Namespace) -> None:
    from zerotuning.mt_bench.means import table
    from zerotuning.mt_bench.questions import read_answers

    answers = read_answers(arguments.answers)
    output = None if arguments.output is None else check_result_file(arguments.output)
    if arguments.scales is not None:
        _scales(arguments.scales)
    from zerotuning.files import write_json_atomically
    from zerotuning.mt_bench.proxy import measure_proxy
    from zerotuning.patching.scaled_model import load_scaled_model

    model, tokenizer = load_scaled_model(
        arguments.model, arguments.scales, arguments.dtype, arguments.device, arguments.device_map
    )
    found = measure_proxy(model, tokenizer, answers, progress=True)
    print(
        f"Proxy: {found['proxy']}\nmodel {arguments.model}, scales {arguments.scales or 'none (γ = 1)'}\n\n{table(found)}"
    )
    if output is not None:
        of = {"answers_file": arguments.answers, "model": arguments.model, "scales": arguments.scales}
        write_json_atomically(output, {**found, **of, "version": __version__})


# What the commands share.


def _candidates_and_records(arguments: argparse.Namespace) -> tuple[list[list[Any]], list[list[Any]]]:
    """Of `--task` and `--data` given once or several times; each task behind every draw of its shots."""
    files = _one_each(arguments.task, arguments.data, "--data")
    shot_files = _one_each(arguments.task, arguments.shot_data, "--shot-data")
    if arguments.shot_draws > 1 and not arguments.shots:
        raise ZeroTuningError(f"--shot-draws {arguments.shot_draws} are draws of --shots, which are 0")
    candidates, records = [], []
    for name, file, shot_file in zip(arguments.task, files, shot_files, strict=True):
        one = argparse.Namespace(**vars(arguments) | {"task": name, "data": file, "shot_data": shot_file})
        task, part = _task_and_records(one, "validation")
        candidates.append(_behind_shots(one, task, part))
        records.append(part)
    return candidates, records


def _one_each(tasks: Sequence[str], files: Sequence[str] | None, option: str) -> Sequence[str | None]:
    if files is not None and len(files) != len(tasks):
        raise ZeroTuningError(f"{option} must come once for each --task ({len(tasks)}), got {len(files)}")
    return files or [None] * len(tasks)


def _task_and_records(arguments: argparse.Namespace, split: str) -> tuple[Any, list[Any]]:
    from dataclasses import replace

    from zerotuning.tasks.hub import read_data
    from zerotuning.tasks.task import Task

    task = Task.load(arguments.task)
    changes = {name: value for name in ("chat", "scoring") if (value := getattr(arguments, name)) is not None}
    task = replace(task, **changes)
    if arguments.data is not None:
        return task, read_data(task, arguments.data, split)
    if not task.builtin:
        raise ZeroTuningError(f"task {task.name!r} has no examples of its own: name a JSON lines file with --data")
    return task, task.examples(split, None)


def _behind_shots(arguments: argparse.Namespace, task: Any, records: list[Any]) -> list[Any]:
    """The task behind each draw of shots."""
    if not arguments.shots:
        return [task]
    from zerotuning.calibration.few_shot_choice import shot_candidates
    from zerotuning.tasks.hub import read_data

    source = records if arguments.shot_data is None else read_data(task, arguments.shot_data, "validation")
    return shot_candidates(task, source, arguments.shots, arguments.shot_seed, arguments.shot_draws)


def _without_shots(task: Any, records: list[Any]) -> list[Any]:
    """The records that are none of the task's shots, enough of them."""
    from zerotuning.calibration.folds import LEAST_EXAMPLES
    from zerotuning.tasks.few_shot import without_shots

    left = without_shots(task, records)
    if task.shots and len(left) < LEAST_EXAMPLES:
        raise ZeroTuningError(
            f"shots {len(task.shots)} leave {len(left)} of {len(records)} examples of task {task.name!r}, "
            f"calibration needs at least {LEAST_EXAMPLES}: fewer shots or --shot-data"
        )
    return left


def _with_shots(arguments: argparse.Namespace, task: Any, records: list[Any]) -> Any:
    """The task with shots that are none of the records to be evaluated."""
    if not arguments.shots:
        return task
    from zerotuning.tasks.few_shot import draw_shots, without_prompts_of
    from zerotuning.tasks.hub import is_hub_name, read_data, without_split

    source = arguments.shot_data
    if source is None and is_hub_name(arguments.data):
        source = without_split(arguments.data)
    if source is None and not task.has_examples:
        raise ZeroTuningError(f"shots of task {task.name!r} need examples to draw from: name a file with --shot-data")
    known = task.examples("validation") if source is None else read_data(task, source, "validation")
    candidates = without_prompts_of(task, known, records)
    return task.with_shots(draw_shots(task, candidates, arguments.shots, arguments.shot_seed))


def _check_records(task: Any, records: Sequence[Any], *, require_label: bool) -> None:
    """Renders every prompt, so that a bad line is found before the model is loaded."""
    for record in records:
        task.render(record, require_label=require_label)


def _scales(name: str) -> Any:
    """The head scales of a folder, or of a repository owner/name of the hub."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ZeroTuningError(f"scales {name} must be a folder, got a file")
    if not folder.exists() and name.count("/") != 1:
        raise ZeroTuningError(f"scales folder {name} does not exist")
    if (folder / STATE_FILE).exists() and not (folder / SCALES_FILE).exists():
        raise ZeroTuningError(f"scales {name}: the calibration there is unfinished; its command, run again, resumes it")
    from zerotuning.patching.head_scales import HeadScales

    return HeadScales.from_pretrained(name)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _calibration_table(report: dict[str, Any], before_name: str) -> str:
    by_errors = report["method"] == "paper" and report["objective"] == "task-loss"
    loss = "error rate" if by_errors else {"metric": "minus metric"}.get(report["objective"], report["objective"])
    before, after = report["baseline"], report["tuned"]
    return "\n".join(
        (
            f"{report['task']}: {report['method']}, {report['steps']} steps, {report['seconds']:.1f} s",
            "",
            f"  {report['held_out_examples']:4d} held-out examples{before_name:>11}     tuned",
            f"  {'accuracy':<22} {_percent(before['accuracy']):>9} {_percent(after['accuracy']):>9}",
            f"  {loss:<22} {before['loss']:>9.4f} {after['loss']:>9.4f}",
        )
    )


def _metadata_lines(folder: str, scales: Any) -> list[str]:
    known = scales.metadata
    model = " · ".join(str(known[name]) for name in ("model_type", "model_name") if known.get(name))
    lines = [f"{'scales':<12}{folder}", f"{'model':<12}{model or 'not named'}"]
    for name in ("task", "method", "objective"):
        if known.get(name):
            lines.append(f"{name:<12}{known[name]}")
    lines.append(f"{'shape':<12}{scales.num_layers} layers × {scales.num_heads} heads")
    return lines + _held_out_lines(known.get("calibration"))


def _held_out_lines(calibration: Any) -> list[str]:
    """The calibration's figures, where the metadata hold such."""
    try:
        before, after = calibration["baseline"], calibration["tuned"]
        examples = int(calibration["held_out_examples"])
        accuracy = f"accuracy {_percent(before['accuracy'])} → {_percent(after['accuracy'])}, "
        loss = f"loss {before['loss']:.4f} → {after['loss']:.4f}"
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return [f"{'held out':<12}{examples} examples: {accuracy if before['accuracy'] is not None else ''}{loss}"]
