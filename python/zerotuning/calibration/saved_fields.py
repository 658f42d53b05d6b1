"""The fields of a saved state, read with checks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class SavedFields:
    """A JSON object of a saved state. Every error is a ValueError that names the field, such as `search.round`.

    Args:
        content: The object, as json.loads returned it.
        name: The object's own name; "" for the outermost.
    """

    def __init__(self, content: Any, name: str = "") -> None:
        self.name = name
        if not isinstance(content, dict):
            raise ValueError(f"{name or 'the state'} must be a JSON object, got {_short(content)}")
        self._content = content

    def value(self, name: str) -> Any:
        """Return a field of any kind."""
        if name not in self._content:
            raise ValueError(f"{self._path(name)} is missing")
        return self._content[name]

    def flag(self, name: str) -> bool:
        """Return a field that is true or false."""
        value = self.value(name)
        self._require(isinstance(value, bool), name, "true or false", value)
        return bool(value)

    def integer(self, name: str, least: int, most: int | None = None) -> int:
        """Return an integer from `least` to `most`."""
        value = self.value(name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        is_valid = is_integer and least <= value and (most is None or value <= most)
        self._require(is_valid, name, f"an integer {bounds}", value)
        return int(value)

    def number(self, name: str, least: float = -math.inf) -> float:
        """Return a finite number of at least `least`."""
        value = self.value(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        self._require(is_number and math.isfinite(value) and value >= least, name, expected, value)
        return float(value)

    def integer_or_none(self, name: str, least: int) -> int | None:
        """Return an integer of at least `least`, or None for null."""
        return None if self.value(name) is None else self.integer(name, least)

    def number_or_none(self, name: str) -> float | None:
        """Return a finite number, or None for null."""
        return None if self.value(name) is None else self.number(name)

    def text(self, name: str) -> str:
        """Return a string."""
        value = self.value(name)
        self._require(isinstance(value, str), name, "a string", value)
        return str(value)

    def items(self, name: str, count: int | None = None) -> list[Any]:
        """Return a list, of `count` items if `count` is given."""
        value = self.value(name)
        is_valid = isinstance(value, list) and count in (None, len(value))
        self._require(is_valid, name, "a list" if count is None else f"a list of {count}", value)
        return list(value)

    def point(self, name: str, count: int) -> np.ndarray:
        """Return a list of `count` finite numbers as float64 [count]."""
        return self._point(name, self.value(name), count)

    def points(self, name: str, count: int, dimension: int) -> list[np.ndarray]:
        """Return a list of `count` points, each float64 [dimension]."""
        values = self.items(name, count)
        return [self._point(f"{name}[{index}]", value, dimension) for index, value in enumerate(values)]

    def fields(self, name: str) -> SavedFields:
        """Return a nested object."""
        return SavedFields(self.value(name), self._path(name))

    def objects(self, name: str, count: int | None = None) -> list[SavedFields]:
        """Return a list of nested objects, of length `count` if `count` is given."""
        values = self.items(name, count)
        return [SavedFields(value, self._path(f"{name}[{index}]")) for index, value in enumerate(values)]

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return a list of objects that each have a `step`."""
        for entry in self.objects(name):
            entry.integer("step", 0)
        return self.items(name)

    def restore(self, name: str, search: Any) -> None:
        """Restore a search of csrc/search, or a list of searches, from a field."""
        searches = search if isinstance(search, list) else [search]
        saved = self.objects(name, len(searches)) if isinstance(search, list) else [self.fields(name)]
        for each, state in zip(searches, saved, strict=True):
            try:
                each.restore(state._content)
            except ValueError as error:
                raise ValueError(f"{state.name}: {error}") from error

    def _point(self, name: str, value: Any, count: int) -> np.ndarray:
        are_numbers = isinstance(value, list) and all(
            isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item) for item in value
        )
        self._require(are_numbers and len(value) == count, name, f"a list of {count} finite numbers", value)
        return np.array(value, dtype=np.float64)

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _require(self, is_valid: bool, name: str, expected: str, got: Any) -> None:
        if not is_valid:
            raise ValueError(f"{self._path(name)} must be {expected}, got {_short(got)}")


def _short(value: Any) -> str:
    text = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
