"""The message of an error that a call must raise."""

from __future__ import annotations

from typing import Any

import pytest
from zerotuning.errors import ZeroTuningError


def one_line_error(action: Any, *arguments: Any, **named: Any) -> str:
    """Call `action` and return the message of its ZeroTuningError, which must be one line."""
    with pytest.raises(ZeroTuningError) as caught:
        action(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message
