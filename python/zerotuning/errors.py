"""The exception that bad input raises, and how its messages show a value."""

from __future__ import annotations


class ZeroTuningError(ValueError):
    """Bad input: a wrong argument, file, model or tensor.

    `str(error)` is one line that names the argument or file, what was expected and what was given. The command line
    prints this line and exits with code 2.
    """


def shown(value: object) -> str:
    """A value as an error message shows it: the name of its type, and its `repr` cut to 60 characters."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
