"""The exception that bad input raises."""

from __future__ import annotations


class ZeroTuningError(ValueError):
    """Bad input: a wrong argument, file, model or tensor.

    `str(error)` is one line that names the argument or file, what was expected and what was given. The command line prints
    this line and exits with code 2.
    """
