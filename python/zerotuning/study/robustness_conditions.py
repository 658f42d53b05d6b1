"""The conditions of `zerotuning study robustness`: what each part varies, and how finely, by size of the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zerotuning.models.inspection import context_length
from zerotuning.study.rounded_weights import ROUNDINGS
from zerotuning.study.setting import Setting
from zerotuning.study.wordings import WORDINGS
from zerotuning.tasks.task import Task

#: The parts, and what each varies.
PARTS = {
    "shots": "solved examples before the prompt",
    "context": "tokens of prompt and distractors",
    "quantisation": "weights",
    "decoding": "decoding",
    "wordings": "wording of the prompt",
    "examples": "examples to tune on",
}
#: Arguments of transformers' `generate`.
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k 10": {"do_sample": True, "top_k": 10, "top_p": 1.0, "temperature": 1.0},
    "nucleus 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 1.0},
    "temperature 0.5": {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.5},
    "temperature 1": {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
}
#: Tasks whose texts (the longest field of each example) stand before the prompt as distractors.
DISTRACTORS = ("boolq", "openbookqa", "commonsense_qa", "piqa")


@dataclass(frozen=True)
class Grid:
    """The conditions of each part, and the effort of tuning.

    Attributes:
        shots: Numbers of solved examples before the prompt.
        own_shots: The numbers of `shots` at which scales are also tuned anew.
        context: Lengths of prompt and distractors together, in tokens; 0: the prompt alone.
        roundings: Names in ROUNDINGS.
        decodings: Names in DECODINGS.
        wordings: How many wordings, the task's own among them.
        examples: Numbers of examples to tune on.
        steps: Gradient steps of a search for scales.
        step_examples: Examples of one such step.
    """

    shots: tuple[int, ...]
    own_shots: tuple[int, ...]
    context: tuple[int, ...]
    roundings: tuple[str, ...]
    decodings: tuple[str, ...]
    wordings: int
    examples: tuple[int, ...]
    steps: int
    step_examples: int


GRIDS = {
    "small": Grid(
        shots=(0, 1),
        own_shots=(),
        context=(0, 128),
        roundings=("as loaded", "8-bit"),
        decodings=("greedy", "top-k 10"),
        wordings=2,
        examples=(4,),
        steps=1,
        step_examples=4,
    ),
    "full": Grid(
        shots=(0, 1, 2, 4, 8, 16),
        own_shots=(1,),
        context=(0, 512, 2048, 8000),
        roundings=tuple(ROUNDINGS),
        decodings=tuple(DECODINGS),
        wordings=5,
        examples=(16, 64, 200),
        steps=12,
        step_examples=16,
    ),
}


def conditions(setting: Setting, part: str, task: str) -> Sequence[Any]:
    """The conditions of a part for a task: lengths that exceed the model's context are left out."""
    grid = GRIDS[setting.size]
    if part == "wordings":
        return range(min(grid.wordings, 1 + len(WORDINGS.get(task, ()))))
    if part == "context":
        limit = context_length(setting.loaded()[0])
        return [length for length in grid.context if limit is None or length <= limit]
    by_part: dict[str, Sequence[Any]] = {
        "shots": grid.shots,
        "quantisation": grid.roundings,
        "decoding": grid.decodings,
        "examples": grid.examples,
    }
    return by_part[part]


def distractors(tokenizer: Any, tokens: int, without: str, seed: int) -> str:
    """A text of other tasks' validation examples, in an order drawn by the seed.

    Args:
        tokenizer: A fast tokenizer, which gives the characters of its tokens.
        tokens: Where the text is cut; it is shorter where there are not enough examples.
        without: A task whose examples are left out.
        seed: Of the order.
    """
    generator = np.random.default_rng((seed, 3))
    texts = [
        max((value for value in record.values() if isinstance(value, str)), key=len)
        for name in DISTRACTORS
        if name != without
        for record in Task.load(name).examples("validation")
    ]
    drawn: list[str] = []
    size = 0
    for place in generator.permutation(len(texts)).tolist():
        if size > tokens:
            break
        drawn.append(texts[place])
        size += len(tokenizer(texts[place], add_special_tokens=False)["input_ids"])
    text = "\n\n".join(drawn)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if tokens == 0:
        return ""
    return text[: offsets[tokens - 1][1]] if tokens <= len(offsets) else text
