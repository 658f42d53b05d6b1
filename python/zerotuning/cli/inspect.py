"""`zerotuning inspect`: the origin of a set of head scales, the heads with the largest changes, and a map."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from zerotuning.cli.arguments import add_command
from zerotuning.cli.inputs import percent, read_scales
from zerotuning.output import check_result_file

if TYPE_CHECKING:
    from zerotuning.patching.head_scales import HeadScales


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    parser = add_command(
        commands,
        "inspect",
        run,
        "show where head scales come from and which heads they change most",
        epilog="example: zerotuning inspect sst2-scales --plot heads.png",
    )
    parser.add_argument("scales", metavar="DIR", help="folder of the head scales")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the map of γ to this .png, .svg or .pdf file; an existing file is replaced"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out."""
    from zerotuning.plots.head_map import head_table, plot_head_map
    from zerotuning.plots.style import PICTURE_SUFFIXES

    if arguments.plot is not None:
        check_result_file(arguments.plot, suffixes=PICTURE_SUFFIXES)
    scales = read_scales(arguments.scales)
    if arguments.plot is not None:
        plot_head_map(scales, arguments.plot)
    print("\n".join(_metadata_lines(arguments.scales, scales)) + "\n")
    print(head_table(scales))


def _metadata_lines(folder: str, scales: HeadScales) -> list[str]:
    metadata = scales.metadata
    model = " · ".join(str(metadata[name]) for name in ("model_type", "model_name") if metadata.get(name))
    lines = [f"{'scales':<12}{folder}", f"{'model':<12}{model or 'not named'}"]
    for name in ("task", "method", "objective"):
        if metadata.get(name):
            lines.append(f"{name:<12}{metadata[name]}")
    lines.append(f"{'shape':<12}{scales.num_layers} layers × {scales.num_heads} heads")
    return lines + _held_out_lines(metadata.get("calibration"))


def _held_out_lines(calibration: Any) -> list[str]:
    """The calibration's figures on held-out examples; no line where the metadata have none."""
    try:
        before, after = calibration["baseline"], calibration["tuned"]
        examples = int(calibration["held_out_examples"])
        accuracy = f"accuracy {percent(before['accuracy'])} → {percent(after['accuracy'])}, "
        loss = f"loss {before['loss']:.4f} → {after['loss']:.4f}"
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return [f"{'held out':<12}{examples} examples: {accuracy if before['accuracy'] is not None else ''}{loss}"]
