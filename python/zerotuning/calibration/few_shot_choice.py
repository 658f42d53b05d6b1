"""Which few-shot examples a calibration uses: random sets are compared by the held-out loss of a short search.

The untuned model's loss does not predict which set is best: few-shot examples favour some labels, and head scales
remove that bias. Nor does the loss after fitting label biases and a temperature: the best of eight sets by that loss
was no better than the first set. So each candidate set gets a short search over two folds, on the examples that no
candidate set contains. Measured with SmolLM2-135M, three sets for each of three draws of 200 examples: the correlation
of the short search's loss after 30 steps with the test loss of a search of 120 steps, within the sets of the same
examples, was 0.84 on trec, 0.90 on sst2, 0.40 on sst5 and 0.0 on mr, where the sets hardly differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zerotuning.calibration.calibrate import calibrate
from zerotuning.calibration.folds import MIN_EXAMPLES, draw_examples
from zerotuning.calibration.options import CalibrationOptions, options_from, shows_option_keywords
from zerotuning.calibration.state import identity
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_json_atomically
from zerotuning.models.process_group import Processes
from zerotuning.models.tensor_parallel import is_tensor_parallel
from zerotuning.output import TRIALS_FILE
from zerotuning.patching.head_scales import HeadScales
from zerotuning.tasks.examples import Record
from zerotuning.tasks.few_shot import draw_shots, without_prompts_of, without_shots
from zerotuning.tasks.hub import is_hub_name, read_data, without_split
from zerotuning.tasks.task import Task
from zerotuning.tasks.tokenization import tokenize

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zerotuning.calibration.options import CalibrationKeywords

#: With fewer examples, the candidates' losses differ by chance.
MIN_COMPARISON_EXAMPLES = 32
#: Every short search has these options in place of the calibration's: on 200 examples, a tenth of the
#: calibration's work.
TRIAL_OPTIONS: dict[str, Any] = {
    "method": "gradient",
    "objective": "task-loss",
    "prior": "unknown",
    "examples": None,
    "steps": 30,
    "seconds": None,
    "num_searches": 1,
    "folds": 2,
    "combine": "average",
    "average": 0.0,
    "step_examples": None,
    "patience": 0,
}
#: With more candidates than FINALISTS, only those of least loss after FIRST_ROUND_STEPS get the full short search. In
#: the searches above, the losses after 10 and after 30 steps correlated by 0.96 on trec, 0.85 on sst2, 0.80 on mr and
#: 0.48 on sst5.
FINALISTS = 5
FIRST_ROUND_STEPS = 10


@dataclass(frozen=True)
class ShotChoice:
    """The result of `choose_shots`.

    Attributes:
        task: The chosen task, with its few-shot examples.
        losses: For each candidate, the mean loss of held-out examples after its short search, in nats.
        steps: For each candidate, the steps of that search; FIRST_ROUND_STEPS unless the candidate was a finalist.
        warnings: Warnings of the searches, such as a lack of memory.
    """

    task: Task
    losses: list[float]
    steps: list[int]
    warnings: list[str]


# Candidates and the examples that compare them.


def shot_candidates(task: Task, records: Sequence[Record], count: int, seed: int, num_candidates: int) -> list[Task]:
    """Return the task with each of several random sets of few-shot examples.

    Args:
        task: The task.
        records: The records that few-shot examples are drawn from.
        count: The number of few-shot examples in a set, 0 to 16.
        seed: The seed of the first set; the others have the seeds that follow.
        num_candidates: The number of sets.

    Returns:
        `num_candidates` tasks and, with more than one candidate, the task without few-shot examples.
    """
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 1:
        raise ZeroTuningError(f"num_shot_candidates must be an integer of at least 1, got {num_candidates!r}")
    if num_candidates > 1:
        _check_scoring(task)
    seeds = range(seed, seed + num_candidates)
    drawn = [task.with_shots(draw_shots(task, records, count, shot_seed), seed=shot_seed) for shot_seed in seeds]
    return drawn if num_candidates == 1 else [*drawn, task.with_shots(())]


def draw_for_candidates(
    candidates: Sequence[Task], records: Sequence[Record], options: CalibrationOptions
) -> list[Record]:
    """Draw the examples on which the candidates are compared, and check their number for each candidate.

    Raises:
        ZeroTuningError: Too few examples are left beside those that the candidates contain.
    """
    draw_examples(min((_calibration_examples(task, records) for task in candidates), key=len), options)
    drawn = draw_examples(records, options)
    if len(candidates) > 1:
        comparison_examples(candidates, drawn)
    return drawn


def comparison_examples(candidates: Sequence[Task], records: Sequence[Record]) -> list[Record]:
    """Return the records that are a few-shot example of no candidate.

    Raises:
        ZeroTuningError: Fewer than MIN_COMPARISON_EXAMPLES are left.
    """
    remaining = list(records)
    for task in candidates:
        remaining = without_shots(task, remaining)
    if len(remaining) < MIN_COMPARISON_EXAMPLES:
        raise ZeroTuningError(
            f"to compare sets of few-shot examples, task {candidates[0].name!r} needs at least "
            f"{MIN_COMPARISON_EXAMPLES} examples outside every set, got {len(remaining)} of {len(records)}"
        )
    return remaining


def with_shots_outside(
    task: Task,
    records: Sequence[Record],
    count: int,
    seed: int,
    *,
    data: str | None = None,
    shot_data: str | None = None,
) -> Task:
    """Return the task with few-shot examples that are none of the records to be evaluated.

    Args:
        task: The task.
        records: The records to be evaluated.
        count: The number of few-shot examples.
        seed: The seed of their draw.
        data: Where `records` came from. A data set of the hub also gives the few-shot examples, from its validation
            part.
        shot_data: Where few-shot examples are drawn from. Default: `data` on the hub, else the task's own validation
            sample.

    Raises:
        ZeroTuningError: Nothing to draw from, or fewer than `count` records.
    """
    source = shot_data
    if source is None and is_hub_name(data):
        source = without_split(str(data))
    if source is None and not task.has_examples:
        raise ZeroTuningError(f"shots of task {task.name!r} need examples to draw from: name a file with --shot-data")
    pool = task.examples("validation") if source is None else read_data(task, source, "validation")
    return task.with_shots(draw_shots(task, without_prompts_of(task, pool, records), count, seed))


def _calibration_examples(task: Task, records: Sequence[Record]) -> list[Record]:
    """The records that are no few-shot examples of the task."""
    remaining = without_shots(task, records)
    if task.shots and len(remaining) < MIN_EXAMPLES:
        raise ZeroTuningError(
            f"shots {len(task.shots)} leave {len(remaining)} of {len(records)} examples of task {task.name!r}, "
            f"calibration needs at least {MIN_EXAMPLES}: choose fewer shots or --shot-data"
        )
    return remaining


# The comparison.


@shows_option_keywords
def choose_shots(
    model: nn.Module,
    tokenizer: Any,
    candidates: Sequence[Task],
    records: Sequence[Record],
    *,
    start: HeadScales | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    options: CalibrationOptions | None = None,
    **keywords: Unpack[CalibrationKeywords],
) -> ShotChoice:
    """Choose the few-shot examples with which a short search has the least held-out loss.

    With more than FINALISTS candidates, only the best after a third of the search are searched to the end.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        candidates: Tasks that differ in their few-shot examples, such as `shot_candidates` returns.
        records: Examples with labels. Every search uses those that are a few-shot example of no candidate.
        start: As in `calibrate`.
        output: An existing folder. Each loss is saved there, and the same call resumes.
        overwrite: Discard losses that `output` holds.
        progress: Draw a progress bar for each search.
        options: As in `calibrate`; TRIAL_OPTIONS replaces some fields.
        keywords: Fields of CalibrationOptions.

    Returns:
        The chosen task and every candidate's loss.

    Raises:
        ZeroTuningError: Scoring `generate`, which has no loss; too few examples; whatever `calibrate` raises.
    """
    chosen = options_from(options, keywords)
    if not candidates:
        raise ZeroTuningError("candidates must be at least one task, got none")
    if len(candidates) == 1:
        return ShotChoice(candidates[0], [math.nan], [0], [])
    for task in candidates:
        _check_scoring(task)
    examples = comparison_examples(candidates, records)
    saved = _SavedTrials(output, Processes(share_model=is_tensor_parallel(model)), overwrite)
    warnings: list[str] = []
    losses, steps = [math.nan] * len(candidates), [0] * len(candidates)

    def search(index: int, num_steps: int) -> None:
        task = candidates[index]
        trial = replace(chosen, **{**TRIAL_OPTIONS, "steps": num_steps})
        tokens = [tokenize(tokenizer, task, examples)]
        key = saved.key(identity(model, [task], [examples], tokens, trial, start, ""))
        if key not in saved.losses:
            result = calibrate(model, tokenizer, task, records=examples, start=start, progress=progress, options=trial)
            warnings.extend(result.report["warnings"])
            saved.add(key, result.report["tuned"]["loss"])
        losses[index], steps[index] = saved.losses[key], num_steps

    finalists = list(range(len(candidates)))
    if len(finalists) > FINALISTS:
        for index in finalists:
            search(index, FIRST_ROUND_STEPS)
        finalists = sorted(sorted(finalists, key=losses.__getitem__)[:FINALISTS])
    for index in finalists:
        search(index, TRIAL_OPTIONS["steps"])
    return ShotChoice(candidates[min(finalists, key=losses.__getitem__)], losses, steps, warnings)


def _check_scoring(task: Task) -> None:
    if task.scoring == "generate":
        raise ZeroTuningError(
            "few-shot examples are compared by the loss of labels, which scoring generate does not have"
        )


class _SavedTrials:
    """The losses of finished searches in a folder, by a digest of everything that a search depends on.

    The main process alone reads and writes the file. All processes have its losses and choose the same candidate.
    """

    def __init__(self, folder: Path | None, processes: Processes, overwrite: bool) -> None:
        self.path = None if folder is None else folder / TRIALS_FILE
        self.processes = processes
        self.losses: dict[str, float] = {}
        if self.path is not None and not overwrite:
            self.losses = json.loads(
                processes.broadcast_from_main(json.dumps(self._read() if processes.is_main_process else {}))
            )

    def _read(self) -> dict[str, float]:
        assert self.path is not None
        if not self.path.exists():
            return {}
        try:
            return {name: float(loss) for name, loss in json.loads(self.path.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ZeroTuningError(f"{self.path} cannot be read ({error!r}); overwrite to start anew") from error

    def key(self, trial: dict[str, Any]) -> str:
        """Return the main process's digest: each rank of a tensor-parallel model counts its own parameters."""
        text = json.dumps(trial, sort_keys=True)
        return self.processes.broadcast_from_main(hashlib.sha256(text.encode()).hexdigest())

    def add(self, key: str, loss: float) -> None:
        """Save the main process's loss."""
        self.losses[key] = float(self.processes.broadcast_from_main(repr(loss)))
        if self.path is not None and self.processes.is_main_process:
            write_json_atomically(self.path, self.losses)
