"""Parts of all commands' parsers: the parser class, the types of arguments, groups of arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from zerotuning.calibration.options import PRIORS
from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.prompts import MAX_SHOTS, SCORINGS

Run = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ZeroTuningErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise the message instead of printing usage and leaving the process."""
        raise ZeroTuningError(f"{message} (see {self.prog} --help)")


def add_command(commands: Any, name: str, run: Run, help: str, **settings: Any) -> argparse.ArgumentParser:
    """Add a command to a parser's subparsers.

    Args:
        commands: The result of `add_subparsers`.
        name: The command's name.
        run: The function that carries the command out.
        help: One line without a capital letter and a full stop; the command's own help shows it as a sentence.
        settings: Further arguments of `add_parser`.

    Returns:
        The command's parser.
    """
    description = help[0].upper() + help[1:] + "."
    parser = commands.add_parser(name, help=help, description=description, allow_abbrev=False, **settings)
    parser.set_defaults(run=run)
    return parser


class RenamedOption(argparse.Action):
    """The old name of an option, kept for one version. The help omits it; its use warns and gives the new name."""

    def __init__(self, option_strings: Sequence[str], dest: str, new_name: str, **settings: Any) -> None:
        """Store into `dest`, as the option `new_name` does."""
        super().__init__(option_strings, dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)
        self.new_name = new_name

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value and print a warning."""
        print(f"zerotuning: warning: {option} is now called {self.new_name}", file=sys.stderr)
        setattr(namespace, self.dest, values)


# Groups of arguments.


def add_model_and_task(parser: argparse.ArgumentParser, default_data: str, *, several_tasks: bool = False) -> None:
    """Add --model, --task, --data, --batch-size, --dtype and the options of the model's placement.

    Args:
        parser: The command's parser.
        default_data: The examples that are used without --data, for the help.
        several_tasks: Whether --task and --data may be given several times.
    """
    add = parser.add_argument
    action = "append" if several_tasks else "store"
    repeated = "; given several times, the tasks are tuned together" if several_tasks else ""
    add(
        "--model",
        metavar="MODEL",
        required=True,
        help="a local folder, a name on the Hugging Face hub, a .gguf file, or demo for SmolLM2-135M-Instruct",
    )
    add(
        "--task",
        metavar="TASK",
        required=True,
        action=action,
        help=f"the name of a built-in task or the path of a YAML file{repeated}",
    )
    add(
        "--data",
        metavar="FILE.jsonl",
        action=action,
        help="the examples: a JSON lines file, hub for the built-in task's data set on the Hugging Face hub, or "
        f"hub:owner/name[/config][:split] (default: {default_data}){'; once for each --task' if several_tasks else ''}",
    )
    add_batch_size(parser)
    add_dtype(parser)
    placement = parser.add_mutually_exclusive_group()
    placement.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    placement.add_argument("--device-map", metavar="MAP", help=DEVICE_MAP_HELP)
    placement.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="split every layer over the processes that torchrun started, by transformers' own plan",
    )


DEVICE_HELP = "a torch device such as cpu or cuda:0 (default: a GPU if there is one)"
DEVICE_MAP_HELP = "spread the layers over GPUs, CPU and disk: auto, balanced or another name that transformers accepts"


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Add --batch-size."""
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive_int,
        default=16,
        help="number of prompts in one forward pass (default: %(default)s)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add --dtype."""
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="data type of the weights: float16, bfloat16, float32 or float64 (default: the fastest on the device)",
    )


def add_prompts(parser: argparse.ArgumentParser, *, several_tasks: bool = False) -> Callable[..., Any]:
    """Add the group "prompts": few-shot examples, chat templates, scoring and truncation.

    Args:
        parser: The command's parser.
        several_tasks: Whether --task, and so --shot-data, may be given several times.

    Returns:
        The group's `add_argument`.
    """
    add = parser.add_argument_group("prompts").add_argument
    source = (
        "the calibration's own examples, which the search then leaves out"
        if several_tasks
        else "the task's validation examples"
    )
    add(
        "--shots",
        metavar="N",
        type=shot_count,
        default=0,
        help=f"number of few-shot examples, with their answers, in front of each prompt: 0 to {MAX_SHOTS} (default: 0)",
    )
    add(
        "--shot-seed",
        metavar="SEED",
        type=non_negative_int,
        default=0,
        help="seed of the random choice of few-shot examples (default: %(default)s)",
    )
    add(
        "--shot-data",
        metavar="FILE.jsonl",
        action="append" if several_tasks else "store",
        help=f"where few-shot examples are chosen from, in the same form as --data (default: {source})",
    )
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="write each prompt as a user's turn in the tokenizer's chat template (default: the task's own setting)",
    )
    add(
        "--scoring",
        choices=SCORINGS,
        help="how a label is scored: by the sum or the mean of its tokens' log-probabilities, by its first "
        "token's log-probability, or by whether the generated text begins with the label (default: the task's own "
        "setting, else sum)",
    )
    add(
        "--truncate",
        action="store_true",
        help="shorten prompts that exceed the model's context from the left, whole few-shot examples first "
        "(default: such a prompt is an error)",
    )
    return add


# Types of arguments. Each function parses the text of an argument and raises ArgumentTypeError if the text is wrong.


def positive_int(text: str) -> int:
    """Parse an integer from 1 on."""
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse an integer from 0 on, such as a seed."""
    if not text.isdecimal() or not int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def shot_count(text: str) -> int:
    """Parse a number of few-shot examples."""
    if not text.isdecimal() or not int(text) <= MAX_SHOTS:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {MAX_SHOTS}, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    return _number(text, "a positive number of seconds", lambda value: 0 < value < float("inf"))


def temperature(text: str) -> float:
    """Parse a sampling temperature."""
    return _number(text, "a number of at least 0", lambda value: 0 <= value < float("inf"))


def probability(text: str) -> float:
    """Parse a probability above 0."""
    return _number(text, "above 0 and at most 1", lambda value: 0 < value <= 1)


def positive_ints(text: str) -> list[int]:
    """Parse integers with commas between, such as 16,64,200."""
    return [positive_int(part) for part in text.split(",")]


def non_negative_numbers(text: str) -> tuple[float, ...]:
    """Parse numbers from 0 on with commas between, such as 0,1e-3."""
    expected = "numbers of at least 0 with commas between"
    return tuple(_number(part, expected, lambda value: 0 <= value < float("inf")) for part in text.split(","))


def prior(text: str) -> str | tuple[float, ...]:
    """Parse a name of PRIORS or positive numbers with commas between."""
    if text in PRIORS:
        return text
    expected = f"{' or '.join(PRIORS)}, or positive numbers with commas between"
    return tuple(_number(part, expected, lambda value: 0 < value < float("inf")) for part in text.split(","))


def layers(text: str) -> tuple[int, ...]:
    """Parse layers and ranges of layers, such as 0-7,12."""
    result: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10**6):
            raise argparse.ArgumentTypeError(f"must be layers such as 0-7,12, got {text!r}")
        result.extend(range(int(first), int(last) + 1))
    return tuple(result)


def layer_head_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Parse layer:head pairs, such as 3:0,12:8."""
    pairs = []
    for part in text.split(","):
        layer, _, head = part.partition(":")
        if not (layer.isdecimal() and head.isdecimal()):
            raise argparse.ArgumentTypeError(f"must be layer:head pairs such as 3:0,12:8, got {text!r}")
        pairs.append((int(layer), int(head)))
    return tuple(pairs)


def _number(text: str, expected: str, is_valid: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_valid(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value
