"""The one exception that bad input raises."""

from __future__ import annotations


class ZeroTuningError(ValueError):
    """Bad input: a wrong argument, file, model or tensor.

    `str(error)` is one line that names what was wrong, what was expected and what came; the command line
    prints it and exits with code 2.
    """
