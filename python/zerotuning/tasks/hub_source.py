"""Where a task's data set lies on the hub, and how its columns become the task's fields (the `hub:` of a task file).

    hub:
      name: allenai/ai2_arc                       # owner/name
      config: ARC-Easy                            # if it has several
      splits: {validation: validation, test: test}  # its names for ours, where they differ
      columns: {question: question, choices: choices.text, label: answerKey}
      choice: "[a-e] \\\\) (.*)"                    # of choices: the part to keep, if not all
      answers: {A: 0, B: 1, C: 2, D: 3}           # where labels are not zero-based numbers

A column inside a column has a dot; `choices` may also be a list of columns, one a choice, or one column of text in
which `choice` finds them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from zerotuning.errors import ZeroTuningError


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub, as the file's first lines describe it.

    Errors: ZeroTuningError that names the key.
    """

    name: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    choice: str | None = None
    answers: Mapping[Any, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ZeroTuningError(f"hub: name must be owner/name, got {self.name!r}")
        if self.config is not None and not isinstance(self.config, str):
            raise ZeroTuningError(f"hub: config must be a string, got {self.config!r}")
        if not isinstance(self.splits, dict) or not all(isinstance(name, str) for name in self.splits.values()):
            raise ZeroTuningError(f"hub: splits must map names to names, got {self.splits!r}")
        if not isinstance(self.columns, dict) or not all(_is_column(name) for name in self.columns.values()):
            raise ZeroTuningError(f"hub: columns must map names to names, got {self.columns!r}")
        if self.answers is not None and not (
            isinstance(self.answers, dict) and all(type(index) is int and index >= 0 for index in self.answers.values())
        ):
            raise ZeroTuningError(f"hub: answers must map answers to zero-based indices, got {self.answers!r}")
        if self.choice is not None:
            try:
                groups = re.compile(self.choice).groups
            except (re.error, TypeError) as error:
                raise ZeroTuningError(f"hub: choice must be a regular expression: {error}") from error
            if groups != 1:
                raise ZeroTuningError(f"hub: choice must have one group in brackets, got {self.choice!r}")

    @staticmethod
    def from_yaml(description: Any) -> HubSource:
        """What stands under `hub:` in a task file."""
        if not isinstance(description, dict):
            raise ZeroTuningError(f"hub must be a mapping with name and columns, got {description!r}")
        known = [one.name for one in fields(HubSource)]
        for key in description:
            if key not in known:
                raise ZeroTuningError(f"hub: unknown field {key!r}; known fields are {', '.join(known)}")
        if "name" not in description:
            raise ZeroTuningError("hub: field 'name' is missing")
        return HubSource(**description)


def _is_column(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
