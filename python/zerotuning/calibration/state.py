"""The state of an unfinished calibration in its folder, from which the same call resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zerotuning.calibration.fingerprint import tokens_digest, weights_digest
from zerotuning.calibration.options import CalibrationOptions
from zerotuning.calibration.saved_fields import SavedFields
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_text_atomically
from zerotuning.models.process_group import Processes
from zerotuning.output import RESULT_FILES, STATE_FILE, TRIALS_FILE
from zerotuning.patching.head_scales import HeadScales
from zerotuning.tasks.examples import Record
from zerotuning.tasks.prompts import Shot
from zerotuning.tasks.task import Task
from zerotuning.tasks.tokenization import TokenizedPrompt
from zerotuning.version import __version__


class CalibrationState:
    """Reads and writes the state file; with several processes only the main process uses the folder.

    Args:
        folder: The calibration's output; None: no state is written.
        identity: A saved state is resumed only if its identity equals this one.
        processes: The processes that make the calibration together.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], processes: Processes) -> None:
        self.path = None if folder is None else folder / STATE_FILE
        self.identity = dict(identity)
        self.processes = processes

    def read(self) -> SavedFields | None:
        """Read the saved state of this calibration; None where no state is saved.

        Raises:
            ZeroTuningError: The file is damaged or belongs to another calibration.
        """
        if self.path is None:
            return None
        text = ""
        if self.processes.is_main_process and self.path.exists():
            try:
                text = self.path.read_text("utf-8") or " "  # an empty file is damaged, not missing
            except (OSError, ValueError) as error:
                raise self.damaged(error) from error
        text = self.processes.broadcast_from_main(text)
        if not text:
            return None
        try:
            content = SavedFields(json.loads(text))
            content.fields("calibration")
            saved, state = content.value("calibration"), content.fields("state")
        except (ValueError, RecursionError) as error:
            raise self.damaged(error) from error
        # Through JSON, so that numbers compare as they were written. All processes compare the main process's
        # identity: each rank of a tensor-parallel model counts its own parameters.
        for name, value in json.loads(self.processes.broadcast_from_main(json.dumps(self.identity))).items():
            if saved.get(name) != value:
                raise ZeroTuningError(
                    f"{self.path.parent} holds an unfinished calibration with another {name}: {saved.get(name)!r}, "
                    f"not {value!r}; run that calibration again, choose another folder or overwrite it"
                )
        return state

    def damaged(self, error: Exception) -> ZeroTuningError:
        """Return the error of a state that cannot be read."""
        return ZeroTuningError(f"{self.path} cannot be read: {error}; overwrite to start anew")

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state on disk."""
        if self.path is not None and self.processes.is_main_process:
            write_text_atomically(
                self.path, _indented_json({"calibration": self.identity, "state": dict(state)}) + "\n"
            )

    def clear(self) -> None:
        """Remove the state, and the unfinished files of killed runs."""
        if self.path is None or not self.processes.is_main_process:
            return
        for name in (*RESULT_FILES, STATE_FILE, TRIALS_FILE):
            for unfinished in self.path.parent.glob(f".{name}.*.part"):
                unfinished.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def identity(
    model: nn.Module,
    tasks: Sequence[Task],
    records: Sequence[Sequence[Record]],
    tokens: Sequence[Sequence[TokenizedPrompt]],
    options: CalibrationOptions,
    start: HeadScales | None,
    metric: str,
) -> dict[str, Any]:
    """Return what two calibrations must have in common for one to resume the other, as JSON values.

    Args:
        model: The model.
        tasks: The tasks.
        records: Each task's examples.
        tokens: Each task's examples, tokenized.
        options: The calibration's options.
        start: The scales to begin with, if any.
        metric: Name of the metric of generated text; "" without a metric.
    """
    data = json.dumps([list(part) for part in records], sort_keys=True, default=str)
    return {
        "version": __version__,
        "model_type": getattr(model.config, "model_type", ""),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype),
        "tasks": [
            {
                "name": task.name,
                "prompt": task.prompt,
                "labels": task.labels if isinstance(task.labels, str) else list(task.labels),
                "continuation": task.continuation,
            }
            for task in tasks
        ],
        "chat": [task.chat for task in tasks],
        "scoring": [task.scoring for task in tasks],
        "shots": [_shots_summary(task.shots) for task in tasks],
        **options.to_json(),
        "start": "" if start is None else start.gamma.numpy().tobytes().hex(),
        "metric": metric,
        "data": hashlib.sha256(data.encode()).hexdigest(),
        # Last: a difference above gives the better error message.
        "weights": weights_digest(model),
        "tokens": tokens_digest(tokens),
    }


def _shots_summary(shots: Sequence[Shot]) -> str:
    """The number of shots and a digest of their texts; the texts would fill pages of an error message."""
    if not shots:
        return "none"
    texts = json.dumps([(shot.prompt, shot.answer) for shot in shots])
    return f"{len(shots)} of SHA-256 {hashlib.sha256(texts.encode()).hexdigest()[:16]}"


def _indented_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each field and each list of numbers: json.dumps(indent=2) has a line for each number."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        fields = [f"{inner}{json.dumps(name)}: {_indented_json(part, inner)}" for name, part in value.items()]
        return "{\n" + ",\n".join(fields) + "\n" + indent + "}"
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        return "[\n" + ",\n".join(inner + _indented_json(part, inner) for part in value) + "\n" + indent + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
