"""The tiny model and its tokenizer, as a pair."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def tiny(tiny_model: Any, tiny_tokenizer: Any) -> tuple[Any, Any]:
    return tiny_model, tiny_tokenizer
