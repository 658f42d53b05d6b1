"""`zerotuning mt-bench`: answers to MT-Bench's questions, their judgment by another model, and an offline proxy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zerotuning.cli.arguments import (
    DEVICE_HELP,
    DEVICE_MAP_HELP,
    add_command,
    add_dtype,
    non_negative_int,
    positive_int,
    probability,
    temperature,
)
from zerotuning.cli.inputs import read_scales
from zerotuning.output import check_result_file
from zerotuning.version import __version__


def add_to(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    help = "answer MT-Bench's two-turn questions, have the answers judged, or measure an offline proxy"
    parser = commands.add_parser("mt-bench", help=help, description=help[0].upper() + help[1:] + ".")
    parts = parser.add_subparsers(metavar="PART", required=True)
    _add_answer(parts)
    _add_judge(parts)
    _add_proxy(parts)


def _add_answer(parts: Any) -> None:
    parser = add_command(
        parts, "answer", run_answer, "answer both turns of each question; the same command resumes an unfinished file"
    )
    parser.set_defaults(is_resumable=_has_output_file)
    _add_model(parser)
    add = parser.add_argument
    add("--model-id", metavar="NAME", help="the model's name in the file (default: the names of --model and --scales)")
    add("--limit", metavar="N", type=positive_int, help="use the first N questions (default: all 80)")
    add(
        "--max-new-tokens",
        metavar="N",
        type=positive_int,
        default=1024,
        help="longest answer of a turn, in tokens (default: %(default)s)",
    )
    add(
        "--temperature",
        metavar="T",
        type=temperature,
        default=0.0,
        help="sampling temperature; 0 is greedy decoding (default: 0)",
    )
    add(
        "--top-p",
        metavar="P",
        type=probability,
        default=1.0,
        help="sample from the likeliest tokens that together have the probability P (default: 1, all tokens)",
    )
    add(
        "--top-k",
        metavar="K",
        type=positive_int,
        default=0,
        help="sample from the K likeliest tokens (default: all tokens)",
    )
    add("--seed", metavar="SEED", type=non_negative_int, default=0, help="seed of the sampling (default: %(default)s)")
    add(
        "--batch-size",
        metavar="N",
        type=positive_int,
        default=8,
        help="number of questions answered together (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="discard the answers in FILE.jsonl and start again")
    add("--output", metavar="FILE.jsonl", required=True, help="write the answers to this file, in FastChat's format")


def _add_judge(parts: Any) -> None:
    parser = add_command(
        parts, "judge", run_judge, "score answers from 1 to 10 with a model behind an OpenAI-compatible endpoint"
    )
    parser.set_defaults(is_resumable=_has_output_file)
    add = parser.add_argument
    add("--answers", metavar="FILE.jsonl", required=True, help="the answers, in FastChat's format")
    add("--base-url", metavar="URL", required=True, help="the endpoint, such as http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", required=True, help="the judging model's name at the endpoint")
    add(
        "--api-key-env",
        metavar="VARIABLE",
        help="environment variable that holds the endpoint's key (default: OPENAI_API_KEY, if that variable is set)",
    )
    add(
        "--prompts",
        metavar="FILE.jsonl",
        help="FastChat's judge_prompts.jsonl, for scores comparable with published ones (default: our own wording)",
    )
    add(
        "--references",
        metavar="FILE.jsonl",
        help="reference answers to the questions on math, reasoning and coding, in FastChat's format (default: none)",
    )
    add("--overwrite", action="store_true", help="discard the judgments in FILE.jsonl and start again")
    add("--output", metavar="FILE.jsonl", required=True, help="write the judgments to this file, in FastChat's format")


def _add_proxy(parts: Any) -> None:
    parser = add_command(
        parts,
        "proxy",
        run_proxy,
        "measure log-likelihood and entropy of answers under a model: a proxy, no judgment of quality",
    )
    add = parser.add_argument
    add("--answers", metavar="FILE.jsonl", required=True, help="the answers, in FastChat's format")
    _add_model(parser)
    add("--output", metavar="FILE.json", help="write the figures to this file; an existing file is replaced")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        required=True,
        help="a local folder, a name on the Hugging Face hub, a .gguf file, or demo",
    )
    add("--scales", metavar="DIR", help="folder of the head scales to apply (default: none, the untuned model)")
    add_dtype(parser)
    add("--device", metavar="DEVICE", help=DEVICE_HELP)
    add("--device-map", metavar="MAP", help=f"instead of --device: {DEVICE_MAP_HELP}")


def _has_output_file(arguments: argparse.Namespace) -> bool:
    return Path(arguments.output).is_file()


def run_answer(arguments: argparse.Namespace) -> None:
    """Carry out `mt-bench answer`."""
    scales = None if arguments.scales is None else read_scales(arguments.scales)
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


def run_judge(arguments: argparse.Namespace) -> None:
    """Carry out `mt-bench judge`."""
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
    summary = judging.summarise(path)
    print(f"{summary['judgments']} judgments by {arguments.judge_model} in {path}\n\n{table(summary)}\n")
    print(
        f"  {summary['failures']} without a score (-1), left out of the means; "
        "failed requests are made again on resuming"
    )
    plain = judging.without_reference(answers, prompts)
    if plain:
        print(f"  {plain} answers on math, reasoning and coding were judged without a reference answer (--references)")


def run_proxy(arguments: argparse.Namespace) -> None:
    """Carry out `mt-bench proxy`."""
    from zerotuning.mt_bench.means import table
    from zerotuning.mt_bench.questions import read_answers

    answers = read_answers(arguments.answers)
    output = None if arguments.output is None else check_result_file(arguments.output)
    if arguments.scales is not None:
        read_scales(arguments.scales)
    from zerotuning.files import write_json_atomically
    from zerotuning.mt_bench.proxy import measure_proxy
    from zerotuning.patching.scaled_model import load_scaled_model

    model, tokenizer = load_scaled_model(
        arguments.model, arguments.scales, arguments.dtype, arguments.device, arguments.device_map
    )
    figures = measure_proxy(model, tokenizer, answers, progress=True)
    print(f"Proxy: {figures['proxy']}")
    print(f"model {arguments.model}, scales {arguments.scales or 'none (γ = 1)'}\n\n{table(figures)}")
    if output is not None:
        source = {"answers_file": arguments.answers, "model": arguments.model, "scales": arguments.scales}
        write_json_atomically(output, {**figures, **source, "version": __version__})
