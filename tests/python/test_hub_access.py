"""Names of repositories of the hub, and its reachability without a network."""

from __future__ import annotations

from typing import Any

import huggingface_hub
import pytest
from zerotuning.hub_access import connection_error, fetch_error, first_line, is_repository_name
from zerotuning.hub_access import repository_connection_error as repository_error


class Session:
    """Stands in for huggingface_hub's HTTP session and counts requests."""

    requests = 0
    reachable = True

    def head(self, url: str, timeout: float) -> None:
        Session.requests += 1
        if not Session.reachable:
            raise OSError("Name or service not known")


@pytest.fixture(autouse=True)
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(Session, "requests", 0)
    monkeypatch.setattr(Session, "reachable", True)


def test_names_and_paths_are_told_apart() -> None:
    assert all(map(is_repository_name, ("gpt2", "owner/name")))
    assert not any(map(is_repository_name, ("./x", "~/x", "/x", "a/b/c", "a\\b")))


def test_an_unreachable_hub_gives_the_reason() -> None:
    assert connection_error() is None
    Session.reachable = False
    assert connection_error() == f"cannot connect to {huggingface_hub.constants.ENDPOINT} (Name or service not known)"


def test_no_request_is_made_offline_or_for_a_cached_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Session.reachable = False
    assert "cannot connect" in (repository_error("owner/name", "config.json") or "")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    assert repository_error("owner/name", "config.json") is None
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert repository_error("owner/name", "config.json") is None
    assert Session.requests == 1


def test_hub_errors_are_one_line_and_name_an_alternative() -> None:
    assert first_line(ValueError("\n  no such name.\nmore")) == "no such name"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 300)) == "x" * 199 + "…"
    message = str(fetch_error("cannot load model m", "no route.", "name a local folder"))
    assert message == "cannot load model m: no route; without a network, name a local folder"
